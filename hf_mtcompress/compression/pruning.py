"""Structured pruning: measure importance on data, choose, cut, repair; the model gets really smaller and faster.

See `schedule.py` for pruning while a model is trained.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_mtcompress.compression.counting import Costs, check_amounts, costs_of, select_compute
from hf_mtcompress.compression.importance import Gradients, Scores, add, gated, shares
from hf_mtcompress.compression.latency import LatencyTable, block_costs
from hf_mtcompress.compression.measuring import (
    Importance,
    Measured,
    combined,
    inputs_of,
    losses_of,
    measure_importance,
    rows_of,
)
from hf_mtcompress.compression.repair import repair as repair_outputs
from hf_mtcompress.compression.selection import (
    Kept,
    protect_weakest,
    select_heads,
    select_layers,
    select_neurons,
    select_within_time,
)
from hf_mtcompress.compression.selection import rearrange as rearrange_layer
from hf_mtcompress.compression.uniform import check_vanilla, select_one_width
from hf_mtcompress.errors import DataError, UnsupportedEncoderError
from hf_mtcompress.model.adapters import refuse_adapters
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.branches import refuse_sub_models
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import cut, describe_structure, keep_layers, refuse_quantized

_TOLERANCE = 1e-3
"""Largest difference, relative to the largest hidden value, between masking and cutting."""

Combine = Literal["mean", "sum", "max", "max_min"]
"""How the importance for several tasks becomes one choice."""

_ON_LOSSES = ("first_order", "fisher")
_ON_DATA = (*_ON_LOSSES, "activation")

_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class TimeBudget:
    """How much faster a model shall become.

    Attributes:
        table: times of its blocks; see `measure_latency`.
        batch_size: rows in a call, one that the table has.
        remove: fraction of the predicted time of a call to remove, 0..1.
    """

    table: LatencyTable
    batch_size: int
    remove: float

    def milliseconds(self, encoder: PreTrainedModel) -> float:
        """Predicted time of a call."""
        return self.table.milliseconds(find_anatomy(encoder).sizes, self.batch_size)


@dataclass(kw_only=True)
class PruneReport:
    """What a call of `prune` did; plain data."""

    importance: str
    rows: int
    """Rows that importance was measured on; 0 where it takes no data."""
    tasks: list[str]
    before: dict[str, Any]
    """Structure before, see `hf_mtcompress.model.surgery`."""
    after: dict[str, Any]
    removed_layers: list[int]
    parameters_before: int
    parameters_after: int
    seconds: float
    masked_difference: float | None
    """Largest relative difference between the model with the parts masked and with the parts cut; None by
    `prune_width`, whose cut is no mask."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Importance of the heads (by layer) and of the layers that the choice was made on."""
    lost_importance: dict[str, float] = field(default_factory=dict)
    """By task, the share of the importance of all heads and neurons that was cut; by `prune_width`, of the numbers in
    the hidden states."""
    multiply_adds_before: int | None = None
    """Of the encoder's layers for one row of `length` tokens; where `compute` was asked for."""
    multiply_adds_after: int | None = None
    milliseconds_before: float | None = None
    """Predicted time of a call; where `latency` was asked for."""
    milliseconds_after: float | None = None
    length: int | None = None
    width_before: int | None = None
    """Numbers in the hidden states; where `prune_width` removed some."""
    width_after: int | None = None
    swapped: int = 0
    """Heads and neurons that the rearrangement swapped for others."""
    repair: dict[str, Any] | None = None
    """What the repair did, see `hf_mtcompress.compression.repair.RepairReport`."""


@dataclass(frozen=True)
class Whole:
    """What the fractions of a further round of pruning are of: the model before the first round."""

    layers: Sequence[tuple[int, int]]
    """Heads and neurons that each layer which is still there had."""
    multiply_adds: int | None = None
    """Of all layers, those that went included; where `compute` is asked for."""


def prune(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    heads: float = 0.0,
    feed_forward: float = 0.0,
    layers: int = 0,
    compute: float = 0.0,
    length: int | None = None,
    latency: TimeBudget | None = None,
    importance: Importance = "first_order",
    combine: Combine = "mean",
    rearrange: bool = False,
    repair: bool = False,
    multiple_of: int = 32,
    shape: Literal["free", "vanilla"] = "free",
    seed: int = 42,
    whole: Whole | None = None,
    progress: bool = True,
) -> PruneReport:
    """Cut the least important heads, feed-forward neurons and layers out of `model`, in place.

    Layers go first; the importance of heads and neurons is then measured again on what is left.

    Args:
        model: a `MultiTaskModel`, or a stock model with a head (`AutoModelFor...`).
        batches: model inputs with `labels` (stock) or `labels_<task>`; the loss of each task counts the same. For
            `magnitude` and `random` they only serve to check the cut, and to repair it; they may be empty.
        heads: fraction of all attention heads to remove, 0..1; each layer keeps one unless it is 1.
        feed_forward: fraction of all feed-forward neurons to remove, 0..1.
        layers: number of whole layers to remove.
        compute: instead of `heads` and `feed_forward`, the fraction of the multiply-adds of the encoder's layers to
            remove, layers that go included; heads and neurons are weighed against each other.
        length: tokens of a row that multiply-adds are counted at; default: the mean of `batches`.
        latency: instead of `heads`, `feed_forward` and `compute`, the time of a call to remove, by a table of this
            machine; heads and neurons are weighed against each other, and whole blocks may go. So may layers, unless
            `layers` says how many or the shape is `vanilla`: those whose fixed time is better spent in the others.
        importance: `first_order` or `fisher` (of the loss; `fisher` has heads and neurons on one scale), `activation`
            (of what flows through a part), `magnitude` (of weights) or `random`.
        combine: `mean`, `sum`, `max` of the tasks' importance, or `max_min`: the task that loses the largest share of
            its importance loses as little as possible.
        rearrange: swap parts within a layer where that hurts the loss less; needs `fisher`.
        repair: solve the output projections anew after the cut, without training; see `repair.py`.
        multiple_of: feed-forward widths become multiples of this, which is what kernels like.
        shape: `vanilla` for what plain transformers can load: whole layers go, and all feed-forward parts get the same
            width; heads stay. `compute` and `latency` then choose that width.
        seed: of `random`.
        whole: for a further round: what `heads`, `feed_forward` and `compute` are fractions of, what went before
            included; default: the model as it is.
        progress: whether to show progress bars.

    Returns:
        What was removed. A model whose stock config cannot express its shape saves the structure with it.

    Raises:
        ValueError: a fraction or count is out of range, or two arguments exclude each other.
        DataError: no batches, or none with labels, to measure importance on; no batches to repair on.
        TrainingError: the loss is not a number.
        UnsupportedEncoderError: the encoder is built in another way; see `find_anatomy`.
    """
    if isinstance(model, MultiTaskModel):
        refuse_sub_models(model, "pruning")
        refuse_adapters(model, "pruning")
    start = time.monotonic()
    _check_arguments(heads, feed_forward, compute, length, latency, importance, rearrange)
    if shape == "vanilla" and heads:
        raise ValueError(f"heads: expected 0 with shape 'vanilla', whose configs know no width of heads, found {heads}")
    encoder = model.encoder if isinstance(model, MultiTaskModel) else encoder_of(model)
    refuse_quantized(encoder, find_anatomy(encoder))
    count = len(find_anatomy(encoder).layers)
    if not 0 <= layers < count:
        raise ValueError(f"layers: expected 0 to {count - 1} layers to remove from {count}, found {layers}")
    if whole is not None and latency is not None:
        raise ValueError(
            "latency: expected it without whole, since the time of a call is one of this model, found both; keep one"
        )
    if whole is not None and len(whole.layers) != count:
        raise ValueError(
            f"whole: expected heads and neurons of the {count} layers that are there, found {len(whole.layers)}; leave "
            "out those that went before"
        )
    device = next(encoder.parameters()).device
    data = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    _check_data(model, data, importance, repair)
    before, parameters_before = describe_structure(encoder), model.num_parameters()
    kept_layers = list(range(count))
    difference, swapped = 0.0, 0
    lost: dict[str, float] = {}
    repaired, costs, total = None, None, None
    if shape == "vanilla":
        check_vanilla(encoder, kept_layers)
    was_training = model.training
    model.eval()
    full = copy.deepcopy(model) if repair else None

    def measure(keep_gradients: bool) -> Measured:
        return measure_importance(
            model, encoder, data, importance, keep_gradients=keep_gradients, seed=seed, progress=progress
        )

    try:
        if compute:
            costs = costs_of(find_anatomy(encoder), length or mean_length(model, data))
            total = costs.of(find_anatomy(encoder))
            if whole is not None and whole.multiply_adds is not None:
                total = whole.multiply_adds
        milliseconds = None if latency is None else latency.milliseconds(encoder)
        one_scale = importance == "fisher" or compute > 0 or latency is not None
        measured = measure(rearrange and not layers)
        by_time = latency is not None and not layers and shape == "free"

        def choose_layers(scores: Scores) -> list[int]:
            if by_time and latency is not None and milliseconds is not None:
                return _layers_within_time(scores, latency, milliseconds, multiple_of)
            return select_layers(scores.layers, layers)

        if layers or by_time:
            kept_layers, layer_scores = _choose(
                measured,
                combine,
                one_scale,
                choose_layers,
                lambda kept, share: 1.0 - float(share.layers[kept].sum()),
            )
            if shape == "vanilla":
                check_vanilla(encoder, kept_layers)
            if len(kept_layers) < count:
                keep_layers(encoder, kept_layers)
                if heads or feed_forward or compute or latency:
                    measured = measure(rearrange)
        else:
            layer_scores = combined(measured, "mean" if combine == "max_min" else combine, one_scale)

        def select(scores: Scores) -> tuple[Kept, Kept]:
            if shape == "vanilla":
                parts = None if whole is None else [whole.layers[layer][1] for layer in kept_layers]
                fits = _fitting(feed_forward, parts, scores, costs, total, compute, latency, milliseconds)
                return select_one_width(encoder, scores, fits, multiple_of)
            if latency is not None and milliseconds is not None:
                return _select_time(scores, latency, milliseconds, multiple_of)
            if costs is None or total is None:
                sizes = None if whole is None else [whole.layers[layer] for layer in kept_layers]
                of = (None, None) if sizes is None else (sum(one for one, _ in sizes), sum(two for _, two in sizes))
                return (
                    select_heads(scores.heads, heads, of[0]),
                    select_neurons(scores.feed_forward, feed_forward, multiple_of, of[1]),
                )
            return select_compute(scores, find_anatomy(encoder), costs, compute, total, multiple_of)

        if heads or feed_forward or compute or latency:
            kept, scores = _choose(measured, combine, one_scale, select, _lost)
            if rearrange:
                kept, swapped = _rearrange(kept, measured, combine)
            lost = {task: _lost(kept, shares(found, one_scale=True)) for task, found in measured.by_task.items()}
            difference = _cut_and_compare(model, encoder, data[:1], *kept)
        else:
            scores = layer_scores
        if full is not None:
            inputs = [inputs_of(batch) for batch in data]
            full_encoder = full.encoder if isinstance(full, MultiTaskModel) else encoder_of(full)
            run, run_full = (lambda batch: model(**batch)), (lambda batch: full(**batch))
            found = repair_outputs(encoder, full_encoder, run, run_full, inputs, kept_layers, progress=progress)
            repaired = dataclasses.asdict(found)
    finally:
        model.train(was_training)
    if isinstance(model, MultiTaskModel):
        model.refresh_config()
    return PruneReport(
        importance=importance,
        rows=sum(map(rows_of, data)) if importance in _ON_DATA else 0,
        tasks=sorted({task for batch in data for task in losses_of(model, batch)}),
        before=before,
        after=describe_structure(encoder),
        removed_layers=[index for index in range(count) if index not in kept_layers],
        parameters_before=parameters_before,
        parameters_after=model.num_parameters(),
        seconds=time.monotonic() - start,
        masked_difference=difference,
        scores={"heads": [value.tolist() for value in scores.heads], "layers": layer_scores.layers.tolist()},
        lost_importance={task: share for task, share in lost.items() if task},
        multiply_adds_before=total,
        multiply_adds_after=None if costs is None else costs.of(find_anatomy(encoder)),
        milliseconds_before=milliseconds,
        milliseconds_after=None
        if latency is None
        else latency.table.milliseconds(find_anatomy(encoder).sizes, latency.batch_size),
        length=None if costs is None else costs.length,
        swapped=swapped,
        repair=repaired,
    )


# ---- choosing ----


def _choose(
    measured: Measured,
    how: Combine,
    one_scale: bool,
    select: Callable[[Scores], _Choice],
    lost: Callable[[_Choice, Scores], float],
) -> tuple[_Choice, Scores]:
    """A choice and the scores it was made on.

    Args:
        measured: importance for each task.
        how: the tasks come together.
        one_scale: see `shares`.
        select: makes a choice by scores.
        lost: what a choice costs a task, given its shares.
    """
    if how != "max_min":
        scores = combined(measured, how, one_scale)
        return select(scores), scores
    tasks = [shares(scores, one_scale) for scores in measured.by_task.values()]

    def weighted(weights: Sequence[float]) -> tuple[_Choice, Scores]:
        scores = None
        for task, weight in zip(tasks, weights, strict=True):
            scores = add(scores, task, weight)
        assert scores is not None
        return select(scores), scores

    return protect_weakest(len(tasks), weighted, lambda found: [lost(found[0], task) for task in tasks])


def _lost(kept: tuple[Kept, Kept], share: Scores) -> float:
    """Sum of the shares of the heads and neurons that go."""
    parts = zip((*share.heads, *share.feed_forward), (*kept[0].values(), *kept[1].values()), strict=True)
    return sum(float(values.sum()) - float(values[stays].sum()) for values, stays in parts)


def _layers_within_time(scores: Scores, latency: TimeBudget, milliseconds: float, multiple_of: int) -> list[int]:
    """Layers to keep: those go, the least important first, whose fixed time buys more importance in the others.

    Raises:
        ValueError: a single layer with nothing in it takes longer.
    """
    order = torch.stack(
        [one.sum() + two.sum() for one, two in zip(scores.heads, scores.feed_forward, strict=True)]
    ).argsort(stable=True)
    found: list[tuple[float, list[int]]] = []
    for gone in range(len(order)):
        kept = sorted(order[gone:].tolist())
        left = Scores(
            [scores.heads[layer] for layer in kept], [scores.feed_forward[layer] for layer in kept], scores.layers[kept]
        )
        if _time_of_blocks(len(kept), latency, milliseconds) >= 0:
            heads, feed_forward = _select_time(left, latency, milliseconds, multiple_of)
            parts = zip((*left.heads, *left.feed_forward), (*heads.values(), *feed_forward.values()), strict=True)
            found.append((sum(float(values[stays].sum()) for values, stays in parts), kept))
    if not found:
        most = latency.remove + _time_of_blocks(1, latency, milliseconds) / milliseconds
        raise ValueError(
            f"latency: expected to remove at most {most:.3f} of the time, since embeddings, task heads and the rest of "
            f"one layer take the others, found {latency.remove}; remove less"
        )
    # Of equals the one with most layers.
    return max(found, key=lambda item: (item[0], len(item[1])))[1]


def _time_of_blocks(layers: int, latency: TimeBudget, milliseconds: float) -> float:
    """What is left of the allowed time for the blocks of so many layers; below 0 where their other parts take more."""
    times = latency.table.batches[latency.batch_size]
    return (1.0 - latency.remove) * milliseconds - times.rest - times.layer * layers


def _select_time(scores: Scores, latency: TimeBudget, milliseconds: float, multiple_of: int) -> tuple[Kept, Kept]:
    """Heads and neurons to keep in all but a fraction of the milliseconds that a call takes."""
    times = latency.table.batches[latency.batch_size]
    budget = _time_of_blocks(len(scores.heads), latency, milliseconds)
    if budget < 0:
        raise ValueError(
            f"latency: expected to remove at most {latency.remove + budget / milliseconds:.3f} of the time, since "
            f"embeddings, task heads and the rest of {len(scores.heads)} layers take the others, found "
            f"{latency.remove}; remove layers too"
        )
    heads_cost, feed_forward_cost = block_costs(times, max(map(len, scores.heads)), max(map(len, scores.feed_forward)))
    return select_within_time(
        scores.heads,
        scores.feed_forward,
        heads_cost=heads_cost,
        feed_forward_cost=feed_forward_cost,
        budget=budget,
        multiple_of=multiple_of,
    )


def _fitting(
    feed_forward: float,
    whole: Sequence[int] | None,
    scores: Scores,
    costs: Costs | None,
    total: int | None,
    compute: float,
    latency: TimeBudget | None,
    milliseconds: float | None,
) -> Callable[[int], bool]:
    """Whether one width for all feed-forward parts is within what was asked for."""
    heads, layers = sum(map(len, scores.heads)), len(scores.feed_forward)
    if latency is not None and milliseconds is not None:
        times = latency.table.batches[latency.batch_size]
        heads_cost, width_cost = block_costs(times, max(map(len, scores.heads)), max(map(len, scores.feed_forward)))
        fixed = times.rest + times.layer * layers + sum(heads_cost(len(values)) for values in scores.heads)
        return lambda width: fixed + layers * width_cost(width) <= (1.0 - latency.remove) * milliseconds
    if costs is not None and total is not None:
        return lambda width: costs.head * heads + costs.neuron * layers * width <= (1.0 - compute) * total
    neurons = sum(map(len, scores.feed_forward)) if whole is None else sum(whole)
    return lambda width: layers * width <= (1.0 - feed_forward) * neurons + 1e-9


def _rearrange(kept: tuple[Kept, Kept], measured: Measured, how: Combine) -> tuple[tuple[Kept, Kept], int]:
    """Heads and neurons after the swaps within each layer, and how many were swapped."""
    tasks = list(measured.gradients)
    scales = {
        task: 1.0 / measured.rows[task] if how == "sum" else 1.0 / max(_total(measured.by_task[task]), 1e-300)
        for task in tasks
    }
    blocks = [
        (kind, layer, [_block(measured.gradients[task], kind, layer) * scales[task] ** 0.5 for task in tasks])
        for kind, choice in enumerate(kept)
        for layer in choice
    ]
    # With max and max_min each task counts for itself, with what it loses in all layers together.
    together = how in ("mean", "sum")
    costs = [[_cost(rows, kept[kind][layer]) for rows in by_task] for kind, layer, by_task in blocks]
    totals = [sum(column) for column in zip(*costs, strict=True)]
    found: tuple[Kept, Kept] = ({}, {})
    swapped = 0
    for (kind, layer, by_task), cost in zip(blocks, costs, strict=True):
        # Rows of all tasks below each other have the sum of the tasks' Fisher information.
        matrices = [torch.cat(by_task)] if together else by_task
        information = [matrix.double().T @ matrix.double() for matrix in matrices]
        elsewhere = None if together else [whole - own for whole, own in zip(totals, cost, strict=True)]
        stays = rearrange_layer(kept[kind][layer], information, elsewhere)
        found[kind][layer] = stays
        swapped += len(set(stays) - set(kept[kind][layer]))
        after = [_cost(rows, stays) for rows in by_task]
        totals = [whole - own + new for whole, own, new in zip(totals, cost, after, strict=True)]
    return found, swapped


def _block(gradients: Sequence[Gradients], kind: int, layer: int) -> Tensor:
    """(rows, parts): derivatives of all rows by the gates of one layer."""
    return torch.cat([(batch.feed_forward if kind else batch.heads)[layer] for batch in gradients])


def _cost(rows: Tensor, kept: Sequence[int]) -> float:
    gone = torch.ones(rows.shape[1], dtype=torch.bool)
    gone[list(kept)] = False
    return float(rows[:, gone].double().sum(1).square().sum())


def _total(scores: Scores) -> float:
    return sum(float(value.sum()) for value in (*scores.heads, *scores.feed_forward))


def mean_length(model: PreTrainedModel, data: Sequence[Mapping[str, Tensor]]) -> int:
    """Tokens or patches of a row that count, on the average.

    Args:
        model: reads the rows, where nothing else says how many tokens they have.
        data: batches.
    """
    if not data:
        raise ValueError("length: expected a number of tokens, or batches to count them in, found neither")
    if all("attention_mask" in batch for batch in data):
        return max(round(sum(int(batch["attention_mask"].sum()) for batch in data) / sum(map(rows_of, data))), 1)
    found: list[int] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    encoder = model.encoder if isinstance(model, MultiTaskModel) else encoder_of(model)
    assert isinstance(encoder, PreTrainedModel)
    hook = find_anatomy(encoder).layers[0].module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs_of({key: value[:1] for key, value in data[0].items()}))
    finally:
        hook.remove()
    return found[0]


# ---- cutting ----


def _cut_and_compare(
    model: PreTrainedModel,
    encoder: PreTrainedModel,
    data: Sequence[Mapping[str, Tensor]],
    heads: Kept,
    feed_forward: Kept,
) -> float:
    """Cut, and make sure on one batch that this equals masking.

    `find_anatomy` goes by shapes; a family that orders its heads in another way would pass it. This would not.

    Returns:
        The largest difference in any output, relative to the largest value of that output; 0 without data.
    """
    like = next(encoder.parameters())
    masked = []
    with torch.no_grad():
        for batch in data:
            with gated(find_anatomy(encoder), rows_of(batch), like.dtype, like.device) as gates:
                for all_gates, kept in ((gates.heads, heads), (gates.feed_forward, feed_forward)):
                    for layer, gate in enumerate(all_gates):
                        mask = torch.zeros_like(gate)
                        mask[:, kept[layer]] = 1
                        gate.copy_(mask)
                masked.append(_outputs(model(**inputs_of(batch))))
        cut(encoder, heads, feed_forward)
        found = [_outputs(model(**inputs_of(batch))) for batch in data]
    difference = max(
        (
            float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))
            for before, after in zip(masked, found, strict=True)
            for a, b in zip(before, after, strict=True)
        ),
        default=0.0,
    )
    check_cut(encoder, difference)
    return difference


def check_cut(encoder: PreTrainedModel, difference: float) -> None:
    """Refuse a cut that does not answer as the mask did.

    Args:
        encoder: that was cut.
        difference: the largest in any output, relative to the largest value of that output.

    Raises:
        UnsupportedEncoderError: it is larger than rounding, or not a number.
    """
    tolerance = max(_TOLERANCE, 8 * torch.finfo(encoder.dtype).eps)
    # Written so that NaN is refused too.
    if not difference <= tolerance:
        raise UnsupportedEncoderError(
            f"{type(encoder).__name__}: expected cutting to equal masking to {tolerance:.2g}, found a difference of "
            f"{difference:.2g}; heads or neurons of this encoder are ordered in a way that is not understood: do not "
            "use this model, and leave pruning out"
        )


def _outputs(outputs: Any) -> list[Tensor]:
    """The float tensors of a model's output, such as logits."""
    return [value for value in outputs.values() if isinstance(value, Tensor) and value.is_floating_point()]


def _check_arguments(
    heads: float,
    feed_forward: float,
    compute: float,
    length: int | None,
    latency: TimeBudget | None,
    importance: str,
    rearrange: bool,
) -> None:
    check_amounts(heads, feed_forward, compute)
    if latency is not None and not 0.0 < latency.remove < 1.0:
        raise ValueError(f"latency: expected a fraction above 0 and below 1 to remove, found {latency.remove}")
    if latency is not None and (heads or feed_forward or compute):
        raise ValueError(
            f"latency: expected it instead of heads, feed_forward and compute, since it chooses both, found heads "
            f"{heads}, feed_forward {feed_forward} and compute {compute} too; keep one of them"
        )
    if length is not None and not compute:
        raise ValueError(f"length: expected it with compute, which is counted at it, found {length} alone")
    if length is not None and length < 1:
        raise ValueError(f"length: expected 1 or more tokens, found {length}")
    if rearrange and importance != "fisher":
        raise ValueError(f"rearrange: expected importance 'fisher', whose derivatives it needs, found '{importance}'")


def _check_data(
    model: PreTrainedModel, data: Sequence[Mapping[str, Tensor]], importance: Importance, repair: bool
) -> None:
    if repair and not data:
        raise DataError("expected batches to repair the model on, found none; pass some rows, or leave repair out")
    if importance == "activation" and not data:
        raise DataError("expected batches to measure activations on, found none; pass some, or use 'magnitude'")
    if importance in _ON_LOSSES and not any(losses_of(model, batch) for batch in data):
        wanted = "labels_<task>" if isinstance(model, MultiTaskModel) else "labels"
        raise DataError(
            f"expected batches with '{wanted}' to measure importance on, found "
            f"{list(data[0]) if data else 'no batches'}; pass labelled rows, or use importance 'magnitude'"
        )
