"""What a task is: its data, its columns, its labels and how it is judged."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_mtcompress.recipe.data import DataConfig

TaskRole = Literal["main", "auxiliary"]
Modality = Literal["text", "image"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

RESERVED_TASK_NAMES = frozenset(
    {
        *("average", "loss", "runtime", "epoch", "samples", "steps", "model_preparation_time"),  # keys of the metrics
        *("label", "labels", "main"),  # arguments of `forward`, name of the encoder
        *("keys", "values", "items", "type", "pop", "clear", "update"),  # attributes of dicts and modules
    }
)
"""Names that a task may not have, because something else of a model, a trainer or a record has them."""

PRIMARY_METRICS: dict[str, tuple[str, ...]] = {
    "single_label_classification": ("accuracy", "balanced_accuracy", "macro_f1", "micro_f1", "weighted_f1", "mcc"),
    "multi_label_classification": ("micro_f1", "macro_f1", "exact_match"),
    "regression": ("pearson", "spearman"),
    "token_classification": ("span_f1", "span_precision", "span_recall", "token_accuracy"),
}
"""Metrics that a task may be judged by, higher being better; `hf_mtcompress.tasks.metrics` computes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSchedule:
    """A weight that changes linearly from the first to the last optimizer step."""

    source: float
    """At the first step."""
    to: float
    """At the last step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings:
    """What every kind of task has."""

    reads: ClassVar[tuple[Modality, ...]] = ("text",)
    """What its rows hold; chooses the reader of the encoder."""

    data: DataConfig | str
    """A source of rows, or the name of another task whose rows are shared."""
    unlabelled: DataConfig | None = None
    """A further source with the same input columns and no labels, its train split: for distill and pretrain steps. It
    belongs to the rows, so tasks that share them share it; say it where `data` is a section."""
    label: str
    """Column with the label; rows without one are not counted."""
    labels: tuple[str, ...] | None = None
    """Label names in order; default: the ClassLabel feature, else the sorted values of all splits."""
    metric: str | None = None
    """Primary metric; default: the kind's own."""
    role: TaskRole = "main"
    """Auxiliary tasks are trained but do not count in `average`."""
    weight: float | WeightSchedule = 1.0
    """Factor of the loss in the sum of all tasks; `{from: 0.5, to: 0}` changes linearly over a step's training."""
    head: Literal["stock", "linear", "mlp"] = "stock"
    """`stock` is the head of the family's own AutoModelFor class."""
    pooling: Literal["cls", "mean", "max"] | None = None
    """Pooling under a `linear` or `mlp` head."""
    layer: int | None = None
    """How many layers of the encoder the task reads, from 1; default: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceClassificationConfig(TaskSettings):
    """One label, several labels or a number for a text or a pair of texts."""

    kind: Literal["sequence-classification"] = "sequence-classification"
    """Always `sequence-classification`."""
    text: str
    """Column with a string or a list of words."""
    text_pair: str | None = None
    """Column with the second text of a pair."""
    problem_type: ProblemType = "single_label_classification"
    """What the label is: one name, a list of names, or a number."""
    class_weights: tuple[float, ...] | None = None
    """Weight of each label in the loss, in the order of `labels`."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenClassificationConfig(TaskSettings):
    """One label for each word; BIO labels are decoded to spans."""

    kind: Literal["token-classification"] = "token-classification"
    """Always `token-classification`."""
    tokens: str
    """Column with a list of words."""
    class_weights: tuple[float, ...] | None = None
    """Weight of each label in the loss, in the order of `labels`."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageClassificationConfig(TaskSettings):
    """One label, several labels or a number for an image."""

    reads: ClassVar[tuple[Modality, ...]] = ("image",)

    kind: Literal["image-classification"] = "image-classification"
    """Always `image-classification`."""
    image: str = "image"
    """Column with the image."""
    problem_type: ProblemType = "single_label_classification"
    """What the label is: one name, a list of names, or a number."""
    class_weights: tuple[float, ...] | None = None
    """Weight of each label in the loss, in the order of `labels`."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all labels."""


TaskConfig = SequenceClassificationConfig | TokenClassificationConfig | ImageClassificationConfig
