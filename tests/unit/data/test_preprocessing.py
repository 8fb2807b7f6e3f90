"""Laws of encoding: tasks over the same rows are encoded once and as each alone, and mistakes are named."""

import logging
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from hf_mtcompress import ImageClassification, SequenceClassification, Task, TokenClassification
from hf_mtcompress.data.preprocessing import (
    EncodedGroup,
    encode_groups,
    encoded_labels,
    group_tasks,
    require_column,
)
from hf_mtcompress.data.readers import reader_of
from hf_mtcompress.errors import DataError
from tests.tiny import (
    COLOUR_LABELS,
    FEELING_LABELS,
    IMAGE_SIZE,
    TAG_LABELS,
    tiny_image_processor,
    tiny_image_rows,
    tiny_text_rows,
    tiny_token_rows,
    tiny_tokenizer,
)

TOPICS = ("fox", "market", "river")
TEXTS = tiny_text_rows(6)
WORDS = tiny_token_rows(6)
IMAGES = tiny_image_rows(4)
ENCODED = Dataset.from_dict(
    {"input_ids": [[2, 7, 3], [2, 3]], "attention_mask": [[1] * 3, [1] * 2], "mark": [0, 2], "rating": [0.5, 1.0]}
)


def mood(**settings: Any) -> SequenceClassification:
    return SequenceClassification("mood", **{"labels": FEELING_LABELS, "text": "text", "label": "label", **settings})


def strength(**settings: Any) -> SequenceClassification:
    return SequenceClassification(
        "strength", **{"problem_type": "regression", "text": "text", "label": "intensity", **settings}
    )


def topics() -> SequenceClassification:
    return SequenceClassification(
        "topics", problem_type="multi_label_classification", labels=TOPICS, text="text", label="topics"
    )


def same() -> SequenceClassification:
    return SequenceClassification("same", labels=["no", "yes"], text="text", text_pair="pair", label="same")


def tags(**settings: Any) -> TokenClassification:
    return TokenClassification("tags", **{"labels": TAG_LABELS, "tokens": "tokens", "label": "tags", **settings})


def colour(**settings: Any) -> ImageClassification:
    return ImageClassification("colour", **{"labels": COLOUR_LABELS, "image": "image", "label": "label", **settings})


def shade() -> ImageClassification:
    return ImageClassification("shade", problem_type="regression", image="image", label="intensity")


def by_name(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


def encode(tasks: dict[str, Task], rows: Any, processor: Any = None, length: int | None = None) -> list[EncodedGroup]:
    """Groups of `tasks`, all over `rows` unless these are given by task."""
    data = rows if isinstance(rows, dict) else dict.fromkeys(tasks, rows)
    reader = None if processor is None else reader_of(processor, length)
    return encode_groups(tasks, data, reader, "train")


# ------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize(
    ("tasks", "rows"),
    [
        ([mood(), strength(), topics()], TEXTS),
        ([mood(text="tokens"), tags()], WORDS),
        ([tags(), mood(text="tokens")], WORDS),
        ([mood(), same()], TEXTS),
        ([colour(), shade()], IMAGES),
    ],
    ids=["texts", "text and words", "words and text", "text and pair", "images"],
)
def test_encoding_together_is_encoding_alone(tasks: list[Task], rows: Dataset) -> None:
    """A task whose inputs or labels depend on its company is trained otherwise than it is used."""
    processor = tiny_image_processor() if rows is IMAGES else tiny_tokenizer()
    together = encode(by_name(*tasks), rows, processor)
    for task in tasks:
        (alone,) = encode(by_name(task), rows, processor)
        (group,) = [group for group in together if task.name in group.tasks]
        for place in range(len(rows)):
            own, shared = alone.dataset[place], group.dataset[place]
            for key, value in own.items():
                assert np.array_equal(shared[key], value), key


@pytest.mark.parametrize("rows", [TEXTS, TEXTS.select([4, 1, 1]), TEXTS.with_format("numpy")])
def test_rows_keep_their_number_and_order(rows: Dataset) -> None:
    (group,) = encode(by_name(strength()), rows, tiny_tokenizer())
    assert list(group.dataset["labels_strength"]) == list(rows["intensity"])
    words = [tiny_tokenizer().decode(ids, skip_special_tokens=True) for ids in group.dataset["input_ids"]]
    assert words == list(rows["text"])


# --------------------------------------------------------------------------------------------------------- grouping


@pytest.mark.parametrize(
    ("tasks", "groups"),
    [
        ([mood(), strength()], [("mood", "strength")]),
        ([mood(), same(), strength()], [("mood", "strength"), ("same",)]),
        ([mood(), strength(text="pair")], [("mood",), ("strength",)]),
        ([mood(), strength(encoder="second")], [("mood", "strength")]),
    ],
)
def test_tasks_with_the_same_inputs_are_grouped(tasks: list[Task], groups: list[tuple[str, ...]]) -> None:
    """Encoding twice costs time; encoding together what differs mixes up the inputs."""
    assert group_tasks(by_name(*tasks), dict.fromkeys((task.name for task in tasks), TEXTS)) == groups


def test_the_same_rows_are_the_same_content_not_the_same_object() -> None:
    tasks = by_name(mood(), strength())
    assert group_tasks(tasks, {"mood": TEXTS, "strength": tiny_text_rows(6)}) == [("mood", "strength")]
    for other in (TEXTS.select([1, 0, 2, 3, 4, 5]), TEXTS.select(range(5)), tiny_text_rows(6, seed=1)):
        assert group_tasks(tasks, {"mood": TEXTS, "strength": other}) == [("mood",), ("strength",)]


def test_sources_of_their_own_by_task() -> None:
    groups = encode(
        by_name(tags(), mood(), strength()), {"strength": TEXTS, "tags": WORDS, "mood": TEXTS}, tiny_tokenizer()
    )
    assert [(group.name, group.tasks) for group in groups] == [
        ("strength+mood", ("strength", "mood")),
        ("tags", ("tags",)),
    ]
    assert [len(group.dataset) for group in groups] == [6, 6]


def test_tasks_without_rows_are_left_out() -> None:
    (group,) = encode(by_name(mood(), strength()), {"mood": TEXTS}, tiny_tokenizer())
    assert group.tasks == ("mood",)


# ---------------------------------------------------------------------------------------------------- exact results


@pytest.mark.parametrize(
    ("family", "inputs"),
    [("bert", {"input_ids", "attention_mask", "token_type_ids"}), ("roberta", {"input_ids", "attention_mask"})],
)
def test_only_model_inputs_and_labels_are_left(family: str, inputs: set[str]) -> None:
    """A raw column that stays is stacked, sent to the device or refused by the model."""
    (group,) = encode(by_name(mood(), strength(), topics()), TEXTS, tiny_tokenizer(family))
    assert set(group.dataset.column_names) == {*inputs, "labels_mood", "labels_strength", "labels_topics"}


def test_labels_of_several_tasks() -> None:
    (group,) = encode(by_name(mood(), strength(), topics()), TEXTS, tiny_tokenizer())
    row, raw = group.dataset[0], TEXTS[0]
    assert row["labels_mood"] == FEELING_LABELS.index(raw["label"])
    assert row["labels_strength"] == raw["intensity"]
    assert row["labels_topics"] == [float(topic in raw["topics"]) for topic in TOPICS]
    assert encoded_labels(group.dataset, mood()) == [FEELING_LABELS.index(label) for label in TEXTS["label"]]


def test_unlabelled_rows_stay() -> None:
    """They carry labels of other tasks."""
    rows = Dataset.from_dict({"text": ["the fox", "the owl"], "label": [None, "good"], "intensity": [1.0, None]})
    (group,) = encode(by_name(mood(), strength()), rows, tiny_tokenizer())
    assert encoded_labels(group.dataset, mood()) == [-100, 2]
    first, second = encoded_labels(group.dataset, strength())
    assert first == 1.0
    assert second is None or np.isnan(second)


def test_a_task_without_a_label_column_has_inputs_only() -> None:
    (group,) = encode(by_name(mood(label=None)), TEXTS, tiny_tokenizer())
    assert set(group.dataset.column_names) == {"input_ids", "attention_mask", "token_type_ids"}


def test_word_labels_of_a_shared_encoding_fit_its_pieces(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_mtcompress"):
        (group,) = encode(by_name(mood(text="tokens"), tags()), WORDS, tiny_tokenizer(), 8)
    assert all(len(row["labels_tags"]) == len(row["input_ids"]) <= 8 for row in group.dataset)
    assert "word_ids" not in group.dataset.column_names
    assert "words without a token (beyond max_length" in caplog.text


def test_images_are_encoded_when_they_are_read() -> None:
    """Encoded in advance they would fill the disk; labels must not need them."""
    (group,) = encode(by_name(colour(), shade()), IMAGES, tiny_image_processor())
    assert group.dataset[[0, 1]]["pixel_values"][1].shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    row = group.dataset[2]
    assert set(row) == {"pixel_values", "labels_colour", "labels_shade"}
    assert (row["labels_colour"], row["labels_shade"]) == (IMAGES[2]["label"], IMAGES[2]["intensity"])
    assert encoded_labels(group.dataset, colour()) == list(IMAGES["label"])


def test_numbers_in_lists_of_a_class_feature_are_its_labels() -> None:
    """[0, 1] of two labels is else read as: the second alone."""
    features = Features({"text": Value("string"), "topics": List(ClassLabel(names=["fox", "market"]))})
    rows = Dataset.from_dict({"text": ["a"] * 4, "topics": [[0, 1], [1], [], None]}, features=features)
    task = SequenceClassification(
        "topics", problem_type="multi_label_classification", labels=["fox", "market"], text="text", label="topics"
    )
    (group,) = encode(by_name(task), rows, tiny_tokenizer())
    assert list(group.dataset["labels_topics"]) == [[1, 1], [0, 1], [0, 0], [-100, -100]]
    unknown = Dataset.from_dict({"text": ["a"], "topics": [[-1]]}, features=features)
    with pytest.raises(DataError, match="found -1"):
        encode({"topics": task}, unknown, tiny_tokenizer())


# ------------------------------------------------------------------------------------------------------ encoded rows


def darkened(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """As the augmentation of a data set's owner: a transform of decoded pictures."""
    return {**rows, "image": [picture.point(lambda value: value // 4) for picture in rows["image"]]}


def test_a_transform_of_the_data_set_is_kept() -> None:
    """Augmentation that is dropped trains on other pictures than its owner believes."""
    tasks = by_name(colour(), shade())
    (found,) = encode(tasks, IMAGES.with_transform(darkened), tiny_image_processor())
    (expected,) = encode(tasks, IMAGES.map(darkened, batched=True), tiny_image_processor())
    assert len(found.dataset) == len(IMAGES)
    for own, other in zip(found.dataset, expected.dataset, strict=True):
        assert own.keys() == other.keys() == {"pixel_values", "labels_colour", "labels_shade"}
        np.testing.assert_array_equal(own["pixel_values"], other["pixel_values"])
    for task in tasks.values():
        assert encoded_labels(found.dataset, task) == encoded_labels(expected.dataset, task)


def test_a_transform_is_called_whenever_a_row_is_read() -> None:
    """Else what it draws at random would be the same in every epoch."""
    calls: list[int] = []

    def counted(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        calls.append(len(rows["image"]))
        return rows

    (group,) = encode(by_name(colour()), IMAGES.with_transform(counted), tiny_image_processor())
    calls.clear()
    for _ in range(2):
        list(group.dataset)
    assert sum(calls) == 2 * len(IMAGES)


@pytest.mark.parametrize("processor", [None, tiny_image_processor()], ids=["none", "given"])
def test_a_transform_that_makes_inputs_needs_no_processor(processor: Any) -> None:
    """As example scripts for pictures have it."""

    def pixels(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [np.full((3, 2, 2), label) for label in rows["label"]], "label": rows["label"]}

    (group,) = encode(by_name(colour()), IMAGES.with_transform(pixels), processor)
    assert [row["labels_colour"] for row in group.dataset] == IMAGES["label"]
    assert [row["pixel_values"][0, 0, 0] for row in group.dataset] == IMAGES["label"]


def test_a_transform_of_encoded_rows_is_kept() -> None:
    """Rows that hold inputs and labels of the names that batches use pass as they are."""

    def other(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**rows, "input_ids": [[5, *ids] for ids in rows["input_ids"]]}

    rows = ENCODED.rename_columns({"mark": "labels_mood", "rating": "labels_strength"})
    (group,) = encode(by_name(mood(), strength()), rows.with_transform(other))
    assert group.dataset[0] == {**rows[0], "input_ids": [5, *rows[0]["input_ids"]]}


def test_a_transform_of_texts_is_applied_once(caplog: pytest.LogCaptureFixture) -> None:
    def louder(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**rows, "text": [f"very {text}" for text in rows["text"]]}

    with caplog.at_level(logging.WARNING):
        (found,) = encode(by_name(mood()), TEXTS.with_transform(louder), tiny_tokenizer())
    (expected,) = encode(by_name(mood()), TEXTS.map(louder, batched=True), tiny_tokenizer())
    assert list(found.dataset) == list(expected.dataset)
    assert "the data set's own transform is called once a row" in caplog.text


def test_a_transform_that_changes_labels_is_refused() -> None:
    """Class weights are read off the labels before it."""

    def turned(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**rows, "label": [2 - label for label in rows["label"]]}

    (group,) = encode(by_name(colour()), IMAGES.with_transform(turned), tiny_image_processor())
    with pytest.raises(DataError, match=r"task 'colour': expected a transform that leaves the labels in 'label' alone"):
        list(group.dataset)


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_another_format_is_the_same_rows(form: str) -> None:
    """Labels that are tensors are no labels."""
    (found,) = encode(by_name(colour()), IMAGES.with_format(form), tiny_image_processor())
    (expected,) = encode(by_name(colour()), IMAGES, tiny_image_processor())
    for own, other in zip(found.dataset, expected.dataset, strict=True):
        np.testing.assert_array_equal(own["pixel_values"], other["pixel_values"])
        assert own["labels_colour"] == other["labels_colour"]


def test_encoded_rows_pass_untouched() -> None:
    """Rows that someone encoded with care must not be encoded again, nor need a processor."""
    rows = ENCODED.rename_columns({"mark": "labels_mood", "rating": "labels_strength"})
    (group,) = encode(by_name(mood(), strength()), rows)
    assert group.dataset is rows


def test_encoded_images_pass_untouched() -> None:
    rows = Dataset.from_dict({"pixel_values": np.zeros((2, 3, 4, 4)), "labels_colour": [0, 1]})
    (group,) = encode(by_name(colour()), rows)
    assert group.dataset is rows


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ({"mark": "mood_index", "rating": "intensity"}, ("mood_index", "intensity")),
        ({"mark": "label", "rating": "intensity"}, ("label", "intensity")),
        ({"mark": "labels", "rating": "labels_strength"}, ("labels", "intensity")),
    ],
)
def test_label_columns_of_encoded_rows_are_renamed(names: dict[str, str], labels: tuple[str, str]) -> None:
    tasks = by_name(mood(label=labels[0]), strength(label=labels[1]))
    (group,) = encode(tasks, ENCODED.rename_columns(names))
    assert set(group.dataset.column_names) == {"input_ids", "attention_mask", "labels_mood", "labels_strength"}
    assert encoded_labels(group.dataset, mood()) == [0, 2]
    assert encoded_labels(group.dataset, strength()) == [0.5, 1.0]


@pytest.mark.parametrize("name", ["label", "labels"])
def test_the_usual_label_column_is_found_for_one_task(name: str) -> None:
    (group,) = encode(by_name(mood(label=None)), ENCODED.rename_column("mark", name))
    assert encoded_labels(group.dataset, mood()) == [0, 2]


@pytest.mark.parametrize("name", ["label", "labels"])
def test_one_usual_label_column_is_not_guessed_to_be_that_of_some_task(name: str) -> None:
    tasks = by_name(mood(label=None), strength(label=None))
    with pytest.raises(DataError, match=rf"for each of \['mood', 'strength'\], found only '{name}'; name them"):
        encode(tasks, ENCODED.rename_column("mark", name))


def test_encoded_rows_without_labels() -> None:
    with pytest.raises(
        DataError, match=r"task 'mood': expected labels in column 'labels_mood', 'label' or 'labels' of the train rows"
    ):
        encode(by_name(mood()), ENCODED)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("tasks", "rows", "message"),
    [
        (
            by_name(mood(text="txt")),
            TEXTS,
            r"task 'mood': expected column 'txt' in the train rows.*did you mean 'text'",
        ),
        (by_name(mood(label="feeling")), TEXTS, "expected column 'feeling' .*name the right column in the task"),
        (by_name(mood(), strength(label="intensty")), TEXTS, "task 'strength': .*did you mean 'intensity'"),
        (by_name(mood(text=None)), TEXTS, "task 'mood': expected the name of its input column, found none"),
        (by_name(mood(), strength()), TEXTS.select([]), "task mood, strength: expected rows in the train split"),
        (by_name(mood(labels=["bad", "good"])), TEXTS, "task 'mood': expected one of 2 labels .*found 'plain'"),
        ({"mood": mood()}, {"moood": TEXTS}, r"expected rows for the tasks \['mood'\], found rows for \['moood'\]"),
    ],
)
def test_rows_that_do_not_fit(tasks: dict[str, Task], rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(tasks, rows, tiny_tokenizer())


def test_raw_rows_without_a_processor() -> None:
    with pytest.raises(DataError, match=r"task mood: expected a processing_class .*columns \['text', .*found none"):
        encode(by_name(mood()), TEXTS)


def test_more_labels_than_words() -> None:
    """The labels behind the surplus one would all be those of the word before."""
    rows = Dataset.from_dict({"tokens": [["the", "fox"]], "tags": [["O", "O", "B-animal"]]})
    with pytest.raises(DataError, match="one label for each word, found 3 labels in column 'tags' for 2 words"):
        encode(by_name(tags()), rows, tiny_tokenizer())


@pytest.mark.parametrize("names", [["good", "plain", "bad"], ["other", "bad", "plain", "good"]])
def test_numbers_that_mean_other_labels_in_the_data(names: list[str]) -> None:
    """The same names in another order: every label would be swapped, and training would go well."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = Dataset.from_dict({"text": ["the fox"], "label": [0]}, features=features)
    with pytest.raises(
        DataError, match=rf"in the order of column 'label' \({', '.join(names)}\), found \(bad, plain, good\)"
    ):
        encode(by_name(mood()), rows, tiny_tokenizer())


@pytest.mark.parametrize("names", [["bad", "plain"], ["bad", "plain", "good"], ["0", "1", "2"]])
def test_numbers_that_mean_the_same_labels_or_new_names(names: list[str]) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = Dataset.from_dict({"text": ["the fox", "the owl"], "label": [0, 1]}, features=features)
    (group,) = encode(by_name(mood()), rows, tiny_tokenizer())
    assert encoded_labels(group.dataset, mood()) == [0, 1]


def test_a_required_column() -> None:
    require_column(["a", "b"], "b", "task 'x'", "test")
    with pytest.raises(DataError, match=r"task 'x': expected column 'c' in the test rows, found \['aa', 'bb'\]; name"):
        require_column(["aa", "bb"], "c", "task 'x'", "test")
