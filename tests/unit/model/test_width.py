"""Narrower hidden states: the stock class builds them, and every weight keeps its place."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import cut, is_vanilla
from hf_mtcompress.model.width import cut_width, narrower_anatomy
from hf_mtcompress.tasks import ImageClassification, SequenceClassification, TokenClassification
from tests import laws
from tests.tiny import (
    FAMILIES,
    FEELING_LABELS,
    HEADS,
    HIDDEN,
    LAYERS,
    randomize,
    tiny_config,
    tiny_encoder,
    tiny_inputs,
)

SIZE = HIDDEN // HEADS
NARROW = [family for family in FAMILIES if family != "mpnet"]
KEPT = [3, 30, 7, 1, 18, 25, 11, 9, 0, 14, 21, 28, 5, 16, 31, 12, 2, 27, 19, 8, 23, 6, 29, 13]
"""Three quarters of the places, in no order."""


def parts(encoder: PreTrainedModel) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Different heads and neurons in every layer, as many as the narrower class has."""
    first = narrower_anatomy(encoder, len(KEPT)).layers[0]
    neurons = find_anatomy(encoder).layers[0].feed_forward.width
    heads = {layer: [(layer + place) % HEADS for place in range(first.attention.heads)] for layer in range(LAYERS)}
    width = first.feed_forward.width
    return heads, {layer: list(range(neurons - width if layer else 0, neurons if layer else width)) for layer in heads}


def outputs(model: PreTrainedModel, family: str) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(family)).last_hidden_state


@pytest.mark.parametrize("family", NARROW)
def test_plain_transformers_builds_and_loads_it(family: str, tmp_path: Path) -> None:
    encoder = tiny_encoder(family)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    narrow = cut_width(encoder, KEPT, *parts(encoder))
    assert is_vanilla(narrow)
    assert "quantization_config" not in narrow.config.to_dict()
    assert (narrow.config.hidden_size, narrow.config.num_attention_heads) == (len(KEPT), HEADS - 1)
    assert find_anatomy(narrow).layers[0].attention.head_size == SIZE
    narrow.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(narrow).from_pretrained(tmp_path), family), outputs(narrow, family))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items()), "the source changed"


@pytest.mark.parametrize("family", NARROW)
def test_every_weight_follows_the_same_places(family: str) -> None:
    """One weight that is cut at other places than the rest would leave an encoder that runs, and knows nothing."""
    encoder = tiny_encoder(family)
    one = outputs(cut_width(encoder, KEPT, *parts(encoder)), family)
    other = outputs(cut_width(encoder, sorted(KEPT), *parts(encoder)), family)
    torch.testing.assert_close(one[..., torch.tensor(KEPT).argsort()], other, rtol=0, atol=1e-5)


def test_it_is_the_model_whose_other_numbers_are_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only thing that a cut changes beyond masking is what norms count."""
    encoder = tiny_encoder("bert")
    heads, _ = parts(encoder)
    narrow = cut_width(encoder, KEPT, heads)
    cut(encoder, heads)
    places = torch.tensor(KEPT)

    def norm(self: nn.LayerNorm, states: Tensor) -> Tensor:
        few = nn.functional.layer_norm(
            states[..., places], (len(KEPT),), self.weight[places], self.bias[places], self.eps
        )
        return torch.zeros_like(states).index_copy(-1, places, few)

    expected = outputs(narrow, "bert")
    monkeypatch.setattr(nn.LayerNorm, "forward", norm)
    masked = outputs(encoder, "bert")
    monkeypatch.undo()
    torch.testing.assert_close(expected, masked[..., places], rtol=0, atol=1e-5)


def test_a_multi_task_model_keeps_its_tasks(tmp_path: Path) -> None:
    tasks = [
        SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label"),
        TokenClassification("words", labels=["a", "b"], tokens="tokens", label="tags"),
    ]
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks, max_length=16).eval()
    randomize(model)
    narrow = cut_width(model, KEPT, *parts(model.encoder))
    assert isinstance(narrow, MultiTaskModel)
    assert narrow.tasks == model.tasks
    narrow.save_pretrained(tmp_path)
    with torch.no_grad():
        found, loaded = (one(**tiny_inputs("bert")) for one in (narrow, AutoModel.from_pretrained(tmp_path)))
    for name in ("mood", "words"):
        assert torch.equal(found[f"logits_{name}"], loaded[f"logits_{name}"])
        stock = narrow.export_task(name, tmp_path / name, None)
        assert "quantization_config" not in (stock / "config.json").read_text()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mood")
    with torch.no_grad():
        assert torch.equal(plain(**tiny_inputs("bert")).logits, found["logits_mood"])


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "vit", "dinov2"])
def test_a_stock_model_keeps_its_head(family: str) -> None:
    images = family in ("vit", "dinov2")
    auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    stock = auto.from_config(tiny_config(family, num_labels=3)).eval()
    randomize(stock)
    narrow = cut_width(stock, KEPT, *parts(encoder_of(stock)))
    assert type(narrow) is type(stock)
    assert not narrow.training
    with torch.no_grad():
        assert narrow(**tiny_inputs(family)).logits.shape == (3, 3)
    before, after = (model.state_dict()["classifier.weight"] for model in (stock, narrow))
    # DINOv2's head reads two hidden states side by side.
    assert torch.equal(after, before.unflatten(1, (-1, HIDDEN))[..., KEPT].flatten(1))


@pytest.mark.parametrize("multi_task", [False, True])
def test_a_ratio_that_says_the_feed_forward_width(multi_task: bool) -> None:
    """Heads that go may let the config say another ratio, by which far more neurons would go than were named."""
    encoder = tiny_encoder("dinov2", mlp_ratio=4)
    model: PreTrainedModel = encoder
    if multi_task:
        task = ImageClassification("mood", labels=FEELING_LABELS, image="image", label="label")
        model = MultiTaskModel.from_encoder(encoder, [task])
    sizes = {layer: list(range(64)) for layer in range(LAYERS)}
    narrow = cut_width(model, range(16), {layer: [1, 3] for layer in range(LAYERS)}, sizes)
    parts = narrow.encoder if isinstance(narrow, MultiTaskModel) else narrow
    assert parts.config.mlp_ratio == 4
    assert find_anatomy(parts).sizes == [(2, 64)] * LAYERS
    first = find_anatomy(encoder).layers[0].feed_forward.output.weight[:16, :64]
    assert torch.equal(find_anatomy(parts).layers[0].feed_forward.output.weight, first)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_half_precision_reloads_bit_equal(family: str, tmp_path: Path) -> None:
    """Frequencies of positions stay in float32 in a model of any precision; a cast of all would change them."""
    encoder = tiny_encoder(family).to(torch.bfloat16)
    encoder.save_pretrained(tmp_path / "whole")
    encoder = AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    narrow = cut_width(encoder, KEPT, *parts(encoder))
    narrow.save_pretrained(tmp_path / "narrow")
    loaded = AutoModel.from_pretrained(tmp_path / "narrow", dtype=torch.bfloat16)
    assert torch.equal(outputs(loaded, family), outputs(narrow, family))
    kept = {name: buffer.dtype for name, buffer in encoder.named_buffers()}
    assert {name: buffer.dtype for name, buffer in narrow.named_buffers()} == kept


def test_what_a_model_is_beside_its_weights() -> None:
    encoder = tiny_encoder("bert", attn_implementation="eager")
    task = SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label")
    model = MultiTaskModel.from_encoder(encoder, [task])
    model.freeze_encoder()
    state = torch.random.get_rng_state()
    narrow = cut_width(model, KEPT, *parts(encoder))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(narrow, MultiTaskModel)
    assert narrow.encoder.config._attn_implementation == "eager"
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in narrow.named_parameters()} == frozen
    assert set(frozen.values()) == {True, False}


def test_a_pooler_that_nobody_reads_any_more(tmp_path: Path) -> None:
    """Whether it is there depends on how the model came about, and no width can change that."""
    tasks = [
        SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label"),
        TokenClassification("words", labels=["a", "b"], tokens="tokens", label="tags"),
    ]
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks).eval()
    model.remove_task("mood")
    encoder = tiny_encoder("bert")
    encoder.pooler = None
    bare = MultiTaskModel.from_encoder(encoder, [replace(tasks[0], head="linear")]).eval()
    for number, source in enumerate((model, bare)):
        narrow = cut_width(source, KEPT, *parts(source.encoder))
        narrow.save_pretrained(tmp_path / str(number))
        with torch.no_grad():
            found, loaded = (
                one(**tiny_inputs("bert")) for one in (narrow, AutoModel.from_pretrained(tmp_path / str(number)))
            )
        assert all(torch.equal(found[key], loaded[key]) for key in found if key.startswith("logits"))


def test_heads_that_went_before_do_not_come_back() -> None:
    """ViT can say fewer heads than its width would have."""
    encoder = tiny_encoder("vit")
    cut(encoder, {layer: [0, 2] for layer in range(LAYERS)})
    narrow = cut_width(encoder, KEPT, {})
    assert find_anatomy(narrow).sizes == [(2, find_anatomy(encoder).layers[0].feed_forward.width)] * LAYERS
    assert outputs(narrow, "vit").shape[-1] == len(KEPT)


# ---- bad input ----


def test_what_layers_share_by_head() -> None:
    with pytest.raises(UnsupportedEncoderError, match="found a bias for each head that all layers share"):
        cut_width(tiny_encoder("mpnet"), KEPT, {})


def test_a_part_that_the_narrower_class_lacks() -> None:
    """ELECTRA projects its embeddings only where they are of another width."""
    with pytest.raises(
        UnsupportedEncoderError, match=r"expected the same weights at a width of 16.*embeddings_project"
    ):
        cut_width(tiny_encoder("electra"), range(16), {layer: [0, 1] for layer in range(LAYERS)})


def test_an_uneven_encoder() -> None:
    encoder = tiny_encoder("bert")
    cut(encoder, laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    with pytest.raises(UnsupportedEncoderError, match="found it cut unevenly; start from the model before"):
        cut_width(encoder, KEPT, {})


@pytest.mark.parametrize(
    ("kept", "heads", "message"),
    [
        (range(12), {}, "in multiples of 8, the size of a head, found 12"),
        (range(32), {}, "a width from 8 to below 32"),
        ([0] * 16, {}, "expected different places among 0 to 31"),
        (range(20, 36), {}, "expected different places among 0 to 31"),
        (range(16), {0: [0, 1], 1: [1, 2], 2: [0]}, "expected 2 heads and 64 neurons to be left in layer 2"),
    ],
)
def test_places_that_are_none(kept: Any, heads: Mapping[int, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_width(tiny_encoder("bert"), list(kept), heads)
