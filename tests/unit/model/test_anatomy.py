import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.surgery import cut
from tests.tiny import FAMILIES, FEED_FORWARD, HEADS, HIDDEN, LAYERS, TEXT_FAMILIES, tiny_encoder, tiny_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_every_family(family: str) -> None:
    """A family whose parts are found with other sizes would be cut in the wrong places."""
    anatomy = find_anatomy(tiny_encoder(family))
    assert len(anatomy.layers) == LAYERS
    assert anatomy.hidden_size == HIDDEN
    assert (anatomy.word_embedding is not None) == (family in TEXT_FAMILIES)
    for layer in anatomy.layers:
        attention, part = layer.attention, layer.feed_forward
        assert (attention.heads, attention.head_size, part.width) == (HEADS, HIDDEN // HEADS, FEED_FORWARD)
        assert len(attention.projections) == {"modernbert": 1, "deberta-v2": 5}.get(family, 3)
        assert len(part.inputs) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_order_of_computation(family: str) -> None:
    """Projections are told from outputs by shape and order alone when all are square: the data must flow that way."""
    encoder = tiny_encoder(family)
    seen: list[torch.nn.Module] = []
    layer = find_anatomy(encoder).layers[1]
    expected = [
        *layer.attention.projections.values(),
        layer.attention.output,
        *layer.feed_forward.inputs.values(),
        layer.feed_forward.output,
    ]
    hooks = [
        module.register_forward_hook(lambda module, args, output: seen.append(module))
        for module in layer.module.modules()
    ]
    with torch.no_grad():
        encoder(**tiny_inputs(family))
    for hook in hooks:
        hook.remove()
    seen = [module for module in seen if module in expected]
    outputs = [seen.index(layer.attention.output), seen.index(layer.feed_forward.output)]
    assert outputs == [len(layer.attention.projections), len(expected) - 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("heads", "width"), [(1, HIDDEN), (HEADS, HIDDEN), (2, 2 * HIDDEN), (1, 1)])
def test_ambiguous_shapes_after_a_cut(family: str, heads: int, width: int) -> None:
    """With a width equal to the hidden size every linear layer of a layer looks alike."""
    encoder = tiny_encoder(family)
    before = [sorted(layer.attention.projections) for layer in find_anatomy(encoder).layers]
    cut(encoder, {1: range(heads)}, {1: range(width)})
    anatomy = find_anatomy(encoder)
    assert [sorted(layer.attention.projections) for layer in anatomy.layers] == before
    assert (anatomy.layers[1].attention.heads, anatomy.layers[1].feed_forward.width) == (heads, width)
    assert (anatomy.layers[0].attention.heads, anatomy.layers[0].feed_forward.width) == (HEADS, FEED_FORWARD)


def test_gated_feed_forward_of_two_layers() -> None:
    """DINOv2's larger models have gate and up apart; cutting one of them only would scramble the product."""
    encoder = tiny_encoder("dinov2", use_swiglu_ffn=True, mlp_ratio=3)
    part = find_anatomy(encoder).layers[0].feed_forward
    assert (len(part.inputs), part.width) == (2, 64)


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        # One layer used many times: cutting it once would cut them all.
        (
            "albert",
            {"embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64},
            "layers",
        ),
        # Stages of different widths.
        (
            "swin",
            {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "window_size": 4},
            "attention",
        ),
        # Encoder and decoder.
        (
            "bart",
            {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 99},
            "one module list",
        ),
        # No attention at all.
        ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, "hidden_size"),
        # Bias tables inside of each attention.
        (
            "beit",
            {
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "intermediate_size": 64,
                "image_size": 32,
                "patch_size": 8,
                "use_relative_position_bias": True,
            },
            "no weights besides",
        ),
    ],
)
def test_other_encoders_are_refused(model_type: str, settings: dict, expected: str) -> None:
    """Guessing at an unknown family would give a model that runs and is wrong."""
    with torch.device("meta"):
        encoder = AutoModel.from_config(AutoConfig.for_model(model_type, **settings))
    assert isinstance(encoder, PreTrainedModel)
    with pytest.raises(UnsupportedEncoderError, match=expected) as caught:
        find_anatomy(encoder)
    assert "ModernBERT" in str(caught.value)
