import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_mtcompress.compression.latency import (
    BlockTimes,
    LatencyTable,
    block_costs,
    measure_latency,
    save_shape,
    shapes_to_measure,
    split_times,
)
from hf_mtcompress.compression.pruning import TimeBudget, prune
from hf_mtcompress.data.readers import load_reader, reader_of
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import cut
from hf_mtcompress.tasks import SequenceClassification
from tests.tiny import FEELING_LABELS, tiny_encoder, tiny_inputs, tiny_text_rows, tiny_tokenizer

HEADS = {0: 0.0, 1: 0.5, 2: 0.7, 4: 1.9}
WIDTHS = {0: 0.0, 4: 0.2, 32: 1.0, 64: 3.0}
TRUTH = BlockTimes(rest=2.0, layer=0.25, heads=HEADS, feed_forward=WIDTHS, largest_error=0.0, reference=20.0)


def tiny_model() -> MultiTaskModel:
    tasks = [SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label")]
    return MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks)


def table(**changes: Any) -> LatencyTable:
    times = dataclasses.replace(TRUTH, **changes)
    return LatencyTable(runtime="onnx_int8", tokens=16, threads=1, batches={1: times, 8: TRUTH}, environment={})


def test_blocks_add_up_and_sizes_between_are_interpolated() -> None:
    assert TRUTH.of([]) == 2.0
    assert TRUTH.of([(4, 64), (0, 0)]) == pytest.approx(2.0 + 2 * 0.25 + 1.9 + 3.0)
    assert TRUTH.of([(3, 48)]) == pytest.approx(2.0 + 0.25 + (0.7 + 1.9) / 2 + (1.0 + 3.0) / 2)


def test_times_of_whole_models_give_those_of_their_blocks() -> None:
    """Solved for too few shapes, a layer's own time could not be told from what is outside of the layers."""
    grid = [(4, heads, width) for heads in HEADS for width in WIDTHS] + [(1, 4, 64), (2, 4, 64), (2, 2, 32)]
    measured = {shape: TRUTH.of([shape[1:]] * shape[0]) for shape in grid}
    found = split_times(measured, reference=20.0)
    assert found.largest_error < 1e-6
    assert found.rest == pytest.approx(TRUTH.rest)
    assert found.layer == pytest.approx(TRUTH.layer)
    assert found.heads == pytest.approx(HEADS)
    assert found.feed_forward == pytest.approx(WIDTHS)


@pytest.mark.parametrize(("layers", "heads", "width"), [(6, 12, 1536), (12, 6, 1536), (4, 4, 64), (1, 1, 8)])
def test_measured_shapes_determine_all_blocks(layers: int, heads: int, width: int) -> None:
    shapes = shapes_to_measure(layers, heads, width)
    assert shapes[0] == (layers, heads, width)
    assert len(shapes) == len(set(shapes)) <= 22
    truth = BlockTimes(
        rest=1.5,
        layer=0.5,
        heads={count: 0.1 * count for _, count, _ in shapes},
        feed_forward={count: 0.01 * count for *_, count in shapes},
        largest_error=0.0,
        reference=1.0,
    )
    truth = dataclasses.replace(
        truth, heads=dict(sorted(truth.heads.items())), feed_forward=dict(sorted(truth.feed_forward.items()))
    )
    found = split_times({shape: truth.of([shape[1:]] * shape[0]) for shape in shapes}, reference=1.0)
    assert found.largest_error < 1e-6
    for shape in [(heads, width), (max(heads // 3, 1), width // 3), (0, width), (heads, 0)]:
        some = [shape] * max(layers // 2, 1)
        assert found.of(some) == pytest.approx(truth.of(some), rel=1e-5)


def test_a_larger_block_is_never_faster() -> None:
    """Noise would make the knapsack take the larger block for its lower price, or refuse the smaller."""
    measured = {(4, heads, 32): 10.0 - 0.3 * heads for heads in (0, 1, 2, 4)} | {(1, 4, 32): 4.0, (4, 2, 0): 5.0}
    found = split_times(measured, reference=1.0)
    for column in (found.heads, found.feed_forward):
        assert list(column.values()) == sorted(column.values())
    assert found.largest_error > 0.01


def test_table_keeps_its_numbers_on_disk(tmp_path: Path) -> None:
    table().save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table()
    (tmp_path / "broken.json").write_text('{"batches": []}')
    for name in ("broken.json", "missing.json"):
        with pytest.raises(ArtifactError, match=f"expected a latency table in '{name}'"):
            LatencyTable.load(tmp_path / name)


@pytest.mark.parametrize("importance", ["fisher", "magnitude"])
def test_pruning_by_the_clock(importance: Any) -> None:
    model = tiny_model()
    full = find_anatomy(model.encoder).sizes
    batches = [{**tiny_inputs("bert", seed=seed), "labels_mood": torch.tensor([0, 1, 2])} for seed in (0, 1)]
    times = table()
    report = prune(
        model, batches, latency=TimeBudget(times, 8, 0.4), importance=importance, multiple_of=4, progress=False
    )
    assert report.milliseconds_before == pytest.approx(times.milliseconds(full, 8))
    assert report.milliseconds_after == pytest.approx(times.milliseconds(find_anatomy(model.encoder).sizes, 8))
    assert report.milliseconds_after is not None
    assert report.milliseconds_after <= 0.6 * times.milliseconds(full, 8)
    # One part more of any kind would have been too much, or something cheaper was worth more.
    assert report.milliseconds_after > 0.5 * times.milliseconds(full, 8)
    assert report.masked_difference is not None
    assert report.masked_difference < 1e-4


@pytest.mark.parametrize(("layer_ms", "gone"), [(0.0, []), (2.0, [1]), (50.0, [0, 1])])
def test_layers_go_whose_fixed_time_is_better_spent(layer_ms: float, gone: list[int]) -> None:
    """A layer with little in it costs its norms and its call all the same."""
    model = tiny_model()
    with torch.no_grad():
        # Of no importance; layer 0 of less than the last one.
        for number, share in ((0, 0.5), (1, 1e-6)):
            layer = find_anatomy(model.encoder).layers[number]
            for part in (layer.attention.output, layer.feed_forward.output):
                part.weight.mul_(share)
    times = table(layer=layer_ms)
    asked = TimeBudget(times, 1, 0.5)
    report = prune(model, [], latency=asked, importance="magnitude", multiple_of=4, progress=False)
    assert report.removed_layers == gone
    assert report.milliseconds_before is not None
    assert report.milliseconds_after is not None
    assert report.milliseconds_after <= 0.5 * report.milliseconds_before
    assert report.milliseconds_after == pytest.approx(times.milliseconds(find_anatomy(model.encoder).sizes, 1))
    # As many as were asked for, where a number was.
    again = tiny_model()
    report = prune(again, [], latency=asked, layers=2, importance="magnitude", multiple_of=4, progress=False)
    assert len(report.removed_layers) == 2


def test_what_cannot_be_pruned_by_the_clock() -> None:
    model = tiny_model()
    budget = TimeBudget(table(), 1, 0.5)
    with pytest.raises(ValueError, match="latency: expected it instead of heads, feed_forward and compute"):
        prune(model, [], latency=budget, heads=0.5, importance="magnitude")
    with pytest.raises(ValueError, match="latency: expected a fraction above 0 and below 1 to remove, found 1"):
        prune(model, [], latency=dataclasses.replace(budget, remove=1.0), importance="magnitude")
    with pytest.raises(ValueError, match=r"batch_size: expected one that was measured, \[1, 8\], found 2"):
        prune(model, [], latency=dataclasses.replace(budget, batch_size=2), importance="magnitude")
    with pytest.raises(ValueError, match="latency: expected to remove at most"):
        prune(model, [], latency=dataclasses.replace(budget, remove=0.95), importance="magnitude")
    small = dataclasses.replace(budget, table=table(heads={0: 0.0, 1: 0.5}))
    with pytest.raises(ValueError, match="expected a table of at least 4 heads and 64 neurons, found one of 1 and 64"):
        prune(model, [], latency=small, importance="magnitude")
    with pytest.raises(ValueError, match="expected a table of at least 4 heads and 65 neurons, found one of 4 and 64"):
        block_costs(TRUTH, 4, 65)


def test_a_shape_is_saved_for_its_runtime(tmp_path: Path) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    save_shape(model, tiny_tokenizer(), [(2, 32), (0, 8)], tmp_path / "torch", "torch")
    assert find_anatomy(MultiTaskModel.from_pretrained(tmp_path / "torch").encoder).sizes == [(2, 32), (0, 8)]
    save_shape(model, tiny_tokenizer(), [(1, 0)], tmp_path / "int8", "onnx_int8")
    assert (tmp_path / "int8" / "model.onnx").is_file()
    assert load_reader(tmp_path / "int8").reads_as(reader_of(tiny_tokenizer()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_measured_table_of_a_tiny_model() -> None:
    """Times of so small a model are mostly noise, so only what holds for every table is asked."""
    texts = list(tiny_text_rows(4)["text"])
    found = measure_latency(
        tiny_model(), tiny_tokenizer(), texts, tokens=8, batch_sizes=(1, 2), threads=1, repetitions=3, progress=False
    )
    assert found.batches.keys() == {1, 2}
    assert (found.tokens, found.threads, found.runtime) == (8, 1, "onnx_int8")
    full = find_anatomy(tiny_model().encoder).sizes
    for size in (1, 2):
        assert 0 < found.milliseconds([(0, 0)], size) <= found.milliseconds(full, size)


def test_a_table_is_measured_on_the_uncut_model() -> None:
    model = tiny_model()
    cut(model.encoder, {0: [0]}, {})
    with pytest.raises(ValueError, match="model: expected layers that are all alike"):
        measure_latency(model, tiny_tokenizer(), ["a"])
