"""Structured pruning: measure importance on data, choose, cut; the model gets really smaller and faster."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_mtcompress.compression.importance import Scores, add, combine, first_order, gated, magnitude
from hf_mtcompress.compression.selection import check_fraction, select_heads, select_layers, select_neurons
from hf_mtcompress.errors import DataError, UnsupportedEncoderError
from hf_mtcompress.model.adapters import refuse_adapters
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.branches import refuse_sub_models
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import cut, describe_structure, is_vanilla, keep_layers

_TOLERANCE = 1e-3
"""Largest difference, relative to the largest hidden value, between masking and cutting."""


@dataclass(kw_only=True)
class PruneReport:
    """What a call of `prune` did; plain data."""

    importance: str
    rows: int
    """Rows that importance was measured on; 0 for magnitude."""
    tasks: list[str]
    before: dict[str, Any]
    """Structure before, see `hf_mtcompress.model.surgery`."""
    after: dict[str, Any]
    removed_layers: list[int]
    parameters_before: int
    parameters_after: int
    seconds: float
    masked_difference: float
    """Largest relative difference between the model with the parts masked and with the parts cut."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Importance of the heads (by layer) and of the layers that the choice was made on."""


def prune(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    heads: float = 0.0,
    feed_forward: float = 0.0,
    layers: int = 0,
    importance: Literal["first_order", "magnitude"] = "first_order",
    multiple_of: int = 32,
    progress: bool = True,
) -> PruneReport:
    """Cut the least important heads, feed-forward neurons and layers out of `model`, in place.

    Layers go first; the importance of heads and neurons is then measured again on what is left.

    Args:
        model: a `MultiTaskModel`, or a stock model with a head (`AutoModelFor...`).
        batches: model inputs with `labels` (stock) or `labels_<task>`; the loss of each task counts the same. For
            `magnitude` they only serve to check the cut and may be empty.
        heads: fraction of all attention heads to remove, 0..1; each layer keeps one unless it is 1.
        feed_forward: fraction of all feed-forward neurons to remove, 0..1.
        layers: number of whole layers to remove.
        importance: `first_order` (on data) or `magnitude` (of weights).
        multiple_of: feed-forward widths become multiples of this, which is what kernels like.
        progress: whether to show progress bars.

    Returns:
        What was removed. A model whose stock config cannot express its shape saves the structure with it.

    Raises:
        ValueError: a fraction or count is out of range.
        DataError: no batches, or none with labels, to measure importance on.
        TrainingError: the loss is not a number.
        UnsupportedEncoderError: the encoder is built in another way; see `find_anatomy`.
    """
    if isinstance(model, MultiTaskModel):
        refuse_sub_models(model, "pruning")
        refuse_adapters(model, "pruning")
    start = time.monotonic()
    check_fraction("heads", heads)
    check_fraction("feed_forward", feed_forward)
    encoder = model.encoder if isinstance(model, MultiTaskModel) else encoder_of(model)
    count = len(find_anatomy(encoder).layers)
    if not 0 <= layers < count:
        raise ValueError(f"layers: expected 0 to {count - 1} layers to remove from {count}, found {layers}")
    device = next(encoder.parameters()).device
    data = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    if importance == "first_order":
        _check_labels(model, data)
    before, parameters_before = describe_structure(encoder), _count(model)
    removed: list[int] = []
    difference = 0.0
    was_training = model.training
    model.eval()
    try:
        scores = _score(model, encoder, data, importance, progress)
        layer_scores = scores.layers.tolist()
        if layers:
            kept = select_layers(scores.layers, layers)
            removed = [index for index in range(count) if index not in kept]
            keep_layers(encoder, kept)
            if heads or feed_forward:
                scores = _score(model, encoder, data, importance, progress)
        if heads or feed_forward:
            kept_heads = select_heads(scores.heads, heads)
            kept_neurons = select_neurons(scores.feed_forward, feed_forward, multiple_of)
            difference = _cut_and_compare(model, encoder, data[:1], kept_heads, kept_neurons)
    finally:
        model.train(was_training)
    if isinstance(model, MultiTaskModel):
        _update_config(model)
    return PruneReport(
        importance=importance,
        rows=sum(map(_rows, data)) if importance == "first_order" else 0,
        tasks=sorted({task for batch in data for task in _tasks(model, batch)}),
        before=before,
        after=describe_structure(encoder),
        removed_layers=removed,
        parameters_before=parameters_before,
        parameters_after=_count(model),
        seconds=time.monotonic() - start,
        masked_difference=difference,
        scores={"heads": [value.tolist() for value in scores.heads], "layers": layer_scores},
    )


def _score(
    model: PreTrainedModel,
    encoder: PreTrainedModel,
    data: Sequence[Mapping[str, Tensor]],
    importance: str,
    progress: bool,
) -> Scores:
    """Importance of all parts; with several tasks the mean of the tasks' shares."""
    anatomy = find_anatomy(encoder)
    if importance == "magnitude":
        return magnitude(anatomy)
    like = next(encoder.parameters())
    by_task: dict[str, Scores] = {}
    for batch in tqdm(data, desc="measuring importance", unit="batch", disable=not progress):
        inputs = _inputs(batch)
        rows = _rows(batch)
        for task, labels in _tasks(model, batch).items():
            found = first_order(anatomy, lambda: model(**inputs, **labels).loss, rows, like)  # noqa: B023 - called at once
            by_task[task] = add(by_task.get(task), found, float(rows))
    return combine(list(by_task.values()))


def _cut_and_compare(
    model: PreTrainedModel,
    encoder: PreTrainedModel,
    data: Sequence[Mapping[str, Tensor]],
    heads: dict[int, list[int]],
    feed_forward: dict[int, list[int]],
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
            with gated(find_anatomy(encoder), _rows(batch), like.dtype, like.device) as gates:
                for all_gates, kept in ((gates.heads, heads), (gates.feed_forward, feed_forward)):
                    for layer, gate in enumerate(all_gates):
                        mask = torch.zeros_like(gate)
                        mask[:, kept[layer]] = 1
                        gate.copy_(mask)
                masked.append(_outputs(model(**_inputs(batch))))
        cut(encoder, heads, feed_forward)
        found = [_outputs(model(**_inputs(batch))) for batch in data]
    difference = max(
        (
            float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))
            for before, after in zip(masked, found, strict=True)
            for a, b in zip(before, after, strict=True)
        ),
        default=0.0,
    )
    # Written so that NaN is refused too.
    if not difference <= _TOLERANCE:
        raise UnsupportedEncoderError(
            f"{type(encoder).__name__}: expected cutting to equal masking to {_TOLERANCE}, found a difference of "
            f"{difference:.2g}; heads or neurons of this encoder are ordered in a way that is not understood: do not "
            "use this model, and leave pruning out"
        )
    return difference


def _update_config(model: MultiTaskModel) -> None:
    model.refresh_config()
    structures = dict(model.config.structure or {})
    for name, encoder in model.encoders.items():
        assert isinstance(encoder, PreTrainedModel)
        structures.pop(name, None)
        if not is_vanilla(encoder):
            structures[name] = describe_structure(encoder)
    model.config.structure = structures


def _tasks(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By task, the labels to pass for its loss alone."""
    return {
        (key.removeprefix("labels_") if isinstance(model, MultiTaskModel) else "task"): {key: value}
        for key, value in batch.items()
        if key.startswith("labels")
    }


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if not key.startswith("labels")}


def _outputs(outputs: Any) -> list[Tensor]:
    """The float tensors of a model's output, such as logits."""
    return [value for value in outputs.values() if isinstance(value, Tensor) and value.is_floating_point()]


def _rows(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_labels(model: PreTrainedModel, data: Sequence[Mapping[str, Tensor]]) -> None:
    if not any(_tasks(model, batch) for batch in data):
        wanted = "labels_<task>" if isinstance(model, MultiTaskModel) else "labels"
        raise DataError(
            f"expected batches with '{wanted}' to measure importance on, found "
            f"{list(data[0]) if data else 'no batches'}; pass labelled rows, or use importance 'magnitude'"
        )
