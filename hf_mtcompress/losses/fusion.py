"""How the losses of several tasks become one number to minimise.

Every method here is a weighted sum whose weights are fixed within an accumulation window and change between windows,
from what the finished windows showed. So gradients do not depend on how a window is split into batches or over
processes, tasks that are absent from a window keep their state, and the state is a handful of numbers that a checkpoint
holds as JSON. Deviations from the papers that follow from this are noted at each method.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from hf_mtcompress.errors import TaskError

Weight = float | tuple[float, float]
"""Of one task: fixed, or from the first to the last step, changing linearly."""

FusionKind = Literal["sum", "product", "uncertainty", "dwa", "random", "famo", "gradient_norm"]

_SMALL = 1e-6
_PATIENCE = 4
"""Times its share of steps that `gradient_norm` waits for tasks that did not come yet."""


class Fusion(ABC):
    """Combines the mean losses of the tasks that are present in a step: the sum of weight * factor * loss / normaliser.

    Subclasses give `factor` and learn it in `observe`.

    Args:
        weights: by task, at least 0; a pair goes linearly from the first value to the second; 1 where absent.
        normalisers: by task, above 0; 1 where absent. The loss of an uninformed guess puts tasks with many labels and
            regressions on one scale (Aghajanyan et al. 2021, "Muppet", divide by log(labels) likewise).
    """

    adaptive: ClassVar[bool] = False
    """Whether `observe` wants the losses of finished windows."""

    def __init__(
        self, weights: Mapping[str, Weight] | None = None, normalisers: Mapping[str, float] | None = None
    ) -> None:
        self.weights = dict(weights or {})
        self.normalisers = dict(normalisers or {})
        self.trained: set[str] | None = None
        """Tasks that have training rows; None where that is not known, which counts as all."""
        self.progress = 0.0
        self.total_steps = 0

    def __call__(self, losses: Mapping[str, Tensor]) -> Tensor:
        """One scalar from the scalars of the present tasks (at least one)."""
        return total(self.terms(losses))

    def terms(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each present task adds to that scalar."""
        return {name: self.weight(name, loss) * loss for name, loss in losses.items()}

    def static(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The same without what was learned in training, so that losses of different moments compare."""
        return total({name: self.base(name, 0.0) * loss for name, loss in losses.items()})

    def weight(self, name: str, loss: Tensor | None = None) -> float:
        """What the loss of a task is multiplied by in this window; `loss` is its value, for tasks not seen before."""
        return self.base(name, self.progress) * self.factor(name, loss)

    def base(self, name: str, progress: float) -> float:
        """The part of the weight that is given: weight / normaliser, after a share of the training in [0, 1]."""
        weight = self.weights.get(name, 1.0)
        if isinstance(weight, tuple):
            weight = weight[0] + progress * (weight[1] - weight[0])
        return weight / self.normalisers.get(name, 1.0)

    @abstractmethod
    def factor(self, name: str, loss: Tensor | None = None) -> float:
        """The part of the weight that is learned; 1 for a plain sum."""

    def start_window(self, step: int, total_steps: int) -> None:
        """Called before the first batch of an accumulation window."""
        self.total_steps = total_steps
        self.progress = min(step / max(total_steps - 1, 1), 1.0)

    def start_epoch(self, epoch: int) -> None:  # noqa: B027  # not every method has epochs
        """Called before an epoch; may be called again for the same epoch after a restart."""

    def observe(self, losses: Mapping[str, float]) -> None:  # noqa: B027  # a plain sum learns nothing
        """Learn from a finished window: the mean loss of each present task over all ranks."""

    @property
    def wants_gradient_norms(self) -> bool:
        """Whether `observe_gradient_norms` wants to be called for the next window."""
        return False

    def observe_gradient_norms(self, norms: Mapping[str, float]) -> None:  # noqa: B027  # asked for by one method
        """Learn from the norm of each present task's gradient at the shared features."""

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  # nothing learned, nothing to load
        """Go on from `state_dict`."""

    def _normalised(self, name: str, loss: float) -> float:
        return max(loss / self.normalisers.get(name, 1.0), _SMALL)


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """Sum of at least one scalar."""
    first, *rest = terms.values()
    for term in rest:
        first = first + term
    return first


class WeightedSum(Fusion):
    """The plain sum, which matches specialised multi-task optimisers when its weights are sensible.

    References:
        Kurin et al. 2022, "In Defense of the Unitary Scalarization for Deep Multi-Task Learning"; Xin et al. 2022, "Do
        Current Multi-Task Optimization Methods in Deep Learning Even Help?".
    """

    def factor(self, name: str, loss: Tensor | None = None) -> float:
        return 1.0


class _RunningMeans(Fusion):
    """Abstract: keeps a running mean of each task's normalised loss over finished windows."""

    adaptive = True
    decay: ClassVar[float] = 0.9

    def __init__(
        self, weights: Mapping[str, Weight] | None = None, normalisers: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(weights, normalisers)
        self.means: dict[str, float] = {}

    def observe(self, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            found = self._normalised(name, loss)
            self.means[name] = self.decay * self.means[name] + (1 - self.decay) * found if name in self.means else found

    def mean(self, name: str, loss: Tensor | None) -> float:
        """The running mean; before the first window the loss itself, else that of an uninformed guess."""
        if name in self.means:
            return self.means[name]
        return 1.0 if loss is None else self._normalised(name, float(loss.detach()))

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means = dict(state["means"])


class Product(_RunningMeans):
    """Minimises the product of the losses, each to the power of its weight: the sum of weight * log(loss).

    The gradient of log(loss) is that of the loss divided by the loss, so a loss that is multiplied by any number counts
    the same. Its direction is that of the geometric mean when all tasks are present; unlike that mean it also says what
    a window with one task means. Deviation: the divisor is the running mean over finished windows.

    References:
        Chennupati et al. 2019, "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy".
    """

    def factor(self, name: str, loss: Tensor | None = None) -> float:
        return 1.0 / self.mean(name, loss)


class Uncertainty(Fusion):
    """Weights by a learned uncertainty: exp(-s) * loss + s, with one number s for each task.

    Deviation: s is learned by a rate of its own, since the learning rate of fine-tuning would not move it.

    Args:
        rate: step size of s, above 0.

    References:
        Kendall et al. 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses".
    """

    adaptive = True
    _LIMIT: ClassVar[float] = 5.0

    def __init__(
        self,
        weights: Mapping[str, Weight] | None = None,
        normalisers: Mapping[str, float] | None = None,
        *,
        rate: float = 0.02,
    ) -> None:
        super().__init__(weights, normalisers)
        self.rate = rate
        self.log_variances: dict[str, float] = {}

    def factor(self, name: str, loss: Tensor | None = None) -> float:
        return math.exp(-self.log_variances.get(name, 0.0))

    def observe(self, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            old = self.log_variances.get(name, 0.0)
            new = old + self.rate * (math.exp(-old) * self._normalised(name, loss) - 1.0)
            self.log_variances[name] = min(max(new, -self._LIMIT), self._LIMIT)

    def state_dict(self) -> dict[str, Any]:
        return {"log_variances": dict(self.log_variances)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.log_variances = dict(state["log_variances"])


class DynamicWeightAverage(Fusion):
    """Gives more weight to tasks whose loss falls slowly, from one epoch to the next; plain sum for two epochs.

    Args:
        temperature: above 0; the larger, the more even.

    References:
        Liu et al. 2019, "End-to-End Multi-Task Learning with Attention" (section 3.3).
    """

    adaptive = True

    def __init__(
        self,
        weights: Mapping[str, Weight] | None = None,
        normalisers: Mapping[str, float] | None = None,
        *,
        temperature: float = 2.0,
    ) -> None:
        super().__init__(weights, normalisers)
        self.temperature = temperature
        self.epoch = 0
        self.sums: dict[str, tuple[float, int]] = {}
        self.history: dict[str, list[float]] = {}
        """Mean loss of the last two epochs."""

    def factor(self, name: str, loss: Tensor | None = None) -> float:
        ratios = {task: means[1] / means[0] for task, means in self.history.items() if len(means) == 2}
        if name not in ratios:
            return 1.0
        powers = {task: math.exp(ratio / self.temperature) for task, ratio in ratios.items()}
        return len(powers) * powers[name] / sum(powers.values())

    def observe(self, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + self._normalised(name, loss), count + 1)

    def start_epoch(self, epoch: int) -> None:
        if epoch <= self.epoch:
            return
        self.epoch = epoch
        for name, (total, count) in self.sums.items():
            self.history[name] = [*self.history.get(name, []), total / count][-2:]
        self.sums = {}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "sums": dict(self.sums), "history": dict(self.history)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        self.history = {name: list(means) for name, means in state["history"].items()}


class RandomWeights(Fusion):
    """Softmax of normal numbers, drawn anew for every window: a baseline that other methods must beat.

    Args:
        seed: of the draws, which depend on it and on the step alone.

    References:
        Lin et al. 2022, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning".
    """

    adaptive = True

    def __init__(
        self,
        weights: Mapping[str, Weight] | None = None,
        normalisers: Mapping[str, float] | None = None,
        *,
        seed: int = 42,
    ) -> None:
        super().__init__(weights, normalisers)
        self.seed = seed
        self._factors: dict[str, float] = {}

    def start_window(self, step: int, total_steps: int) -> None:
        super().start_window(step, total_steps)
        names = sorted(self.weights)
        powers = np.exp(np.random.default_rng([self.seed, step]).standard_normal(len(names)))
        self._factors = dict(zip(names, (len(names) * powers / powers.sum()).tolist(), strict=True))

    def factor(self, name: str, loss: Tensor | None = None) -> float:
        return self._factors.get(name, 1.0)


class Famo(_RunningMeans):
    """Moves weight to the tasks whose log loss falls slowest, so that all fall at about the same rate.

    Deviation: the change of a loss is taken between two windows in which the task was present, instead of from a
    second forward pass on the same rows. The factors add up to the number of tasks.

    Args:
        rate: step size of the weights' logits, above 0.
        decay_rate: pull of the logits to 0, at least 0.

    References:
        Liu et al. 2023, "FAMO: Fast Adaptive Multitask Optimization".
    """

    def __init__(
        self,
        weights: Mapping[str, Weight] | None = None,
        normalisers: Mapping[str, float] | None = None,
        *,
        rate: float = 0.025,
        decay_rate: float = 0.001,
    ) -> None:
        super().__init__(weights, normalisers)
        self.rate = rate
        self.decay_rate = decay_rate
        self.logits: dict[str, float] = {}

    def factor(self, name: str, loss: Tensor | None = None) -> float:
        if name not in self.means:
            return 1.0
        shares = {task: math.exp(self.logits.get(task, 0.0)) / self.means[task] for task in self.means}
        return len(shares) * shares[name] / sum(shares.values())

    def observe(self, losses: Mapping[str, float]) -> None:
        before = {name: self.means[name] for name in losses if name in self.means}
        super().observe(losses)
        if not before:
            return
        powers = {name: math.exp(self.logits.get(name, 0.0)) for name in self.means}
        shares = {name: powers[name] / sum(powers.values()) for name in before}
        falls = {name: math.log(before[name]) - math.log(self.means[name]) for name in before}
        mean = sum(shares[name] * falls[name] for name in before) / sum(shares.values())
        for name in before:
            slope = shares[name] * (falls[name] - mean)
            old = self.logits.get(name, 0.0)
            self.logits[name] = old - self.rate * len(self.means) * slope - self.decay_rate * old

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "logits": dict(self.logits)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.logits = dict(state["logits"])


class GradientNorm(Fusion):
    """Measures gradient norms for a while, then fixes weights that make them alike; static and printable after that.

    Static weights are as good as moving ones when they are chosen well, and gradients of like size are the sign of
    well chosen ones. While it measures, the sum is plain. Weights that were given stay: a task of weight 3 ends with a
    gradient three times as long as one of weight 1.

    Args:
        share: of all steps that are measured, in (0, 1).
        limit: a factor is at most this and at least one over it.

    References:
        Royer et al. 2023, "Scalarization for Multi-Task and Multi-Domain Learning at Scale"; AutoScale, arXiv
        2508.13979, chooses weights by the similarity of gradient magnitudes. Deviation: norms are those at the shared
        features, which cost no backward pass through the encoder.
    """

    adaptive = True

    def __init__(
        self,
        weights: Mapping[str, Weight] | None = None,
        normalisers: Mapping[str, float] | None = None,
        *,
        share: float = 0.05,
        limit: float = 10.0,
    ) -> None:
        super().__init__(weights, normalisers)
        self.share = share
        self.limit = limit
        self.windows = 0
        self.sums: dict[str, tuple[float, int]] = {}
        self.factors: dict[str, float] | None = None

    @property
    def wants_gradient_norms(self) -> bool:
        return self.factors is None

    def factor(self, name: str, loss: Tensor | None = None) -> float:
        return (self.factors or {}).get(name, 1.0)

    def observe_gradient_norms(self, norms: Mapping[str, float]) -> None:
        for name, norm in norms.items():
            total, count = self.sums.get(name, (0.0, 0))
            # Not as it is weighted: a weight that was given says how much longer than the others it should be.
            self.sums[name] = (total + norm / self.normalisers.get(name, 1.0), count + 1)
        self.windows += 1
        awaited = set(self.weights) if self.trained is None else self.trained
        enough = max(math.ceil(self.share * self.total_steps), 1)
        # A task may have no label at all.
        if self.windows >= enough and (awaited <= self.sums.keys() or self.windows >= _PATIENCE * enough):
            # A gradient of 0 says nothing of how long one should be.
            means = {name: total / count for name, (total, count) in self.sums.items() if total > 0}
            middle = math.exp(sum(map(math.log, means.values())) / max(len(means), 1))
            self.factors = {name: min(max(middle / mean, 1 / self.limit), self.limit) for name, mean in means.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self.windows, "sums": dict(self.sums), "factors": self.factors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.windows = state["windows"]
        self.sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        self.factors = None if state["factors"] is None else dict(state["factors"])


def fusion_of(kind: str, **options: Any) -> Fusion:
    """The fusion of a name, with its own defaults where an option is None.

    Raises:
        TaskError: no such fusion, or it has no such option.
    """
    classes: dict[str, type[Fusion]] = {
        "sum": WeightedSum,
        "product": Product,
        "uncertainty": Uncertainty,
        "dwa": DynamicWeightAverage,
        "random": RandomWeights,
        "famo": Famo,
        "gradient_norm": GradientNorm,
    }
    if kind not in classes:
        raise TaskError(f"expected a fusion among {list(classes)}, found '{kind}'")
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return classes[kind](**given)
    except TypeError as error:
        raise TaskError(f"fusion '{kind}' has no option among {list(given)} ({error}); remove it") from error
