"""Checkpoints of every family come back whole, whatever their weights are called in files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_mtcompress import MultiTaskTrainer, MultiTaskTrainingArguments
from hf_mtcompress.errors import TrainingError
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import ImageClassification, SequenceClassification
from tests.tiny import (
    COLOUR_LABELS,
    FAMILIES,
    FEELING_LABELS,
    IMAGE_FAMILIES,
    IMAGE_SIZE,
    randomize,
    tiny_config,
    tiny_encoder,
    tiny_image_processor,
    tiny_image_rows,
    tiny_text_rows,
    tiny_tokenizer,
)


def build(folder: Path, family: str, *, stock: bool = False, **settings: Any) -> MultiTaskTrainer:
    """A trainer that saves after 2 and after 4 steps."""
    arguments = MultiTaskTrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        save_strategy="steps",
        save_steps=2,
        seed=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    model: PreTrainedModel
    common: dict[str, Any] = {"args": arguments}
    if stock:
        model = randomize(AutoModelForImageClassification.from_config(tiny_config(family, num_labels=3)))
        processor = tiny_image_processor(family)
        encoded = [
            {"pixel_values": processor(row["image"], return_tensors="pt")["pixel_values"][0], "labels": row["label"]}
            for row in map(dict, tiny_image_rows(32))
        ]
        rows = common["eval_dataset"] = Dataset.from_list(encoded).with_format("torch")
        return MultiTaskTrainer(model=model, train_dataset=rows, **common)
    if family in IMAGE_FAMILIES:
        task: Any = ImageClassification("colour", image="image", label="label", labels=list(COLOUR_LABELS))
        model = MultiTaskModel.from_encoder(tiny_encoder(family), [task], image_size=IMAGE_SIZE)
        rows, processor = tiny_image_rows(32), tiny_image_processor(family)
    else:
        task = SequenceClassification("mood", text="text", label="label", labels=list(FEELING_LABELS))
        model = MultiTaskModel.from_encoder(tiny_encoder(family), [task], max_length=32)
        rows, processor = tiny_text_rows(32), tiny_tokenizer(family)
    torch.manual_seed(0)
    for head in model.heads.values():
        torch.nn.init.normal_(next(head.parameters()))
    return MultiTaskTrainer(model=model, train_dataset=rows, eval_dataset=rows, processing_class=processor, **common)


def differing(one: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    """Names of weights that are not bit-equal."""
    theirs = other.state_dict()
    return [name for name, value in one.state_dict().items() if not torch.equal(value, theirs[name])]


CASES = [(family, False) for family in FAMILIES] + [("vit", True), ("dinov2", True)]


@pytest.mark.parametrize(("family", "stock"), CASES)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, family: str, stock: bool) -> None:
    """`Trainer` loads by name, and leaves what a file names otherwise as it is in the model."""
    whole = build(tmp_path / "whole", family, stock=stock)
    whole.train()
    resumed = build(tmp_path / "resumed", family, stock=stock)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert differing(whole.model, resumed.model) == []


@pytest.mark.parametrize(("family", "stock"), CASES)
def test_the_best_weights_are_those_of_one_checkpoint(tmp_path: Path, family: str, stock: bool) -> None:
    """Not the best head on the last encoder; the worst loss is called best here, so that the first checkpoint is."""
    trainer = build(
        tmp_path,
        family,
        stock=stock,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    kind = type(trainer.model)
    assert differing(trainer.model, kind.from_pretrained(best)) == []
    (other,) = (folder for folder in tmp_path.glob("checkpoint-*") if folder != best)
    assert differing(trainer.model, kind.from_pretrained(other)) != []


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    """A head that the checkpoint has not would go on from where it began, beside others that were trained."""
    build(tmp_path / "whole", "bert").train()
    resumed = build(tmp_path / "resumed", "bert")
    resumed.model.add_task(SequenceClassification("other", labels=["a", "b"]))
    with pytest.raises(TrainingError, match="found none for 2 of them, such as heads"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
