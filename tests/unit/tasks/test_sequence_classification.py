"""Laws of tasks about a whole text: labels keep their meaning, losses are those of torch, no label counts nowhere."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor
from torch.nn import functional

from hf_mtcompress import SequenceClassification
from hf_mtcompress.errors import DataError, TaskError
from hf_mtcompress.tasks.base import divisor
from tests.tiny import FEELING_LABELS

NAN = math.nan
PROBLEMS = ["single_label_classification", "multi_label_classification", "regression"]


def mood(**settings: Any) -> SequenceClassification:
    return SequenceClassification("mood", **{"text": "text", "label": "label", "labels": FEELING_LABELS, **settings})


def topics(labels: Sequence[str] = ("fox", "river", "market")) -> SequenceClassification:
    return mood(problem_type="multi_label_classification", labels=labels)


def strength() -> SequenceClassification:
    return mood(problem_type="regression", labels=None)


def task_and_labels(problem: str) -> tuple[SequenceClassification, list[Any], list[Any]]:
    """A task, raw labels of five rows of which the second and the last have none, and the labelled rows alone."""
    match problem:
        case "single_label_classification":
            return mood(), ["good", None, "bad", "good", -100], ["good", "bad", "good"]
        case "multi_label_classification":
            return topics(), [["fox"], None, [], ["river", "fox"], -100], [["fox"], [], ["river", "fox"]]
        case _:
            return strength(), [0.5, None, -2.0, 1.25, -100], [0.5, -2.0, 1.25]


def loss_and_gradient(task: SequenceClassification, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    loss = task.loss_sum(logits, labels) / divisor(task.item_count(labels))
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def random_logits(task: SequenceClassification, rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, task.num_outputs, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("problem", PROBLEMS)
def test_unlabelled_rows_count_nowhere(problem: str) -> None:
    """A row without a label that is taken for one teaches the first class, a zero or minus a hundred."""
    task, raw, labelled = task_and_labels(problem)
    places = [0, 2, 3]
    logits = random_logits(task, 5)
    all_labels = task.encode_labels(raw, {})
    own_labels = task.encode_labels(labelled, {})
    every, own = task.collate_labels(all_labels, None), task.collate_labels(own_labels, None)
    assert task.item_count(every).item() == task.item_count(own).item() == 3.0
    loss, gradient = loss_and_gradient(task, logits, every)
    expected, own_gradient = loss_and_gradient(task, logits[places], own)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient[places], own_gradient)
    assert gradient[[1, 4]].abs().max().item() == 0.0
    assert task.compute_metrics(logits.numpy(), every.numpy()) == task.compute_metrics(
        logits[places].numpy(), own.numpy()
    )
    assert task.baseline(all_labels) == task.baseline(own_labels)
    assert task.chance_loss(all_labels) == task.chance_loss(own_labels)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_batch_without_labels_has_no_loss(problem: str) -> None:
    task = task_and_labels(problem)[0]
    labels = task.collate_labels(task.encode_labels([None, -100], {}), None)
    loss, gradient = loss_and_gradient(task, random_logits(task, 2), labels)
    assert (loss.item(), gradient.abs().max().item(), task.item_count(labels).item()) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_of_a_batch_is_the_sum_over_its_parts(problem: str) -> None:
    """A loss that is a mean inside weighs short batches more, and accumulation changes gradients."""
    task, raw, _ = task_and_labels(problem)
    logits, labels = random_logits(task, 5), task.collate_labels(task.encode_labels(raw, {}), None)
    parts = task.loss_sum(logits[:2], labels[:2]) + task.loss_sum(logits[2:], labels[2:])
    torch.testing.assert_close(task.loss_sum(logits, labels), parts)
    assert task.item_count(labels) == task.item_count(labels[:2]) + task.item_count(labels[2:])


def test_a_vector_with_a_gap_is_refused() -> None:
    """Read as places of labels, its zeros and ones would be the first two labels."""
    task = topics()
    for gap in ([1, -100, 0], [1, None, 0], [0, 0, -100]):
        with pytest.raises(DataError, match=r"expected 0 or 1 for each label in column 'label', found .* with a gap"):
            task.encode_labels([gap], {})
    assert task.encode_labels([[2, -100, -100], [-100, -100, -100]], {}) == [[0.0, 0.0, 1.0], [-100.0] * 3]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [0.05, 0.9, 0.1]])
def test_the_mean_loss_of_classes_is_that_of_torch(weights: list[float] | None, smoothing: float) -> None:
    """Class weights must be in the divisor too, below one as well as above it."""
    task = mood(class_weights=weights, label_smoothing=smoothing)
    logits = random_logits(task, 4)
    labels = torch.tensor([0, 2, -100, 0])
    plain = logits.clone().requires_grad_()
    expected = functional.cross_entropy(
        plain, labels, weight=torch.tensor(weights) if weights else None, label_smoothing=smoothing
    )
    expected.backward()
    loss, gradient = loss_and_gradient(task, logits, labels)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, plain.grad)


def test_the_mean_loss_of_several_labels_is_that_of_torch() -> None:
    task = topics()
    logits, labels = random_logits(task, 3), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(
        loss_and_gradient(task, logits, labels)[0], functional.binary_cross_entropy_with_logits(logits, labels)
    )


def test_the_mean_loss_of_a_regression_is_that_of_torch() -> None:
    task = strength()
    logits, labels = random_logits(task, 3), torch.tensor([0.5, -2.0, 30.0])
    torch.testing.assert_close(
        loss_and_gradient(task, logits, labels)[0], functional.mse_loss(logits.squeeze(-1), labels)
    )


def test_half_precision_logits_are_summed_in_float32() -> None:
    """A sum over many rows in 8 bits of mantissa stops growing."""
    task = mood()
    logits, labels = random_logits(task, 2000).bfloat16(), torch.zeros(2000, dtype=torch.long)
    loss = task.loss_sum(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, functional.cross_entropy(logits.float(), labels, reduction="sum"))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_perfect_logits_score_one(problem: str) -> None:
    task, _, labelled = task_and_labels(problem)
    encoded = task.encode_labels(labelled, {})
    if problem == "single_label_classification":
        logits = np.eye(3)[encoded]
    else:
        logits = np.asarray(encoded, dtype=float).reshape(len(encoded), -1) - (0.5 if problem != "regression" else 0)
    assert task.compute_metrics(logits, np.asarray(encoded))[str(task.metric)] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("labels", "row", "expected"),
    [
        (("calm", "glad"), [0], [1.0, 0.0]),
        (("calm", "glad"), [1, 1], [1.0, 1.0]),
        (("calm", "glad"), [0.0, 1.0], [0.0, 1.0]),
        (("calm", "glad"), [False, True], [0.0, 1.0]),
        (("calm", "glad"), ["calm", "glad"], [1.0, 1.0]),
        (("0", "1"), [0, 0], [0.0, 0.0]),
        (("2019", "2020", "2021"), [0, 1, 1], [0.0, 1.0, 1.0]),
        (("2019", "2020", "2021"), [2019, 2021], [1.0, 0.0, 1.0]),
        (("1", "2", "3"), [1, 0, 0], [1.0, 0.0, 0.0]),
        (("0", "1", "2"), [0, 1, 0], [0.0, 1.0, 0.0]),
        (("0", "1", "2"), [0, 1], [1.0, 1.0, 0.0]),
        (("calm",), [1], [1.0]),
        (("calm", "glad", "sad"), [0, 1], [1.0, 1.0, 0.0]),
        (("calm", "glad", "sad"), [0, 1, 1], [0.0, 1.0, 1.0]),
    ],
)
def test_lists_of_numbers_are_read_one_way(labels: tuple[str, ...], row: list[Any], expected: list[float]) -> None:
    assert topics(labels).encode_labels([row], {}) == [expected]


@pytest.mark.parametrize(
    ("labels", "row", "message"),
    [
        (("calm", "glad"), [0, 1], "may be the numbers of labels or a 0 or 1 for each label; write the names"),
        (("calm", "glad"), [1, 0], "may be the numbers of labels"),
        (("calm",), [0], "may be the numbers of labels"),
        (("calm", "glad", "sad"), [1, 1], "each label of a row once.*give a 0 or 1 for each of the 3 labels"),
        (("calm", "glad", "sad"), [0, 1, 0, 0], "each label of a row once"),
        (("0", "1"), [0, 1], "may be the numbers of labels"),
    ],
)
def test_lists_that_could_be_read_two_ways_are_refused(labels: tuple[str, ...], row: list[Any], message: str) -> None:
    """[0, 1] of two labels would be the second alone, or both; a vector that is too short would be numbers."""
    with pytest.raises(DataError, match=message):
        topics(labels).encode_labels([row], {})


def test_decoding_reverses_encoding() -> None:
    """Otherwise a model answers with the names of other labels."""
    assert [mood().decode(row)["label"] for row in np.eye(3)[mood().encode_labels(FEELING_LABELS, {})]] == [
        *FEELING_LABELS
    ]
    given = [["fox", "market"], [], ["river"]]
    vectors = np.asarray(topics().encode_labels(given, {}))
    assert [[found["label"] for found in topics().decode(row - 0.5)] for row in vectors] == given
    assert strength().decode(np.array([-1.5])) == -1.5


# ---------------------------------------------------------------------------------------------------- exact numbers


@pytest.mark.parametrize(
    ("labels", "values", "indices"),
    [
        (
            ("bad", "good"),
            ["good", "bad", None, -100, NAN, 1, 0, 1.0, np.int64(1)],
            [1, 0, -100, -100, -100, 1, 0, 1, 1],
        ),
        # Names that are numbers are names: 3 is the first label here, not an index that is out of range.
        (("3", "1"), [3, 1, "1", 3.0], [0, 1, 1, 0]),
        (("False", "True"), [True, False, "True"], [1, 0, 1]),
        (("-1", "1"), [-1, 1, -100], [0, 1, -100]),
    ],
)
def test_a_label_is_a_name_or_an_index(labels: tuple[str, ...], values: list[Any], indices: list[int]) -> None:
    assert mood(labels=labels).encode_labels(values, {}) == indices


def test_indices_follow_the_order_that_was_given() -> None:
    assert mood(labels=["good", "bad"]).encode_labels(["bad", "good"], {}) == [1, 0]


@pytest.mark.parametrize(
    ("value", "vector"),
    [
        (["market", "fox"], [1.0, 0.0, 1.0]),
        ([], [0.0, 0.0, 0.0]),
        ([0, 1, 1], [0.0, 1.0, 1.0]),
        ([1.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
        ([2], [0.0, 0.0, 1.0]),
        ([None, "river"], [0.0, 1.0, 0.0]),
        (None, [-100.0] * 3),
        (-100, [-100.0] * 3),
        ([-100, -100, -100], [-100.0] * 3),
    ],
)
def test_several_labels_become_a_vector(value: Any, vector: list[float]) -> None:
    assert topics().encode_labels([value], {}) == [vector]


def test_numbers_of_a_regression() -> None:
    assert strength().encode_labels([1, "2.5", -99.5], {}) == [1.0, 2.5, -99.5]
    assert all(math.isnan(value) for value in strength().encode_labels([None, NAN, -100], {}))


def test_exact_losses() -> None:
    assert mood(labels=["a", "b"]).loss_sum(torch.zeros(3, 2), torch.tensor([0, 1, -100])).item() == pytest.approx(
        2 * math.log(2)
    )
    assert topics().loss_sum(torch.zeros(2, 3), torch.tensor([[1.0, 0, 1], [0, 0, 0]])).item() == pytest.approx(
        2 * math.log(2)
    )
    assert strength().loss_sum(torch.tensor([[1.0], [2.0], [7.0]]), torch.tensor([3.0, 2.5, NAN])).item() == 4.25


def test_exact_chance_losses() -> None:
    """The normaliser of a loss: a wrong one lets one task outweigh the others."""
    assert mood().chance_loss([0, 1]) == math.log(3)
    assert mood(labels=["only"]).chance_loss([0]) == math.log(2)
    assert topics().chance_loss([[1.0, 0.0, 0.0]]) == math.log(2)
    assert strength().chance_loss([1.0, 3.0, NAN]) == 1.0
    assert strength().chance_loss([0.0, 4.0]) == 4.0
    assert strength().chance_loss([2.0, 2.0]) == 1.0


def test_exact_metrics() -> None:
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.0]])
    scores = mood().compute_metrics(logits, np.array([0, 2, 0, -100]))
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["macro_f1"] == pytest.approx(f1_score([0, 2, 0], [0, 2, 1], average="macro", zero_division=0))
    several = topics().compute_metrics(
        np.array([[1.0, -1.0, -1.0], [1.0, 1.0, -1.0], [9.0, 9.0, 9.0]]),
        np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [-100.0] * 3]),
    )
    assert several == {"micro_f1": pytest.approx(2 / 3), "macro_f1": pytest.approx(1 / 3), "exact_match": 0.5}
    numbers = strength().compute_metrics(np.array([[1.0], [2.0], [5.0]]), np.array([1.0, NAN, 3.0]))
    assert (numbers["mse"], numbers["mae"], numbers["pearson"]) == (2.0, 1.0, pytest.approx(1.0))


def test_exact_baselines() -> None:
    assert mood().baseline([2, 2, 0, -100]) == pytest.approx(2 / 3)
    assert strength().baseline([1.0, 2.0, NAN]) == 0.0
    # "fox" is in more than half of the rows: 2 hits, 1 false alarm, 1 miss.
    assert topics().baseline([[1.0, 0, 0], [1.0, 1, 0], [0.0, 0, 0], [-100.0] * 3]) == pytest.approx(2 / 3)


def test_exact_answers() -> None:
    assert mood().decode(np.log([1.0, 1.0, 2.0])) == {"label": "good", "score": pytest.approx(0.5)}
    assert topics().decode(np.array([math.log(3), 0.0, -1.0])) == [{"label": "fox", "score": pytest.approx(0.75)}]


@pytest.mark.parametrize(
    ("columns", "expected"), [({}, ("text",)), ({"text_pair": "pair"}, ("text", "pair")), ({"text": None}, ())]
)
def test_input_columns(columns: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert mood(**columns).input_columns == expected


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("labels", "value", "message"),
    [
        (
            FEELING_LABELS,
            "godo",
            r"3 labels \(bad, plain, good\) in column 'label', found 'godo'; did you mean 'good'\?",
        ),
        (FEELING_LABELS, "xyz", "found 'xyz'; add the label to the task"),
        (FEELING_LABELS, "", "found ''"),
        (FEELING_LABELS, 3, "found 3; "),
        (FEELING_LABELS, -1, "found -1; .*set it to null where a row is unlabelled"),
        (FEELING_LABELS, -2.0, "found -2; "),
        (FEELING_LABELS, 0.5, "found 0.5"),
        (FEELING_LABELS, True, "found True"),
        (("1", "2"), 0, r"2 labels \(1, 2\).*found 0"),
        ([f"l{number}" for number in range(12)], "z", r"12 labels \(l0, .*l9, \.\.\.\)"),
    ],
)
def test_a_label_outside_the_list(labels: Any, value: Any, message: str) -> None:
    """-1 as an index would be the last label, and True would be the second one."""
    with pytest.raises(DataError, match=f"task 'mood': expected one of .*{message}"):
        mood(labels=labels).encode_labels([value], {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["fox", "rivers"], "found 'rivers'; did you mean 'river'"),
        ([-1], "found -1"),
        ([3], "found 3"),
        ("fox", "expected a list of labels in column 'label', found 'fox'"),
        (2, "expected a list of labels in column 'label', found 2"),
    ],
)
def test_several_labels_that_do_not_fit(value: Any, message: str) -> None:
    """Text instead of a list would be read letter by letter."""
    with pytest.raises(DataError, match=message):
        topics().encode_labels([value], {})


def test_text_of_short_labels_is_no_list_of_them() -> None:
    with pytest.raises(DataError, match="expected a list of labels"):
        topics(labels=["a", "b"]).encode_labels(["ab"], {})


@pytest.mark.parametrize("value", ["much", [1.0]])
def test_a_number_that_is_none(value: Any) -> None:
    with pytest.raises(DataError, match=r"expected a number in column 'label', found .*use problem_type single_label"):
        strength().encode_labels([value], {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problem_type": "regression"}, r"a regression has no labels, found \['bad', 'plain', 'good'\]"),
        ({"problem_type": "regression", "labels": None, "class_weights": [1.0]}, "class_weights and label_smoothing"),
        ({"problem_type": "multi_label_classification", "label_smoothing": 0.1}, "class_weights and label_smoothing"),
        ({"problem_type": "ranking"}, "expected problem_type single_label_.*found 'ranking'"),
        ({"problem_type": "ranking", "metric": "accuracy"}, "expected problem_type single_label_.*found 'ranking'"),
        ({"problem_type": "multi_label_classification", "metric": "accuracy"}, "found 'accuracy'"),
    ],
)
def test_problem_types_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        mood(**settings)


@pytest.mark.parametrize(("task", "logits"), [(mood(), np.zeros((1, 3))), (topics(), np.zeros((1, 3)))])
def test_scoring_nothing_is_an_error(task: SequenceClassification, logits: np.ndarray) -> None:
    """A score of 0 or 1 over no rows would be printed as one that was measured."""
    with pytest.raises(DataError, match="expected at least one labelled row to score"):
        task.compute_metrics(logits, np.asarray(task.encode_labels([None], {})))
