"""How the losses of several tasks become one number to minimise."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


class Fusion(ABC):
    """Combines the mean losses of the tasks that are present in a step."""

    @abstractmethod
    def __call__(self, losses: Mapping[str, Tensor]) -> Tensor:
        """One scalar from the scalars of the present tasks (at least one)."""


@dataclass
class WeightedSum(Fusion):
    """Sum over present tasks of weight * loss / normaliser.

    A plain sum with sensible weights matches specialised multi-task optimisers (Kurin et al. 2022, "In Defense of the
    Unitary Scalarization for Deep Multi-Task Learning").

    Args:
        weights: by task, at least 0; 1 where absent.
        normalisers: by task, above 0; 1 where absent. The loss of an uninformed guess puts tasks with many labels and
            regressions on one scale (Aghajanyan et al. 2021, "Muppet", divide by log(labels) likewise).
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    normalisers: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, losses: Mapping[str, Tensor]) -> Tensor:
        terms = [self.weights.get(name, 1.0) / self.normalisers.get(name, 1.0) * loss for name, loss in losses.items()]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total
