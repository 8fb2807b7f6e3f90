"""Laws of distillation, on tiny real models."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from hf_mtcompress import (
    DistillationTrainer,
    DistillationTrainingArguments,
    MultiTaskModel,
    SequenceClassification,
    TokenClassification,
    student_of,
)
from hf_mtcompress.data.preprocessing import EncodedGroup, for_every_task
from hf_mtcompress.errors import DataError, TaskError, UnsupportedEncoderError
from tests.tiny import FEELING_LABELS, TAG_LABELS, tiny_encoder, tiny_text_rows, tiny_token_rows, tiny_tokenizer
from tests.unit.trainers.test_multitask import gradients

ARGUMENTS = (
    "normalize_losses",
    "mixing",
    "mixing_weights",
    "measure_interference",
    "cache_precision",
    "batches",
    "gradient_accumulation_steps",
    "gradient_combination",
    "fusion",
)


def teacher_model(family: str = "bert", **overrides: Any) -> MultiTaskModel:
    tasks = [
        SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label"),
        SequenceClassification("strength", problem_type="regression", text="text", label="intensity"),
        TokenClassification("tags", labels=TAG_LABELS, tokens="tokens", label="tags"),
    ]
    return MultiTaskModel.from_encoder(tiny_encoder(family, **overrides), tasks, max_length=32).eval()


def build(student: PreTrainedModel, teacher: Any, folder: Path, **settings: Any) -> DistillationTrainer:
    texts, tokens = tiny_text_rows(8), tiny_token_rows(6)
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        args=DistillationTrainingArguments(
            str(folder),
            max_steps=3,
            per_device_train_batch_size=4,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **{name: settings.pop(name) for name in ARGUMENTS if name in settings},
        ),
        **{
            "train_dataset": {"mood": texts, "strength": texts, "tags": tokens},
            "processing_class": tiny_tokenizer(),
            "probe_rows": 0,  # the teachers here are random
            **settings,
        },
    )


def losses(trainer: DistillationTrainer) -> dict[str, float]:
    trainer.model.eval()
    found: dict[str, float] = {}
    for batch in trainer.get_train_dataloader():
        present = {name: task for name, task in trainer.tasks.items() if task.label_name in batch}
        labels = {name: batch[task.label_name] for name, task in present.items()}
        features = {key: value for key, value in batch.items() if not key.startswith("labels_")}
        counts = {name: task.item_count(labels[name]) for name, task in present.items()}
        with torch.no_grad():
            _, by_task, extra = trainer.task_losses(trainer.model, features, labels, counts, {})
        for name, value in {**by_task, **extra}.items():
            found[name] = max(found.get(name, 0.0), float(value))
    return found


def test_distilling_a_copy_of_the_teacher_starts_at_zero(tmp_path: Path) -> None:
    teacher = teacher_model()
    found = losses(build(copy.deepcopy(teacher), teacher, tmp_path, label_weight=0.0))
    assert found.keys() == {"mood", "strength", "tags", "hidden"}
    assert max(found.values()) < 1e-6


def test_permuting_the_teachers_labels_changes_nothing(tmp_path: Path) -> None:
    """Logits compared by position teach the student other classes, and accuracy alone shows it late."""
    teacher = teacher_model()
    permuted = copy.deepcopy(teacher)
    order = [2, 0, 1]
    task = permuted.tasks["mood"]
    task.labels = tuple(FEELING_LABELS[index] for index in order)
    classifier = permuted.heads["task_mood"].classifier
    with torch.no_grad():
        classifier.weight.copy_(classifier.weight[order])
        classifier.bias.copy_(classifier.bias[order])
    student = student_of(teacher, 2)
    plain = losses(build(copy.deepcopy(student), teacher, tmp_path, label_weight=0.0))
    other = losses(build(copy.deepcopy(student), permuted, tmp_path, label_weight=0.0))
    assert plain["mood"] > 1e-4
    assert other["mood"] == pytest.approx(plain["mood"], rel=1e-5)


def test_splitting_a_window_differently_changes_no_gradient(tmp_path: Path) -> None:
    teacher = teacher_model()
    trainer = build(student_of(teacher, 2), teacher, tmp_path)
    rows = trainer.train_groups[0].dataset
    collate = trainer.data_collator
    trainer.create_optimizer_and_scheduler(10)
    whole = [collate([rows[index] for index in range(6)])]
    split = [collate([rows[index] for index in part]) for part in ([0], [1, 2, 3], [4, 5])]
    one, other = gradients(trainer, [whole, split])
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_class_weights_are_for_labels_and_not_for_the_teacher(tmp_path: Path) -> None:
    """Beside the teacher alone they change no gradient; with labels they do."""
    teacher = teacher_model()

    def gradient(label_weight: float, class_weights: tuple[float, ...] | None) -> torch.Tensor:
        trainer = build(student_of(teacher, 2), teacher, tmp_path, label_weight=label_weight, criteria=("logits",))
        trainer.tasks["mood"].class_weights = class_weights
        trainer.create_optimizer_and_scheduler(10)
        rows = trainer.train_groups[0].dataset
        (found,) = gradients(trainer, [[trainer.data_collator([rows[index] for index in range(6)])]])
        return found

    weights = (3.0, 1.0, 0.25)
    torch.testing.assert_close(gradient(0.0, weights), gradient(0.0, None), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(gradient(1.0, weights), gradient(1.0, None), rtol=1e-2)


def test_the_teacher_is_never_trained_or_saved(tmp_path: Path) -> None:
    teacher = teacher_model()
    before = copy.deepcopy(teacher.state_dict())
    trainer = build(student_of(teacher, 1), teacher, tmp_path)
    trainer.train()
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained.isdisjoint(id(parameter) for parameter in teacher.parameters())
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = MultiTaskModel.from_pretrained(tmp_path / "saved")
    assert reloaded.state_dict().keys() == trainer.model.state_dict().keys()


def test_a_narrower_student_learns_through_projections_that_are_not_saved(tmp_path: Path) -> None:
    teacher = teacher_model()
    student = teacher_model(hidden_size=16, num_hidden_layers=2, intermediate_size=32)
    keys = student.state_dict().keys()
    trainer = build(student, teacher, tmp_path)
    trainer.train()
    assert student.state_dict().keys() == keys


def test_student_layers_are_the_teachers(tmp_path: Path) -> None:
    """Off by one, the student keeps the wrong depths and only quality tells."""
    teacher = teacher_model(num_hidden_layers=6)
    student = student_of(teacher, 3)
    assert student.encoder.config.num_hidden_layers == 3
    own, theirs = student.encoder.state_dict(), teacher.encoder.state_dict()
    for mine, origin in zip(range(3), (1, 3, 5), strict=True):
        for key, value in own.items():
            if f"layer.{mine}." in key:
                assert torch.equal(value, theirs[key.replace(f"layer.{mine}.", f"layer.{origin}.")])


def test_more_layers_than_the_teacher_has_are_refused() -> None:
    with pytest.raises(UnsupportedEncoderError, match="expected layers of a teacher that has 3"):
        student_of(teacher_model(), 4)


def test_a_teacher_without_the_task_is_refused(tmp_path: Path) -> None:
    teacher = teacher_model()
    student = copy.deepcopy(teacher)
    del teacher.tasks["tags"]
    with pytest.raises(TaskError, match="expected a teacher with the task 'tags'"):
        build(student, teacher, tmp_path)


def test_a_stock_student_takes_one_task_of_a_multi_task_teacher(tmp_path: Path) -> None:
    """It has no name for its task, so that none of the teacher's can be the same."""
    teacher = teacher_model()
    stock = teacher.to_stock("mood")
    rows = Dataset.from_list([{"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1], "labels": 1}] * 4)
    with pytest.raises(TaskError, match=r"found one with the tasks \['mood', .*teacher=model.to_stock\('mood'\)"):
        build(stock, teacher, tmp_path, train_dataset=rows)


def test_other_label_names_are_refused(tmp_path: Path) -> None:
    teacher = teacher_model()
    student = copy.deepcopy(teacher)
    teacher.tasks["mood"].labels = ("bad", "plain", "great")
    with pytest.raises(TaskError, match=r"only the student has \['good'\], only the teacher has \['great'\]"):
        build(student, teacher, tmp_path)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    teacher = teacher_model(vocab_size=500)
    with pytest.raises(TaskError, match="expected teacher and student with one tokenizer"):
        build(teacher_model(), teacher, tmp_path)


def test_every_task_is_answered_on_every_text(tmp_path: Path) -> None:
    """Tags of sentences that nobody tagged, moods that nobody rated: a copy of the teacher still agrees."""
    teacher = teacher_model()
    trainer = build(copy.deepcopy(teacher), teacher, tmp_path, label_weight=0.0, every_task=True)
    assert [set(group.tasks) for group in trainer.train_groups] == [{"mood", "strength", "tags"}] * 2
    (batch, *_) = trainer.get_train_dataloader()
    assert {"labels_mood", "labels_strength", "labels_tags"} <= set(batch)
    assert max(losses(trainer).values()) < 1e-6


@pytest.mark.parametrize("batches", ["one_source", "mixed"])
def test_rows_of_others_teach_and_carry_no_label(batches: str, tmp_path: Path) -> None:
    """With labels alone, rows without one change nothing; with the teacher alone, each text counts for every task."""
    teacher = teacher_model()
    student = student_of(teacher, 2)

    def found(label_weight: float, every_task: bool) -> torch.Tensor:
        trainer = build(
            copy.deepcopy(student),
            teacher,
            tmp_path,
            label_weight=label_weight,
            every_task=every_task,
            criteria=["logits"],
            batches=batches,
        )
        trainer.create_optimizer_and_scheduler(10)
        collate = trainer.data_collator
        texts, tokens = (group.dataset for group in trainer.train_groups)
        rows = [*(texts[index] for index in range(4)), *(tokens[index] for index in range(3))]
        window = [collate(rows)] if batches == "mixed" else [collate(rows[:4]), collate(rows[4:])]
        return gradients(trainer, [window])[0]

    torch.testing.assert_close(found(1.0, True), found(1.0, False), rtol=1e-4, atol=1e-6)
    assert (found(0.0, True) - found(0.0, False)).abs().max() > 1e-3


def test_answers_to_every_task_are_the_same_from_a_cache(tmp_path: Path) -> None:
    teacher = teacher_model()
    student = student_of(teacher, 2)

    def found(**settings: Any) -> torch.Tensor:
        trainer = build(
            copy.deepcopy(student), teacher, tmp_path, every_task=True, cache_precision="float32", **settings
        )
        trainer.create_optimizer_and_scheduler(10)
        return gradients(trainer, [list(trainer.get_train_dataloader())])[0]

    torch.testing.assert_close(found(teacher_cache=tmp_path / "cache"), found(), rtol=1e-5, atol=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_rows_are_drawn_by_the_tasks_they_were_made_for(tmp_path: Path) -> None:
    """Guests on all rows would make every source weigh the same."""
    teacher = teacher_model()
    settings: dict[str, Any] = {"mixing": "weights", "mixing_weights": {"mood": 8.0, "strength": 0.0, "tags": 1.0}}
    trainer = build(student_of(teacher, 2), teacher, tmp_path, every_task=True, **settings)
    assert [group.name for group in trainer.train_groups] == ["mood+strength", "tags"]
    trainer.get_train_dataloader()
    assert list(trainer.mixing_sampler.shares) == [3, 1]  # batches; equal weights would give 2 and 2


def test_a_guests_open_labels_say_nothing_of_its_loss(tmp_path: Path) -> None:
    """The loss of an uninformed guess is the variance of the labels, which a guest's rows have not."""
    teacher = teacher_model()
    trainer = build(student_of(teacher, 2), teacher, tmp_path, every_task=True, normalize_losses="none")
    assert trainer.train_groups[-1].guests == ("mood", "strength")
    variance = torch.tensor(tiny_text_rows(8)["intensity"]).var(correction=0)
    assert trainer.chance_losses["strength"] == pytest.approx(float(variance))


def test_pairs_teach_tasks_about_pairs_only(tmp_path: Path) -> None:
    """A task about two texts has nothing to say of one."""
    tasks = {
        "mood": SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label"),
        "same": SequenceClassification("same", labels=["no", "yes"], text="text", text_pair="text", label="same"),
        "near": SequenceClassification("near", problem_type="regression", text="other", text_pair="text", label="near"),
        "many": SequenceClassification(
            "many", labels=["a", "b"], problem_type="multi_label_classification", text="text", label="many"
        ),
    }
    rows = Dataset.from_dict({"input_ids": [[2, 7, 3], [2, 8, 9, 3]], "labels_mood": [0, 1]})
    pairs = Dataset.from_dict({"input_ids": [[2, 7, 3, 8, 3]], "labels_same": [1]})
    found = for_every_task([EncodedGroup(("mood",), rows), EncodedGroup(("same",), pairs)], tasks)
    assert [group.tasks for group in found] == [("mood", "many"), ("same", "near")]
    assert found[0].dataset["labels_many"] == [[-100.0, -100.0]] * 2
    assert found[1].dataset["labels_same"] == [1]
    assert torch.tensor(found[1].dataset["labels_near"]).isnan().all()


def test_tasks_of_all_branches_read_every_row() -> None:
    """Whose row it is, and which of its tasks comes first, must not matter."""
    tasks = {
        name: SequenceClassification(name, labels=FEELING_LABELS, text="text", label=name, encoder=place)
        for name, place in (("strength", "main"), ("mood", "side"), ("tone", "side"), ("source", "main"))
    }
    shared = Dataset.from_dict({"input_ids": [[2, 7, 3]], "labels_strength": [0], "labels_mood": [1]})
    alone = Dataset.from_dict({"input_ids": [[2, 8, 3]], "labels_tone": [1]})
    found = for_every_task([EncodedGroup(("strength", "mood"), shared), EncodedGroup(("tone",), alone)], tasks)
    assert [set(group.tasks) for group in found] == [set(tasks)] * 2
    assert [group.guests for group in found] == [("tone", "source"), ("strength", "mood", "source")]


def test_every_task_needs_answers_and_texts(tmp_path: Path) -> None:
    teacher = teacher_model()
    with pytest.raises(TaskError, match=r"every_task: expected .* found criteria \['hidden'\]"):
        build(student_of(teacher, 2), teacher, tmp_path, every_task=True, criteria=["hidden"])
    images = Dataset.from_dict({"pixel_values": [[0.0]], "labels_mood": [0]})
    with pytest.raises(DataError, match="every_task: expected texts, found images for mood"):
        for_every_task([EncodedGroup(("mood",), images)], {"mood": teacher.tasks["mood"]})


def test_interference_is_measured_on_labelled_rows(tmp_path: Path) -> None:
    """A gradient of zero from rows without labels would look like a task that agrees with nobody."""
    teacher = teacher_model()
    trainer = build(student_of(teacher, 2), teacher, tmp_path, every_task=True, measure_interference=1)
    trainer.train()
    report = trainer.interference()
    assert report is not None
    assert list(report["norms"]) == ["mood", "strength", "tags"]
    assert min(report["norms"].values()) > 1e-3
    assert min(report["losses"].values()) > 0.5
