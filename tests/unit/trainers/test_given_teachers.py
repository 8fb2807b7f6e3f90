"""What a user gives as student, teacher, criteria and collator: it teaches, or is refused before training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from hf_mtcompress import (
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageClassification,
    MultiTaskModel,
    MultiTaskTrainer,
    student_of,
)
from hf_mtcompress.errors import TaskError, TrainingError
from tests.tiny import (
    COLOUR_LABELS,
    FEELING_LABELS,
    IMAGE_SIZE,
    randomize,
    tiny_config,
    tiny_encoder,
    tiny_image_processor,
    tiny_image_rows,
    tiny_text_rows,
    tiny_tokenizer,
)
from tests.unit.trainers.test_distillation import build, teacher_model
from tests.unit.trainers.test_multitask import arguments, text_tasks


def stock(seed: int = 0) -> PreTrainedModel:
    config = tiny_config("bert", id2label=dict(enumerate(FEELING_LABELS)))
    return randomize(AutoModelForSequenceClassification.from_config(config), seed)


def encoded_rows(n: int) -> Dataset:
    rows, tokenizer = tiny_text_rows(n), tiny_tokenizer()
    return rows.map(
        lambda row: {
            **tokenizer(row["text"], padding="max_length", max_length=32),
            "label": FEELING_LABELS.index(row["label"]),
        },
        remove_columns=rows.column_names,
    )


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """As the script of transformers for images has it: labels by hand."""
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}
    return {**batch, "labels": torch.tensor([row["label"] for row in rows])}


@pytest.mark.parametrize("asked", ["probe", "cache"])
def test_a_collator_that_reads_labels_is_asked_as_it_trains(tmp_path: Path, asked: str) -> None:
    """Rows were put before the teacher without their labels, which such a collator looks for."""
    settings = {"probe_rows": 15} if asked == "probe" else {"teacher_cache": tmp_path / "cache"}
    rows = encoded_rows(24)
    trainer = build(stock(), stock(1), tmp_path, train_dataset=rows, data_collator=collate, **settings)
    trainer.train()
    assert bool(trainer.caches) == (asked == "cache")
    if trainer.caches:
        plain = build(stock(), stock(1), tmp_path, train_dataset=rows, data_collator=collate)
        plain.train()
        for name, value in plain.model.state_dict().items():
            torch.testing.assert_close(value, trainer.model.state_dict()[name], rtol=1e-3, atol=1e-4)


def weights_of(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return trainer.model.state_dict()


def test_a_teacher_may_be_a_folder(tmp_path: Path) -> None:
    """With the tokenizer beside it, whose ids may be others."""
    teacher = teacher_model()
    for folder, saved in (("multi", teacher), ("stock", stock(1))):
        saved.save_pretrained(tmp_path / folder)
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    by_hand = weights_of(build(student_of(teacher, 2), teacher, tmp_path / "a"))
    for number, place in enumerate([str(tmp_path / "multi"), tmp_path / "multi"]):
        found = weights_of(build(student_of(teacher, 2), place, tmp_path / str(number)))
        assert all(torch.equal(value, found[name]) for name, value in by_hand.items())
    several = build(student_of(teacher, 2), [(str(tmp_path / "multi"), 2.0), (teacher, 1.0)], tmp_path / "b")
    assert [weight for _, weight in several.panel.by_task["mood"]] == [2.0, 1.0]
    mood = MultiTaskModel.from_encoder(tiny_encoder("bert"), text_tasks()[:1], max_length=32)
    rows = {"mood": tiny_text_rows(8)}
    build(mood, {"mood": str(tmp_path / "stock")}, tmp_path / "c", train_dataset=rows).train()
    for wrong in (str(tmp_path / "nothing"), tmp_path):
        with pytest.raises(TaskError, match="expected a teacher: a model, or a folder or Hub id of one, found"):
            build(student_of(teacher, 2), wrong, tmp_path / "d")


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated"
)  # peft asks transformers by the old name
def test_adapters_of_peft_are_refused_by_name(tmp_path: Path) -> None:
    """A bare assertion says nothing, and around a multi-task model they would be taken for a stock model."""
    lora = LoraConfig(target_modules=["query"])
    rows = encoded_rows(8)
    with pytest.raises(TaskError, match=r"as teacher, found a PeftModel; .*merge_and_unload"):
        build(stock(), get_peft_model(stock(1), lora), tmp_path, train_dataset=rows)
    with pytest.raises(TaskError, match="as student, found a PeftModel"):
        build(get_peft_model(stock(), lora), stock(1), tmp_path, train_dataset=rows)
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), text_tasks(), max_length=32)
    wrapped: list[Any] = [torch.nn.DataParallel(model), get_peft_model(model, lora)]
    for other in wrapped:
        with pytest.raises(TrainingError, match=r"expected a MultiTaskModel, found a \w+ around one.*add_adapters"):
            MultiTaskTrainer(
                model=other,
                args=arguments(tmp_path),
                train_dataset=tiny_text_rows(8),
                processing_class=tiny_tokenizer(),
            )


@pytest.mark.parametrize("family", ["convnext", "resnet", "swin"])
def test_states_of_encoders_in_stages_are_refused_and_their_answers_taught(tmp_path: Path, family: str) -> None:
    """Their configs name no width or no layers, and their states are of several widths."""
    labels = {"id2label": dict(enumerate(COLOUR_LABELS)), "label2id": {name: i for i, name in enumerate(COLOUR_LABELS)}}
    stages = {"depths": [1, 1], "image_size": IMAGE_SIZE, **labels}
    teacher: PreTrainedModel
    match family:
        case "convnext":
            teacher = ConvNextForImageClassification(ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], **stages))
        case "resnet":
            config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], layer_type="basic", **stages)
            teacher = ResNetForImageClassification(config)
        case _:
            config = SwinConfig(patch_size=4, embed_dim=8, num_heads=[2, 2], window_size=2, **stages)
            teacher = SwinForImageClassification(config)
    task = ImageClassification("colour", image="image", label="label", labels=list(COLOUR_LABELS))
    student = MultiTaskModel.from_encoder(tiny_encoder("vit"), [task], image_size=IMAGE_SIZE)
    given: dict[str, Any] = {
        "train_dataset": {"colour": tiny_image_rows(8)},
        "processing_class": tiny_image_processor("vit"),
    }
    with pytest.raises(
        TaskError, match=r"layers of one width for the criteria \['hidden'\].*use criteria=\['logits'\]"
    ):
        build(student, teacher, tmp_path, **given)
    build(student, teacher, tmp_path, criteria=["logits"], **given).train()


@pytest.mark.parametrize("criteria", ["logits, embedding", ["logits", "embedding"], ("logits", "embedding")])
def test_criteria_are_named_in_a_list_or_between_commas(tmp_path: Path, criteria: Any) -> None:
    args = DistillationTrainingArguments(str(tmp_path), criteria=criteria, use_cpu=True, report_to="none")
    teacher = teacher_model()
    trainer = DistillationTrainer(
        model=student_of(teacher, 2),
        teacher=teacher,
        args=args,
        train_dataset={"mood": tiny_text_rows(8)},
        processing_class=tiny_tokenizer(),
        probe_rows=0,
    )
    assert [item.kind for item in trainer.criteria] == ["logits", "embedding"]


@pytest.mark.parametrize("words", [["logits,embedding"], ["logits", "embedding"]])
def test_a_command_line_names_criteria(tmp_path: Path, words: list[str]) -> None:
    line = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--criteria", *words]
    (args,) = HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(line)
    teacher = teacher_model()
    trainer = DistillationTrainer(model=student_of(teacher, 2), teacher=teacher, args=args, probe_rows=0)
    assert [item.kind for item in trainer.criteria] == ["logits", "embedding"]
