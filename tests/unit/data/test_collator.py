"""Laws of batches: inputs and labels of a row stay together, and padding counts nowhere."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from hf_mtcompress import ImageClassification, SequenceClassification, Task, TokenClassification
from hf_mtcompress.data.collator import MultiTaskCollator
from hf_mtcompress.data.preprocessing import encode_groups
from hf_mtcompress.data.readers import reader_of
from tests.tiny import COLOUR_LABELS, FEELING_LABELS, TAG_LABELS, TEXT_FAMILIES, tiny_token_rows, tiny_tokenizer

TASKS: dict[str, Task] = {
    "mood": SequenceClassification("mood", labels=FEELING_LABELS, text="tokens", label="label"),
    "strength": SequenceClassification("strength", problem_type="regression"),
    "topics": SequenceClassification("topics", problem_type="multi_label_classification", labels=["fox", "owl"]),
    "tags": TokenClassification("tags", labels=TAG_LABELS, tokens="tokens", label="tags"),
    "colour": ImageClassification("colour", labels=COLOUR_LABELS),
}
READER = reader_of(tiny_tokenizer())


def row(*ids: int, **labels: Any) -> dict[str, Any]:
    return {
        "input_ids": list(ids),
        "attention_mask": [1] * len(ids),
        **{f"labels_{name}": value for name, value in labels.items()},
    }


# ------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_inputs_are_padded_as_by_transformers(family: str) -> None:
    """Padding with a wrong id or mask shifts every score a little."""
    tokenizer = tiny_tokenizer(family)
    rows = [tokenizer("the fox"), tokenizer("the very happy horse sleeps near the river"), tokenizer("owl")]
    batch = MultiTaskCollator(TASKS, reader_of(tokenizer))([dict(row) for row in rows])
    expected = DataCollatorWithPadding(tokenizer)(rows)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_word_labels_are_padded_as_by_transformers() -> None:
    tasks = {name: TASKS[name] for name in ("mood", "tags")}
    rows = tiny_token_rows(5)
    (group,) = encode_groups(tasks, dict.fromkeys(tasks, rows), READER, "train")
    encoded = [dict(row) for row in group.dataset]
    batch = MultiTaskCollator(tasks, READER)(encoded)
    plain = [{key: value for key, value in row.items() if key != "labels_mood"} for row in encoded]
    expected = DataCollatorForTokenClassification(tiny_tokenizer())(
        [{"labels" if key == "labels_tags" else key: value for key, value in row.items()} for row in plain]
    )
    assert torch.equal(batch["labels_tags"], expected["labels"])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    # What a word label stands at is never padding.
    assert (batch["attention_mask"][batch["labels_tags"] != -100] == 1).all()
    assert batch["labels_mood"].tolist() == [FEELING_LABELS.index(label) for label in rows["label"]]


def test_a_batch_is_its_rows_in_any_order() -> None:
    rows = [row(2, 7, 3, mood=0, tags=[-100, 1, -100]), row(2, 3, mood=2, tags=[-100, -100])]
    collate = MultiTaskCollator(TASKS, READER)
    forward, backward = collate(rows), collate(rows[::-1])
    assert all(torch.equal(forward[key], backward[key].flip(0)) for key in forward)


# ---------------------------------------------------------------------------------------------------- exact batches


def test_labels_by_kind() -> None:
    rows = [
        row(2, 3, mood=1, strength=0.5, topics=[1.0, 0.0], tags=[-100, 2], colour=2),
        row(2, 7, 8, 3, mood=-100, strength=math.nan, topics=[-100.0, -100.0], tags=[-100, 1, 0, -100], colour=0),
    ]
    batch = MultiTaskCollator(TASKS, READER)(rows)
    assert batch["input_ids"].tolist() == [[2, 3, 1, 1], [2, 7, 8, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels_mood"].tolist() == [1, -100]
    assert batch["labels_strength"][0].item() == 0.5
    assert batch["labels_strength"][1].isnan()
    assert batch["labels_topics"].tolist() == [[1.0, 0.0], [-100.0, -100.0]]
    assert batch["labels_tags"].tolist() == [[-100, 2, -100, -100], [-100, 1, 0, -100]]
    assert batch["labels_colour"].tolist() == [2, 0]
    dtypes = {key: tensor.dtype for key, tensor in batch.items()}
    assert {key for key, dtype in dtypes.items() if dtype == torch.float32} == {"labels_strength", "labels_topics"}
    assert set(dtypes.values()) == {torch.float32, torch.long}


def test_word_labels_reach_a_padded_multiple() -> None:
    """Logits and labels of different lengths do not flatten to pairs."""
    batch = MultiTaskCollator(TASKS, READER, pad_to_multiple_of=8)([row(2, 7, 3, tags=[-100, 1, -100])])
    assert batch["input_ids"].shape == batch["labels_tags"].shape == (1, 8)
    assert batch["labels_tags"].tolist() == [[-100, 1, *[-100] * 6]]


def test_other_columns_are_left_out() -> None:
    given = {**row(2, 3, mood=0, unknown=1), "text": "the fox", "label": 3, "length": 2}
    assert set(MultiTaskCollator(TASKS, READER)([given])) == {
        "input_ids",
        "attention_mask",
        "labels_mood",
    }


def test_rows_of_several_sources() -> None:
    """A task's labels must be joined with the logits of its own rows."""
    rows = [row(2, 3, mood=1), row(2, 7, 3, tags=[-100, 3, -100]), row(2, 3, mood=0)]
    batch = MultiTaskCollator(TASKS, READER)(rows)
    assert batch["input_ids"].shape == (3, 3)
    assert (batch["labels_mood"].tolist(), batch["rows_mood"].tolist()) == ([1, 0], [0, 2])
    assert (batch["labels_tags"].tolist(), batch["rows_tags"].tolist()) == ([[-100, 3, -100]], [1])


def test_whole_batches_need_no_places() -> None:
    batch = MultiTaskCollator(TASKS, READER)([row(2, 3, mood=1), row(2, 3, mood=0)])
    assert not [key for key in batch if key.startswith("rows_")]


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor, np.ndarray.tolist])
def test_images_are_stacked(make: Any) -> None:
    images = [np.full((3, 2, 2), value, dtype=np.float32) for value in (0.25, 0.5)]
    batch = MultiTaskCollator(TASKS)(
        [{"pixel_values": make(image), "labels_colour": 2 - place} for place, image in enumerate(images)]
    )
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].tolist() == np.stack(images).tolist()
    assert batch["labels_colour"].tolist() == [2, 1]


def test_rows_of_one_length_need_no_tokenizer() -> None:
    batch = MultiTaskCollator(TASKS)([row(2, 7, 3, tags=[-100, 1, -100]), row(2, 8, 3, tags=[-100, 0, -100])])
    assert batch["input_ids"].tolist() == [[2, 7, 3], [2, 8, 3]]
    assert batch["labels_tags"].shape == (2, 3)


# -------------------------------------------------------------------------------------------------------- bad input


def test_rows_of_unequal_length_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"one size for 'input_ids', found \[\(2,\), \(3,\)\]; pass processing_class"):
        MultiTaskCollator(TASKS)([row(2, 7, 3), row(2, 3)])


def test_longer_labels_than_inputs_are_no_batch() -> None:
    with pytest.raises(ValueError, match="expected sequence of length"):
        MultiTaskCollator(TASKS, READER)([row(2, 3, tags=[-100] * 5), row(2, 3, tags=[-100] * 2)])
