"""How much the loss depends on every head, feed-forward neuron and layer.

First order: each part is multiplied by a gate that is one. The derivative of a row's loss by a gate says how the loss
would change were the part to fade; its square, averaged over rows, is the diagonal of the empirical Fisher information
of the gates. Gates sit on the inputs of the two output projections of a layer, which every family has, and on the
layer's change to the hidden state; `head_mask` is gone from transformers.

`fisher` takes the same derivatives, row by row, so that also how two gates of a part act together is known (the
off-diagonal of the Fisher information, see `rearrange` in `selection.py`), and puts heads and neurons on one scale.

What the others are to be held against: `magnitude` looks at weights alone, `activation` at what flows through them, and
`random_scores` at nothing.

References:
    Michel, Levy, Neubig: Are Sixteen Heads Really Better than One? NeurIPS 2019 (gates on heads, first order).
    Molchanov et al.: Importance Estimation for Neural Network Pruning. CVPR 2019 (squared first-order terms).
    Kwon et al.: A Fast Post-Training Pruning Framework for Transformers. NeurIPS 2022 (Fisher information of gates).
    Sun et al.: A Simple and Effective Pruning Approach for Large Language Models. ICLR 2024 (activation times weight).

Deviations: Michel et al. take absolute values and divide by the norm of each layer; here the scores stay comparable
between layers, as in Kwon et al., so that a layer that matters less loses more. Gates are per row, so one backward pass
gives the derivative of each row's loss; Kwon et al. square the derivative of a whole batch's loss. Sun et al. score
single weights; here the score of a part is the energy of all that it sends to the hidden state.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, assert_never

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
    states: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Of shape (hidden size,), of the numbers in the hidden states; empty where they were not asked for."""


@dataclass
class Gradients:
    """Derivatives of each row's loss by the gates; float64 on the CPU."""

    heads: list[Tensor]
    """By layer, of shape (rows, heads)."""
    feed_forward: list[Tensor]
    """By layer, of shape (rows, width)."""
    layers: list[Tensor]
    """By layer, of shape (rows, 1)."""
    states: list[Tensor] = field(default_factory=list)
    """One of shape (rows, hidden size), or none."""

    def scores(self) -> Scores:
        """Mean over rows of the squares: the diagonal of the empirical Fisher information."""

        def diagonal(values: list[Tensor]) -> list[Tensor]:
            return [value.double().square().mean(0) for value in values]

        heads, widths, layers, states = map(diagonal, (self.heads, self.feed_forward, self.layers, self.states))
        return Scores(heads, widths, torch.cat(layers), *states)

    def rounded(self) -> "Gradients":
        """In float32, to keep those of many rows."""
        kinds = self.heads, self.feed_forward, self.layers, self.states
        return Gradients(*([value.float() for value in kind] for kind in kinds))


Combination = Literal["mean", "sum", "max"]
"""How the scores of several tasks become one."""


@contextmanager
def gated(
    anatomy: Anatomy, rows: int, dtype: torch.dtype, device: torch.device, *, states: bool = False
) -> Iterator["Gates"]:
    """Put gates of one on all parts while the block runs.

    Args:
        anatomy: of the encoder that runs.
        rows: batch size of what it will run on.
        dtype: of the hidden states.
        device: of the encoder.
        states: whether the numbers in the hidden states have gates too, each the same one at the input of the first
            layer and the output of every layer.
    """
    gates = Gates(
        heads=[_ones(rows, layer.attention.heads, dtype, device) for layer in anatomy.layers],
        feed_forward=[_ones(rows, layer.feed_forward.width, dtype, device) for layer in anatomy.layers],
        layers=[_ones(rows, 1, dtype, device) for _ in anatomy.layers],
        states=[_ones(rows, anatomy.hidden_size, dtype, device)] if states else [],
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
        hooks.append(layer.module.register_forward_hook(change_gate(gates.layers[index]), with_kwargs=True))
    for gate in gates.states:
        hooks.append(anatomy.layers[0].module.register_forward_pre_hook(_states_in_gate(gate), with_kwargs=True))
        hooks += [layer.module.register_forward_hook(_states_out_gate(gate)) for layer in anatomy.layers]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Gates:
    """Gates by layer, each of shape (rows, parts); one or none for the hidden states."""

    heads: list[Tensor]
    feed_forward: list[Tensor]
    layers: list[Tensor]
    states: list[Tensor]

    def all(self) -> list[Tensor]:
        """Every gate, heads first."""
        return [*self.heads, *self.feed_forward, *self.layers, *self.states]


def gate_gradients(
    anatomy: Anatomy, loss: Callable[[], Tensor], rows: int, like: Tensor, *, states: bool = False
) -> Gradients:
    """Derivatives of each row's loss by each gate.

    Args:
        anatomy: of the encoder.
        loss: runs the model on one batch; the mean over its rows.
        rows: rows of that batch.
        like: a weight of the encoder, for dtype and device.
        states: see `gated`.

    Raises:
        TrainingError: the loss is not a number.
    """
    with torch.enable_grad(), gated(anatomy, rows, like.dtype, like.device, states=states) as gates:
        value = loss()
        if not torch.isfinite(value):
            raise TrainingError(
                f"expected a finite loss to measure importance on, found {value.item()}; check the labels and the model"
            )
        found = torch.autograd.grad(value, gates.all(), allow_unused=True)
    # The loss is a mean: times rows it is the derivative of each row's own loss.
    by_row = [
        torch.zeros(gate.shape, dtype=torch.float64) if gradient is None else (gradient.detach().double() * rows).cpu()
        for gate, gradient in zip(gates.all(), found, strict=True)
    ]
    count = len(anatomy.layers)
    ends = [0, count, 2 * count, 3 * count, None]
    return Gradients(*(by_row[begin:end] for begin, end in pairwise(ends)))


def from_weight_gradients(anatomy: Anatomy) -> tuple[list[Tensor], list[Tensor]]:
    """Squared derivatives of the loss by gates on heads and neurons, from the gradients that a backward pass left.

    The gates of this file scale the inputs of an output projection, so the derivative by one of them is the sum of
    weight times gradient over the columns of its part: training knows it for nothing. Here it is that of the mean loss
    of a whole step, not of single rows; as in Molchanov et al. its square is taken.

    Returns:
        By layer, of shapes (heads,) and (width,), float32 on the device of the weights; zeros without gradient.
    """

    def squared(output: nn.Module, parts: int) -> Tensor:
        if not isinstance(output, nn.Linear):
            return torch.zeros(0)
        weight = output.weight
        if weight.grad is None:
            return torch.zeros(parts, device=weight.device)
        products = (weight.detach().float() * weight.grad.float()).sum(0)
        # A step that overflowed says nothing; the optimizer leaves it out too.
        return products.unflatten(0, (parts, -1)).sum(1).square().nan_to_num(0.0, 0.0, 0.0)

    layers = anatomy.layers
    return (
        [squared(layer.attention.output, layer.attention.heads) for layer in layers],
        [squared(layer.feed_forward.output, layer.feed_forward.width) for layer in layers],
    )


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


def activation(anatomy: Anatomy, run: Callable[[], object], mask: Tensor | None = None) -> Scores:
    """Mean squared length of what a part adds to the hidden state, before its bias; needs no labels.

    Of a layer: the squared length of its change, relative to that of its input.

    Args:
        anatomy: of the encoder.
        run: runs the model on one batch.
        mask: (rows, tokens), 1 where a position counts; default: everywhere.
    """
    count = len(anatomy.layers)
    heads = [torch.zeros(layer.attention.heads, dtype=torch.float64) for layer in anatomy.layers]
    widths = [torch.zeros(layer.feed_forward.width, dtype=torch.float64) for layer in anatomy.layers]
    layers = torch.zeros(count, dtype=torch.float64)

    def sent(scores: list[Tensor], index: int, size: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            features = _counted(args[0], mask).unflatten(1, (-1, size))
            assert isinstance(module, nn.Linear)
            weight = module.weight.detach().cpu().double().unflatten(1, (-1, size))
            gram = torch.einsum("nps,npt->pst", features, features) / len(features)
            scores[index] = torch.einsum("pst,dps,dpt->p", gram, weight, weight)

        return hook

    def changed(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = _counted(args[0] if args else kwargs["hidden_states"], mask)
            after = _counted(output[0] if isinstance(output, tuple) else output, mask)
            layers[index] = ((after - before).square().sum(1) / before.square().sum(1).clamp(min=1e-12)).mean()

        return hook

    hooks = []
    for index, layer in enumerate(anatomy.layers):
        # A part that is gone already sends nothing.
        if layer.attention.heads:
            hook = sent(heads, index, layer.attention.head_size)
            hooks.append(layer.attention.output.register_forward_pre_hook(hook))
        if layer.feed_forward.width:
            hooks.append(layer.feed_forward.output.register_forward_pre_hook(sent(widths, index, 1)))
        hooks.append(layer.module.register_forward_hook(changed(index), with_kwargs=True))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return Scores(heads, widths, layers)


def random_scores(anatomy: Anatomy, seed: int) -> Scores:
    """Numbers that mean nothing; a method that is worth its time is better than them.

    Drawn between 0 and 1 and multiplied by the weights of a part, so that neither heads nor neurons are favoured where
    both compete for one budget.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(parts: int, weights: int = 1) -> Tensor:
        return torch.rand(parts, dtype=torch.float64, generator=generator) * weights

    heads = [
        draw(attention.heads, attention.head_size * (len(attention.projections) * attention.blocks + 1))
        for attention in (layer.attention for layer in anatomy.layers)
    ]
    widths = [
        draw(part.width, len(part.inputs) * part.blocks + 1)
        for part in (layer.feed_forward for layer in anatomy.layers)
    ]
    return Scores(heads, widths, draw(len(anatomy.layers)))


def shares(scores: Scores, one_scale: bool = False) -> Scores:
    """Each score as a share of the sum over all parts of its kind.

    So a task with a larger loss does not decide alone.

    Args:
        scores: of one task.
        one_scale: heads and neurons count as one kind, so that they can be weighed against each other.
    """
    by_kind = [sum(float(value.sum()) for value in values) for values in (scores.heads, scores.feed_forward)]
    heads, widths = [sum(by_kind)] * 2 if one_scale else by_kind
    layers = float(scores.layers.sum())

    def share(value: Tensor, total: float) -> Tensor:
        return value / total if total > 0 else value

    return Scores(
        [share(value, heads) for value in scores.heads],
        [share(value, widths) for value in scores.feed_forward],
        share(scores.layers, layers),
        share(scores.states, float(scores.states.sum())),
    )


def combine(by_task: list[Scores], how: Combination = "mean", one_scale: bool = False) -> Scores:
    """One score for each part from those of all tasks.

    Args:
        by_task: the scores of each task.
        how: `mean` or `max` of the tasks' shares (see `shares`), or the `sum` of the scores as they are, in which a
            task with a larger loss counts more.
        one_scale: see `shares`.
    """
    if how != "sum":
        by_task = [shares(scores, one_scale) for scores in by_task]

    def join(same: tuple[Tensor, ...]) -> Tensor:
        stacked = torch.stack(same)
        match how:
            case "mean":
                return stacked.mean(0)
            case "sum":
                return stacked.sum(0)
            case "max":
                return stacked.amax(0)
            case _:
                assert_never(how)

    return Scores(
        [join(same) for same in zip(*(scores.heads for scores in by_task), strict=True)],
        [join(same) for same in zip(*(scores.feed_forward for scores in by_task), strict=True)],
        join(tuple(scores.layers for scores in by_task)),
        join(tuple(scores.states for scores in by_task)),
    )


def add(total: Scores | None, more: Scores, weight: float) -> Scores:
    """`total` plus `weight` times `more`."""
    scaled = Scores(
        [value * weight for value in more.heads],
        [value * weight for value in more.feed_forward],
        more.layers * weight,
        more.states * weight,
    )
    if total is None:
        return scaled
    return Scores(
        [a + b for a, b in zip(total.heads, scaled.heads, strict=True)],
        [a + b for a, b in zip(total.feed_forward, scaled.feed_forward, strict=True)],
        total.layers + scaled.layers,
        total.states + scaled.states,
    )


def _ones(rows: int, parts: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(rows, parts, dtype=dtype, device=device, requires_grad=True)


def _input_gate(gate: Tensor, size: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # (rows, tokens, parts * size) times (rows, 1, parts * size)
        return (args[0] * gate.repeat_interleave(size, dim=1)[:, None], *args[1:])

    return hook


def change_gate(gate: Tensor) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
    """A forward hook on a layer that scales its change of the hidden states by `gate`, of shape (rows,) or (1,)."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        # At zero the layer is skipped, norms and all.
        changed = before + gate[:, None] * (after - before)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _states_in_gate(gate: Tensor) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (args[0] * gate[:, None], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * gate[:, None]}

    return hook


def _states_out_gate(gate: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (output[0] * gate[:, None], *output[1:]) if isinstance(output, tuple) else output * gate[:, None]

    return hook


def _counted(states: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, tokens, width) to (positions that count, width), in float64 on the CPU."""
    flat = states.detach().flatten(0, -2)
    return (flat if mask is None else flat[mask.flatten().bool()]).cpu().double()


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
