"""Laws of the metrics: equal to scikit-learn, scipy and seqeval, finite always, no network and no files."""

import math
import warnings
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from scipy import stats
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.metrics import precision_score as seqeval_precision
from seqeval.metrics import recall_score as seqeval_recall
from seqeval.metrics.sequence_labeling import get_entities
from sklearn import metrics as sk

from hf_mtcompress.errors import DataError, TaskError, TrainingError
from hf_mtcompress.tasks.metrics import (
    DEFAULT_METRIC,
    METRICS_BY_PROBLEM,
    PRIMARY_METRICS,
    baseline_score,
    bio_spans,
    classification_metrics,
    higher_is_better,
    is_bio,
    load_metric,
    multi_label_metrics,
    regression_metrics,
    token_metrics,
)

EXAMPLES = {
    "single_label_classification": ([0, 1, 2, 2], [0, 2, 2, 1]),
    "multi_label_classification": ([[0, 1], [1, 1]], [[0, 1], [1, 0]]),
    "regression": ([0.5, 1.5, 1.0], [0.0, 2.0, 2.5]),
    "token_classification": ([["B-a", "O"], ["B-b"]], [["B-a", "I-a"], ["B-b"]]),
}
ZERO: dict[str, Any] = {"zero_division": 0}
ALL_METRICS = [(problem, name) for problem, names in METRICS_BY_PROBLEM.items() for name in names]


def all_metrics(problem: str, predictions: list, references: list) -> dict[str, float]:
    match problem:
        case "single_label_classification":
            return classification_metrics(predictions, references, num_labels=3)
        case "multi_label_classification":
            return multi_label_metrics(predictions, references)
        case "regression":
            return regression_metrics(predictions, references)
        case _:
            return token_metrics(predictions, references)


@pytest.mark.parametrize("seed", range(20))
def test_classification_equals_scikit_learn(seed: int) -> None:
    """A slipped average or swapped arguments would rank checkpoints wrongly without any error."""
    random = np.random.default_rng(seed)
    classes, rows = int(random.integers(2, 6)), int(random.integers(1, 40))
    predictions, references = random.integers(0, classes, (2, rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns about classes that are only predicted
        expected = {
            "accuracy": sk.accuracy_score(references, predictions),
            "balanced_accuracy": sk.balanced_accuracy_score(references, predictions),
            "macro_f1": sk.f1_score(references, predictions, average="macro", **ZERO),
            "micro_f1": sk.f1_score(references, predictions, average="micro", **ZERO),
            "weighted_f1": sk.f1_score(references, predictions, average="weighted", **ZERO),
            "mcc": sk.matthews_corrcoef(references, predictions),
        }
    assert classification_metrics(predictions, references, classes) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_multi_label_equals_scikit_learn(seed: int) -> None:
    """Macro and micro swapped, or rows read as classes, would go unnoticed."""
    random = np.random.default_rng(seed)
    predictions, references = random.integers(0, 2, (2, int(random.integers(1, 20)), int(random.integers(2, 5))))
    assert multi_label_metrics(predictions, references) == pytest.approx(
        {
            "micro_f1": sk.f1_score(references, predictions, average="micro", **ZERO),
            "macro_f1": sk.f1_score(references, predictions, average="macro", **ZERO),
            "exact_match": sk.accuracy_score(references, predictions),
        },
        abs=1e-12,
    )


def test_multi_label_with_one_label_scores_that_label() -> None:
    """A single column reads as two classes in scikit-learn, and its F1 would count the absent label as a success."""
    assert multi_label_metrics([[0], [0], [1]], [[0], [1], [1]]) == pytest.approx(
        {"micro_f1": 2 / 3, "macro_f1": 2 / 3, "exact_match": 2 / 3}
    )


@pytest.mark.parametrize("seed", range(10))
def test_regression_equals_scipy_and_scikit_learn(seed: int) -> None:
    """A correlation in float32 or of swapped columns would look plausible."""
    random = np.random.default_rng(seed)
    predictions, references = random.normal(size=(2, int(random.integers(2, 30))))
    assert regression_metrics(predictions, references) == pytest.approx(
        {
            "pearson": np.asarray(stats.pearsonr(predictions, references))[0],
            "spearman": np.asarray(stats.spearmanr(predictions, references))[0],
            "mse": sk.mean_squared_error(references, predictions),
            "mae": sk.mean_absolute_error(references, predictions),
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("tags", ["BIO", "BIOES"])
def test_spans_equal_seqeval(seed: int, tags: str) -> None:
    """Spans decoded by stricter rules than conlleval's give figures that cannot be compared with published ones."""
    random = np.random.default_rng(seed)
    labels = ["O", *(f"{tag}-{kind}" for tag in tags.replace("O", "") for kind in ("a", "b-c"))]
    lengths = random.integers(1, 12, size=8)
    references, predictions = ([list(random.choice(labels, size=length)) for length in lengths] for _ in range(2))
    for row in references:
        assert bio_spans(row) == [(kind, start, end + 1) for kind, start, end in get_entities(row)]
    hits = np.concatenate([np.array(a) == np.array(b) for a, b in zip(predictions, references, strict=True)])
    assert token_metrics(predictions, references) == pytest.approx(
        {
            "span_f1": seqeval_f1(references, predictions, **ZERO),
            "span_precision": seqeval_precision(references, predictions, **ZERO),
            "span_recall": seqeval_recall(references, predictions, **ZERO),
            "token_accuracy": hits.mean(),
        },
        abs=1e-12,
    )


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ([], []),
        (["O", "O"], []),
        (["I-a", "I-a"], [("a", 0, 2)]),
        (["O", "I-a", "O"], [("a", 1, 2)]),
        (["B-a", "I-b"], [("a", 0, 1), ("b", 1, 2)]),
        (["B-a", "B-a"], [("a", 0, 1), ("a", 1, 2)]),
        (["B-a", "I-a", "O", "B-a"], [("a", 0, 2), ("a", 3, 4)]),
        (["B-a-b", "I-a-b"], [("a-b", 0, 2)]),
        (["B", "I"], [("_", 0, 2)]),
    ],
)
def test_spans_of_small_sentences(labels: list[str], spans: list[tuple[str, int, int]]) -> None:
    """An end that is inclusive here and exclusive there cuts the last word off every answer."""
    assert bio_spans(labels) == spans


def test_labels_without_spans_are_told_apart() -> None:
    """Part-of-speech tags such as INTJ read as the span tag I would make up spans."""
    assert is_bio(["O", "B-a", "I-a"])
    assert not is_bio(["O"])
    assert not is_bio([])
    assert not is_bio(["NOUN", "INTJ"])
    assert token_metrics([["NOUN", "VERB"]], [["NOUN", "NOUN"]]) == {"token_accuracy": 0.5}
    with pytest.raises(TaskError, match=r"found 'INTJ'.*token_accuracy"):
        bio_spans(["INTJ"])


def test_all_words_outside_is_zero() -> None:
    """No span on either side is an undefined F1; as NaN it would win or lose every comparison."""
    assert token_metrics([["O", "O"]], [["O", "O"]]) == {
        "span_f1": 0.0,
        "span_precision": 0.0,
        "span_recall": 0.0,
        "token_accuracy": 1.0,
    }


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.7])
def test_constant_predictions_correlate_with_nothing(constant: float) -> None:
    """An undefined correlation is NaN in scipy, and a NaN would be kept as the best checkpoint."""
    scores = regression_metrics([constant] * 5, [0.0, 1.0, 2.0, 3.0, 4.0])
    assert scores["pearson"] == scores["spearman"] == 0.0
    assert all(math.isfinite(score) for score in regression_metrics([1.0], [2.0]).values())


def test_one_class_only_is_finite() -> None:
    """A split where only one class occurs must not warn (warnings are errors) nor give NaN."""
    scores = classification_metrics([1, 1], [1, 1], num_labels=3)
    assert scores == {
        "accuracy": 1.0,
        "balanced_accuracy": 1.0,
        "macro_f1": 1.0,
        "micro_f1": 1.0,
        "weighted_f1": 1.0,
        "mcc": 0.0,
    }


@pytest.mark.parametrize(("problem", "name"), ALL_METRICS)
def test_evaluate_form_equals_plain_function(problem: str, name: str, tmp_path: Path) -> None:
    """Two forms of one metric that differ would make a user's script disagree with the record."""
    predictions, references = EXAMPLES[problem]
    metric = load_metric(name, problem, cache_dir=str(tmp_path))
    assert isinstance(metric, evaluate.Metric)
    expected = {name: pytest.approx(all_metrics(problem, predictions, references)[name])}
    assert metric.compute(predictions=predictions, references=references) == expected
    for predicted, gold in zip(predictions, references, strict=True):
        metric.add_batch(predictions=[predicted], references=[gold])
    assert metric.compute() == expected
    assert list(tmp_path.iterdir()) == []


def test_evaluate_forms_combine() -> None:
    """`evaluate.combine` joins results by key; keys that are not the metric's name would overwrite each other."""
    both = evaluate.combine([load_metric("accuracy"), load_metric("macro_f1")])
    assert both.compute(predictions=[0, 1], references=[0, 0]) == {
        "accuracy": 0.5,
        "macro_f1": pytest.approx(1 / 3),
    }


def test_evaluate_form_takes_arrays() -> None:
    """Predictions come as numpy arrays from a Trainer."""
    metric = load_metric("accuracy")
    assert metric.compute(predictions=np.array([0, 1]), references=np.array([0, 0])) == {"accuracy": 0.5}


@pytest.mark.parametrize(("problem", "name"), ALL_METRICS)
def test_perfect_predictions_are_the_best_score(problem: str, name: str) -> None:
    """A metric registered with the wrong direction would keep the worst checkpoint."""
    _, references = EXAMPLES[problem]
    perfect = all_metrics(problem, references, references)[name]
    assert perfect == pytest.approx(1.0 if higher_is_better(name) else 0.0)


def test_tables_agree() -> None:
    """A default that may not be primary would be refused in every recipe that names no metric."""
    assert DEFAULT_METRIC.keys() == METRICS_BY_PROBLEM.keys() == PRIMARY_METRICS.keys()
    for problem, name in DEFAULT_METRIC.items():
        assert name in PRIMARY_METRICS[problem]
        assert PRIMARY_METRICS[problem] == tuple(filter(higher_is_better, METRICS_BY_PROBLEM[problem]))
        assert tuple(all_metrics(problem, *EXAMPLES[problem])) == METRICS_BY_PROBLEM[problem]


@pytest.mark.parametrize(
    ("metric", "references", "problem", "expected"),
    [
        ("accuracy", [2, 2, 0, 2], "single_label_classification", 0.75),
        ("accuracy", [1, 0, 1, 0], "single_label_classification", 0.5),
        ("mcc", [2, 2, 0, 2], "single_label_classification", 0.0),
        ("balanced_accuracy", [2, 2, 0, 2], "single_label_classification", 0.5),
        ("exact_match", [[1, 0], [1, 1], [1, 0]], "multi_label_classification", 2 / 3),
        ("micro_f1", [[0, 0], [0, 1], [1, 0]], "multi_label_classification", 0.0),
        ("pearson", [1.0, 2.0, 3.5], "regression", 0.0),
        ("spearman", [0.1] * 3, "regression", 0.0),
        ("mse", [0.0, 2.0], "regression", 1.0),
        ("mae", [0, 1], "regression", 0.5),
        ("span_f1", [["O", "O", "B-a"], ["O"]], "token_classification", 0.0),
        ("token_accuracy", [["O", "O", "B-a"], ["O"]], "token_classification", 0.75),
        ("span_f1", [["B-a"], ["B-a"], ["O"]], "token_classification", 0.8),
    ],
)
def test_baseline(metric: str, references: list, problem: str, expected: float) -> None:
    """Retention above chance divides by the distance to this number."""
    assert baseline_score(metric, references, problem) == pytest.approx(expected)


@pytest.mark.parametrize("problem", METRICS_BY_PROBLEM)
def test_no_rows_is_an_error(problem: str) -> None:
    """A score of nothing would enter the average as if it had been measured."""
    with pytest.raises(DataError, match="at least one labelled"):
        all_metrics(problem, [], [])
    with pytest.raises(DataError, match="at least one labelled"):
        baseline_score(DEFAULT_METRIC[problem], [], problem)


def test_mistakes_are_named() -> None:
    """Broadcasting would score arrays of unequal shape without a word."""
    with pytest.raises(DataError, match=r"0 to 2.*found -100"):
        classification_metrics([0, 1], [0, -100], num_labels=3)
    with pytest.raises(DataError, match="one shape"):
        regression_metrics([[1.0], [2.0]], [1.0, 2.0])
    with pytest.raises(DataError, match="references"):
        regression_metrics([1.0, 2.0], [1.0, math.nan])
    with pytest.raises(TrainingError, match=r"found 1 of 2.*diverged"):
        regression_metrics([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(DataError, match="row 1"):
        token_metrics([["O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(DataError, match="as many predictions"):
        token_metrics([["O"]], [["O"], ["O", "O"]])
    with pytest.raises(TaskError, match="found 'acuracy'"):
        load_metric("acuracy")
    with pytest.raises(TaskError, match="metric of regression"):
        load_metric("accuracy", "regression")
    with pytest.raises(TaskError, match="problem type"):
        baseline_score("accuracy", [1], "ranking")
