from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel

from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.surgery import apply_structure, cut, describe_structure, is_vanilla, keep_layers
from tests import laws
from tests.tiny import FAMILIES, HEADS, LAYERS, tiny_config, tiny_encoder, tiny_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_nothing_is_the_identity(family: str) -> None:
    laws.assert_cutting_nothing_is_the_identity(family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("empty", [False, True])
def test_cutting_equals_masking(family: str, empty: bool) -> None:
    laws.assert_cutting_equals_masking(
        family, laws.EMPTY_HEADS if empty else laws.UNEVEN_HEADS, laws.EMPTY_NEURONS if empty else laws.UNEVEN_NEURONS
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_structure_round_trip(family: str) -> None:
    laws.assert_structure_round_trip(family, laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    laws.assert_structure_round_trip(family, laws.EMPTY_HEADS, laws.EMPTY_NEURONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_model_trains(family: str) -> None:
    laws.assert_cut_model_trains(family, laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    laws.assert_cut_model_trains(family, laws.EMPTY_HEADS, laws.EMPTY_NEURONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_prune_save_load_prune_again(family: str, tmp_path: Path) -> None:
    laws.assert_prune_save_load_prune_again(family, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_gated_and_eager_forms(family: str) -> None:
    """Eager attention reads other attributes than sdpa; both must follow the weights."""
    encoder = tiny_encoder(family)
    cut(encoder, laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    before = laws.hidden(encoder, family)
    encoder.set_attn_implementation("eager")
    torch.testing.assert_close(laws.hidden(encoder, family), before, rtol=0, atol=5e-6)


def test_swiglu_of_dinov2() -> None:
    """Gate and up are two layers there: both must lose the same rows."""
    encoder = tiny_encoder("dinov2", use_swiglu_ffn=True, mlp_ratio=3)
    kept = [1, 5, 40]
    part = find_anatomy(encoder).layers[0].feed_forward
    mask = torch.zeros(part.width)
    mask[kept] = 1
    hook = part.output.register_forward_pre_hook(lambda _, args: (args[0] * mask,))
    masked = laws.hidden(encoder, "dinov2")
    hook.remove()
    cut(encoder, feed_forward={0: kept})
    torch.testing.assert_close(laws.hidden(encoder, "dinov2"), masked, rtol=0, atol=5e-6)


# ---- what plain transformers can load ----


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_width_is_vanilla(family: str, tmp_path: Path) -> None:
    """A student's plain folder must need no package; with a stale width in the config it would not load."""
    encoder = tiny_encoder(family)
    # DINOv2 writes its width as a whole multiple of the hidden size.
    cut(encoder, feed_forward={layer: range(3, 35) for layer in range(LAYERS)})
    assert is_vanilla(encoder)
    assert "quantization_config" not in encoder.config.to_dict()
    encoder.save_pretrained(tmp_path)
    torch.testing.assert_close(
        laws.hidden(AutoModel.from_pretrained(tmp_path), family), laws.hidden(encoder, family), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_heads(family: str) -> None:
    """Only ViT and DINOv2 can say fewer heads of the same size; elsewhere the config would mean smaller heads."""
    encoder = tiny_encoder(family)
    cut(encoder, heads={layer: [0, 3] for layer in range(LAYERS)})
    assert is_vanilla(encoder) == (family in ("vit", "dinov2"))
    assert encoder.config.num_attention_heads == (2 if family in ("vit", "dinov2") else HEADS)
    # Uneven from there.
    cut(encoder, heads={1: [1]})
    assert not is_vanilla(encoder)
    assert [layer["heads"] for layer in describe_structure(encoder)["layers"]] == [2, 1, 2]


def test_a_width_that_dinov2_cannot_express() -> None:
    """`mlp_ratio` is a whole number: rounding it would build another width."""
    encoder = tiny_encoder("dinov2")
    cut(encoder, feed_forward={layer: range(48) for layer in range(LAYERS)})
    assert not is_vanilla(encoder)
    assert encoder.config.to_dict()["mlp_ratio"] == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [[0, 2], [1, 2], [2]])
def test_keep_layers(family: str, kept: list[int], tmp_path: Path) -> None:
    """Config lists with a value for each layer, and layer numbers, must follow, or reload builds other layers."""
    encoder = tiny_encoder(family)
    layers = [find_anatomy(encoder).layers[index].module for index in kept]
    kinds = [module.__dict__.get("attention_type") for module in layers]
    keep_layers(encoder, kept)
    assert [layer.module for layer in find_anatomy(encoder).layers] == layers
    assert encoder.config.num_hidden_layers == len(kept)
    if family == "modernbert":
        assert encoder.config.layer_types == kinds
    # ModernBERT's first layer lacks a norm that the others have: only with it is the rest a stock encoder.
    assert is_vanilla(encoder) == (family != "modernbert" or kept[0] == 0)
    encoder.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert len(find_anatomy(loaded).layers) == len(kept)
    torch.testing.assert_close(laws.hidden(loaded, family), laws.hidden(encoder, family), rtol=0, atol=1e-5)


def test_mpnet_keeps_each_heads_own_bias() -> None:
    """MPNet computes one bias per head for all layers: by count alone a layer would get the first heads' bias."""
    encoder = tiny_encoder("mpnet")
    cut(encoder, heads={0: [1, 2, 3]})
    cut(encoder, heads={0: [0, 2]})
    assert describe_structure(encoder)["layers"][0] == {"heads": 2, "feed_forward": 64, "bias_heads": [1, 3]}


def test_tied_weights_stay_tied() -> None:
    """A masked-language head shares the word embedding; a cut must not give it a copy."""
    model = AutoModelForMaskedLM.from_config(tiny_config("bert"))
    assert isinstance(model, PreTrainedModel)
    cut(encoder_of(model), laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    outputs = model.get_output_embeddings()
    assert outputs is not None
    assert outputs.weight is model.get_input_embeddings().weight


def test_parameters_stay_the_same_objects() -> None:
    """An optimizer made before the cut would go on training weights that are no longer in the model."""
    encoder = tiny_encoder("bert")
    before = dict(encoder.named_parameters())
    cut(encoder, laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    assert all(parameter is before[name] for name, parameter in encoder.named_parameters())


def test_apply_on_the_meta_device() -> None:
    """Loading reshapes before weights exist."""
    structure = {
        "layers": [{"heads": 2, "feed_forward": 8}, {"heads": 0, "feed_forward": 0}, {"heads": 4, "feed_forward": 64}]
    }
    with torch.device("meta"):
        encoder = AutoModel.from_config(tiny_config("deberta-v2"))
    apply_structure(encoder, structure)
    assert describe_structure(encoder)["layers"] == structure["layers"]
    assert all(parameter.is_meta for parameter in encoder.parameters())


def test_empty_structure_changes_nothing() -> None:
    encoder = tiny_encoder("bert")
    before = laws.hidden(encoder, "bert")
    apply_structure(encoder, {})
    apply_structure(encoder, None)
    assert torch.equal(laws.hidden(encoder, "bert"), before)


# ---- bad input ----

_WHOLE: dict[str, Any] = {"heads": 4, "feed_forward": 64}


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"layers": [_WHOLE]}, "structure of 3 layers"),
        ({"layers": [_WHOLE, _WHOLE, {"heads": 5, "feed_forward": 64}]}, "at most 4 heads and 64 neurons in layer 2"),
        ({"layers": [_WHOLE, {"heads": 4, "feed_forward": 65}, _WHOLE]}, "layer 1"),
        ({"layers": [_WHOLE, _WHOLE, {**_WHOLE, "rank": 3}]}, "rank"),
        ({"layers": [_WHOLE] * 3, "hidden": 16}, "hidden"),
    ],
)
def test_structures_that_do_not_fit(structure: dict, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        apply_structure(tiny_encoder("bert"), structure)


@pytest.mark.parametrize(
    ("heads", "neurons", "message"),
    [
        ({3: [0]}, None, "layers 0 to 2, found layer 3"),
        ({0: [4]}, None, "heads of layer 0 among 0 to 3"),
        ({0: [1, 1]}, None, "different heads"),
        (None, {1: [64]}, "neurons of layer 1"),
        ({0: [0]}, {1: [-1]}, "neurons of layer 1"),
    ],
)
def test_indices_that_are_not_there(heads: dict | None, neurons: dict | None, message: str) -> None:
    """Refused before anything is cut: a model cut by half would be saved as a good one."""
    encoder = tiny_encoder("bert")
    with pytest.raises(ValueError, match=message):
        cut(encoder, heads, neurons)
    assert is_vanilla(encoder)


@pytest.mark.parametrize("indices", [[], [3], [0, 0], [-1]])
def test_layers_that_are_not_there(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="layers among 0 to 2"):
        keep_layers(tiny_encoder("bert"), indices)


def test_inputs_run_on_every_family() -> None:
    """The laws compare nothing if padding is absent."""
    assert tiny_inputs("bert")["attention_mask"].sum() < tiny_inputs("bert")["attention_mask"].numel()
