"""One answer for a whole input: one label, several labels or a number. Shared by text and image tasks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from hf_mtcompress.errors import DataError, TaskError
from hf_mtcompress.tasks.base import UNLABELLED, ProblemType, Task, cross_entropy_sum, softmax, weighted_count
from hf_mtcompress.tasks.metrics import (
    PRIMARY_METRICS,
    baseline_score,
    classification_metrics,
    multi_label_metrics,
    regression_metrics,
)

ClassificationProblem = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass
class Classification(Task):
    """Abstract: a task with one answer for an input.

    `problem_type` takes the values that transformers configs use. Labels by problem type: a label name or its index;
    a list of label names or indices (or a vector of zeros and ones; a list of whole numbers that may be either is
    refused); a number.
    """

    _: KW_ONLY
    problem_type: ClassificationProblem = "single_label_classification"

    def __post_init__(self) -> None:
        if self.problem_type not in get_args(ClassificationProblem):
            raise TaskError(
                f"task '{self.name}': expected problem_type single_label_classification, multi_label_classification or "
                f"regression, found '{self.problem_type}'"
            )
        super().__post_init__()
        if self.problem_type == "regression" and self.labels is not None:
            raise TaskError(f"task '{self.name}': a regression has no labels, found {list(self.labels)}; remove them")
        if self.problem_type != "single_label_classification" and (self.class_weights or self.label_smoothing):
            raise TaskError(
                f"task '{self.name}': class_weights and label_smoothing need problem_type single_label_classification, "
                f"found {self.problem_type}"
            )

    @property
    def problem(self) -> ProblemType:
        return self.problem_type

    @property
    def default_metric(self) -> str:
        match self.problem_type:
            case "single_label_classification":
                return "accuracy"
            case "multi_label_classification":
                return "micro_f1"
            case "regression":
                return "pearson"

    @property
    def primary_metrics(self) -> tuple[str, ...]:
        return PRIMARY_METRICS[self.problem_type]

    def encode_labels(self, values: Sequence[Any], encoding: Mapping[str, Any]) -> list[Any]:
        match self.problem_type:
            case "single_label_classification":
                return [label_index(self, value) for value in values]
            case "multi_label_classification":
                return [self._label_vector(value) for value in values]
            case "regression":
                return [self._number(value) for value in values]

    def _label_vector(self, value: Any) -> list[float]:
        unlabelled = [float(UNLABELLED)] * self.num_outputs
        if is_unlabelled(value):
            return unlabelled
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise DataError(
                f"task '{self.name}': expected a list of labels in column '{self.label}', found {value!r}; "
                "use problem_type single_label_classification for one label a row"
            )
        known = [item for item in value if not is_unlabelled(item)]
        if value and not known:
            return unlabelled
        whole = any(_is_whole(item) for item in known)
        vector = len(value) == self.num_outputs and all(item in (0, 1) and not isinstance(item, str) for item in known)
        numbers = whole and len(set(known)) == len(known) and all(self._is_number_of_label(item) for item in known)
        if vector and len(known) < len(value):
            raise DataError(
                f"task '{self.name}': expected 0 or 1 for each label in column '{self.label}', found {value!r} "
                "with a gap; say None for a row whose labels are not all known, or give the names of its labels"
            )
        if vector and numbers:
            raise DataError(
                f"task '{self.name}': expected the labels of a row in column '{self.label}', found {value!r}, "
                "which may be the numbers of labels or a 0 or 1 for each label; write the names of the labels, or "
                "true and false (0.0 and 1.0) for each label"
            )
        if vector:
            return [float(item) for item in value]
        indices = [label_index(self, item) for item in known]
        if len(set(indices)) < len(indices):
            raise DataError(
                f"task '{self.name}': expected each label of a row once in column '{self.label}', found {value!r}; "
                f"remove the double, or give a 0 or 1 for each of the {self.num_outputs} labels"
            )
        return [float(index in indices) for index in range(self.num_outputs)]

    def _is_number_of_label(self, item: Any) -> bool:
        """Whether a whole number may stand for a label: by its name, or where names are words by its place."""
        labels = self.labels or ()
        return str(item) in labels if _are_numbers(labels) else 0 <= item < len(labels)

    def _number(self, value: Any) -> float:
        if is_unlabelled(value):
            return math.nan
        try:
            return float(value)
        except (TypeError, ValueError):
            raise DataError(
                f"task '{self.name}': expected a number in column '{self.label}', found {value!r}; "
                "use problem_type single_label_classification for label names"
            ) from None

    def collate_labels(self, labels: Sequence[Any], length: int | None) -> Tensor:
        dtype = torch.long if self.problem_type == "single_label_classification" else torch.float32
        return torch.tensor(labels, dtype=dtype)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.problem_type == "single_label_classification":
            return cross_entropy_sum(self, logits, labels)
        if self.problem_type == "regression":
            labelled = ~labels.isnan()
            difference = logits.float().squeeze(-1)[labelled] - labels[labelled]
            return (difference * difference).sum()
        labelled = labels[:, 0] != UNLABELLED
        per_label = nn.functional.binary_cross_entropy_with_logits(
            logits.float()[labelled], labels[labelled], reduction="none"
        )
        return per_label.mean(-1).sum()

    def item_count(self, labels: Tensor) -> Tensor:
        match self.problem_type:
            case "single_label_classification":
                return weighted_count(self, labels)
            case "regression":
                return (~labels.isnan()).sum().float()
            case "multi_label_classification":
                return (labels[:, 0] != UNLABELLED).sum().float()

    def chance_loss(self, labels: Sequence[Any]) -> float:
        match self.problem_type:
            case "single_label_classification":
                return math.log(max(self.num_outputs, 2))
            case "multi_label_classification":
                return math.log(2)
            case "regression":
                numbers = np.asarray(labels, dtype=np.float64)
                numbers = numbers[~np.isnan(numbers)]
                variance = float(numbers.var()) if len(numbers) else 0.0
                return variance if variance > 0 else 1.0

    def compute_metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        kept = self._labelled(labels)
        logits, labels = np.asarray(logits)[kept], np.asarray(labels)[kept]
        match self.problem_type:
            case "single_label_classification":
                return classification_metrics(logits.argmax(-1), labels, self.num_outputs)
            case "multi_label_classification":
                return multi_label_metrics((logits > 0).astype(int), labels.astype(int))
            case "regression":
                return regression_metrics(logits.reshape(-1), labels)

    def baseline(self, labels: Sequence[Any]) -> float:
        array = np.asarray(labels)
        assert self.metric is not None
        return baseline_score(self.metric, array[self._labelled(array)], self.problem_type)

    def _labelled(self, labels: np.ndarray) -> np.ndarray:
        if self.problem_type == "regression":
            return ~np.isnan(labels)
        return (labels if labels.ndim == 1 else labels[:, 0]) != UNLABELLED

    def decode(self, logits: np.ndarray, encoding: Mapping[str, Any] | None = None) -> Any:
        names = self.labels or ()
        match self.problem_type:
            case "regression":
                return float(np.asarray(logits).reshape(-1)[0])
            case "single_label_classification":
                scores = softmax(np.asarray(logits, dtype=np.float64))
                best = int(scores.argmax())
                return {"label": names[best], "score": float(scores[best])}
            case "multi_label_classification":
                scores = 1.0 / (1.0 + np.exp(-np.asarray(logits, dtype=np.float64)))
                return [
                    {"label": name, "score": float(score)}
                    for name, score in zip(names, scores, strict=True)
                    if score > 0.5
                ]


def _are_numbers(labels: Sequence[str]) -> bool:
    return all(label.lstrip("-").isdigit() for label in labels)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_unlabelled(value: Any) -> bool:
    """Whether a value in a column of labels says that the row has none: None, NaN or -100."""
    return value is None or value == UNLABELLED or (isinstance(value, float) and math.isnan(value))


def label_index(task: Task, value: Any) -> int:
    """Index of a label name (or of an index in range); None, NaN and -100 are unlabelled.

    Raises:
        DataError: the value is not a label of the task.
    """
    labels = task.labels or ()
    if is_unlabelled(value):
        return UNLABELLED
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables read whole numbers with gaps as floats
    if str(value) in labels:
        return labels.index(str(value))
    numeric = _are_numbers(labels)
    if _is_whole(value) and not numeric and 0 <= value < len(labels):
        return int(value)
    near = get_close_matches(str(value), labels, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
    raise DataError(
        f"task '{task.name}': expected one of {len(labels)} labels ({shown}) in column '{task.label}', "
        f"found {value!r}; "
        f"{hint}add the label to the task, or set it to null where a row is unlabelled"
    )
