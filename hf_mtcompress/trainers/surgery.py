"""Gradient surgery inside Trainer: the tasks' gradients meet in a Gramian, which says how much each one counts.

Where tasks share a batch, weights come first and one ordinary backward pass follows, so mixed precision, checkpointing
of activations and DDP see nothing unusual. Where they come in batches of their own within an accumulation window,
gradients are kept by source of rows and combined before the optimizer's step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hf_mtcompress.errors import TrainingError
from hf_mtcompress.losses.gradients import combination, gramian
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel

SurgeryScope = Literal["features", "last_block", "full"]
SCOPE_WORDS = {
    "features": "the output of the encoder",
    "last_block": "the last layer of the encoder",
    "full": "the trained layers of the encoder",
}
_LEAST = 1e-3
"""Smallest weight, relative to an even one: a task that is cut off altogether could not train its head."""

Sum = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Sums of equally named tensors over all processes."""


class SharedGradients:
    """Gradients of single tasks at what they share.

    Args:
        model: the model that is trained.
        scope: where. `features`: at the encoder's output, summed over positions, which is the gradient of a bias added
            there; costs a pass through the heads. `last_block`: parameters of the last layer. `full`: those of all
            layers, which costs a backward pass for each task.

    Raises:
        TrainingError: an unknown scope.
    """

    def __init__(self, model: MultiTaskModel, scope: SurgeryScope) -> None:
        if scope not in get_args(SurgeryScope):
            raise TrainingError(f"surgery_scope: expected one of {get_args(SurgeryScope)}, found '{scope}'")
        self.scope = scope
        self._model = model

    def of(self, term: Tensor | None, features: Tensor) -> Tensor:
        """Flat float32 gradient of a scalar; zeros where there is none, or where it reads something else.

        Args:
            term: a loss that was computed from `features`.
            features: (batch, positions, hidden) output of the encoder.
        """
        if term is None:
            term = 0.0 * features.sum()
        if self.scope == "features":
            (found,) = torch.autograd.grad(term, features, retain_graph=True, allow_unused=True)
            found = torch.zeros_like(features) if found is None else found
            return found.float().reshape(-1, features.shape[-1]).sum(0)
        found = torch.autograd.grad(term, self.parameters, retain_graph=True, allow_unused=True)
        return self.flat(dict(zip(self.parameters, found, strict=True)))

    def flat(self, gradients: Mapping[nn.Parameter, Tensor | None]) -> Tensor:
        """Gradients of the compared parameters in one row, zeros where there are none."""
        found = {parameter: gradients.get(parameter) for parameter in self.parameters}
        return torch.cat(
            [
                (torch.zeros_like(parameter) if gradient is None else gradient).float().flatten()
                for parameter, gradient in found.items()
            ]
        )

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradients are compared, embeddings apart."""
        layers = find_anatomy(self._model.encoder).layers
        chosen = layers if self.scope == "full" else layers[-1:]
        return [parameter for layer in chosen for parameter in layer.module.parameters() if parameter.requires_grad]


class GradientSurgery:
    """Weights the losses of a window so that the gradient of the shared encoder is a combination of the tasks' own.

    Heads always get the gradient of their own task.

    Args:
        model: the model that is trained.
        method: one of `hf_mtcompress.losses.gradients.COMBINATIONS`.
        scope: where gradients are compared; see `SharedGradients`.
        over_ranks: sums tensors over processes, so that all of them find the same weights.
        world_size: number of processes.

    Raises:
        TrainingError: an unknown scope.
        ValueError: an unknown method.
    """

    def __init__(
        self, model: MultiTaskModel, method: str, scope: SurgeryScope, over_ranks: Sum, world_size: int
    ) -> None:
        self.combine_gramian = combination(method)
        self.gradients = SharedGradients(model, scope)
        self.step = 0
        """Number of the optimizer step; draws depend on it alone."""
        self.weights: dict[str, float] = {}
        """Of the last window, by task or source; 1 is an even share."""
        self._model = model
        self._over_ranks = over_ranks
        self._world_size = world_size
        self._head_scale: dict[str, float] = {}
        self._kept: dict[str, dict[nn.Parameter, Tensor]] = {}
        """By source: gradients of the shared parameters in this window."""
        self._at_features: dict[str, Tensor] = {}
        """By source: gradient at the features in this window."""
        self._hooks = [
            parameter.register_hook(self._scaler(name))
            for name, task in model.tasks.items()
            for parameter in model.heads[task.head_name].parameters()
            if parameter.requires_grad
        ]

    def close(self) -> None:
        """Take the hooks off the heads."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _scaler(self, name: str) -> Callable[[Tensor], Tensor]:
        def scale(gradient: Tensor) -> Tensor:
            return gradient * self._head_scale.get(name, 1.0)

        return scale

    # ---- tasks that share a batch ----

    def reweighted(self, terms: Mapping[str, Tensor], features: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Weighted losses of the tasks of one batch times the weights that the method gives them.

        Args:
            terms: by task that this process has rows of, scalars.
            features: (batch, positions, hidden) output of the encoder that they were computed from.
            names: tasks that any process has rows of, the same on all of them.
        """
        self._head_scale = {}
        if not features.requires_grad or not names:
            return dict(terms)
        vectors = {name: self.gradients.of(terms.get(name), features) for name in names}
        source = "+".join(names)
        if self.gradients.scope == "features":
            total = torch.stack(list(vectors.values())).sum(0)
            self._at_features[source] = self._at_features.get(source, torch.zeros_like(total)) + total
        if len(names) < 2:
            return dict(terms)
        factors = self._factors(self._over_ranks(vectors))
        self.weights |= factors
        self._head_scale = {name: 1 / factor for name, factor in factors.items()}
        return {name: factors.get(name, 1.0) * term for name, term in terms.items()}

    def _factors(self, vectors: Mapping[str, Tensor]) -> dict[str, float]:
        """Weights of the vectors, 1 being an even share; 1 also where a vector is zero.

        Methods give weights of different scales (PCGrad a sum, MGDA a mean). Here their sizes always add up to the
        number of vectors: the method chooses the direction, the learning rate the length.
        """
        factors = dict.fromkeys(vectors, 1.0)
        moving = {name: vector for name, vector in vectors.items() if vector.any()}
        if not moving:
            return factors
        # PCGrad draws an order: the same on all processes, and in a run that is resumed.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.step)
            weights = self.combine_gramian(gramian(moving))
        weights = weights / weights.abs().mean()
        least = torch.where(weights < 0, -_LEAST, _LEAST).to(weights)
        weights = torch.where(weights.abs() < _LEAST, least, weights)
        return factors | dict(zip(moving, weights.tolist(), strict=True))

    # ---- tasks in batches of their own ----

    def keep(self, source: str, last: bool) -> None:
        """Put aside what the backward pass of one batch left on the shared parameters.

        Args:
            source: names of the tasks of the batch, joined.
            last: whether DDP has averaged these gradients over processes already.
        """
        kept = self._kept.setdefault(source, {})
        found = {parameter: parameter.grad for parameter in self._shared() if parameter.grad is not None}
        for parameter, gradient in found.items():
            if not last and self._world_size > 1:
                gradient = self._over_ranks({"gradient": gradient})["gradient"] / self._world_size
            kept[parameter] = kept[parameter] + gradient if parameter in kept else gradient
            parameter.grad = None

    def _shared(self) -> Iterator[nn.Parameter]:
        return (parameter for encoder in self._model.encoders.values() for parameter in encoder.parameters())

    def combine(self) -> None:
        """Give the shared parameters the combination of what was kept in the window."""
        if len(self._kept) > 1:
            if self.gradients.scope == "features":
                vectors = self._over_ranks(self._at_features)
            else:
                vectors = {source: self.gradients.flat(kept) for source, kept in self._kept.items()}
            factors = self._factors(vectors)
            self.weights |= factors
        else:
            factors = dict.fromkeys(self._kept, 1.0)
        for source, kept in self._kept.items():
            for parameter, gradient in kept.items():
                share = factors[source] * gradient
                parameter.grad = share if parameter.grad is None else parameter.grad + share
        self.finish_window()

    def finish_window(self) -> None:
        """Forget the window."""
        self._kept, self._at_features, self._head_scale = {}, {}, {}


def refuse_sharded(trainer: Any, what: str = "gradient_combination") -> None:
    """Surgery, and what else looks at weights one by one, needs whole gradients on every process.

    Args:
        trainer: a `Trainer`.
        what: the setting that needs them.

    Raises:
        TrainingError: the run is sharded by FSDP or DeepSpeed.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise TrainingError(
            f"expected one process or DDP with {what}, found "
            f"{'FSDP' if trainer.is_fsdp_enabled else 'DeepSpeed'}, which keeps only pieces of each gradient; leave "
            f"{what} out, or train without sharding"
        )
