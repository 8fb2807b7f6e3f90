"""Structured pruning while a model is trained: parts fade step by step, the cut comes after the last step.

A part is masked by setting every weight that belongs to it to zero: the rows of the projections into a head or neuron,
their biases, and its columns of the output projection. Nothing flows through the part then, and no gradient reaches
it, since each of its weights is multiplied by another one that is zero: norms of gradients are those of the cut model.
Momentum would still move the weights, so they are set to zero again after every step of the optimizer. There are no
hooks and no wrapped layers, so gradient accumulation, checkpointing of activations, mixed precision and DDP see nothing
unusual, and every checkpoint holds weights that answer as the cut model would, whoever loads it.

What is masked stays masked, as no gradient could tell that it is needed after all.

References:
    Zhu and Gupta: To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression. 2018 (eq. 1).
    Molchanov et al.: Importance Estimation for Neural Network Pruning. CVPR 2019 (scores from training gradients).

Deviations: Zhu and Gupta mask single weights by magnitude; here heads and neurons go, by default by a running average
of squared first-order terms. That average is kept by gate, as in `importance.py`, so that the norm of the weights into
a part does not count.
"""

import base64
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_mtcompress.compression.counting import Costs, check_amounts, costs_of, select_compute
from hf_mtcompress.compression.importance import Scores, from_weight_gradients, magnitude
from hf_mtcompress.compression.pruning import check_cut
from hf_mtcompress.compression.selection import Kept, select_heads, select_neurons
from hf_mtcompress.errors import TrainingError, UnsupportedEncoderError
from hf_mtcompress.model.adapters import refuse_adapters
from hf_mtcompress.model.anatomy import Anatomy, encoder_of, find_anatomy
from hf_mtcompress.model.branches import refuse_sub_models
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import cut, describe_structure, refuse_quantized

logger = logging.getLogger(__name__)

GradualImportance = Literal["first_order", "magnitude"]
"""What counts as important while a model is trained."""

_CHANGES = 20
"""How often masks change where `every` is left out."""


def cubic(step: int, first: int, last: int) -> float:
    """Share of what is to be removed that is gone after a step: fast at first, slower as less is left.

    Args:
        step: optimizer steps that are done.
        first: step at which it begins.
        last: step from which all is gone.
    """
    if step >= last:
        return 1.0
    return 1.0 - (1.0 - (step - first) / (last - first)) ** 3 if step > first else 0.0


@dataclass(kw_only=True)
class GradualReport:
    """What gradual pruning did; plain data."""

    importance: str
    first_step: int
    last_step: int
    changes: list[dict[str, Any]]
    """Whenever masks changed: `step`, and the fractions of `heads` and `feed_forward` that were gone then."""
    before: dict[str, Any]
    """Structure before, see `hf_mtcompress.model.surgery`."""
    after: dict[str, Any]
    parameters_before: int
    parameters_after: int
    complete: bool
    """False where training stopped before the last change."""
    masked_difference: float | None
    """Largest difference of the encoder's answers before and after the cut, relative to the largest of them, on the
    first batch that was trained on; None where there was none."""


@dataclass
class _Masks:
    """The present state: what is left, and what is known of it."""

    heads: Kept
    feed_forward: Kept
    averages: tuple[list[Tensor], list[Tensor]] | None = None
    """Running averages of importance, by layer, of all parts."""
    changes: list[dict[str, Any]] = field(default_factory=list)


class GradualPruning(TrainerCallback, ExportableState):
    """Removes heads and feed-forward neurons while any `Trainer` trains a stock model or a `MultiTaskModel`.

    ```python
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[GradualPruning(heads=0.5, feed_forward=0.5)])
    trainer.train()                  # masks while it trains, cuts when it ends
    trainer.save_model("small")      # loads with AutoModelFor... after `import hf_mtcompress`
    ```

    The cut is made in `on_train_end`, which is after `load_best_model_at_end`; so `save_model`, `evaluate` and
    `push_to_hub` after `train()` see the small model, while checkpoints hold the masked one in its old shape. Only
    scores with the final masks compete for the best checkpoint: those before forget their claim when the last change is
    made. Training goes on with a new `Trainer`, since the optimizer of this one knows the old shapes.

    The state lies in each checkpoint's `trainer_state.json`: a run that is resumed has the same masks and ends with the
    same weights as one that was not interrupted. With `restore_callback_states_from_checkpoint=True` a `Trainer` makes
    a new callback of it; find it in `trainer.callback_handler.callbacks`.

    Args:
        heads: fraction of all attention heads to remove, 0..1; each layer keeps one unless it is 1.
        feed_forward: fraction of all feed-forward neurons to remove, 0..1.
        compute: instead of both, the fraction of the multiply-adds of the encoder's layers to remove.
        length: tokens of a row that multiply-adds are counted at; needed with `compute`.
        begin: fraction of all optimizer steps after which pruning begins, 0..1.
        end: fraction of them after which all is removed, above `begin`, at most 1; the steps after it recover.
        every: optimizer steps between two changes; default: so that there are 20.
        importance: `first_order`: the running average of the squared derivative of the training loss by a gate on the
            part, from gradients that training has anyway; `magnitude`: how large the weights are.
        memory: how much of that average stays at each step, at least 0 and below 1.
        multiple_of: feed-forward widths become multiples of this, which is what kernels like.
        cut_at_end: whether to cut in `on_train_end`; otherwise the model stays masked until `cut` is called.

    Attributes:
        report: what was done; None before the cut.

    Raises:
        ValueError: an argument is out of range, or two exclude each other.
    """

    def __init__(
        self,
        heads: float = 0.0,
        feed_forward: float = 0.0,
        compute: float = 0.0,
        *,
        length: int | None = None,
        begin: float = 0.1,
        end: float = 0.7,
        every: int | None = None,
        importance: GradualImportance = "first_order",
        memory: float = 0.9,
        multiple_of: int = 32,
        cut_at_end: bool = True,
    ) -> None:
        self._arguments: dict[str, Any] = {
            "heads": heads,
            "feed_forward": feed_forward,
            "compute": compute,
            "length": length,
            "begin": begin,
            "end": end,
            "every": every,
            "importance": importance,
            "memory": memory,
            "multiple_of": multiple_of,
            "cut_at_end": cut_at_end,
        }
        _check_arguments(**self._arguments)
        self.heads, self.feed_forward, self.compute, self.length = heads, feed_forward, compute, length
        self.begin, self.end, self.every = begin, end, every
        self.importance, self.memory, self.multiple_of = importance, memory, multiple_of
        self.cut_at_end = cut_at_end
        self.report: GradualReport | None = None
        self._first = self._last = 0
        self._done = 0
        """Optimizer steps that were seen."""
        self._masks: _Masks | None = None
        self._anatomy: Anatomy | None = None
        self._costs: Costs | None = None
        self._gone: list[tuple[Tensor, int, Tensor]] = []
        """Parameters with the dimension and the places that stay zero."""
        self._seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        """What the encoder was first called with, to hold the cut against the mask."""
        self._watch: Any = None

    # ---- the state in a checkpoint ----

    def state(self) -> dict[str, Any]:
        """The arguments, and the masks and averages as text."""
        masks = self._masks
        saved = None
        if masks is not None and self._anatomy is not None:
            sizes = self._anatomy.sizes
            saved = {
                "heads": [_packed(_flags(masks.heads[layer], size)) for layer, (size, _) in enumerate(sizes)],
                "feed_forward": [
                    _packed(_flags(masks.feed_forward[layer], size)) for layer, (_, size) in enumerate(sizes)
                ],
                "averages": None
                if masks.averages is None
                else [[_packed(value.cpu().numpy()) for value in kind] for kind in masks.averages],
                "changes": masks.changes,
            }
        return {"args": self._arguments, "attributes": {"_saved": saved}}

    def _restore(self, state: TrainerState, like: Tensor) -> _Masks:
        """The masks of the checkpoint that training goes on from.

        Raises:
            TrainingError: it holds none, or those of another schedule.
        """
        found = self._stored(state)
        saved = found["attributes"].get("_saved") if found else None
        if found is None or saved is None:
            raise TrainingError(
                f"expected a checkpoint of a training with {type(self).__name__} to go on from, found none of its "
                "state at step "
                f"{state.global_step}; train without resume_from_checkpoint, or resume without the callback"
            )
        if found["args"] != self._arguments:
            changed = {
                key: (value, self._arguments.get(key))
                for key, value in found["args"].items()
                if value != self._arguments.get(key)
            }
            raise TrainingError(
                f"expected the arguments of the checkpoint to go on with it, found others (there, here): {changed}; "
                "restore them, or train without resume_from_checkpoint"
            )
        heads, neurons = (
            {layer: np.flatnonzero(_unpacked(text, np.uint8)).tolist() for layer, text in enumerate(saved[key])}
            for key in ("heads", "feed_forward")
        )
        averages = None
        if saved["averages"] is not None:
            first, second = (
                [torch.from_numpy(_unpacked(text, np.float32).copy()).to(like.device) for text in kind]
                for kind in saved["averages"]
            )
            averages = (first, second)
        return _Masks(heads, neurons, averages, list(saved["changes"]))

    def _stored(self, state: TrainerState) -> dict[str, Any] | None:
        """What the state of the training holds of this callback.

        Raises:
            TrainingError: there are several of them, which would cut each other's parts.
        """
        # It is a mapping when training begins, whatever its annotation says.
        stored: Any = state.stateful_callbacks or {}
        found = stored.get(type(self).__name__)
        if isinstance(found, list):
            raise TrainingError(
                f"expected one {type(self).__name__} among the callbacks, found {len(found)}; give fractions of heads "
                "and neurons to one of them"
            )
        return found

    # ---- while a model is trained ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the model, and take up the masks of a checkpoint."""
        _, encoder = self._model(kwargs.get("model"))
        self._stored(state)
        _refuse_sharded(args)
        anatomy = find_anatomy(encoder)
        self._refuse_optimizer(anatomy, kwargs.get("optimizer"))
        outputs = [part.output for layer in anatomy.layers for part in (layer.attention, layer.feed_forward)]
        weights = [parameter for output in outputs for parameter in output.parameters()]
        refuse_quantized(encoder, anatomy)
        if self.importance == "first_order" and not all(weight.requires_grad for weight in weights):
            raise TrainingError(
                "expected layers that are trained, whose gradients say what is important, found frozen ones; train "
                "them, or use importance='magnitude'"
            )
        self._anatomy, self._seen, self.report = anatomy, None, None
        # However short the training is, there is a step at which all is gone.
        self._first = min(round(self.begin * state.max_steps), state.max_steps - 1)
        self._last = min(max(round(self.end * state.max_steps), self._first + 1), state.max_steps)
        self._done = state.global_step
        if self.compute:
            self._costs = costs_of(anatomy, self.length or 1)
            # What the layers cannot give is said now, not at the end.
            select_compute(magnitude(anatomy), anatomy, self._costs, self.compute, self._whole(), self.multiple_of)
        if state.global_step:
            self._masks = self._restore(state, weights[0])
        else:
            sizes = list(enumerate(anatomy.sizes))
            heads, neurons = ({layer: list(range(size[kind])) for layer, size in sizes} for kind in (0, 1))
            self._masks = _Masks(heads, neurons)
        self._find_gone()
        self._set_to_zero()
        self._watch_inputs(encoder)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the importance from the gradients of this step."""
        if self.importance != "first_order" or self._masks is None or self._anatomy is None:
            return
        if state.global_step >= self._last:
            return
        found = from_weight_gradients(self._anatomy)
        if self._masks.averages is None:
            self._masks.averages = found
            return
        for averages, values in zip(self._masks.averages, found, strict=True):
            for average, value in zip(averages, values, strict=True):
                average.mul_(self.memory).add_(value, alpha=1.0 - self.memory)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Momentum moves weights that have no gradient; those of masked parts go back to zero."""
        self._set_to_zero()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mask more parts when it is time, before this step is evaluated or saved."""
        if self._masks is None:
            return
        self._done = state.global_step
        every = self.every or max((self._last - self._first) // _CHANGES, 1)
        after = state.global_step - self._first
        if not 0 < after <= self._last - self._first:
            return
        if after % every == 0 or state.global_step == self._last:
            self._change(state.global_step)
        removes = self.heads or self.feed_forward or self.compute
        if state.global_step == self._last and removes:
            # Better scores of a larger model must not win: only what has the final masks may be the best.
            state.best_metric, state.best_global_step, state.best_model_checkpoint = None, None, None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut what is masked."""
        self._stop_watching()
        if self._masks is None:
            return
        # The best checkpoint may just have been loaded.
        self._set_to_zero()
        if self.cut_at_end:
            self.cut(kwargs["model"])

    def cut(self, model: nn.Module) -> GradualReport:
        """Cut what is masked out of the trained model, in place.

        Args:
            model: the model that was trained.

        Returns:
            What was removed; `report` holds it too.

        Raises:
            TrainingError: no training was seen, or the cut was made already.
            UnsupportedEncoderError: the cut model does not answer as the masked one.
        """
        core, encoder = self._model(model)
        masks = self._masks
        if masks is None or self._anatomy is None:
            raise TrainingError(
                "expected a training to cut after, found none that this callback was in or one whose cut is made; "
                "pass it in Trainer(callbacks=[...]) and call trainer.train()"
            )
        before, parameters = describe_structure(encoder), core.num_parameters()
        difference = _cut_and_compare(encoder, masks, self._seen)
        if isinstance(core, MultiTaskModel):
            core.refresh_config()
        complete = self._done >= self._last
        self.report = GradualReport(
            importance=self.importance,
            first_step=self._first,
            last_step=self._last,
            changes=masks.changes,
            before=before,
            after=describe_structure(encoder),
            parameters_before=parameters,
            parameters_after=core.num_parameters(),
            complete=complete,
            masked_difference=difference,
        )
        if not complete:
            logger.warning(
                "training ended at step %d, before all was pruned at step %d: what was masked until then is cut",
                self._done,
                self._last,
            )
        self._masks, self._anatomy, self._gone, self._seen = None, None, [], None
        return self.report

    # ---- masks ----

    def _change(self, step: int) -> None:
        """Mask more parts, so that the fraction which is gone follows the cubic curve."""
        assert self._masks is not None
        assert self._anatomy is not None
        share = cubic(step, self._first, self._last)
        heads, neurons = self._choose(share)
        heads, neurons = self._agreed(heads, neurons)
        self._masks.heads, self._masks.feed_forward = heads, neurons
        gone = [
            1.0 - sum(map(len, kept.values())) / max(sum(size[kind] for size in self._anatomy.sizes), 1)
            for kind, kept in enumerate((heads, neurons))
        ]
        self._masks.changes.append({"step": step, "heads": gone[0], "feed_forward": gone[1]})
        self._find_gone()
        self._set_to_zero()

    def _choose(self, share: float) -> tuple[Kept, Kept]:
        """Parts to keep of those that are left, when a share of what is to be removed is to be gone."""
        masks, anatomy = self._masks, self._anatomy
        assert masks is not None
        assert anatomy is not None
        if masks.averages is not None:
            scores = Scores(
                [value.cpu() for value in masks.averages[0]], [v.cpu() for v in masks.averages[1]], torch.zeros(0)
            )
        else:
            scores = magnitude(anatomy)
        left = Scores(
            [values.double()[masks.heads[layer]] for layer, values in enumerate(scores.heads)],
            [values.double()[masks.feed_forward[layer]] for layer, values in enumerate(scores.feed_forward)],
            scores.layers,
        )
        sizes = anatomy.sizes
        if self._costs is not None:
            compute = share * self.compute
            heads, neurons = select_compute(left, anatomy, self._costs, compute, self._whole(), self.multiple_of)
        else:
            heads = select_heads(left.heads, share * self.heads, sum(size for size, _ in sizes))
            of = sum(size for _, size in sizes)
            neurons = select_neurons(left.feed_forward, share * self.feed_forward, self.multiple_of, of)
        return (
            {layer: [masks.heads[layer][place] for place in places] for layer, places in heads.items()},
            {layer: [masks.feed_forward[layer][place] for place in places] for layer, places in neurons.items()},
        )

    def _whole(self) -> int:
        assert self._anatomy is not None
        assert self._costs is not None
        return self._costs.of(self._anatomy)

    def _agreed(self, heads: Kept, neurons: Kept) -> tuple[Kept, Kept]:
        """The choice of the first process, on all of them.

        Averaged gradients are the same everywhere, but a choice that hangs on the last bit must not.
        """
        assert self._anatomy is not None
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return heads, neurons
        sizes = self._anatomy.sizes
        flags = [_flags(heads[layer], size) for layer, (size, _) in enumerate(sizes)]
        flags += [_flags(neurons[layer], size) for layer, (_, size) in enumerate(sizes)]
        device = next(self._anatomy.stack.parameters()).device
        sent = torch.from_numpy(np.concatenate(flags)).to(device)
        torch.distributed.broadcast(sent, src=0)
        parts = sent.cpu().split([len(flag) for flag in flags])
        kept = [part.nonzero().flatten().tolist() for part in parts]
        return dict(enumerate(kept[: len(sizes)])), dict(enumerate(kept[len(sizes) :]))

    def _find_gone(self) -> None:
        """Places of all weights of masked parts."""
        assert self._masks is not None
        assert self._anatomy is not None
        self._gone = []

        def note(parameter: Tensor | None, dimension: int, places: Sequence[int]) -> None:
            if parameter is not None:
                self._gone.append((parameter, dimension, torch.tensor(places, device=parameter.device)))

        for index, layer in enumerate(self._anatomy.layers):
            attention, part = layer.attention, layer.feed_forward
            for kept, count, size, blocks, inputs, output in (
                (
                    self._masks.heads[index],
                    attention.heads,
                    attention.head_size,
                    attention.blocks,
                    attention.projections.values(),
                    attention.output,
                ),
                (self._masks.feed_forward[index], part.width, 1, part.blocks, part.inputs.values(), part.output),
            ):
                gone = sorted(set(range(count)) - set(kept))
                columns = [place * size + offset for place in gone for offset in range(size)]
                if not columns:
                    continue
                rows = [block * count * size + column for block in range(blocks) for column in columns]
                for linear in inputs:
                    assert isinstance(linear, nn.Linear)
                    note(linear.weight, 0, rows)
                    note(linear.bias, 0, rows)
                assert isinstance(output, nn.Linear)
                note(output.weight, 1, columns)

    @torch.no_grad()
    def _set_to_zero(self) -> None:
        for parameter, dimension, places in self._gone:
            parameter.index_fill_(dimension, places, 0.0)

    # ---- looking on ----

    def _watch_inputs(self, encoder: PreTrainedModel) -> None:
        """Keep what the encoder is called with for the first time."""
        self._stop_watching()

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training:
                self._seen = (tuple(map(_detached, args)), {key: _detached(value) for key, value in kwargs.items()})
                self._stop_watching()

        self._watch = encoder.register_forward_pre_hook(note, with_kwargs=True)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    @staticmethod
    def _model(model: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The model that is trained, and its encoder."""
        while not isinstance(model, PreTrainedModel) and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedEncoderError(
                f"expected a model of transformers to prune, found a {type(model).__name__}; give the model itself, "
                "with adapters of other packages merged"
            )
        if not isinstance(model, MultiTaskModel):
            return model, encoder_of(model)
        refuse_sub_models(model, "pruning")
        refuse_adapters(model, "pruning")
        encoder = model.encoder
        assert isinstance(encoder, PreTrainedModel)
        return model, encoder

    def _refuse_optimizer(self, anatomy: Anatomy, optimizer: Any) -> None:
        """An optimizer that has seen larger weights would fail in the middle of its first step."""
        state = getattr(getattr(optimizer, "optimizer", optimizer), "state", None) or {}
        for parameter in anatomy.stack.parameters():
            for value in state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.dim() == parameter.dim() and value.shape != parameter.shape:
                    raise TrainingError(
                        "expected a Trainer whose optimizer fits the model, found one from before the cut; make a new "
                        "Trainer to train what is left"
                    )


def _check_arguments(
    heads: float,
    feed_forward: float,
    compute: float,
    length: int | None,
    begin: float,
    end: float,
    every: int | None,
    importance: str,
    memory: float,
    multiple_of: int,
    cut_at_end: bool,
) -> None:
    check_amounts(heads, feed_forward, compute)
    if bool(compute) != (length is not None) or (length is not None and length < 1):
        raise ValueError(
            f"length: expected 1 or more tokens together with compute, which is counted at it, found length {length} "
            f"and compute {compute}; give both or neither"
        )
    if not 0.0 <= begin < end <= 1.0:
        raise ValueError(
            f"begin, end: expected fractions of the training with 0 <= begin < end <= 1, found {begin} and {end}"
        )
    if every is not None and every < 1:
        raise ValueError(f"every: expected 1 or more optimizer steps between two changes, found {every}")
    if importance not in ("first_order", "magnitude"):
        raise ValueError(
            f"importance: expected 'first_order' or 'magnitude', which training knows at every step, found "
            f"'{importance}'; use prune(...) for others"
        )
    if not 0.0 <= memory < 1.0:
        raise ValueError(f"memory: expected a share of at least 0 and below 1 that stays at a step, found {memory}")
    if multiple_of < 1:
        raise ValueError(f"multiple_of: expected 1 or more, found {multiple_of}")


def _refuse_sharded(args: TrainingArguments) -> None:
    if args.fsdp or args.deepspeed:
        raise TrainingError(
            f"expected one process or DDP with gradual pruning, found {'FSDP' if args.fsdp else 'DeepSpeed'}, which "
            "keeps only pieces of each weight; train without sharding, or prune after the training"
        )


def _cut_and_compare(
    encoder: PreTrainedModel, masks: _Masks, seen: tuple[tuple[Any, ...], dict[str, Any]] | None
) -> float | None:
    """Cut, and make sure on one batch that this equals the mask, as `prune` does."""

    @torch.no_grad()
    def answer() -> Tensor | None:
        if seen is None:
            return None
        output = encoder(*seen[0], **seen[1])
        return (output[0] if not isinstance(output, Mapping) else next(iter(output.values()))).float()

    was_training = encoder.training
    encoder.eval()
    masked = answer()
    cut(encoder, masks.heads, masks.feed_forward)
    found = answer()
    encoder.train(was_training)
    if masked is None or found is None:
        return None
    difference = float((masked - found).abs().max() / masked.abs().max().clamp(min=1e-6))
    check_cut(encoder, difference)
    return difference


def _detached(value: Any) -> Any:
    """Without the graph that led to it, which would be kept as long as the training lasts."""
    return value.detach() if isinstance(value, Tensor) else value


def _flags(kept: Sequence[int], size: int) -> np.ndarray:
    flags = np.zeros(size, dtype=np.uint8)
    flags[list(kept)] = 1
    return flags


def _packed(values: np.ndarray) -> str:
    """Exactly these numbers as short text: a line for each would make a checkpoint's state unreadable."""
    return base64.b64encode(values.tobytes()).decode("ascii")


def _unpacked(text: str, kind: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=kind)
