"""Whether a teacher knows what it is to teach: a look at its answers to a few labelled rows before training."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from hf_mtcompress.tasks import Task
from hf_mtcompress.tasks.base import UNLABELLED

LEAST_AGREEMENT = 0.1
"""Agreement above chance that a teacher must reach; 0 is a guess, 1 is perfect."""
FEWEST_ITEMS = 16
"""Labelled items below which nothing can be said."""
FEWEST_OTHERS = 5
"""Items with another label than the commonest one below which nothing can be said either."""


@dataclass(frozen=True)
class Agreement:
    """How a teacher's answers agree with labels.

    Attributes:
        value: Cohen's kappa of labels, or Pearson's correlation of numbers.
        items: labelled items that were looked at.
        cause: what explains a value near 0; empty where nothing is known.
    """

    value: float
    items: int
    cause: str

    @property
    def near_chance(self) -> bool:
        """Whether the teacher is not to be trusted."""
        return self.items >= FEWEST_ITEMS and self.value < LEAST_AGREEMENT


def agreement(task: Task, logits: list[np.ndarray], labels: list[Any]) -> Agreement:
    """Compare answers with labels, beyond what a guess would reach.

    Args:
        task: whose labels they are.
        logits: of each row, (outputs,) or (positions, outputs), in the task's label order.
        labels: encoded labels of each row.
    """
    match task.problem:
        case "regression":
            return _of_numbers(np.asarray([float(row[0]) for row in logits]), np.asarray(labels, dtype=float))
        case "multi_label_classification":
            answers, truth = np.asarray(logits) > 0, np.asarray(labels)
            known = truth[:, 0] != UNLABELLED
            return _of_labels(answers[known].astype(int).ravel(), truth[known].astype(int).ravel(), ())
        case "single_label_classification":
            answers, truth = np.asarray([row.argmax() for row in logits]), np.asarray(labels)
        case "token_classification":
            answers = np.concatenate([row.argmax(-1) for row in logits])
            truth = np.concatenate([np.asarray(row) for row in labels])
    known = truth != UNLABELLED
    return _of_labels(answers[known], truth[known], tuple(task.labels or ()))


def _of_numbers(answers: np.ndarray, truth: np.ndarray) -> Agreement:
    known = np.isfinite(truth)
    answers, truth = answers[known], truth[known]
    if len(truth) < 3 or np.ptp(truth) == 0 or np.ptp(answers) == 0:
        return Agreement(0.0 if len(truth) and np.ptp(answers) == 0 else 1.0, len(truth), "its answers are all alike")
    value = float(np.corrcoef(answers, truth)[0, 1])
    return Agreement(value, len(truth), "its numbers have the opposite sign" if value < -0.3 else "")


def _of_labels(answers: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> Agreement:
    if len(truth) == 0 or len(set(truth.tolist())) < 2:
        return Agreement(1.0, 0, "")  # one label says nothing
    if len(truth) - np.unique(truth, return_counts=True)[1].max() < FEWEST_OTHERS:
        return Agreement(1.0, 0, "")
    value = float(cohen_kappa_score(answers, truth))
    if len(set(answers.tolist())) == 1:
        shown = f"'{names[int(answers[0])]}'" if names else int(answers[0])
        return Agreement(0.0, len(truth), f"it answers {shown} to everything")
    counts = confusion_matrix(truth, answers, labels=sorted({*truth.tolist(), *answers.tolist()}))
    rows, columns = linear_sum_assignment(-counts)
    present = sorted({*truth.tolist(), *answers.tolist()})
    swap = {present[column]: present[row] for row, column in zip(rows, columns, strict=True)}
    renamed = float(cohen_kappa_score(np.asarray([swap[answer] for answer in answers.tolist()]), truth))
    moved = {answer: label for answer, label in swap.items() if answer != label}
    if renamed > 0.5 and renamed > value + 0.3 and moved and names:
        pairs = ", ".join(f"'{names[answer]}' for '{names[label]}'" for answer, label in list(moved.items())[:4])
        return Agreement(value, len(truth), f"its label names are in another order: it says {pairs}")
    return Agreement(value, len(truth), "")
