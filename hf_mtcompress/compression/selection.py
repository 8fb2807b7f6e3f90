"""Which parts stay, given their scores and how much is to go. Pure: numbers in, indices out.

Ties are broken by place (the part that comes first goes first), so the same scores always give the same cut.

References:
    Kwon et al.: A Fast Post-Training Pruning Framework for Transformers. NeurIPS 2022. `select_within_budget` is its
    mask search (under a limit on multiply-adds; here neurons go in groups), `rearrange` its mask rearrangement.
    Deviations: each layer keeps a head and a group of neurons; swaps go on until none helps, where the paper visits
    each removed part once.
    Freund and Schapire: Adaptive Game Playing Using Multiplicative Weights. Games and Economic Behavior 1999.
    `protect_weakest` plays the game of tasks against selections in this way.
    Kurtic et al.: ZipLM: Inference-Aware Structured Pruning of Language Models. NeurIPS 2023, and Shen et al.:
    Structural Pruning via Latency-Saliency Knapsack. NeurIPS 2022. `select_within_time` solves the same knapsack, in
    which each block has one size and costs what that size was measured to take.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_TIME_STEPS = 20_000
"""Parts of a budget that times are rounded to."""

Kept = dict[int, list[int]]
"""Parts that stay, by layer."""

_Selection = TypeVar("_Selection")


def check_fraction(name: str, fraction: float) -> None:
    """Refuse what is no fraction.

    Raises:
        ValueError: `fraction` is outside of 0..1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"{name}: expected a fraction from 0 (keep all) to 1 (remove all), found {fraction}")


def select_heads(scores: Sequence[Tensor], fraction: float, of: int | None = None) -> Kept:
    """Heads to keep, by layer.

    The least important heads of all layers together go; each layer that has heads keeps one, unless `fraction` is 1.

    Args:
        scores: by layer, of shape (heads,).
        fraction: of all heads to remove, 0..1.
        of: how many heads there were, where some went before and count as removed; default: all have scores.
    """
    check_fraction("heads", fraction)
    kept = {layer: list(range(len(values))) for layer, values in enumerate(scores)}
    if fraction == 1.0:
        return {layer: [] for layer in kept}
    order = sorted(
        (float(value), layer, head) for layer, values in enumerate(scores) for head, value in enumerate(values)
    )
    whole = len(order) if of is None else of
    removed = whole - len(order)
    for _, layer, head in order:
        if removed >= _round(fraction * whole):
            break
        if len(kept[layer]) > 1:
            kept[layer].remove(head)
            removed += 1
    return kept


def select_neurons(scores: Sequence[Tensor], fraction: float, multiple_of: int = 1, of: int | None = None) -> Kept:
    """Feed-forward neurons to keep, by layer, in widths that are multiples.

    In each layer the neurons are sorted by score and put in groups of `multiple_of`; the groups with the highest mean
    over all layers stay until the wanted share is kept as nearly as groups allow. Each layer that has neurons keeps one
    group, unless `fraction` is 1. A width below `multiple_of` is one group.

    Args:
        scores: by layer, of shape (width,).
        fraction: of all neurons to remove, 0..1.
        multiple_of: at least 1.
        of: how many neurons there were, where some went before and count as removed; default: all have scores.

    Raises:
        ValueError: `fraction` or `multiple_of` is out of range.
    """
    check_fraction("feed_forward", fraction)
    _check_multiple(multiple_of)
    everything = {layer: list(range(len(values))) for layer, values in enumerate(scores)}
    if fraction == 0.0:
        return everything
    if fraction == 1.0:
        return {layer: [] for layer in everything}
    kept, groups = _grouped(scores, multiple_of)
    wanted = (1.0 - fraction) * (sum(len(values) for values in scores) if of is None else of)
    have = sum(len(neurons) for neurons in kept.values())
    # Scores fall within a layer, so a layer's groups are taken in order.
    for _, layer, group in sorted(groups, key=lambda entry: (-entry[0], entry[1])):
        if have + len(group) / 2 > wanted:
            break
        kept[layer] += group
        have += len(group)
    return {layer: sorted(neurons) for layer, neurons in kept.items()}


def select_layers(scores: Tensor, count: int) -> list[int]:
    """Layers to keep when the `count` least important ones go.

    Raises:
        ValueError: `count` is negative, or would leave no layer.
    """
    if not 0 <= count < len(scores):
        raise ValueError(f"layers: expected 0 to {len(scores) - 1} layers to remove from {len(scores)}, found {count}")
    order = sorted(range(len(scores)), key=lambda layer: (float(scores[layer]), layer))
    return sorted(order[count:])


def select_within_budget(
    heads: Sequence[Tensor],
    feed_forward: Sequence[Tensor],
    *,
    head_cost: float,
    neuron_cost: float,
    budget: float,
    multiple_of: int = 1,
) -> tuple[Kept, Kept]:
    """Heads and feed-forward neurons to keep, by layer, so that the sum of their scores is largest within a budget.

    All heads cost the same and all neurons do, so for each number of heads the best ones are known, and the best groups
    of neurons that the rest of the budget pays: trying every number of heads finds the best choice of all (nearly the
    best where a width is no multiple, since its last group is cheaper). Each layer that has heads keeps one, each that
    has neurons keeps a group.

    Args:
        heads: scores by layer, of shape (heads,).
        feed_forward: scores by layer, of shape (width,), on the same scale.
        head_cost: of one head, above 0.
        neuron_cost: of one neuron, above 0, in the same unit.
        budget: what the parts that are kept may cost together.
        multiple_of: size of a group of neurons, as in `select_neurons`.

    Raises:
        ValueError: the budget does not pay for one head and one group in each layer; a cost or `multiple_of` is out of
            range.
    """
    _check_multiple(multiple_of)
    for name, cost in (("head_cost", head_cost), ("neuron_cost", neuron_cost)):
        if not cost > 0:
            raise ValueError(f"{name}: expected a cost above 0, found {cost}")
    kept_heads: Kept = {}
    more_heads: list[tuple[float, int, list[int]]] = []
    for layer, values in enumerate(heads):
        # Of heads that are alike the last ones stay, as in `select_heads`.
        ranked = sorted(range(len(values)), key=lambda head: (-float(values[head]), -head))
        kept_heads[layer] = ranked[:1]
        more_heads += [(float(values[head]), layer, [head]) for head in ranked[1:]]
    kept_neurons, more_neurons = _grouped(feed_forward, multiple_of)
    more_heads.sort(key=lambda entry: (-entry[0], -entry[1]))
    more_neurons.sort(key=lambda entry: (-entry[0], entry[1]))
    least = head_cost * sum(map(len, kept_heads.values())) + neuron_cost * sum(map(len, kept_neurons.values()))
    # Costs are sums of floats: what fits exactly must not be refused for its last bit.
    left = budget - least + 1e-9 * max(abs(budget), least)
    if left < 0:
        raise ValueError(
            f"budget: expected at least {least:.6g}, which is one head and one group of {multiple_of} neurons in each "
            f"layer, found {budget:.6g}; remove less, whole layers, or take smaller groups"
        )
    spent, gained = [0.0], [0.0]
    for mean, _, group in more_neurons:
        spent.append(spent[-1] + neuron_cost * len(group))
        gained.append(gained[-1] + mean * len(group))
    best, choice, groups = (-math.inf, 0.0), (0, 0), len(more_neurons)
    value = 0.0
    for count in range(len(more_heads) + 1):
        if count:
            value += more_heads[count - 1][0]
        rest = left - head_cost * count
        if rest < 0:
            break
        while spent[groups] > rest:
            groups -= 1
        # Of choices that are worth the same the larger one, so that a budget for everything keeps everything.
        found = (value + gained[groups], head_cost * count + spent[groups])
        if found > best:
            best, choice = found, (count, groups)
    for _, layer, head in more_heads[: choice[0]]:
        kept_heads[layer] += head
    for _, layer, group in more_neurons[: choice[1]]:
        kept_neurons[layer] += group
    return _in_order(kept_heads), _in_order(kept_neurons)


def select_within_time(
    heads: Sequence[Tensor],
    feed_forward: Sequence[Tensor],
    *,
    heads_cost: Callable[[int], float],
    feed_forward_cost: Callable[[int], float],
    budget: float,
    multiple_of: int = 1,
) -> tuple[Kept, Kept]:
    """Heads and feed-forward neurons to keep, by layer, so that the sum of their scores is largest within a time.

    Each block gets one of its sizes, from nothing to all, and of that size its best parts. Costs need not grow evenly:
    the best choice of all is found (times are rounded up to a part in 20,000 of the budget).

    Args:
        heads: scores by layer, of shape (heads,), at least 0.
        feed_forward: scores by layer, of shape (width,), at least 0, on the same scale.
        heads_cost: what an attention block with so many heads costs, at least 0, and 0 for none.
        feed_forward_cost: what a feed-forward block with so many neurons costs.
        budget: what all blocks may cost together.
        multiple_of: feed-forward widths are multiples of this, or all that a layer has.

    Raises:
        ValueError: the budget is below 0, or `multiple_of` is out of range.
    """
    _check_multiple(multiple_of)
    if not budget >= 0:
        raise ValueError(f"budget: expected at least 0 for heads and neurons, found {budget:.6g}; remove less")
    blocks: list[tuple[list[int], list[int], list[float], list[float]]] = []
    # Of parts that are alike the same stay as in the functions above: the last heads, the first neurons.
    for scores, cost, step, sign in ((heads, heads_cost, 1, -1), (feed_forward, feed_forward_cost, multiple_of, 1)):
        for values in scores:
            numbers = values.tolist()
            ranked = [
                part for _, _, part in sorted((-number, sign * part, part) for part, number in enumerate(numbers))
            ]
            sizes = sorted({*range(0, len(ranked) + 1, step), len(ranked)})
            gained = np.concatenate([[0.0], np.cumsum([numbers[part] for part in ranked])])
            blocks.append((ranked, sizes, [float(gained[size]) for size in sizes], [cost(size) for size in sizes]))
    if sum(costs[-1] for *_, costs in blocks) <= budget:
        chosen = [sizes[-1] for _, sizes, _, _ in blocks]
    else:
        chosen = _knapsack([(sizes, values, costs) for _, sizes, values, costs in blocks], budget)
    kept = [sorted(ranked[:size]) for (ranked, *_), size in zip(blocks, chosen, strict=True)]
    return dict(enumerate(kept[: len(heads)])), dict(enumerate(kept[len(heads) :]))


def _knapsack(blocks: Sequence[tuple[list[int], list[float], list[float]]], budget: float) -> list[int]:
    """One size for each block, so that values add up to most while costs stay within the budget."""
    best = np.zeros(_TIME_STEPS + 1)
    choices = []
    for _, values, costs in blocks:
        places = [
            math.inf if budget == 0 < cost else math.ceil(cost / max(budget, 1e-300) * _TIME_STEPS - 1e-9)
            for cost in costs
        ]
        options = np.full((len(places), len(best)), -np.inf)
        for row, value, place in zip(options, values, places, strict=True):
            if place <= _TIME_STEPS:
                row[int(place) :] = best[: len(best) - int(place)] + value
        choices.append((places, options.argmax(0)))
        best = options.max(0)
    left, found = _TIME_STEPS, []
    for (sizes, _, _), (places, choice) in zip(reversed(blocks), reversed(choices), strict=True):
        option = int(choice[left])
        found.append(sizes[option])
        left -= int(places[option])
    return found[::-1]


def rearrange(kept: Sequence[int], blocks: Sequence[Tensor], elsewhere: Sequence[float] | None = None) -> list[int]:
    """Swap parts of one layer that stay for parts that go, as long as the loss is then hurt less.

    Scores take parts one by one; two that do the same are both dispensable, but not together. The full Fisher
    information of a layer knows: removing the set S costs the sum over i and j in S of block[i, j]. As many parts stay
    as before.

    Args:
        kept: parts that stay.
        blocks: one matrix (parts, parts) for each task whose loss is looked at; the largest of their costs counts.
        elsewhere: what each task loses in other layers already; default: nothing.

    Returns:
        Parts that stay, in order; their cost is never larger than that of `kept`.
    """
    lost = list(elsewhere) if elsewhere is not None else [0.0] * len(blocks)
    parts = len(blocks[0])
    gone = sorted(set(range(parts)) - set(kept))
    if not gone or len(gone) == parts:
        return sorted(kept)
    stays = torch.ones(parts, dtype=torch.bool)
    stays[gone] = False
    stacked = torch.stack([block.double() for block in blocks])
    own = stacked.diagonal(dim1=1, dim2=2)
    # By task and part: how much of the removed set's cost the part shares, and the set's own cost.
    shared = stacked[:, :, gone].sum(2)
    total = shared[:, gone].sum(1) + torch.tensor(lost, dtype=torch.float64)
    swapped = True
    while swapped:
        swapped = False
        for index in list(gone):
            without = shared - stacked[:, :, index]
            rest = total - own[:, index] - 2 * without[:, index]
            costs = (rest[:, None] + own + 2 * without).amax(0)
            allowed = torch.where(stays, costs, torch.inf)
            other = int(allowed.argmin())
            # Relative, so that rounding cannot swap two equal parts for ever.
            if float(allowed[other]) < float(costs[index]) - 1e-12 * abs(float(costs[index])):
                total = rest + own[:, other] + 2 * without[:, other]
                shared = without + stacked[:, :, other]
                gone[gone.index(index)] = other
                stays[index], stays[other] = True, False
                swapped = True
    return stays.nonzero().flatten().tolist()


def protect_weakest(
    tasks: int,
    select: Callable[[Sequence[float]], _Selection],
    lost: Callable[[_Selection], Sequence[float]],
    rounds: int = 32,
) -> _Selection:
    """The selection whose worst task loses least, of those that weighted tasks would choose.

    Starts from equal weights and lets a task that loses more count more in the next round; the best selection seen is
    returned, so none that is worse for the worst task than that of equal weights.

    Args:
        tasks: how many.
        select: makes a selection for weights of the tasks, which add up to 1.
        lost: what each task loses by a selection, as a share of all it has.
        rounds: selections to try.
    """
    weights = [1.0 / tasks] * tasks
    best: _Selection | None = None
    least = math.inf
    for step in range(max(rounds, 1)):
        found = select(weights)
        losses = lost(found)
        worst = max(losses)
        if best is None or worst < least:
            best, least = found, worst
        if tasks == 1 or not worst > 0:
            break
        factors = [math.exp((loss / worst - 1.0) / math.sqrt(step + 1)) for loss in losses]
        total = sum(weight * factor for weight, factor in zip(weights, factors, strict=True))
        weights = [weight * factor / total for weight, factor in zip(weights, factors, strict=True)]
    assert best is not None
    return best


def _check_multiple(multiple_of: int) -> None:
    if multiple_of < 1:
        raise ValueError(f"multiple_of: expected 1 or more, found {multiple_of}")


def _grouped(scores: Sequence[Tensor], multiple_of: int) -> tuple[Kept, list[tuple[float, int, list[int]]]]:
    """The best group of neurons of each layer, and all others, each with its mean score and its layer."""
    groups: list[tuple[float, int, list[int]]] = []
    kept: Kept = {}
    for layer, values in enumerate(scores):
        numbers = values.tolist()
        ranked = sorted(range(len(numbers)), key=lambda neuron: (-numbers[neuron], neuron))
        kept[layer] = ranked[:multiple_of]
        for start in range(multiple_of, len(ranked), multiple_of):
            group = ranked[start : start + multiple_of]
            groups.append((sum(numbers[neuron] for neuron in group) / len(group), layer, group))
    return kept, groups


def _in_order(kept: Kept) -> Kept:
    return {layer: sorted(parts) for layer, parts in kept.items()}


def _round(value: float) -> int:
    """To the nearest whole number, halves up."""
    return int(value + 0.5)
