from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from hf_mtcompress.compression.selection import (
    protect_weakest,
    rearrange,
    select_heads,
    select_layers,
    select_neurons,
    select_within_budget,
    select_within_time,
)

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


def test_what_went_before_counts_towards_the_fraction() -> None:
    """Otherwise a second round removes its share of what the first one left, and the sum is less than was asked for."""
    left = [HEADS[0], HEADS[1][:1]]
    assert select_heads(left, 0.5, of=6) == {0: [0, 2], 1: [0]}
    assert select_heads(left, 1 / 3, of=6) == {0: [0, 1, 2], 1: [0]}
    assert select_heads(left, 0.1, of=6) == {0: [0, 1, 2], 1: [0]}
    widths = [torch.arange(8.0), torch.arange(4.0)]
    assert select_neurons(widths, 0.5, 2, of=16) == {0: [2, 3, 4, 5, 6, 7], 1: [2, 3]}
    assert select_neurons(widths, 0.1, 2, of=16) == {0: list(range(8)), 1: list(range(4))}


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


# ---- one budget ----


@pytest.mark.parametrize("budget", [7.0, 9.0, 12.5, 16.0, 22.0])
def test_budget_is_spent_in_the_best_way(budget: float) -> None:
    """Held against every choice there is."""
    generator = torch.Generator().manual_seed(int(budget))
    heads = [torch.rand(3, generator=generator, dtype=torch.float64) for _ in range(2)]
    neurons = [torch.rand(4, generator=generator, dtype=torch.float64) for _ in range(2)]
    kept = select_within_budget(heads, neurons, head_cost=2.5, neuron_cost=1.0, budget=budget)

    def worth(choice: tuple[dict[int, list[int]], dict[int, list[int]]]) -> float:
        return sum(
            float(values[layer][parts].sum())
            for values, by_layer in zip((heads, neurons), choice, strict=True)
            for layer, parts in by_layer.items()
        )

    def cost(choice: tuple[dict[int, list[int]], dict[int, list[int]]]) -> float:
        return 2.5 * sum(map(len, choice[0].values())) + sum(map(len, choice[1].values()))

    def parts(size: int) -> list[list[int]]:
        return [list(found) for count in range(1, size + 1) for found in combinations(range(size), count)]

    choices = [({0: a, 1: b}, {0: c, 1: d}) for a, b, c, d in product(parts(3), parts(3), parts(4), parts(4))]
    best = max(worth(choice) for choice in choices if cost(choice) <= budget)
    assert cost(kept) <= budget
    assert worth(kept) == pytest.approx(best)


def test_budget_by_hand() -> None:
    """A head for 4 or two groups of neurons for 2 each: what is worth more for the same money stays."""
    heads = [torch.tensor([9.0, 1.0]), torch.tensor([9.0, 5.0])]
    neurons = [torch.tensor([8.0, 8.0, 1.0, 1.0]), torch.tensor([8.0, 8.0, 2.0, 2.0])]
    settings = {"head_cost": 4.0, "neuron_cost": 1.0, "multiple_of": 2}
    # Two heads and two groups are always there: 12. The other 4 pay for the head of 5, or for neurons of 6 in all.
    assert select_within_budget(heads, neurons, budget=16.0, **settings) == (
        {0: [0], 1: [0]},
        {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]},
    )
    assert select_within_budget(heads, neurons, budget=18.0, **settings) == (
        {0: [0], 1: [0, 1]},
        {0: [0, 1], 1: [0, 1, 2, 3]},
    )


def test_budget_for_everything_keeps_everything() -> None:
    """Also parts without any importance, and layers that lost a part before."""
    heads, neurons = [torch.zeros(2), torch.zeros(0)], [torch.zeros(5), torch.zeros(4)]
    kept = select_within_budget(heads, neurons, head_cost=0.1, neuron_cost=0.1, budget=1.1, multiple_of=2)
    assert kept == ({0: [0, 1], 1: []}, {0: [0, 1, 2, 3, 4], 1: [0, 1, 2, 3]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 11.0}, "budget: expected at least 12, .* one head and one group of 2 neurons"),
        ({"head_cost": 0.0}, "head_cost: expected a cost above 0"),
        ({"neuron_cost": float("nan")}, "neuron_cost: expected a cost above 0"),
        ({"multiple_of": 0}, "multiple_of: expected 1 or more"),
    ],
)
def test_budgets_that_cannot_be(changes: dict[str, float], message: str) -> None:
    settings: dict = {"head_cost": 4.0, "neuron_cost": 1.0, "budget": 16.0, "multiple_of": 2, **changes}
    with pytest.raises(ValueError, match=message):
        select_within_budget([torch.ones(2)] * 2, [torch.ones(4)] * 2, **settings)


# ---- rearrangement ----


def information(*parts: list[float]) -> Tensor:
    """Fisher information of parts, each given by its derivatives in all rows."""
    rows = torch.tensor(parts, dtype=torch.float64)
    return rows @ rows.T


def cost_of(block: Tensor, kept: list[int]) -> float:
    gone = [part for part in range(len(block)) if part not in kept]
    return float(block[gone][:, gone].sum())


def test_parts_that_do_the_same_do_not_both_go() -> None:
    """One by one the first two are the least important; without both, what they do is lost."""
    block = information([1.0, 0.0], [1.0, 0.0], [0.0, 1.2])
    assert (cost_of(block, [2]), cost_of(block, [0])) == (4.0, pytest.approx(2.44))
    assert rearrange([2], [block]) == [0]


def test_parts_that_undo_each_other_go_together() -> None:
    block = information([3.0, 0.0], [-3.0, 0.0], [0.0, 1.0])
    assert rearrange([0], [block]) == [2]
    assert cost_of(block, [2]) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_swaps_never_hurt(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(10, 12, generator=generator, dtype=torch.float64)
    block = rows.T @ rows
    before = block.diagonal().topk(7).indices.tolist()
    after = rearrange(before, [block])
    assert len(after) == 7
    assert after == sorted(set(after))
    assert cost_of(block, after) <= cost_of(block, before)
    # No single swap would be better still.
    for part, other in product(after, set(range(12)) - set(after)):
        assert cost_of(block, [*(set(after) - {part}), other]) >= cost_of(block, after) - 1e-9


def test_swaps_for_the_worst_task() -> None:
    """The mean of two tasks would keep the first part; what the second task lost elsewhere decides for its own."""
    one, other = information([1.0], [0.1]), information([0.1], [0.6])
    assert rearrange([1], [(one + other) / 2]) == [0]
    assert rearrange([0], [one, other], elsewhere=[0.0, 2.0]) == [1]


def test_nothing_to_swap() -> None:
    assert rearrange([1, 0], [torch.eye(2)]) == [0, 1]
    assert rearrange([], [torch.eye(2)]) == []
    assert rearrange([1], [torch.zeros(3, 3)]) == [1]


# ---- the weakest task ----


@pytest.mark.parametrize("seed", range(6))
def test_weakest_task_is_protected(seed: int) -> None:
    """Never worse than equal weights for the task that loses most, and near the best choice of all."""
    generator = torch.Generator().manual_seed(seed)
    tasks = torch.rand(3, 8, generator=generator, dtype=torch.float64) ** 4
    tasks /= tasks.sum(1, keepdim=True)

    def select(weights) -> list[int]:
        return (torch.tensor(weights, dtype=torch.float64) @ tasks).topk(4).indices.tolist()

    def lost(kept) -> list[float]:
        return [1.0 - float(values[list(kept)].sum()) for values in tasks]

    worst = max(lost(protect_weakest(3, select, lost)))
    best = min(max(lost(kept)) for kept in combinations(range(8), 4))
    assert best - 1e-12 <= worst <= max(lost(select([1 / 3] * 3))) + 1e-12
    assert worst <= best + 0.05


def test_weakest_task_by_hand() -> None:
    """Two tasks agree on one part, each has one of its own: shared by halves, the smaller one would lose its own."""
    shares = [[0.2, 0.8, 0.0, 0.0], [0.0, 0.0, 0.6, 0.4]]

    def select(weights) -> list[int]:
        worth = [sum(w * s[part] for w, s in zip(weights, shares, strict=True)) for part in range(4)]
        return sorted(sorted(range(4), key=lambda part: -worth[part])[:3])

    kept = protect_weakest(2, select, lambda kept: [1 - sum(share[part] for part in kept) for share in shares])
    assert kept == [1, 2, 3]
    assert protect_weakest(1, lambda weights: weights, lambda found: [1.0]) == [1.0]


def time_of(count: int) -> float:
    """Uneven, as kernels are: the first two parts cost little more than nothing, the third much."""
    return [0.0, 1.0, 1.1, 2.5, 2.6][count]


@pytest.mark.parametrize("budget", [0.0, 1.05, 2.05, 3.3, 4.75, 6.15, 9.0])
def test_choice_within_a_time_is_the_best_of_all(budget: float) -> None:
    """Taking parts one by one would stop at a step of the kernel that a whole block pays for."""
    generator = torch.Generator().manual_seed(3)
    heads = [torch.rand(3, generator=generator) for _ in range(2)]
    feed_forward = [torch.rand(4, generator=generator) for _ in range(2)]
    kept = select_within_time(
        heads, feed_forward, heads_cost=time_of, feed_forward_cost=time_of, budget=budget, multiple_of=1
    )
    layers = [*kept[0].values(), *kept[1].values()]
    blocks = [*heads, *feed_forward]
    assert sum(time_of(len(parts)) for parts in layers) <= budget + 1e-9
    found = sum(float(block[parts].sum()) for block, parts in zip(blocks, layers, strict=True))
    best = max(
        sum(float(block.sort(descending=True).values[:size].sum()) for block, size in zip(blocks, sizes, strict=True))
        for sizes in product(range(4), range(4), range(5), range(5))
        if sum(map(time_of, sizes)) <= budget
    )
    assert found == pytest.approx(best, abs=1e-6)


def test_time_for_everything_keeps_everything() -> None:
    kept = select_within_time(
        HEADS, [torch.ones(6)] * 2, heads_cost=float, feed_forward_cost=float, budget=18.0, multiple_of=4
    )
    assert kept == ({0: [0, 1, 2], 1: [0, 1, 2]}, {0: list(range(6)), 1: list(range(6))})
    less = select_within_time(
        HEADS, [torch.ones(6)] * 2, heads_cost=float, feed_forward_cost=float, budget=17.9, multiple_of=4
    )
    assert less == ({0: [0, 1, 2], 1: [0, 1]}, kept[1])


def test_time_below_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="budget: expected at least 0 for heads and neurons, found -1"):
        select_within_time(HEADS, HEADS, heads_cost=float, feed_forward_cost=float, budget=-1.0)
