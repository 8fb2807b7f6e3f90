"""What a student imitates of its teacher: one section for each criterion of distillation."""

from dataclasses import dataclass
from typing import Literal

from hf_mtcompress.recipe.tasks import WeightSchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsCriterionConfig:
    """The teacher's answers to each task.

    ```yaml
    - {kind: logits, method: standardized, temperature: 2, weight: 1}
    ```
    """

    kind: Literal["logits"] = "logits"
    """Always `logits`."""
    method: Literal["divergence", "standardized", "decoupled", "correlation"] = "divergence"
    """How answers with one label are compared: Kullback-Leibler divergence; the same of standardized logits; with the
    true label and the others apart (DKD); by correlation over labels and rows (DIST)."""
    temperature: float = 2.0
    """Softens the answers before they are compared; 1 leaves them as they are."""
    weight: float | WeightSchedule = 1.0
    """Factor of this criterion; `{from: 1, to: 0}` changes linearly over the training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenCriterionConfig:
    """The teacher's hidden states after each layer; a projection is learned where widths differ.

    ```yaml
    - {kind: hidden, measure: cosine, layers: [1, 3, 5]}
    ```
    """

    kind: Literal["hidden"] = "hidden"
    """Always `hidden`."""
    measure: Literal["mse", "cosine"] = "mse"
    """Squared error relative to the teacher's squared length, or one minus the cosine."""
    layers: tuple[int, ...] | None = None
    """For each layer of the student the teacher's layer that it follows, counted from 0; default: evenly spaced."""
    weight: float | WeightSchedule = 1.0
    """Factor of this criterion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RelationsCriterionConfig:
    """How positions attend to each other: relations of queries, keys and values in one layer (MiniLMv2).

    Widths and numbers of heads may differ, and the student may be pruned.

    ```yaml
    - {kind: relations, weight: 0.5}
    ```
    """

    kind: Literal["relations"] = "relations"
    """Always `relations`."""
    teacher_layer: int | None = None
    """The teacher's layer, counted from 0; default: the last. The student's is its last."""
    relation_heads: int | None = None
    """Heads that queries, keys and values are split into; default: 12 or the next number below that divides both."""
    weight: float | WeightSchedule = 1.0
    """Factor of this criterion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingCriterionConfig:
    """The mean of the last hidden states: the embedding of the whole input.

    ```yaml
    - {kind: embedding, measure: relational}
    ```
    """

    kind: Literal["embedding"] = "embedding"
    """Always `embedding`."""
    measure: Literal["cosine", "relational"] = "cosine"
    """One minus the cosine, or how distances between the rows of a batch differ (RKD)."""
    weight: float | WeightSchedule = 1.0
    """Factor of this criterion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureMapCriterionConfig:
    """Where a vision encoder looks: squared activations by patch (attention transfer).

    ```yaml
    - {kind: feature_map, layers: [3, 5, 7, 9, 10, 11]}
    ```
    """

    kind: Literal["feature_map"] = "feature_map"
    """Always `feature_map`."""
    layers: tuple[int, ...] | None = None
    """For each layer of the student the teacher's layer that it follows, counted from 0; default: evenly spaced."""
    weight: float | WeightSchedule = 1.0
    """Factor of this criterion."""


CriterionConfig = (
    LogitsCriterionConfig
    | HiddenCriterionConfig
    | RelationsCriterionConfig
    | EmbeddingCriterionConfig
    | FeatureMapCriterionConfig
)
"""Every criterion, told apart by `kind`; a word alone stands for the criterion of that kind with its defaults."""
