"""Repair without training: the weights that were left make up for those that were cut, by linear least squares.

After a cut the two output projections of a layer, of the attention and of the feed-forward part, see fewer inputs.
Going through the layers in order, with the inputs that each gets in the pruned model, the projection is solved anew so
that the hidden state behind it comes as near as it can to that of the full model:

    minimise  || (r + X W) - (r' + X' W') ||^2  over W

X, X' are the inputs of the projection and r, r' the hidden states it is added to, in the pruned and in the full model.
The target therefore carries what earlier layers lost, and what dropped layers would have done; nothing makes up for
layers that are dropped at the end. W is written as what the cut left plus a change, and only the change is penalised,
relative to each input's own energy, so where nothing was lost nothing changes. Sums of X^T X and X^T (target) are all
that is kept of the rows, in float64: memory is width^2, beside the hidden states of all rows in one layer, for both
models.

References:
    Kwon et al.: A Fast Post-Training Pruning Framework for Transformers. NeurIPS 2022 (mask tuning: the same
    problem, with one factor for each head or neuron in place of W).
    Kurtic et al.: ZipLM: Inference-Aware Structured Pruning of Language Models. NeurIPS 2023 (the full matrix).

Deviations: Kwon et al. solve with LSMR and keep factors within bounds; here the normal equations are solved exactly,
with a ridge in place of bounds. ZipLM chooses what to cut by the same matrices, layer by layer and with the inputs of
the full model; here the choice is made before, and inputs are those of the pruned model. The bias is solved with the
weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.anatomy import Layer, find_anatomy
from hf_mtcompress.model.blocks import Constant

_TOLERANCE = 1e-2
"""Largest relative difference between two positions in how the hidden state follows a projection."""

Run = Callable[[Mapping[str, Tensor]], object]
"""Runs a model on inputs; its layers are listened to."""


@dataclass(frozen=True)
class RepairReport:
    """How far the hidden state behind the last layer is from the full model's, on the rows of the repair."""

    positions: int
    """Tokens or patches that counted."""
    error_before: float
    """Squared length of the difference, relative to the full model's squared length."""
    error_after: float
    undone: bool
    """Whether the repair was taken back, because it made the difference larger."""


class LeastSquares:
    """Sums over positions that a linear least squares problem is solved from.

    Args:
        width: inputs of the linear layer.
        outputs: outputs of the linear layer.
    """

    def __init__(self, width: int, outputs: int) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.cross = torch.zeros(width, outputs, dtype=torch.float64)
        self.positions = 0

    def add(self, features: Tensor, missing: Tensor) -> None:
        """Add positions.

        Args:
            features: (positions, width), inputs of the layer.
            missing: (positions, outputs), what its output should be larger by.
        """
        features = features.double()
        self.positions += len(features)
        self.gram.addmm_(features.T, features)
        self.cross.addmm_(features.T, missing.double())

    def solve(self, ridge: float | None = None) -> Tensor:
        """The change D, (width, outputs), that minimises |missing - features D|^2 + ridge |energy^(1/2) D|^2.

        The energy of an input is its sum of squares. D never makes the first term larger than no change does.

        Args:
            ridge: above 0; default: inputs per position, so that few rows change little and many rows are trusted.
        """
        if ridge is None:
            ridge = len(self.gram) / max(self.positions, 1)
        energy = self.gram.diagonal().sqrt()
        # An input that is always zero cannot help; any scale leaves its change at zero.
        scale = torch.where(energy > 0, energy, 1.0)
        normalised = self.gram / scale[:, None] / scale
        normalised.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(normalised)
        return torch.cholesky_solve(self.cross / scale[:, None], factor) / scale[:, None]


def repair(
    pruned: PreTrainedModel,
    full: PreTrainedModel,
    run_pruned: Run,
    run_full: Run,
    batches: Sequence[Mapping[str, Tensor]],
    kept_layers: Sequence[int],
    *,
    ridge: float | None = None,
    progress: bool = True,
) -> RepairReport:
    """Solve the output projections of `pruned` anew, in place, so that its hidden states are those of `full`.

    Args:
        pruned: an encoder that was cut, in eval mode.
        full: the encoder before the cut, in eval mode.
        run_pruned: runs the model that `pruned` is in.
        run_full: runs the model that `full` is in.
        batches: model inputs without labels; positions where `attention_mask` is 0 do not count.
        kept_layers: for each layer of `pruned` its index in `full`.
        ridge: see `LeastSquares.solve`.
        progress: whether to show a progress bar.

    Returns:
        The difference before and after. Where it would have grown the weights are as they were.

    Raises:
        UnsupportedEncoderError: the layers do not follow one upon the other, or what a projection computes is not added
            to the hidden state.
    """
    layers, originals = find_anatomy(pruned).layers, find_anatomy(full).layers
    masks = [batch.get("attention_mask") for batch in batches]
    with torch.no_grad():
        calls, states, full_calls, full_states, before = [], [], [], [], 0.0
        for batch, mask in zip(batches, masks, strict=True):
            call, inputs, output = _record(type(pruned).__name__, run_pruned, batch, layers)
            full_call, full_inputs, wanted = _record(type(full).__name__, run_full, batch, originals)
            calls.append(call)
            states.append(inputs)
            full_calls.append(full_call)
            full_states.append(full_inputs)
            before += _distance(output, wanted, mask)
        weights = [
            (parameter, parameter.detach().clone())
            for layer in layers
            for block in (layer.attention.output, layer.feed_forward.output)
            for parameter in block.parameters()
        ]
        done = 0
        for index, layer in enumerate(tqdm(layers, desc="repairing", unit="layer", disable=not progress)):
            place = kept_layers[index]
            full_states = _through(originals, range(done, place), full_calls, full_states)
            work = _LayerRepair(type(pruned).__name__, layer, originals[place], index, place, ridge)
            states, full_states = work.solve(calls, full_calls, states, full_states, masks)
            done = place + 1
        full_states = _through(originals, range(done, len(originals)), full_calls, full_states)
        after = sum(map(_distance, states, full_states, masks))
        # Every projection is nearer to its own target; that the sum of all is so as well is not a theorem.
        undone = not after <= before
        if undone:
            for parameter, value in weights:
                parameter.copy_(value)
    counted = [_counted(state, mask) for state, mask in zip(full_states, masks, strict=True)]
    size = max(sum(float(state.square().sum()) for state in counted), 1e-30)
    return RepairReport(sum(map(len, counted)), before / size, (before if undone else after) / size, undone)


def _through(
    layers: Sequence[Layer], places: Sequence[int], calls: Sequence["_Call"], states: list[Tensor]
) -> list[Tensor]:
    """Hidden states behind layers that were dropped: they still change what the full model hands on."""
    for place in places:
        states = [call.layer(layers[place], place, state) for call, state in zip(calls, states, strict=True)]
    return states


# ---- one layer ----


@dataclass(frozen=True)
class _Block:
    """A projection of a layer, and where the hidden state that it is added to can be seen."""

    projection: nn.Module
    arrival: str | None
    """Path in the layer of the module that reads the sum; None: it is the layer's output."""
    scale: Tensor
    """(hidden,): how much of the projection's output is added."""


class _LayerRepair:
    def __init__(self, family: str, layer: Layer, original: Layer, index: int, place: int, ridge: float | None) -> None:
        self.family = family
        self.layer, self.original = layer, original
        self.index, self.place = index, place
        self.ridge = ridge

    def solve(
        self,
        calls: Sequence["_Call"],
        full_calls: Sequence["_Call"],
        states: list[Tensor],
        full_states: list[Tensor],
        masks: Sequence[Tensor | None],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Solve attention, then feed-forward part; returns the hidden states behind the layer, in both models."""
        if self._untouched() and all(map(torch.equal, states, full_states)):
            after = [call.layer(self.layer, self.index, state) for call, state in zip(calls, states, strict=True)]
            return after, after
        ends = [self._block(kind, full_calls[0], full_states[0], masks[0]) for kind in ("attention", "feed_forward")]
        own = [
            _Block(part.output, end.arrival, end.scale)
            for part, end in zip((self.layer.attention, self.layer.feed_forward), ends, strict=True)
        ]
        targets, next_full = [], []
        attention = _problem(own[0])
        for call, full_call, state, full_state, mask in zip(calls, full_calls, states, full_states, masks, strict=True):
            after, seen = _observe(self.original, self.place, full_call, full_state, ends)
            next_full.append(after)
            targets.append(_counted(seen[1][1], mask))
            _, (found, _) = _observe(self.layer, self.index, call, state, own)
            _add(attention, own[0], found, _counted(seen[0][1], mask), mask)
        _change(attention, own[0], self.ridge)
        feed_forward = _problem(own[1])
        for call, state, target, mask in zip(calls, states, targets, masks, strict=True):
            _, (_, found) = _observe(self.layer, self.index, call, state, own)
            _add(feed_forward, own[1], found, target, mask)
        _change(feed_forward, own[1], self.ridge)
        return [call.layer(self.layer, self.index, state) for call, state in zip(calls, states, strict=True)], next_full

    def _untouched(self) -> bool:
        ours, theirs = ((layer.attention.heads, layer.feed_forward.width) for layer in (self.layer, self.original))
        return ours == theirs

    def _block(self, kind: str, call: "_Call", state: Tensor, mask: Tensor | None) -> _Block:
        """Find where the output of a projection arrives, and how much of it.

        Families differ: with the norm behind the sum the norm reads it, with the norm in front the next norm does, or
        nothing in the layer; some multiply by learned factors before. So the layer is asked.
        """
        part = self.original.attention if kind == "attention" else self.original.feed_forward
        module = self.original.module
        readers: list[tuple[str, Tensor]] = []
        outputs: list[Tensor] = []

        def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                if outputs and args and isinstance(args[0], Tensor):
                    readers.append((name, args[0]))

            return hook

        def answer(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            outputs.append(output)

        def raised(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + 1.0

        # Modules with weights of their own: dropouts hand on what they get, containers see it too early.
        hooks = [
            child.register_forward_pre_hook(note(name))
            for name, child in module.named_modules()
            if name and child is not part.output and next(child.parameters(recurse=False), None) is not None
        ]
        hooks.append(part.output.register_forward_hook(answer))
        with _removed(hooks):
            call.layer(self.original, self.place, state)
        # Learned factors read the projection's output as it is; whoever comes next reads the sum.
        arrival = next((name for name, value in readers if not _same(value, outputs[0])), None)
        block = _Block(part.output, arrival, torch.ones(0))
        _, ((_, plain),) = _observe(self.original, self.place, call, state, [block])
        with _removed([part.output.register_forward_hook(raised)]):
            _, ((_, moved),) = _observe(self.original, self.place, call, state, [block])
        changes = _counted(moved, mask) - _counted(plain, mask)
        scale = changes.mean(0)
        spread = float((changes - scale).abs().max())
        if not spread <= _TOLERANCE * max(1.0, float(_counted(plain, mask).abs().max())):
            raise UnsupportedEncoderError(
                f"{self.family}: expected the output of '{part.output_name}' to be added to the hidden state, found "
                f"that positions follow it differently, by {spread:.2g}; leave repair out, and recover by training"
            )
        return _Block(part.output, arrival, scale)


def _observe(
    layer: Layer, index: int, call: "_Call", state: Tensor, blocks: Sequence[_Block]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Run a layer; its output, and for each block the inputs of the projection and the sum it is added into."""
    features: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}

    def keep(found: dict[int, Tensor], place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[place] = args[0]

        return hook

    hooks = []
    for place, block in enumerate(blocks):
        hooks.append(block.projection.register_forward_pre_hook(keep(features, place)))
        if block.arrival is not None:
            reader = layer.module.get_submodule(block.arrival)
            hooks.append(reader.register_forward_pre_hook(keep(sums, place)))
    with _removed(hooks):
        output = call.layer(layer, index, state)
    return output, [(features[place], sums.get(place, output)) for place in range(len(blocks))]


def _problem(block: _Block) -> LeastSquares:
    assert isinstance(block.projection, nn.Linear | Constant)
    projection = block.projection
    return LeastSquares(projection.in_features + (projection.bias is not None), projection.out_features)


def _add(
    problem: LeastSquares, block: _Block, found: tuple[Tensor, Tensor], target: Tensor, mask: Tensor | None
) -> None:
    assert isinstance(block.projection, nn.Linear | Constant)
    features, reached = (_counted(value, mask) for value in found)
    # All that is left of a projection without inputs is its bias, whatever it is called with.
    features = features[:, : block.projection.in_features]
    if block.projection.bias is not None:
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    # What a factor of zero hides cannot be repaired.
    visible = block.scale.abs() > 1e-8
    missing = (target - reached) / torch.where(visible, block.scale, 1.0) * visible
    problem.add(features, missing)


def _change(problem: LeastSquares, block: _Block, ridge: float | None) -> None:
    if not len(problem.gram):
        return
    assert isinstance(block.projection, nn.Linear | Constant)
    projection = block.projection
    change = problem.solve(ridge)
    if projection.in_features:
        projection.weight.add_(change[: projection.in_features].T.to(projection.weight))
    if projection.bias is not None:
        projection.bias.add_(change[-1].to(projection.bias))


# ---- running one layer after the other ----


@dataclass(frozen=True)
class _Call:
    """What the layers of a model were called with on one batch, the hidden state apart."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """By layer."""

    def layer(self, layer: Layer, index: int, state: Tensor) -> Tensor:
        """Run a layer on another hidden state."""
        args, kwargs = self.arguments[index]
        output = layer.module(state, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def _record(
    family: str, run: Run, batch: Mapping[str, Tensor], layers: Sequence[Layer]
) -> tuple[_Call, Tensor, Tensor]:
    """Run a model; the calls of its layers, what the first one read, and what the last one answered."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        arguments.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = []
    for layer in layers:
        hooks.append(layer.module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.module.register_forward_hook(after))
    with _removed(hooks):
        run(batch)
    chained = len(inputs) == len(layers) and all(map(torch.equal, outputs[:-1], inputs[1:]))
    if not chained:
        raise UnsupportedEncoderError(
            f"{family}: expected {len(layers)} layers that each read what the one before answered, found "
            f"{len(inputs)} calls that do not; leave repair out, and recover by training"
        )
    return _Call(arguments), inputs[0], outputs[-1]


@contextmanager
def _removed(hooks: Sequence[Any]) -> Iterator[None]:
    """Remove hooks after the block."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _distance(states: Tensor, wanted: Tensor, mask: Tensor | None) -> float:
    return float((_counted(states, mask) - _counted(wanted, mask)).square().sum())


def _counted(states: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, tokens, width) to (positions that count, width), in float64 on the CPU."""
    flat = states.flatten(0, -2)
    return (flat if mask is None else flat[mask.flatten().bool()]).cpu().double()
