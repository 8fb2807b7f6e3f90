"""Fewer numbers in the hidden states, by importance; heads follow. The result is a smaller model of the same family."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_mtcompress.compression.importance import gated
from hf_mtcompress.compression.pruning import PruneReport
from hf_mtcompress.compression.uniform import select_uniform
from hf_mtcompress.errors import DataError, TrainingError
from hf_mtcompress.model.adapters import refuse_adapters
from hf_mtcompress.model.anatomy import Anatomy, encoder_of, find_anatomy
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
        scores, rows = _measure(model, anatomy, data, progress)
    finally:
        model.train(training)
    first = target.layers[0]
    numbers, heads, neurons = _joined(scores, len(anatomy.layers))
    kept_heads = select_uniform(heads, first.attention.heads)
    kept_neurons = select_uniform(neurons, first.feed_forward.width)
    (kept,) = select_uniform([numbers], left).values()
    narrow = cut_width(model, kept, kept_heads, kept_neurons)
    parts = narrow.encoder if isinstance(narrow, MultiTaskModel) else encoder_of(narrow)
    return narrow, PruneReport(
        importance="first_order",
        rows=rows,
        tasks=sorted(scores),
        before=describe_structure(encoder),
        after=describe_structure(parts),
        removed_layers=[],
        parameters_before=model.num_parameters(),
        parameters_after=narrow.num_parameters(),
        seconds=time.monotonic() - start,
        masked_difference=None,
        width_before=whole,
        width_after=left,
        lost_importance={
            task: 1 - float(gates[0][kept].sum() / gates[0].sum()) for task, gates in scores.items() if gates[0].any()
        },
    )


def _measure(
    model: PreTrainedModel, anatomy: Anatomy, data: Sequence[Mapping[str, Tensor]], progress: bool
) -> tuple[dict[str, list[Tensor]], int]:
    """By task, squared derivatives by gates on numbers, then on heads and on neurons of each layer; and all rows."""
    scores: dict[str, list[Tensor]] = {}
    every_row = 0
    like = next(iter(anatomy.stack.parameters()))
    for batch in tqdm(data, desc="measuring importance", unit="batch", disable=not progress):
        inputs = {key: value for key, value in batch.items() if not key.startswith("labels")}
        rows = len(next(iter(batch.values())))
        every_row += rows
        for key in batch:
            if not key.startswith("labels"):
                continue
            task = key.removeprefix("labels_") if isinstance(model, MultiTaskModel) else "task"
            with (
                torch.enable_grad(),
                gated(anatomy, rows, like.dtype, like.device) as gates,
                _gated_states(anatomy, rows, like) as gate,
            ):
                loss = model(**inputs, **{key: batch[key]}).loss
                every = [gate, *gates.heads, *gates.feed_forward]
                found = torch.autograd.grad(loss, every, allow_unused=True)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"expected a finite loss to measure importance on, found {loss.item()}; check the labels and the "
                    "model"
                )
            squares = [
                torch.zeros(one.shape[1], dtype=torch.float64)
                if gradient is None
                # The loss is a mean: times rows it is the derivative of each row's own loss.
                else (gradient.double() * rows).square().sum(0).cpu()
                for one, gradient in zip(every, found, strict=True)
            ]
            scores[task] = [a + b for a, b in zip(scores[task], squares, strict=True)] if task in scores else squares
    if not scores:
        raise DataError(
            f"expected batches with labels to measure importance on, found {list(data[0]) if data else 'no batches'}; "
            "pass labelled rows"
        )
    return scores, every_row


def _joined(scores: Mapping[str, Sequence[Tensor]], layers: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Means over tasks of each kind's shares."""

    def mean(kind: slice) -> list[Tensor]:
        totals = {task: float(sum(values.sum() for values in gates[kind])) for task, gates in scores.items()}
        shares = [[values / (totals[task] or 1.0) for values in gates[kind]] for task, gates in scores.items()]
        return [torch.stack(same).mean(0) for same in zip(*shares, strict=True)]

    return mean(slice(0, 1))[0], mean(slice(1, 1 + layers)), mean(slice(1 + layers, None))


@contextmanager
def _gated_states(anatomy: Anatomy, rows: int, like: Tensor) -> Iterator[Tensor]:
    """One gate for each number and row, at the input of the first layer and the output of every one."""
    gate = torch.ones(rows, anatomy.hidden_size, dtype=like.dtype, device=like.device, requires_grad=True)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (args[0] * gate[:, None], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * gate[:, None]}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (output[0] * gate[:, None], *output[1:]) if isinstance(output, tuple) else output * gate[:, None]

    hooks = [anatomy.stack[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in anatomy.stack]
    try:
        yield gate
    finally:
        for hook in hooks:
            hook.remove()
