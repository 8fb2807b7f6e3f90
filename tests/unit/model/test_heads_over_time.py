"""Heads that come and go: what is there already does not change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from hf_mtcompress import ImageClassification, MultiTaskModel, MultiTaskTrainer, SequenceClassification, Task
from hf_mtcompress import TokenClassification as Tokens
from hf_mtcompress.errors import TaskError
from tests.tiny import (
    COLOUR_LABELS,
    FAMILIES,
    FEELING_LABELS,
    IMAGE_FAMILIES,
    TAG_LABELS,
    randomize,
    tiny_config,
    tiny_encoder,
    tiny_inputs,
    tiny_text_rows,
    tiny_tokenizer,
)
from tests.unit.trainers.test_multitask import arguments


def first_task(family: str) -> Task:
    if family in IMAGE_FAMILIES:
        return ImageClassification("mood", labels=COLOUR_LABELS)
    return SequenceClassification("mood", labels=FEELING_LABELS)


def second_task(family: str) -> Task:
    if family in IMAGE_FAMILIES:
        return ImageClassification("strength", problem_type="regression")
    return Tokens("tags", labels=TAG_LABELS)


def logits(model: Any, family: str, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_inputs(family))[f"logits_{name}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_adding_and_removing_a_task_changes_no_other(family: str, tmp_path: Path) -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder(family), [first_task(family)])
    before = logits(model, family, "mood")
    added = second_task(family)
    model.add_task(added)
    assert torch.equal(logits(model, family, "mood"), before)
    fresh = logits(model, family, added.name)
    model.save_pretrained(tmp_path)
    loaded = MultiTaskModel.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, family, added.name), fresh)
    loaded.remove_task(added.name)
    assert list(loaded.tasks) == ["mood"]
    assert not any(added.name in key for key in loaded.state_dict())
    assert torch.equal(logits(loaded, family, "mood"), before)


@pytest.mark.parametrize("layers", [1, None])
def test_a_removed_task_takes_along_what_no_other_reads(layers: int | None, tmp_path: Path) -> None:
    """A branch or an encoder that nobody asks would be kept, saved and sent for nothing."""
    tasks = [first_task("bert"), second_task("bert")]
    place = {"branches": {"side": [tasks[1].name]}, "branch_layers": layers}
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks, **place)
    before = logits(model, "bert", "mood")
    assert any("side" in key for key in model.state_dict())
    model.remove_task(tasks[1].name)
    assert not any("side" in key for key in model.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(MultiTaskModel.from_pretrained(tmp_path), "bert", "mood"), before)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert", "vit"])
def test_one_checkpoint_keeps_its_logits(family: str, tmp_path: Path) -> None:
    """Head, labels and encoder are taken over; from a folder and from memory."""
    task = first_task(family)
    auto: Any = __import__("transformers", fromlist=[task.auto_class])
    config = tiny_config(family)
    task.configure(config)
    stock = randomize(getattr(auto, task.auto_class).from_config(config))
    stock.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = stock(**tiny_inputs(family)).logits
    for checkpoint in (stock, tmp_path):
        model = MultiTaskModel.from_heads({"mood": checkpoint})
        assert tuple(model.tasks["mood"].labels or ()) == task.labels
        torch.testing.assert_close(logits(model, family, "mood"), wanted, rtol=0, atol=1e-6)


def test_several_checkpoints_share_the_first_ones_encoder() -> None:
    config = tiny_config("bert")
    first_task("bert").configure(config)
    mood = randomize(AutoModelForSequenceClassification.from_config(config), seed=1)
    config = tiny_config("bert")
    second_task("bert").configure(config)
    tags = randomize(AutoModelForTokenClassification.from_config(config), seed=2)
    model = MultiTaskModel.from_heads({"mood": mood, "tags": tags})
    with torch.no_grad():
        torch.testing.assert_close(logits(model, "bert", "mood"), mood(**tiny_inputs("bert")).logits)
    assert torch.equal(model.heads["task_tags"].classifier.weight, tags.classifier.weight)
    assert model.tasks["tags"].labels == TAG_LABELS
    next(model.encoder.parameters()).data.zero_()
    assert next(mood.base_model.parameters()).any(), "the checkpoint in memory is not touched"


def test_training_one_head_leaves_everything_else(tmp_path: Path) -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [first_task("bert"), second_task("bert")])
    strength = SequenceClassification("strength", problem_type="regression", text="text", label="intensity")
    model.add_task(strength)
    model.freeze_encoder(["strength"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows: Dataset = tiny_text_rows(8)
    trainer = MultiTaskTrainer(
        model=model,
        args=arguments(tmp_path, weight_decay=0.1),
        train_dataset={"strength": rows},
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert all(key.startswith("heads.task_strength.") for key in moved)
    model.freeze_encoder(frozen=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_mistakes_are_refused() -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [Tokens("tags", labels=TAG_LABELS)])
    with pytest.raises(TaskError, match="expected a new task name, found 'tags'"):
        model.add_task(Tokens("tags", labels=TAG_LABELS))
    with pytest.raises(TaskError, match="whose pooler was dropped"):
        model.add_task(first_task("bert"))
    with pytest.raises(TaskError, match="expected one of at least two tasks"):
        model.remove_task("tags")
    with pytest.raises(TaskError, match="expected tasks among"):
        model.freeze_encoder(["tag"])
    with pytest.raises(TaskError, match="expected at least one checkpoint"):
        MultiTaskModel.from_heads({})
    with pytest.raises(TaskError, match="expected a model of a class"):
        MultiTaskModel.from_heads({"a": tiny_encoder("bert")})
    stocks = {
        family: AutoModelForSequenceClassification.from_config(tiny_config(family)) for family in ("bert", "distilbert")
    }
    with pytest.raises(TaskError, match="expected checkpoints of one family"):
        MultiTaskModel.from_heads(stocks)
