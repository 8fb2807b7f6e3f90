"""Importance of the parts of a model's encoder for each of its tasks, measured on batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_mtcompress.compression.importance import (
    Gradients,
    Scores,
    activation,
    add,
    change_gate,
    gate_gradients,
    magnitude,
    random_scores,
)
from hf_mtcompress.compression.importance import combine as combine_tasks
from hf_mtcompress.errors import DataError, TrainingError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel

Importance = Literal["first_order", "fisher", "magnitude", "activation", "random"]
"""What counts as important."""


@dataclass
class Measured:
    """What `measure_importance` found."""

    by_task: dict[str, Scores]
    """Sums over rows; by the name "" where nothing was measured on tasks."""
    rows: dict[str, int]
    gradients: dict[str, list[Gradients]]
    """By task and batch, where the rearrangement needs them."""


def measure_importance(
    model: PreTrainedModel,
    encoder: PreTrainedModel,
    data: Sequence[Mapping[str, Tensor]],
    importance: Importance,
    *,
    keep_gradients: bool = False,
    states: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Measured:
    """Importance of all parts for each task.

    Args:
        model: a `MultiTaskModel` or a stock model with a head, in evaluation mode.
        encoder: its encoder.
        data: model inputs with labels, on its device.
        importance: see `prune`.
        keep_gradients: keep those of each row, too.
        states: with `first_order` and `fisher`, also of the numbers in the hidden states.
        seed: of `random`.
        progress: whether to show a progress bar.

    Raises:
        TrainingError: the loss is not a number.
    """
    anatomy = find_anatomy(encoder)
    measured = Measured({}, {}, {})
    match importance:
        case "magnitude":
            return Measured({"": magnitude(anatomy)}, {}, {})
        case "random":
            return Measured({"": random_scores(anatomy, seed)}, {}, {})
        case "first_order" | "fisher" | "activation":
            pass
        case _:
            assert_never(importance)
    like = next(encoder.parameters())
    for batch in tqdm(data, desc="measuring importance", unit="batch", disable=not progress):
        inputs = inputs_of(batch)
        rows = rows_of(batch)
        if importance == "activation":
            mask = batch.get("attention_mask")
            scores = activation(anatomy, lambda: model(**inputs), mask)  # noqa: B023 - called at once
            # Means over positions: a batch counts by those that it has.
            weight = float(rows if mask is None else mask.sum())
            for task in losses_of(model, batch) or {"": {}}:
                measured.by_task[task] = add(measured.by_task.get(task), scores, weight)
                measured.rows[task] = measured.rows.get(task, 0) + rows
            continue
        for task, labels in losses_of(model, batch).items():
            found = gate_gradients(
                anatomy,
                lambda: model(**inputs, **labels).loss,  # noqa: B023 - called at once
                rows,
                like,
                states=states,
            )
            measured.by_task[task] = add(measured.by_task.get(task), found.scores(), float(rows))
            measured.rows[task] = measured.rows.get(task, 0) + rows
            if keep_gradients:
                measured.gradients.setdefault(task, []).append(found.rounded())
    return measured


def leave_one_out(
    model: PreTrainedModel, encoder: PreTrainedModel, data: Sequence[Mapping[str, Tensor]], *, progress: bool = True
) -> Tensor:
    """How much each layer's absence adds to the loss: one pass over the rows for each layer.

    Unlike derivatives, which see what a little less of a layer would do, this is what taking it out does.

    Args:
        model: a `MultiTaskModel` or a stock model with a head, in evaluation mode.
        encoder: its encoder.
        data: model inputs with labels, on its device.
        progress: whether to show a progress bar.

    Returns:
        (layers,) float64: the mean over tasks of the shares in what all layers add for that task; 0 for a layer whose
        absence helps.

    Raises:
        DataError: there are no labels.
        TrainingError: a loss is not a number.
    """
    layers = find_anatomy(encoder).layers

    def losses() -> Tensor:
        sums: dict[str, float] = {}
        with torch.no_grad():
            for batch in data:
                for task, labels in losses_of(model, batch).items():
                    loss = float(model(**inputs_of(batch), **labels).loss)
                    sums[task] = sums.get(task, 0.0) + loss * rows_of(batch)
        return torch.tensor([sums[task] for task in sorted(sums)], dtype=torch.float64)

    whole = losses()
    if not len(whole):
        raise DataError("expected batches with labels to leave layers out on, found none; pass labelled rows")
    like = next(encoder.parameters())
    closed = change_gate(torch.zeros(1, dtype=like.dtype, device=like.device))
    added = []
    for layer in tqdm(layers, desc="leaving layers out", unit="layer", disable=not progress):
        hook = layer.module.register_forward_hook(closed, with_kwargs=True)
        try:
            added.append((losses() - whole).clamp(min=0))
        finally:
            hook.remove()
    found = torch.stack(added)
    if not found.isfinite().all():
        raise TrainingError("expected a finite loss without each layer, found another; check the labels and the model")
    return (found / found.sum(0).clamp(min=1e-12)).mean(1)


def combined(measured: Measured, how: Literal["mean", "sum", "max"], one_scale: bool) -> Scores:
    """One score for each part; see `hf_mtcompress.compression.importance.combine`."""
    if list(measured.by_task) == [""]:
        return measured.by_task[""]
    by_task = measured.by_task.values()
    if how == "sum":
        by_task = [add(None, scores, 1.0 / measured.rows[task]) for task, scores in measured.by_task.items()]
    return combine_tasks(list(by_task), how, one_scale)


def losses_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By task, the labels to pass for its loss alone."""
    return {
        (key.removeprefix("labels_") if isinstance(model, MultiTaskModel) else "task"): {key: value}
        for key, value in batch.items()
        if key.startswith("labels")
    }


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch without labels."""
    return {key: value for key, value in batch.items() if not key.startswith("labels")}


def rows_of(batch: Mapping[str, Tensor]) -> int:
    """How many rows a batch has."""
    return len(next(iter(batch.values())))
