"""Metrics of every kind of task, computed offline, as plain functions and as `evaluate.Metric` instances.

`evaluate.load("accuracy")` fetches a script from the network; the classes here need none, keep their rows in memory
(no cache files, so processes cannot disturb each other) and share one formula with the plain functions:

    load_metric("macro_f1").compute(predictions=[0, 1], references=[0, 0])   # {"macro_f1": 0.333...}
    classification_metrics([0, 1], [0, 0], num_labels=2)                      # every metric of the problem

A score is always a finite number, because the best checkpoint is chosen by it: where a formula is undefined (the
correlation with a constant, the F1 of a class that never occurs) the score is 0.0.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import evaluate
import numpy as np
from datasets import Features, List, Value
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    matthews_corrcoef,
    mean_absolute_error,
    mean_squared_error,
    recall_score,
)

from hf_mtcompress.errors import DataError, TaskError, TrainingError
from hf_mtcompress.recipe.tasks import PRIMARY_METRICS

__all__ = [
    "DEFAULT_METRIC",
    "METRICS_BY_PROBLEM",
    "PRIMARY_METRICS",
    "ClassificationMetric",
    "MultiLabelMetric",
    "RegressionMetric",
    "TokenMetric",
    "baseline_score",
    "bio_spans",
    "classification_metrics",
    "higher_is_better",
    "is_bio",
    "load_metric",
    "multi_label_metrics",
    "regression_metrics",
    "token_metrics",
]

Problem: TypeAlias = Literal[
    "single_label_classification", "multi_label_classification", "regression", "token_classification"
]
Span: TypeAlias = tuple[str, int, int]
"""Label, first word, word after the last one."""

METRICS_BY_PROBLEM: Mapping[str, tuple[str, ...]] = {
    "single_label_classification": ("accuracy", "balanced_accuracy", "macro_f1", "micro_f1", "weighted_f1", "mcc"),
    "multi_label_classification": ("micro_f1", "macro_f1", "exact_match"),
    "regression": ("pearson", "spearman", "mse", "mae"),
    "token_classification": ("span_f1", "span_precision", "span_recall", "token_accuracy"),
}
LOWER_IS_BETTER = frozenset({"mse", "mae"})
SPAN_METRICS = frozenset({"span_f1", "span_precision", "span_recall"})
DEFAULT_METRIC: Mapping[str, str] = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "micro_f1",
    "regression": "pearson",
    "token_classification": "span_f1",
}
"""For token classification without BIO labels (see `is_bio`) the default is `token_accuracy`."""


def higher_is_better(name: str) -> bool:
    """Whether a larger value of metric `name` is a better one.

    Raises:
        TaskError: there is no such metric.
    """
    if not any(name in names for names in METRICS_BY_PROBLEM.values()):
        known = sorted({metric for names in METRICS_BY_PROBLEM.values() for metric in names})
        raise TaskError(f"expected one of the metrics {', '.join(known)}, found '{name}'")
    return name not in LOWER_IS_BETTER


# ---------------------------------------------------------------------------------------------- spans of BIO labels


def is_bio(labels: Iterable[str]) -> bool:
    """Whether every label is `O` or starts with `B-`, `I-`, `E-` or `S-`, and at least one is not `O`."""
    seen = set(labels)
    return seen != {"O"} and bool(seen) and all(_is_span_label(label) for label in seen)


def bio_spans(labels: Sequence[str]) -> list[Span]:
    """Decode the labels of one sentence to spans, by the lenient rules of conlleval.

    `I-x` continues a span of type x and otherwise starts one: after `O`, after another type and after a closed span.
    `E-x` (end) and `S-x` (single) of the IOBES scheme are understood too.

    Args:
        labels: one label a word, such as `["B-city", "I-city", "O"]`.

    Returns:
        Spans `(type, start, end)` in order, `end` exclusive: `[("city", 0, 2)]`.

    Raises:
        TaskError: a label belongs to neither scheme.

    References:
        Tjong Kim Sang and Buchholz, Introduction to the CoNLL-2000 Shared Task, 2000.
    """
    spans: list[Span] = []
    start = 0
    previous, previous_type = "O", ""
    for index, label in enumerate([*labels, "O"]):
        if not _is_span_label(label):
            raise TaskError(
                f"expected labels O, B-..., I-..., E-... or S-..., found '{label}'; "
                "without such labels there are no spans: use the metric token_accuracy"
            )
        tag, span_type = label[0], label[2:] or "_"
        starts = tag in "BS" or (tag in "IE" and (previous in "OES" or previous_type != span_type))
        if previous != "O" and (starts or tag == "O"):
            spans.append((previous_type, start, index))
        if starts:
            start = index
        previous, previous_type = tag, span_type
    return spans


def _is_span_label(label: str) -> bool:
    return label == "O" or label in {"B", "I", "E", "S"} or label[:2] in {"B-", "I-", "E-", "S-"}


# ------------------------------------------------------------------------------------------------- plain functions


def classification_metrics(predictions: ArrayLike, references: ArrayLike, num_labels: int) -> dict[str, float]:
    """Every metric of single-label classification.

    The F1 averages are over the classes that occur in predictions or references, as in scikit-learn.

    Args:
        predictions: class indices, shape (rows,).
        references: class indices, shape (rows,).
        num_labels: number of classes; an index outside of it is a mistake.

    Raises:
        DataError: no rows, unequal lengths, or a class index outside 0..num_labels-1.
    """
    predicted, expected = np.asarray(predictions), np.asarray(references)
    for name, values in (("predictions", predicted), ("references", expected)):
        if values.size and (values.min() < 0 or values.max() >= num_labels):
            raise DataError(
                f"expected {name} from 0 to {num_labels - 1}, found {values.min()} to {values.max()}; "
                "leave out unlabelled rows before scoring"
            )
    return _all_metrics("single_label_classification", predicted, expected)


def multi_label_metrics(predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """Every metric of multi-label classification.

    Args:
        predictions: 0 or 1 for each label, shape (rows, labels).
        references: 0 or 1 for each label, shape (rows, labels).

    Raises:
        DataError: no rows or unequal shapes.
    """
    return _all_metrics("multi_label_classification", predictions, references)


def regression_metrics(predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """Every metric of regression; the correlation with a constant is 0.0.

    Args:
        predictions: numbers, shape (rows,).
        references: numbers, shape (rows,).

    Raises:
        DataError: no rows, unequal lengths, or a reference that is not finite.
        TrainingError: a prediction is not finite.
    """
    return _all_metrics("regression", predictions, references)


def token_metrics(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Every metric of token classification: micro-averaged span scores where the labels are BIO, and word accuracy.

    Args:
        predictions: one list of labels a sentence.
        references: the same, of the same lengths.

    Raises:
        DataError: no words or unequal lengths.
    """
    _check_sentences(predictions, references)
    seen = {label for rows in (predictions, references) for labels in rows for label in labels}
    scores = {"token_accuracy": _token_accuracy(predictions, references)}
    if all(_is_span_label(label) for label in seen):
        scores = {**_span_scores(predictions, references), **scores}
    return scores


def baseline_score(metric: str, references: Any, problem_type: str) -> float:
    """Score of a predictor that knows the references' distribution but not the input: majority class or mean.

    Single-label classification predicts the most frequent class, multi-label every label that more than half of the
    rows have, regression the mean (so a correlation is 0.0), token classification the most frequent label for
    every word.

    Args:
        metric: one of `METRICS_BY_PROBLEM[problem_type]`.
        references: as the problem's `..._metrics` function takes them.
        problem_type: a key of `METRICS_BY_PROBLEM`.

    Raises:
        TaskError: the problem has no such metric.
        DataError: no rows.
    """
    formula = _formula(metric, problem_type)
    if problem_type == "token_classification":
        _check_sentences(references, references)
        majority = _most_frequent(label for labels in references for label in labels)
        return formula([[majority] * len(labels) for labels in references], references)
    values = np.asarray(references)
    _check_arrays(values, values)
    if problem_type == "single_label_classification":
        constant = np.full_like(values, _most_frequent(values.tolist()))
    elif problem_type == "multi_label_classification":
        constant = np.broadcast_to(values.mean(axis=0) > 0.5, values.shape).astype(values.dtype)
    else:
        constant = np.full(values.shape, values.mean(dtype=np.float64))
    return formula(constant, values)


def _most_frequent(labels: Iterable[Any]) -> Any:
    """The most frequent label, the smallest one among equals."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


# ---------------------------------------------------------------------------------------------- evaluate.Metric form


def load_metric(name: str, problem_type: str | None = None, **settings: Any) -> evaluate.Metric:
    """A metric as an `evaluate.Metric`, without the network.

    Args:
        name: such as `macro_f1`.
        problem_type: needed to tell apart the metrics that two problems share; default: the first problem with `name`,
            in the order of `METRICS_BY_PROBLEM`.
        settings: other arguments of `evaluate.Metric`, such as `num_process` and `process_id`.

    Raises:
        TaskError: there is no such metric.
    """
    higher_is_better(name)
    problem = problem_type or next(problem for problem, names in METRICS_BY_PROBLEM.items() if name in names)
    _formula(name, problem)
    match problem:
        case "single_label_classification":
            return ClassificationMetric(name, **settings)
        case "multi_label_classification":
            return MultiLabelMetric(name, **settings)
        case "regression":
            return RegressionMetric(name, **settings)
        case _:
            return TokenMetric(name, **settings)


class _OfflineMetric(evaluate.Metric):
    """Adapter from one formula to the interface of evaluate; `config_name` is the name of the metric."""

    problem: str
    element: Value | List

    def __init__(self, config_name: str | None = None, **settings: Any) -> None:
        # In memory unless several processes must meet in files.
        settings.setdefault("keep_in_memory", settings.get("num_process", 1) == 1)
        super().__init__(config_name=config_name or DEFAULT_METRIC[self.problem], **settings)

    def _build_data_dir(self) -> str:
        # evaluate makes a cache folder for each metric even when nothing is going to be stored in it.
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        name = self.config_name or DEFAULT_METRIC[self.problem]
        return evaluate.MetricInfo(
            description=f"{name} of {self.problem.replace('_', ' ')}",
            citation="",
            inputs_description="",
            features=Features({"predictions": self.element, "references": self.element}),
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        if kwargs:
            raise TypeError(f"expected predictions and references only, found {', '.join(kwargs)}")
        name = self.config_name or DEFAULT_METRIC[self.problem]
        return {name: _formula(name, self.problem)(predictions, references)}


class ClassificationMetric(_OfflineMetric):
    """Metric over class indices."""

    problem = "single_label_classification"
    element = Value("int64")


class MultiLabelMetric(_OfflineMetric):
    """Metric over rows of 0 and 1, one for each label."""

    problem = "multi_label_classification"
    element = List(Value("int64"))


class RegressionMetric(_OfflineMetric):
    """Metric over numbers."""

    problem = "regression"
    element = Value("float64")


class TokenMetric(_OfflineMetric):
    """Metric over lists of label names, one list a sentence."""

    problem = "token_classification"
    element = List(Value("string"))


# -------------------------------------------------------------------------------------------------------- formulas


Formula: TypeAlias = Callable[[Any, Any], float]

_UNDEFINED_IS_ZERO: dict[str, Any] = {"zero_division": 0.0}


def _formula(name: str, problem_type: str) -> Formula:
    formulas = _FORMULAS.get(problem_type)
    if formulas is None:
        raise TaskError(f"expected a problem type of {', '.join(_FORMULAS)}, found '{problem_type}'")
    if name not in formulas:
        raise TaskError(f"expected a metric of {problem_type} ({', '.join(formulas)}), found '{name}'")
    return formulas[name]


def _all_metrics(problem: Problem, predictions: Any, references: Any) -> dict[str, float]:
    return {name: formula(predictions, references) for name, formula in _FORMULAS[problem].items()}


def _check_arrays(predictions: NDArray[Any], references: NDArray[Any]) -> None:
    if references.size == 0:
        raise DataError("expected at least one labelled row to score, found none; give a split with labels")
    if predictions.shape != references.shape:
        raise DataError(
            f"expected predictions and references of one shape, found {predictions.shape} and {references.shape}"
        )


def _check_sentences(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> None:
    if not any(len(labels) for labels in references):
        raise DataError("expected at least one labelled word to score, found none; give a split with labels")
    if len(predictions) != len(references):
        raise DataError(f"expected as many predictions as references, found {len(predictions)} and {len(references)}")
    for row, (predicted, expected) in enumerate(zip(predictions, references, strict=True)):
        if len(predicted) != len(expected):
            raise DataError(
                f"expected one predicted label for each word, found {len(predicted)} for {len(expected)} words "
                f"in row {row}"
            )


def _over_arrays(formula: Formula) -> Formula:
    def checked(predictions: Any, references: Any) -> float:
        predicted, expected = np.asarray(predictions), np.asarray(references)
        _check_arrays(predicted, expected)
        return float(formula(predicted, expected))

    return checked


def _over_numbers(formula: Formula) -> Formula:
    def checked(predictions: Any, references: Any) -> float:
        predicted = np.asarray(predictions, dtype=np.float64)
        expected = np.asarray(references, dtype=np.float64)
        if not np.isfinite(expected).all():
            raise DataError(
                f"expected finite numbers as references, found {np.count_nonzero(~np.isfinite(expected))} that are "
                "not; leave out unlabelled rows before scoring"
            )
        if not np.isfinite(predicted).all():
            raise TrainingError(
                f"expected finite predictions, found {np.count_nonzero(~np.isfinite(predicted))} of {predicted.size} "
                "that are not; the model has diverged: lower the learning rate"
            )
        return formula(predicted, expected)

    return _over_arrays(checked)


def _over_sentences(formula: Formula) -> Formula:
    def checked(predictions: Any, references: Any) -> float:
        _check_sentences(predictions, references)
        return formula(predictions, references)

    return checked


def _balanced_accuracy(predictions: NDArray[Any], references: NDArray[Any]) -> float:
    # The mean recall over the classes that occur; scikit-learn's own function warns when others are predicted.
    labels = np.unique(references)
    return float(recall_score(references, predictions, labels=labels, average="macro", **_UNDEFINED_IS_ZERO))


def _mcc(predictions: NDArray[Any], references: NDArray[Any]) -> float:
    constant = np.unique(predictions).size < 2 or np.unique(references).size < 2
    return 0.0 if constant else float(matthews_corrcoef(references, predictions))


def _f1(average: str) -> Formula:
    def f1(predictions: NDArray[Any], references: NDArray[Any]) -> float:
        # A single column of 0 and 1 would be read as two classes.
        labels = [1] if references.ndim == 2 and references.shape[1] == 1 else None
        return float(f1_score(references, predictions, labels=labels, average=average, **_UNDEFINED_IS_ZERO))

    return f1


def _is_constant(values: NDArray[np.float64]) -> bool:
    # The bound below which scipy calls an input nearly constant: what is left are rounding errors.
    return bool(np.linalg.norm(values - values.mean()) <= 1e-13 * abs(values.mean()))


def _pearson(predictions: NDArray[np.float64], references: NDArray[np.float64]) -> float:
    if _is_constant(predictions) or _is_constant(references):
        return 0.0
    return float(np.corrcoef(predictions, references)[0, 1])


def _spearman(predictions: NDArray[np.float64], references: NDArray[np.float64]) -> float:
    if _is_constant(predictions) or _is_constant(references):
        return 0.0
    return float(np.corrcoef(rankdata(predictions), rankdata(references))[0, 1])


def _token_accuracy(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    hits = sum(
        p == r for row, gold in zip(predictions, references, strict=True) for p, r in zip(row, gold, strict=True)
    )
    return hits / sum(len(gold) for gold in references)


def _span_scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    correct = predicted = expected = 0
    for row, gold in zip(predictions, references, strict=True):
        found, wanted = set(bio_spans(row)), set(bio_spans(gold))
        correct += len(found & wanted)
        predicted += len(found)
        expected += len(wanted)
    return {
        "span_f1": 2 * correct / (predicted + expected) if correct else 0.0,
        "span_precision": correct / predicted if correct else 0.0,
        "span_recall": correct / expected if correct else 0.0,
    }


def _span_score(name: str) -> Formula:
    return lambda predictions, references: _span_scores(predictions, references)[name]


_FORMULAS: dict[str, dict[str, Formula]] = {
    "single_label_classification": {
        "accuracy": _over_arrays(lambda predictions, references: accuracy_score(references, predictions)),
        "balanced_accuracy": _over_arrays(_balanced_accuracy),
        "macro_f1": _over_arrays(_f1("macro")),
        "micro_f1": _over_arrays(_f1("micro")),
        "weighted_f1": _over_arrays(_f1("weighted")),
        "mcc": _over_arrays(_mcc),
    },
    "multi_label_classification": {
        "micro_f1": _over_arrays(_f1("micro")),
        "macro_f1": _over_arrays(_f1("macro")),
        "exact_match": _over_arrays(lambda predictions, references: accuracy_score(references, predictions)),
    },
    "regression": {
        "pearson": _over_numbers(_pearson),
        "spearman": _over_numbers(_spearman),
        "mse": _over_numbers(lambda predictions, references: mean_squared_error(references, predictions)),
        "mae": _over_numbers(lambda predictions, references: mean_absolute_error(references, predictions)),
    },
    "token_classification": {
        "span_f1": _over_sentences(_span_score("span_f1")),
        "span_precision": _over_sentences(_span_score("span_precision")),
        "span_recall": _over_sentences(_span_score("span_recall")),
        "token_accuracy": _over_sentences(_token_accuracy),
    },
}
