"""When a prune step removes what it removes, one frozen class each, joined in the union `ScheduleConfig`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class OneShotSchedule:
    """All at once, then the recovery."""

    kind: Literal["one_shot"] = "one_shot"
    """Always `one_shot`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IterativeSchedule:
    """A part, a part of the recovery, and again: importance is measured anew on what is left."""

    kind: Literal["iterative"] = "iterative"
    """Always `iterative`."""
    rounds: int = 3
    """How often; each round removes as much, and has as large a part of the recovery's epochs or steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradualSchedule:
    """During the recovery: heads and neurons are masked step by step (Zhu and Gupta 2018), and cut at its end."""

    kind: Literal["gradual"] = "gradual"
    """Always `gradual`."""
    begin: float = 0.1
    """Fraction of the recovery's steps after which it begins."""
    end: float = 0.7
    """Fraction of them after which all is removed; the rest recovers."""
    every: int | None = None
    """Optimizer steps between two changes; default: so that there are 20."""


ScheduleConfig = OneShotSchedule | IterativeSchedule | GradualSchedule
"""Every schedule of a prune step, told apart by `kind`."""
