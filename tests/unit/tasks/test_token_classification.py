"""Laws of word labels: each word counts once, at its first sub-word, and answers come back by word."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from seqeval.metrics import f1_score as seqeval_f1
from torch.nn import functional

from hf_mtcompress import TokenClassification
from hf_mtcompress.data.readers import reader_of
from hf_mtcompress.errors import DataError, TaskError
from hf_mtcompress.tasks.base import divisor
from tests.tiny import TAG_LABELS, TEXT_FAMILIES, tiny_token_rows, tiny_tokenizer

O, ANIMAL, PLACE, INSIDE = range(4)  # noqa: E741  # the label of words outside of spans is written so everywhere
BLANK = -100


def tags(**settings: Any) -> TokenClassification:
    return TokenClassification("tags", **{"tokens": "tokens", "label": "tags", "labels": TAG_LABELS, **settings})


def aligned(word_ids: Sequence[int | None], labels: Any, **settings: Any) -> list[int]:
    return tags(**settings).encode_labels([labels], {"word_ids": [word_ids]})[0]


# ------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_every_word_is_labelled_once_at_its_first_sub_word(family: str) -> None:
    """Labels that slip by one position still train, to a model that is a little worse."""
    rows, tokenizer = tiny_token_rows(40), tiny_tokenizer(family)
    encoded = reader_of(tokenizer, 64).encode([list(rows["tokens"])], words=True)
    labels = tags().encode_labels(list(rows["tags"]), {**encoded, "words": list(rows["tokens"])})
    pieces = 0
    for ids, found, words, wanted in zip(encoded["input_ids"], labels, rows["tokens"], rows["tags"], strict=True):
        assert len(ids) == len(found)
        assert [TAG_LABELS[index] for index in found if index != BLANK] == wanted
        starts = [
            place for place, piece in enumerate(tokenizer.convert_ids_to_tokens(ids)) if not piece.startswith("##")
        ]
        # Start and end marks are no words.
        assert [place for place, index in enumerate(found) if index != BLANK] == starts[1:-1]
        assert len(starts) - 2 == len(words)
        pieces += len(ids) - len(starts)
    assert pieces > 40, "without words of several pieces the law says nothing"


def test_decoding_reverses_encoding() -> None:
    rows, task = tiny_token_rows(20), tags()
    encoded = reader_of(tiny_tokenizer(), 64).encode([list(rows["tokens"])], words=True)
    labels = task.encode_labels(list(rows["tags"]), encoded)
    for place, wanted in enumerate(rows["tags"]):
        # Positions without a label say something wrong, which must not matter.
        logits = np.eye(4)[[index if index != BLANK else INSIDE for index in labels[place]]]
        assert task.decode(logits, {"word_ids": encoded["word_ids"][place]})["labels"] == wanted


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.1, 0.1]])
def test_the_mean_loss_is_that_of_torch_over_labelled_words(weights: list[float] | None, smoothing: float) -> None:
    """A mean over positions would weigh sentences by their padding."""
    task = tags(class_weights=weights, label_smoothing=smoothing)
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[BLANK, O, ANIMAL, BLANK, BLANK], [BLANK, INSIDE, BLANK, O, PLACE]])
    kept = labels != BLANK
    expected = functional.cross_entropy(
        logits[kept],
        labels[kept],
        weight=None if weights is None else torch.tensor(weights),
        label_smoothing=smoothing,
    )
    loss = task.loss_sum(logits, labels) / divisor(task.item_count(labels))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad[~kept].abs().max().item() == 0.0


def test_sentences_without_labels_count_nowhere() -> None:
    task = tags()
    logits = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[BLANK, O, ANIMAL, BLANK], [BLANK] * 4, [BLANK, PLACE, INSIDE, BLANK]])
    own = [0, 2]
    assert task.item_count(labels).item() == task.item_count(labels[own]).item() == 4.0
    torch.testing.assert_close(task.loss_sum(logits, labels), task.loss_sum(logits[own], labels[own]))
    assert task.compute_metrics(logits.numpy(), labels.numpy()) == task.compute_metrics(
        logits[own].numpy(), labels[own].numpy()
    )
    assert task.baseline(labels.tolist()) == task.baseline(labels[own].tolist())


def test_positions_without_a_label_do_not_score() -> None:
    """A piece inside a word that says `O` would break a span in two."""
    labels = np.array([[BLANK, PLACE, BLANK, INSIDE, BLANK]])
    right = np.eye(4)[[O, PLACE, O, INSIDE, ANIMAL]][None]
    assert tags().compute_metrics(right, labels) == {
        "span_f1": 1.0,
        "span_precision": 1.0,
        "span_recall": 1.0,
        "token_accuracy": 1.0,
    }


@pytest.mark.parametrize("seed", range(5))
def test_span_scores_are_those_of_seqeval(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, (6, 9))
    labels[generator.random((6, 9)) < 0.3] = BLANK
    logits = np.eye(4)[np.where(generator.random((6, 9)) < 0.7, np.maximum(labels, 0), O)]
    kept = [row != BLANK for row in labels]
    named = np.asarray(TAG_LABELS)
    expected = seqeval_f1(
        [named[row[keep]].tolist() for row, keep in zip(labels, kept, strict=True)],
        [named[row.argmax(-1)[keep]].tolist() for row, keep in zip(logits, kept, strict=True)],
    )
    assert tags().compute_metrics(logits, labels)["span_f1"] == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------- exact numbers


@pytest.mark.parametrize(
    ("word_ids", "labels", "expected"),
    [
        ([None, 0, 1, 2, None], ["O", "B-place", "I-place"], [BLANK, O, PLACE, INSIDE, BLANK]),
        ([None, 0, 0, 1, 1, 1, None], ["B-animal", "O"], [BLANK, ANIMAL, BLANK, O, BLANK, BLANK, BLANK]),
        # A word between that has no pieces, such as a blank one.
        ([None, 0, 2, None], ["B-animal", "B-place", "O"], [BLANK, ANIMAL, O, BLANK]),
        ([None, 0, 1, None], [None, "O"], [BLANK, BLANK, O, BLANK]),
        ([None, 0, 1, None], [2, -100], [BLANK, PLACE, BLANK, BLANK]),
        ([None, 0, 1, None], None, [BLANK] * 4),
        ([None, None], [], [BLANK] * 2),
    ],
)
def test_labels_by_position(word_ids: list[int | None], labels: Any, expected: list[int]) -> None:
    assert aligned(word_ids, labels) == expected


def test_labels_beyond_the_maximal_length_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Words that are cut off are not scored; in silence the score would seem to be of whole sentences."""
    words, wanted = ["the", "fox", "near", "the", "market"], ["O", "B-animal", "O", "O", "B-place"]
    encoded = reader_of(tiny_tokenizer(), 5).encode([[words, words[:2]]], words=True)
    with caplog.at_level(logging.WARNING, "hf_mtcompress"):
        labels = tags().encode_labels([wanted, wanted[:2]], {**encoded, "words": [words, words[:2]]})
    assert labels[0] == [BLANK, O, ANIMAL, O, BLANK]
    assert labels[1] == [BLANK, O, ANIMAL, BLANK]
    assert "task 'tags': 1 of 2 rows have words without a token (beyond max_length" in caplog.text


def test_nothing_is_said_when_nothing_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    aligned([None, 0, 1, None], ["O", "O"])
    assert not caplog.records


def test_text_is_split_at_blanks() -> None:
    one = reader_of(tiny_tokenizer(), 32).encode([["the fox  sleeps"]], words=True)
    other = reader_of(tiny_tokenizer(), 32).encode([[["the", "fox", "sleeps"]]], words=True)
    assert one == other
    assert tags().encode_labels([["O", "B-animal", "O"]], {**one, "words": ["the fox  sleeps"]}) == [
        [BLANK, O, ANIMAL, O, BLANK]
    ]


def test_labels_are_padded_on_the_right() -> None:
    assert tags().collate_labels([[BLANK, O], [BLANK, ANIMAL, O]], 4).tolist() == [
        [BLANK, O, BLANK, BLANK],
        [BLANK, ANIMAL, O, BLANK],
    ]
    assert tags().collate_labels([[O], [ANIMAL, O]], None).tolist() == [[O, BLANK], [ANIMAL, O]]
    assert tags().collate_labels([[O]], 1).dtype == torch.long


@pytest.mark.parametrize(
    ("predicted", "spans"),
    [
        ([O, PLACE, INSIDE], [{"label": "place", "start": 1, "end": 3}]),
        ([PLACE, PLACE, O], [{"label": "place", "start": 0, "end": 1}, {"label": "place", "start": 1, "end": 2}]),
        # A span may start with I-, as models write it.
        (
            [ANIMAL, INSIDE, INSIDE],
            [{"label": "animal", "start": 0, "end": 1}, {"label": "place", "start": 1, "end": 3}],
        ),
        ([O, O, O], []),
    ],
)
def test_predictions_become_spans(predicted: list[int], spans: list[dict[str, Any]]) -> None:
    answer = tags().decode(np.eye(4)[predicted])
    assert answer == {"labels": [TAG_LABELS[index] for index in predicted], "spans": spans}


def test_spans_hold_their_words() -> None:
    """Word 1 has two pieces; start and end count words, not pieces."""
    encoding = {"word_ids": [None, 0, 1, 1, 2, None], "words": ["the", "market", "square"]}
    assert tags().decode(np.eye(4)[[O, O, PLACE, O, INSIDE, O]], encoding) == {
        "labels": ["O", "B-place", "I-place"],
        "spans": [{"label": "place", "start": 1, "end": 3, "text": "market square"}],
    }


def test_labels_that_mark_no_spans_are_only_labels() -> None:
    task = tags(labels=["noun", "verb"])
    assert task.decode(np.eye(2)[[1, 0]]) == {"labels": ["verb", "noun"]}
    assert task.metric == "token_accuracy"
    assert task.compute_metrics(np.eye(2)[[[1, 0, 0]]], np.array([[1, 1, BLANK]])) == {"token_accuracy": 0.5}


def test_the_metric_waits_for_the_labels() -> None:
    """Labels read from the data decide; a metric chosen before would be the wrong one for half of the tasks."""
    assert tags(labels=None).metric is None
    assert tags().metric == "span_f1"


def test_exact_metrics() -> None:
    labels = np.array([[ANIMAL, O, PLACE, INSIDE], [O, ANIMAL, BLANK, BLANK]])
    logits = np.eye(4)[[[ANIMAL, O, PLACE, O], [O, ANIMAL, PLACE, PLACE]]]
    # Found: animal, a place that is too short, animal. Wanted: animal, place, animal.
    assert tags().compute_metrics(logits, labels) == {
        "span_f1": pytest.approx(2 / 3),
        "span_precision": pytest.approx(2 / 3),
        "span_recall": pytest.approx(2 / 3),
        "token_accuracy": pytest.approx(5 / 6),
    }


def test_exact_baseline_and_chance() -> None:
    labels = [[BLANK, O, O, ANIMAL], [BLANK, O]]
    assert tags().baseline(labels) == 0.0
    assert tags(metric="token_accuracy").baseline(labels) == 0.75
    assert tags().chance_loss(labels) == math.log(4)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("wanted", [["O"], ["O", "O", "B-place"]])
def test_as_many_labels_as_words(wanted: list[str]) -> None:
    """One label too many is a slip of all that follow it, and no row is too long for it."""
    words = ["the", "fox"]
    encoded = reader_of(tiny_tokenizer(), 32).encode([[words]], words=True)
    with pytest.raises(
        DataError, match=rf"one label for each word, found {len(wanted)} labels in column 'tags' for 2 words"
    ):
        tags().encode_labels([wanted], {**encoded, "words": [words]})


def test_too_few_labels_without_the_words() -> None:
    with pytest.raises(DataError, match="found 1 labels in column 'tags' for at least 2 words in column 'tokens'"):
        aligned([None, 0, 1, None], ["O"])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("B-plaec", "found 'B-plaec'; did you mean 'B-place'"),
        ("b", "found 'b'; add the label"),
        (4, "found 4"),
        (-1, "found -1"),
    ],
)
def test_a_label_outside_the_list(label: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"task 'tags': expected one of 4 labels \(O, .*{message}"):
        aligned([None, 0, None], [label])


def test_a_label_outside_the_list_behind_the_cut() -> None:
    """Whether a data set is accepted must not depend on max_length."""
    with pytest.raises(DataError, match="found 'X'"):
        aligned([None, 0, None], ["O", "X"])


def test_a_span_metric_of_labels_without_spans() -> None:
    """It could not be computed: training would leave the task out of the average, and the end would fail."""
    with pytest.raises(TaskError, match=r"expected a primary metric among \['token_accuracy'\], found 'span_f1'"):
        tags(labels=["noun", "verb"], metric="span_f1")


def test_scoring_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="expected at least one labelled word to score"):
        tags().compute_metrics(np.zeros((1, 2, 4)), np.full((1, 2), BLANK))
