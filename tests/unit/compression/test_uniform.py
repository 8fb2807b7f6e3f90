"""Shapes that plain transformers loads: one width for all, said by the config alone."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_mtcompress.compression.pruning import Whole, prune
from hf_mtcompress.compression.uniform import select_uniform
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.surgery import expresses_width, is_vanilla
from tests.tiny import FAMILIES, HEADS, tiny_encoder
from tests.unit.compression.test_pruning import answers, model_and_batches


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stays_plain(family: str) -> None:
    """Half of the neurons of every layer go, all heads stay, and the config says it."""
    model, batches = model_and_batches(family)
    layers = 0 if family == "modernbert" else 1
    report = prune(model, batches, feed_forward=0.5, layers=layers, shape="vanilla", multiple_of=8, progress=False)
    assert find_anatomy(model.encoder).sizes == [(HEADS, 32)] * (3 - layers)
    assert is_vanilla(model.encoder)
    assert report.masked_difference is not None
    assert report.masked_difference < 1e-5
    assert len(report.removed_layers) == layers


def test_a_plain_folder_needs_nothing_of_ours(tmp_path: Path) -> None:
    """The config of an exported task holds a width and no mark, and gives the same answers."""
    model, batches = model_and_batches("bert")
    prune(model, batches, compute=0.3, importance="fisher", repair=True, shape="vanilla", multiple_of=8, progress=False)
    model.eval()
    model.export_task("mood", tmp_path, None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["intermediate_size"] == find_anatomy(model.encoder).layers[0].feed_forward.width
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = {key: value for key, value in batches[0].items() if "labels" not in key}
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, answers(model, batches[0]))


def test_the_most_important_stay() -> None:
    """In every layer its own; of neurons that are alike the first."""
    scores = [torch.tensor([1.0, 5.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 2.0, 9.0])]
    assert select_uniform(scores, 2) == {0: [1, 3], 1: [0, 3]}


@pytest.mark.parametrize("compute", [0.2, 0.4])
def test_compute_is_within_the_budget(compute: float) -> None:
    """And one step more would not be."""
    model, batches = model_and_batches("bert")
    report = prune(
        model, batches, compute=compute, length=9, shape="vanilla", importance="fisher", multiple_of=4, progress=False
    )
    assert report.multiply_adds_before is not None
    assert report.multiply_adds_after is not None
    assert report.multiply_adds_after <= (1 - compute) * report.multiply_adds_before
    ((_, width),) = set(find_anatomy(model.encoder).sizes)
    step = 3 * 4 * 9 * 32 * 2  # layers, neurons, tokens, width of the hidden state, up and down
    assert report.multiply_adds_after + step > (1 - compute) * report.multiply_adds_before
    assert width < 64


def test_rounds_are_of_the_whole() -> None:
    """A second round to half of what there was at first."""
    model, batches = model_and_batches("bert")
    prune(model, batches, feed_forward=0.25, shape="vanilla", multiple_of=4, progress=False)
    whole = Whole(layers=[(4, 64)] * 3, multiply_adds=None)
    prune(model, batches, feed_forward=0.5, shape="vanilla", multiple_of=4, whole=whole, progress=False)
    assert find_anatomy(model.encoder).sizes == [(4, 32)] * 3


def test_widths_that_a_config_can_say() -> None:
    """DINOv2's config has a ratio of whole numbers; BERT's any width."""
    assert expresses_width(tiny_encoder("bert"), 40)
    dinov2 = tiny_encoder("dinov2")
    assert expresses_width(dinov2, 32)
    assert not expresses_width(dinov2, 40)
    model, batches = model_and_batches("dinov2")
    prune(model, batches, feed_forward=0.3, shape="vanilla", multiple_of=8, progress=False)
    assert find_anatomy(model.encoder).sizes == [(HEADS, 32)] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0.5}, "heads: expected 0 with shape 'vanilla', .* found 0.5"),
        ({"feed_forward": 1.0}, "shape: expected an amount that leaves 8 or more of 64 neurons"),
        ({"compute": 0.9}, "found more to remove; remove layers too, or less"),
    ],
)
def test_amounts_that_no_plain_shape_has(arguments: dict[str, Any], message: str) -> None:
    """Before anything is cut."""
    model, batches = model_and_batches("bert")
    with pytest.raises(ValueError, match=message):
        prune(model, batches, shape="vanilla", multiple_of=8, progress=False, **arguments)
    assert find_anatomy(model.encoder).sizes == [(4, 64)] * 3


def test_uneven_models_are_refused() -> None:
    """What was cut freely cannot become plain by cutting more of it alike."""
    model, batches = model_and_batches("bert")
    prune(model, batches, heads=0.5, feed_forward=0.3, multiple_of=8, progress=False)
    before = find_anatomy(model.encoder).sizes
    for arguments in ({"feed_forward": 0.5}, {"layers": 1}):
        with pytest.raises(ValueError, match=r"shape: expected layers that are alike .* say shape 'free'"):
            prune(model, batches, shape="vanilla", multiple_of=8, progress=False, **arguments)
    assert find_anatomy(model.encoder).sizes == before


def test_layers_that_a_config_cannot_say() -> None:
    """ModernBERT attends globally in every third layer: which layers are left decides, and nothing is cut if not."""
    left = []
    for seed in range(4):
        model, batches = model_and_batches("modernbert")
        with contextlib.suppress(ValueError):
            prune(model, batches, layers=2, importance="random", seed=seed, shape="vanilla", progress=False)
        assert is_vanilla(model.encoder)
        left.append(len(find_anatomy(model.encoder).layers))
    assert set(left) == {1, 3}
    refused = left.index(3)
    model, batches = model_and_batches("modernbert")
    with pytest.raises(ValueError, match="layers that ModernBertConfig can express"):
        prune(model, batches, layers=2, importance="random", seed=refused, shape="vanilla", progress=False)
