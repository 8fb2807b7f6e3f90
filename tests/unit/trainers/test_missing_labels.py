"""Rows, splits and columns without labels: what is scored, answered and said."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hf_mtcompress import MultiTaskModel, MultiTaskTrainer, SequenceClassification
from tests.tiny import FEELING_LABELS, tiny_encoder, tiny_text_rows, tiny_token_rows, tiny_tokenizer
from tests.unit.trainers.test_multitask import arguments, build, tag_task, text_tasks


def without(rows: Dataset, column: str) -> Dataset:
    """The rows with None as every label of a column."""
    features = rows.features
    return rows.map(lambda row: {column: None}, features=features)


def test_a_task_without_a_label_in_the_split_gets_no_score(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The other tasks do, and the average is theirs."""
    trainer = build(tmp_path)
    texts = tiny_text_rows(12)
    rows = {"mood": texts, "strength": without(texts, "intensity"), "tags": tiny_token_rows(6)}
    with caplog.at_level(logging.WARNING):
        metrics = trainer.evaluate(rows)
    assert "no row with a label of task 'strength'" in caplog.text
    assert not [key for key in metrics if key.startswith("eval_strength")]
    assert metrics["eval_average"] == pytest.approx((metrics["eval_mood_accuracy"] + metrics["eval_tags_span_f1"]) / 2)
    assert np.isfinite(metrics["eval_loss"])


def test_rows_without_label_columns_are_predicted(tmp_path: Path) -> None:
    """A test set whose labels nobody has is what prediction is for."""
    trainer = build(tmp_path)
    texts, tokens = tiny_text_rows(6), tiny_token_rows(4)
    bare = {
        "mood": texts.select_columns(["text"]),
        "strength": texts.select_columns(["text"]),
        "tags": tokens.select_columns(["tokens"]),
    }
    output = trainer.predict(bare)
    found, expected = (
        output.predictions,
        trainer.predict({"mood": texts, "strength": texts, "tags": tokens}).predictions,
    )
    assert output.label_ids is None
    assert {name: logits.shape[0] for name, logits in found.items()} == {"mood": 6, "strength": 6, "tags": 4}
    for name, logits in expected.items():
        np.testing.assert_array_equal(found[name], logits)


def test_a_misspelt_label_column_of_one_data_set_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The task would be left out, and its head stay as it was drawn, without a word."""
    wrong = SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="lable")
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [wrong, text_tasks()[1]])
    settings: dict[str, Any] = {"model": model, "args": arguments(tmp_path), "processing_class": tiny_tokenizer()}
    with caplog.at_level(logging.WARNING):
        trainer = MultiTaskTrainer(**settings, train_dataset=tiny_text_rows(8))
    assert "train: no rows for mood, since the data set has no column 'lable'" in caplog.text
    assert [group.tasks for group in trainer.train_groups] == [("strength",)]


@pytest.mark.parametrize("fusion", ["sum", "gradient_norm"])
def test_a_head_that_saw_no_label_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, fusion: str) -> None:
    """And measuring gradient norms does not wait for it until the end."""
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [*text_tasks(), tag_task()], max_length=32)
    texts = tiny_text_rows(12)
    trainer = MultiTaskTrainer(
        model=model,
        args=arguments(tmp_path, fusion=fusion, num_train_epochs=4),
        train_dataset={"mood": texts, "strength": without(texts, "intensity"), "tags": tiny_token_rows(6)},
        processing_class=tiny_tokenizer(),
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "no training row with a label of strength was seen" in caplog.text
    if fusion == "gradient_norm":
        assert trainer.fusion.state_dict()["factors"].keys() == {"mood", "tags"}


def test_heads_that_saw_labels_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither after a restart shortly before the end, which sees few rows."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 9, "max_steps": 10}
    with caplog.at_level(logging.WARNING):
        build(tmp_path / "whole", **settings).train()
        build(tmp_path / "again", **settings).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))
    assert "was seen" not in caplog.text
