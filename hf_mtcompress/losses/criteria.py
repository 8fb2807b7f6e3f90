"""What a student imitates of its teacher, as objects that a trainer calls.

Two kinds: an `AnswerCriterion` compares the logits of each task, a `StateCriterion` compares what happens inside the
encoder, once a batch. Both return sums over items, so that the trainer can divide by the items of a whole accumulation
window and gradients do not depend on how it is split. Each formula stands in `losses/distillation.py` with its paper.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, assert_never, get_args

import torch
from torch import Tensor

from hf_mtcompress.errors import TaskError
from hf_mtcompress.losses.distillation import (
    attention_map_distance_sum,
    binary_divergence_sum,
    correlation_distance_sum,
    cosine_distance_sum,
    decoupled_divergence_sum,
    hidden_error_sum,
    layer_map,
    relation_divergence_sum,
    relation_heads,
    relational_distance_sum,
    soft_cross_entropy_sum,
    squared_error_sum,
    standardized_divergence_sum,
)
from hf_mtcompress.losses.fusion import Weight

Problem = Literal["single_label_classification", "multi_label_classification", "regression", "token_classification"]
"""What kind of answer a task has."""
LogitsMethod = Literal["divergence", "standardized", "decoupled", "correlation"]
HIDDEN, QUERY, KEY, VALUE, EMBEDDING = "hidden", "query", "key", "value", "embedding"
"""Kinds of states; a state of one layer is named `hidden_3`, layers counted from 0."""


def state_name(kind: str, layer: int) -> str:
    """Name of a state of one layer, such as `hidden_3`."""
    return f"{kind}_{layer}"


class Criterion(ABC):
    """Base of all criteria.

    Args:
        weight: factor, at least 0; a pair goes linearly from the first to the last optimizer step.
    """

    kind: ClassVar[str]

    def __init__(self, weight: Weight = 1.0) -> None:
        if min(weight if isinstance(weight, tuple) else (weight,)) < 0:
            raise TaskError(f"criterion '{self.kind}': expected a weight of at least 0, found {weight}")
        self.weight = weight

    def weight_at(self, progress: float) -> float:
        """The factor after a share of the training in [0, 1]."""
        return scheduled(self.weight, progress)


def scheduled(weight: Weight, progress: float) -> float:
    """A weight, or the point between a pair of them, after a share of the training in [0, 1]."""
    if isinstance(weight, tuple):
        return weight[0] + min(max(progress, 0.0), 1.0) * (weight[1] - weight[0])
    return weight


class AnswerCriterion(Criterion):
    """Compares the answers to one task."""

    @abstractmethod
    def divergence_sum(self, problem: Problem, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """How far the student's answers are from the teacher's, summed over items; a scalar.

        Args:
            problem: what kind of task it is.
            student: (items, outputs) logits of the items that count: rows, or words.
            teacher: (items, outputs) logits in the student's label order.
            target: (items,) or (items, outputs) labels; -100 or NaN where an item has none.
        """


class LogitsCriterion(AnswerCriterion):
    """The teacher's logits. Regressions by squared error, independent labels by their Bernoulli divergences.

    Args:
        method: for tasks with one label an item: `divergence` (Hinton et al. 2015), `standardized` (Sun et al. 2024),
            `decoupled` (Zhao et al. 2022) or `correlation` (Huang et al. 2022).
        temperature: above 0.
        weight: see `Criterion`.

    Raises:
        TaskError: an unknown method, or a temperature of 0 or less.
    """

    kind = "logits"

    def __init__(self, method: LogitsMethod = "divergence", temperature: float = 2.0, weight: Weight = 1.0) -> None:
        super().__init__(weight)
        if method not in get_args(LogitsMethod) or temperature <= 0:
            raise TaskError(
                f"criterion 'logits': expected a method among {get_args(LogitsMethod)} and a temperature above 0, "
                f"found '{method}' and {temperature}"
            )
        self.method: LogitsMethod = method
        self.temperature = temperature

    def divergence_sum(self, problem: Problem, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        match problem:
            case "regression":
                return squared_error_sum(student, teacher)
            case "multi_label_classification":
                return binary_divergence_sum(student, teacher, self.temperature)
            case "single_label_classification" | "token_classification":
                return self._one_label(student, teacher, target)

    def _one_label(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        every = torch.ones(len(student), dtype=torch.bool, device=student.device)
        match self.method:
            case "divergence":
                return soft_cross_entropy_sum(student, teacher, every, self.temperature)
            case "standardized":
                return standardized_divergence_sum(student, teacher, every, self.temperature)
            case "decoupled":
                return decoupled_divergence_sum(student, teacher, every, target, self.temperature)
            case "correlation":
                return correlation_distance_sum(student, teacher, every, self.temperature)
        assert_never(self.method)


class StateCriterion(Criterion):
    """Compares states of the encoder, named as `state_name` does."""

    per_row: ClassVar[bool] = False
    """Whether items are rows instead of positions."""
    projected: ClassVar[bool] = False
    """Whether states of another width are projected to the teacher's by a linear layer that is learned beside."""
    on_patches: ClassVar[bool] = False
    """Whether states must be those of a vision encoder."""

    @abstractmethod
    def pairs(self, student_layers: int, teacher_layers: int) -> list[tuple[str, str]]:
        """Names of the student's states and of the teacher's that they follow.

        Raises:
            TaskError: layers that are not there.
        """

    @abstractmethod
    def distance_sum(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """How far one state is from another, summed over items; a scalar.

        Args:
            student: (batch, positions, width), or (batch, width) where items are rows.
            teacher: the same of another width, unless `projected`.
            mask: (batch, positions) or (batch,) bool: items that count.
        """


class HiddenCriterion(StateCriterion):
    """Hidden states after each layer (Jiao et al. 2020, TinyBERT; Sanh et al. 2019, DistilBERT, for the cosine).

    Args:
        measure: `mse`, relative to the teacher's squared length, or `cosine`.
        layers: for each layer of the student the teacher's layer, counted from 0; default: evenly spaced.
        weight: see `Criterion`.
    """

    kind = "hidden"
    projected = True

    def __init__(
        self,
        measure: Literal["mse", "cosine"] = "mse",
        layers: Sequence[int] | None = None,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(weight)
        if measure not in ("mse", "cosine"):
            raise TaskError(f"criterion 'hidden': expected measure 'mse' or 'cosine', found '{measure}'")
        self.measure = measure
        self.layers = None if layers is None else list(layers)

    def pairs(self, student_layers: int, teacher_layers: int) -> list[tuple[str, str]]:
        followed = _followed(self.kind, self.layers, student_layers, teacher_layers)
        return [(state_name(HIDDEN, own), state_name(HIDDEN, layer)) for own, layer in enumerate(followed)]

    def distance_sum(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        measure = hidden_error_sum if self.measure == "mse" else cosine_distance_sum
        return measure(student, teacher, mask)


class RelationsCriterion(StateCriterion):
    """Relations of queries, keys and values in the last layer (Wang et al. 2021, MiniLMv2).

    Args:
        teacher_layer: counted from 0; default: the last. For large teachers the paper takes one below the last.
        relation_heads: heads that both sides are split into; default: 12, or the next number below it that divides
            the widths of both.
        weight: see `Criterion`.
    """

    kind = "relations"

    def __init__(
        self, teacher_layer: int | None = None, relation_heads: int | None = None, weight: Weight = 1.0
    ) -> None:
        super().__init__(weight)
        self.teacher_layer = teacher_layer
        self.relation_heads = relation_heads

    def pairs(self, student_layers: int, teacher_layers: int) -> list[tuple[str, str]]:
        layer = teacher_layers - 1 if self.teacher_layer is None else self.teacher_layer
        if not 0 <= layer < teacher_layers:
            raise TaskError(
                f"criterion 'relations': expected a layer of a teacher that has {teacher_layers} (counted from 0), "
                f"found {layer}"
            )
        return [(state_name(kind, student_layers - 1), state_name(kind, layer)) for kind in (QUERY, KEY, VALUE)]

    def distance_sum(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        heads = relation_heads(student.shape[-1], teacher.shape[-1], self.relation_heads)
        return relation_divergence_sum(student, teacher, mask, heads)


class EmbeddingCriterion(StateCriterion):
    """The mean of the last hidden states over positions (Reimers and Gurevych 2020; Park et al. 2019, RKD).

    Args:
        measure: `cosine` (projected where widths differ) or `relational` (any widths; compares rows of a batch).
        weight: see `Criterion`.
    """

    kind = "embedding"
    per_row = True

    def __init__(self, measure: Literal["cosine", "relational"] = "cosine", weight: Weight = 1.0) -> None:
        super().__init__(weight)
        if measure not in ("cosine", "relational"):
            raise TaskError(f"criterion 'embedding': expected measure 'cosine' or 'relational', found '{measure}'")
        self.measure = measure
        self.projected = measure == "cosine"  # type: ignore[misc]  # of the object, for this one criterion

    def pairs(self, student_layers: int, teacher_layers: int) -> list[tuple[str, str]]:
        return [(EMBEDDING, EMBEDDING)]

    def distance_sum(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        measure = cosine_distance_sum if self.measure == "cosine" else relational_distance_sum
        return measure(student, teacher, mask)


class FeatureMapCriterion(StateCriterion):
    """Where a vision encoder's activations are large (Zagoruyko and Komodakis 2017, attention transfer).

    Args:
        layers: for each layer of the student the teacher's layer, counted from 0; default: evenly spaced.
        weight: see `Criterion`.
    """

    kind = "feature_map"
    per_row = True
    on_patches = True

    def __init__(self, layers: Sequence[int] | None = None, weight: Weight = 1.0) -> None:
        super().__init__(weight)
        self.layers = None if layers is None else list(layers)

    def pairs(self, student_layers: int, teacher_layers: int) -> list[tuple[str, str]]:
        followed = _followed(self.kind, self.layers, student_layers, teacher_layers)
        return [(state_name(HIDDEN, own), state_name(HIDDEN, layer)) for own, layer in enumerate(followed)]

    def distance_sum(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return attention_map_distance_sum(
            student[mask], teacher[mask], _special(student.shape[1]), _special(teacher.shape[1])
        )


def _special(positions: int) -> int:
    """Positions that are no patch (class token, registers): what is over the largest square grid."""
    return positions - math.isqrt(positions) ** 2


def _followed(kind: str, layers: list[int] | None, student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layer for each layer of the student."""
    if layers is None:
        try:
            return layer_map(student_layers, teacher_layers)
        except ValueError as error:
            raise TaskError(
                f"criterion '{kind}': a student of {student_layers} layers cannot follow a teacher of "
                f"{teacher_layers}: {error}; give layers: one of the teacher's for each of the student's, choose a "
                f"shallower student, or leave out '{kind}'"
            ) from error
    if len(layers) != student_layers or not all(0 <= layer < teacher_layers for layer in layers):
        raise TaskError(
            f"criterion '{kind}': expected {student_layers} layers, one for each of the student's, of a teacher that "
            f"has {teacher_layers} (counted from 0), found {layers}"
        )
    return layers


CRITERIA: dict[str, type[Criterion]] = {
    cls.kind: cls
    for cls in (LogitsCriterion, HiddenCriterion, RelationsCriterion, EmbeddingCriterion, FeatureMapCriterion)
}
"""The criteria by kind."""


def criterion_of(kind: str, **options: Any) -> Criterion:
    """A criterion by name.

    Args:
        kind: one of `CRITERIA`.
        **options: its arguments.

    Raises:
        TaskError: an unknown name or option.
    """
    if kind not in CRITERIA:
        raise TaskError(f"expected criteria among {list(CRITERIA)}, found '{kind}'")
    try:
        return CRITERIA[kind](**options)
    except TypeError as error:
        raise TaskError(f"criterion '{kind}': {error}") from error
