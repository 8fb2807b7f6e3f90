import pytest
import torch
from torch import Tensor

from hf_mtcompress.compression.selection import select_heads, select_layers, select_neurons

HEADS = [torch.tensor([4.0, 1.0, 3.0]), torch.tensor([0.5, 0.2, 0.1])]


def test_least_important_heads_of_all_layers_go() -> None:
    """Chosen within each layer, an important layer would lose as much as one that does nothing."""
    assert select_heads(HEADS, 1 / 3) == {0: [0, 1, 2], 1: [0]}


def test_each_layer_keeps_a_head() -> None:
    assert select_heads(HEADS, 0.5) == {0: [0, 2], 1: [0]}
    assert select_heads(HEADS, 0.99) == {0: [0], 1: [0]}


def test_all_and_none() -> None:
    assert select_heads(HEADS, 0.0) == {0: [0, 1, 2], 1: [0, 1, 2]}
    assert select_heads(HEADS, 1.0) == {0: [], 1: []}


def test_layers_that_lost_all_heads_before() -> None:
    assert select_heads([torch.zeros(0), torch.tensor([1.0, 2.0])], 0.5) == {0: [], 1: [1]}


def test_ties_are_broken_by_place() -> None:
    """Sorting that is not stable would give another model on another machine."""
    assert select_heads([torch.ones(2), torch.ones(2)], 0.25) == {0: [1], 1: [0, 1]}


def test_widths_are_multiples() -> None:
    scores = [torch.arange(8.0), torch.arange(8.0) / 10]
    assert select_neurons(scores, 0.5, multiple_of=4) == {0: [4, 5, 6, 7], 1: [4, 5, 6, 7]}
    assert select_neurons(scores, 0.25, multiple_of=4) == {0: list(range(8)), 1: [4, 5, 6, 7]}
    assert select_neurons(scores, 0.25, multiple_of=1) == {0: list(range(1, 8)), 1: [3, 4, 5, 6, 7]}


def test_each_layer_keeps_one_multiple() -> None:
    scores = [torch.arange(8.0), torch.arange(8.0) / 1000]
    kept = select_neurons(scores, 0.9, multiple_of=2)
    assert kept == {0: [6, 7], 1: [6, 7]}


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.77])
def test_wanted_share_is_met_to_a_group(fraction: float) -> None:
    """Rounding each layer for itself would miss the wanted size by up to half a multiple in every layer."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(128, generator=generator) for _ in range(12)]
    kept = select_neurons(scores, fraction, multiple_of=16)
    assert all(len(neurons) % 16 == 0 and neurons == sorted(set(neurons)) for neurons in kept.values())
    assert abs(sum(map(len, kept.values())) - (1 - fraction) * 12 * 128) <= 8


def test_width_below_a_multiple() -> None:
    """Already narrower than a multiple: nothing is rounded up to neurons that are not there."""
    assert select_neurons([torch.arange(5.0), torch.arange(64.0)], 0.5, multiple_of=32) == {
        0: [0, 1, 2, 3, 4],
        1: list(range(32, 64)),
    }


def test_no_and_all_neurons() -> None:
    assert select_neurons([torch.ones(5)], 0.0, multiple_of=4) == {0: [0, 1, 2, 3, 4]}
    assert select_neurons([torch.ones(5)], 1.0, multiple_of=4) == {0: []}


def test_layers() -> None:
    scores = torch.tensor([3.0, 1.0, 1.0, 2.0])
    assert select_layers(scores, 0) == [0, 1, 2, 3]
    assert select_layers(scores, 1) == [0, 2, 3]
    assert select_layers(scores, 3) == [0]


@pytest.mark.parametrize("count", [-1, 4, 9])
def test_no_layer_left(count: int) -> None:
    with pytest.raises(ValueError, match="0 to 3 layers to remove from 4"):
        select_layers(torch.ones(4), count)


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("select", [select_heads, select_neurons])
def test_fractions_out_of_range(select, fraction: float) -> None:
    scores: list[Tensor] = HEADS
    with pytest.raises(ValueError, match=r"fraction from 0 \(keep all\) to 1"):
        select(scores, fraction)


def test_multiple_below_one() -> None:
    with pytest.raises(ValueError, match="multiple_of: expected 1 or more"):
        select_neurons(HEADS, 0.5, multiple_of=0)
