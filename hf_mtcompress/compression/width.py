"""Fewer numbers in the hidden states, by importance; heads follow. The result is a smaller model of the same family."""

import time
from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from hf_mtcompress.compression.importance import shares
from hf_mtcompress.compression.measuring import combined, measure_importance, rows_of
from hf_mtcompress.compression.pruning import PruneReport
from hf_mtcompress.compression.uniform import select_uniform
from hf_mtcompress.errors import DataError
from hf_mtcompress.model.adapters import refuse_adapters
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.branches import refuse_sub_models
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import describe_structure, refuse_quantized
from hf_mtcompress.model.width import cut_width, narrower_anatomy


def prune_width(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], width: float, *, progress: bool = True
) -> tuple[PreTrainedModel, PruneReport]:
    """A copy of `model` with fewer numbers in its hidden states, and as many heads less; it has to be trained again.

    The importance of a number is the mean over rows of the squared derivative of a row's loss by a gate on it, at the
    input and the output of every layer; each task's count as shares of their sum. Norms then see fewer numbers, which
    no derivative tells: unlike heads and neurons, what is cut here is not what would be masked.

    Args:
        model: a `MultiTaskModel` with one encoder, or a stock model with a head, whose layers are alike.
        batches: model inputs with `labels` (stock) or `labels_<task>`.
        width: fraction to remove, above 0 and below 1; what is left is rounded to whole heads.
        progress: whether to show a progress bar.

    Returns:
        The narrower model, which loads with plain transformers, and what was done.

    Raises:
        ValueError: the fraction is out of range, or leaves no head, or removes none.
        DataError: no batches with labels.
        TrainingError: the loss is not a number.
        UnsupportedEncoderError: the encoder was cut unevenly, or its family has no such shape (MPNet, whose layers
            share what belongs to a head).

    References:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", CVPR (the squared derivative);
        Xia et al. 2022, "Structured Pruning Learns Compact and Accurate Models", ACL, who cut hidden states likewise.
    """
    if isinstance(model, MultiTaskModel):
        refuse_sub_models(model, "pruning")
        refuse_adapters(model, "pruning")
    if not 0.0 < width < 1.0:
        raise ValueError(f"width: expected a fraction above 0 and below 1 to remove, found {width}")
    start = time.monotonic()
    encoder = model.encoder if isinstance(model, MultiTaskModel) else encoder_of(model)
    anatomy = find_anatomy(encoder)
    refuse_quantized(encoder, anatomy)
    size, whole = anatomy.layers[0].attention.head_size, anatomy.hidden_size
    left = round(whole * (1 - width) / size) * size
    if not 0 < left < whole:
        raise ValueError(
            f"width: expected a fraction that leaves 1 to {whole // size - 1} of {whole // size} heads of {size} "
            f"numbers each, found {width}; remove another amount"
        )
    target = narrower_anatomy(model, left)
    data = [{key: value.to(encoder.device) for key, value in batch.items()} for batch in batches]
    training = model.training
    model.eval()
    try:
        measured = measure_importance(model, encoder, data, "first_order", states=True, progress=progress)
    finally:
        model.train(training)
    if not measured.by_task:
        raise DataError(
            f"expected batches with labels to measure importance on, found {list(data[0]) if data else 'no batches'}; "
            "pass labelled rows"
        )
    scores, first = combined(measured, "mean", one_scale=False), target.layers[0]
    (kept,) = select_uniform([scores.states], left).values()
    narrow = cut_width(
        model,
        kept,
        select_uniform(scores.heads, first.attention.heads),
        select_uniform(scores.feed_forward, first.feed_forward.width),
    )
    parts = narrow.encoder if isinstance(narrow, MultiTaskModel) else encoder_of(narrow)
    return narrow, PruneReport(
        importance="first_order",
        rows=sum(map(rows_of, data)),
        tasks=sorted(measured.by_task),
        before=describe_structure(encoder),
        after=describe_structure(parts),
        removed_layers=[],
        parameters_before=model.num_parameters(),
        parameters_after=narrow.num_parameters(),
        seconds=time.monotonic() - start,
        masked_difference=None,
        width_before=whole,
        width_after=left,
        lost_importance={task: 1 - float(shares(found).states[kept].sum()) for task, found in measured.by_task.items()},
    )
