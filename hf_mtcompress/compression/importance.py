"""How much the loss depends on every head, feed-forward neuron and layer.

First order: each part is multiplied by a gate that is one. The derivative of a row's loss by a gate says how the loss
would change were the part to fade; its square, averaged over rows, is the diagonal of the empirical Fisher information
of the gates. Gates sit on the inputs of the two output projections of a layer, which every family has, and on the
layer's change to the hidden state; `head_mask` is gone from transformers.

References:
    Michel, Levy, Neubig: Are Sixteen Heads Really Better than One? NeurIPS 2019 (gates on heads, first order).
    Molchanov et al.: Importance Estimation for Neural Network Pruning. CVPR 2019 (squared first-order terms).
    Kwon et al.: A Fast Post-Training Pruning Framework for Transformers. NeurIPS 2022 (Fisher information of gates).

Deviations: Michel et al. take absolute values and divide by the norm of each layer; here the scores stay comparable
between layers, as in Kwon et al., so that a layer that matters less loses more. Gates are per row, so one backward pass
gives the derivative of each row's loss.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_mtcompress.errors import TrainingError
from hf_mtcompress.model.anatomy import Anatomy


@dataclass
class Scores:
    """Importance of the parts of an encoder, larger is more; float64 on the CPU."""

    heads: list[Tensor]
    """By layer, of shape (heads,)."""
    feed_forward: list[Tensor]
    """By layer, of shape (width,)."""
    layers: Tensor
    """Of shape (layers,)."""


@contextmanager
def gated(anatomy: Anatomy, rows: int, dtype: torch.dtype, device: torch.device) -> Iterator["Gates"]:
    """Put gates of one on all parts while the block runs.

    Args:
        anatomy: of the encoder that runs.
        rows: batch size of what it will run on.
        dtype: of the hidden states.
        device: of the encoder.
    """
    gates = Gates(
        heads=[_ones(rows, layer.attention.heads, dtype, device) for layer in anatomy.layers],
        feed_forward=[_ones(rows, layer.feed_forward.width, dtype, device) for layer in anatomy.layers],
        layers=[_ones(rows, 1, dtype, device) for _ in anatomy.layers],
    )
    hooks = []
    for index, layer in enumerate(anatomy.layers):
        # A part that is gone already has nothing to gate.
        if layer.attention.heads:
            hook = _input_gate(gates.heads[index], layer.attention.head_size)
            hooks.append(layer.attention.output.register_forward_pre_hook(hook))
        if layer.feed_forward.width:
            hook = _input_gate(gates.feed_forward[index], 1)
            hooks.append(layer.feed_forward.output.register_forward_pre_hook(hook))
        hooks.append(layer.module.register_forward_hook(_change_gate(gates.layers[index]), with_kwargs=True))
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Gates:
    """Gates by layer, each of shape (rows, parts)."""

    heads: list[Tensor]
    feed_forward: list[Tensor]
    layers: list[Tensor]

    def all(self) -> list[Tensor]:
        """Every gate, heads first."""
        return [*self.heads, *self.feed_forward, *self.layers]


def first_order(anatomy: Anatomy, loss: Callable[[], Tensor], rows: int, like: Tensor) -> Scores:
    """Mean over rows of the squared derivatives of a row's loss by the gates.

    Args:
        anatomy: of the encoder.
        loss: runs the model on one batch; the mean over its rows.
        rows: rows of that batch.
        like: a weight of the encoder, for dtype and device.

    Raises:
        TrainingError: the loss is not a number.
    """
    with torch.enable_grad(), gated(anatomy, rows, like.dtype, like.device) as gates:
        value = loss()
        if not torch.isfinite(value):
            raise TrainingError(
                f"expected a finite loss to measure importance on, found {value.item()}; check the labels and the model"
            )
        found = torch.autograd.grad(value, gates.all(), allow_unused=True)
    # The loss is a mean: times rows it is the derivative of each row's own loss.
    squares = [
        torch.zeros(gate.shape[1], dtype=torch.float64)
        if gradient is None
        else (gradient.detach().double() * rows).square().mean(0).cpu()
        for gate, gradient in zip(gates.all(), found, strict=True)
    ]
    count = len(anatomy.layers)
    return Scores(squares[:count], squares[count : 2 * count], torch.cat(squares[2 * count :]))


def block_influence(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """How much each layer changes its input: one minus the cosine between the hidden state before and after it.

    Args:
        model: an encoder, or a model that returns hidden states.
        batches: model inputs.

    Returns:
        (layers,) float64, the mean over positions that count; a layer near 0 can be left out cheaply.

    References:
        Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (eq. 1).
    """
    total, count = torch.zeros(0, dtype=torch.float64), 0.0
    with torch.no_grad():
        for batch in batches:
            states = model(**batch, output_hidden_states=True).hidden_states
            mask = batch.get("attention_mask", torch.ones(states[0].shape[:2], device=states[0].device)).double()
            changes = [
                ((1 - nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)) * mask).sum()
                for before, after in pairwise(states)
            ]
            found = torch.stack(changes).cpu()
            total = found if count == 0 else total + found
            count += float(mask.sum())
    return total / max(count, 1.0)


def magnitude(anatomy: Anatomy) -> Scores:
    """Norm of the weights into a part times the norm of the weights out of it; needs no data."""
    heads, widths, layers = [], [], []
    for layer in anatomy.layers:
        attention, part = layer.attention, layer.feed_forward
        heads.append(
            _norm_out(attention.output, attention.heads)
            * _norm_in(attention.projections.values(), attention.blocks, attention.heads)
        )
        widths.append(_norm_out(part.output, part.width) * _norm_in(part.inputs.values(), part.blocks, part.width))
        layers.append(heads[-1].square().sum().sqrt() + widths[-1].square().sum().sqrt())
    return Scores(heads, widths, torch.stack(layers))


def combine(by_task: list[Scores]) -> Scores:
    """Mean over tasks; each task's heads, neurons and layers are first scaled to a sum of one.

    So a task with a larger loss does not decide alone.
    """

    def mean(pick: Callable[[Scores], list[Tensor]]) -> list[Tensor]:
        shares = []
        for scores in by_task:
            values = pick(scores)
            total = sum(float(value.sum()) for value in values)
            shares.append([value / total if total > 0 else value for value in values])
        return [torch.stack(same).mean(0) for same in zip(*shares, strict=True)]

    return Scores(
        mean(lambda scores: scores.heads), mean(lambda scores: scores.feed_forward), mean(lambda s: [s.layers])[0]
    )


def add(total: Scores | None, more: Scores, weight: float) -> Scores:
    """`total` plus `weight` times `more`."""
    scaled = Scores(
        [value * weight for value in more.heads],
        [value * weight for value in more.feed_forward],
        more.layers * weight,
    )
    if total is None:
        return scaled
    return Scores(
        [a + b for a, b in zip(total.heads, scaled.heads, strict=True)],
        [a + b for a, b in zip(total.feed_forward, scaled.feed_forward, strict=True)],
        total.layers + scaled.layers,
    )


def _ones(rows: int, parts: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(rows, parts, dtype=dtype, device=device, requires_grad=True)


def _input_gate(gate: Tensor, size: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # (rows, tokens, parts * size) times (rows, 1, parts * size)
        return (args[0] * gate.repeat_interleave(size, dim=1)[:, None], *args[1:])

    return hook


def _change_gate(gate: Tensor) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        # At zero the layer is skipped, norms and all.
        changed = before + gate[:, None] * (after - before)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _norm_in(linears: Any, blocks: int, parts: int) -> Tensor:
    total = torch.zeros(parts, dtype=torch.float64)
    for linear in linears:
        if parts:
            rows = linear.weight.detach().double().cpu().reshape(blocks, parts, -1)
            total += rows.square().sum((0, 2))
    return total.sqrt()


def _norm_out(output: nn.Module, parts: int) -> Tensor:
    if not parts:
        return torch.zeros(0, dtype=torch.float64)
    assert isinstance(output, nn.Linear)
    columns = output.weight.detach().double().cpu().reshape(output.out_features, parts, -1)
    return columns.square().sum((0, 2)).sqrt()
