"""Teachers of every kind: cached, several, with a tokenizer of their own, stock and ONNX; on tiny real models."""

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_mtcompress import (
    DistillationMixin,
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageClassification,
    MultiTaskModel,
    SequenceClassification,
    TokenClassification,
    student_of,
)
from hf_mtcompress.data import teacher_cache
from hf_mtcompress.data.mixing import MixedDataset
from hf_mtcompress.errors import DataError, TaskError, TrainingError
from hf_mtcompress.formats.onnx.export import export_onnx
from hf_mtcompress.formats.runtimes import open_runtime
from hf_mtcompress.losses.criteria import (
    EmbeddingCriterion,
    FeatureMapCriterion,
    HiddenCriterion,
    LogitsCriterion,
    RelationsCriterion,
)
from hf_mtcompress.trainers.probing import agreement
from tests.tiny import (
    COLOUR_LABELS,
    FEELING_LABELS,
    IMAGE_SIZE,
    TAG_LABELS,
    tiny_encoder,
    tiny_image_processor,
    tiny_image_rows,
    tiny_text_rows,
    tiny_token_rows,
    tiny_tokenizer,
)
from tests.unit.trainers.test_distillation import build, losses, teacher_model
from tests.unit.trainers.test_multitask import gradients

EVERY = [
    LogitsCriterion(),
    HiddenCriterion(),
    RelationsCriterion(relation_heads=4),
    EmbeddingCriterion(),
]


def windows(trainer: DistillationTrainer) -> list[list[dict[str, Any]]]:
    """One window for each source of rows, with the rows of the trainer's own data set."""
    dataset = trainer.train_dataset
    assert isinstance(dataset, MixedDataset)
    return [
        [trainer.data_collator(dataset.__getitems__([(source, row) for row in range(5)]))]
        for source in range(len(dataset.sources))
    ]


def first_gradients(trainer: DistillationTrainer) -> list[torch.Tensor]:
    trainer.create_optimizer_and_scheduler(10)
    return list(gradients(trainer, windows(trainer)))


@pytest.mark.parametrize(
    "criterion",
    [
        LogitsCriterion("standardized"),
        LogitsCriterion("decoupled"),
        LogitsCriterion("correlation"),
        HiddenCriterion("cosine"),
        RelationsCriterion(relation_heads=4),
        EmbeddingCriterion(),
        EmbeddingCriterion("relational"),
    ],
    ids=lambda item: "-".join(str(value) for value in (item.kind, *vars(item).values()) if isinstance(value, str)),
)
def test_a_copy_of_the_teacher_is_at_zero_and_another_is_not(criterion: Any, tmp_path: Path) -> None:
    teacher = teacher_model()
    settings = {"label_weight": 0.0, "criteria": [criterion]}
    assert max(losses(build(copy.deepcopy(teacher), teacher, tmp_path, **settings)).values()) < 1e-6
    assert max(losses(build(student_of(teacher, 1), teacher, tmp_path, **settings)).values()) > 1e-4


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
def test_cached_answers_train_as_live_ones_do(precision: str, tolerance: float, tmp_path: Path) -> None:
    """A row whose answers are another row's would train, and badly."""
    teacher = teacher_model()
    student = student_of(teacher, 2)
    live = first_gradients(build(copy.deepcopy(student), teacher, tmp_path, criteria=EVERY))
    trainer = build(
        copy.deepcopy(student),
        teacher,
        tmp_path,
        criteria=EVERY,
        teacher_cache=tmp_path / "cache",
        cache_precision=precision,
    )
    cached = first_gradients(trainer)
    assert {summary.precision for summary in trainer.caches} == {precision}
    for one, other in zip(live, cached, strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=tolerance)


def test_a_cache_is_filled_once_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "SHARD_ROWS", 3)
    teacher = teacher_model()
    cache = tmp_path / "cache"
    build(student_of(teacher, 2), teacher, tmp_path, teacher_cache=cache)
    shards = sorted(cache.glob("*/shard-*.arrow"))
    assert len(shards) == 3 + 2  # 8 texts, 6 lists of words
    stamps = {file: file.stat().st_mtime_ns for file in shards}
    again = build(student_of(teacher, 2), teacher, tmp_path, teacher_cache=cache)
    again.train()
    assert {file: file.stat().st_mtime_ns for file in cache.glob("*/shard-*.arrow")} == stamps
    # One file is lost, and the summary that speaks of it: only that part is asked again.
    for summary in cache.glob("*/cache.json"):
        summary.unlink()
    shards[1].unlink()
    build(student_of(teacher, 2), teacher, tmp_path, teacher_cache=cache)
    changed = {file for file in cache.glob("*/shard-*.arrow") if file.stat().st_mtime_ns != stamps[file]}
    assert changed == {shards[1]}


@pytest.mark.parametrize("damaged", ["values", "end", "facts", "no facts"])
def test_a_damaged_file_of_a_cache_is_asked_again(
    damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Numbers are any bytes: without a digest a student is trained on what the teacher never said."""
    monkeypatch.setattr(teacher_cache, "SHARD_ROWS", 3)
    teacher = teacher_model()
    student = student_of(teacher, 2)
    cache = tmp_path / "cache"
    wanted = first_gradients(build(copy.deepcopy(student), teacher, tmp_path, teacher_cache=cache))
    shards = sorted(cache.glob("*/shard-*.arrow"))
    stamps = {file: file.stat().st_mtime_ns for file in shards}
    content, facts = shards[1].read_bytes(), shards[1].with_suffix(".json")
    match damaged:
        case "values":
            middle = 3 * len(content) // 4
            shards[1].write_bytes(content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :])
        case "end":
            shards[1].write_bytes(content[:-40])
        case "facts":
            facts.write_text(facts.read_text().replace('"width": 3', '"width": 1'))
        case "no facts":
            facts.unlink()
    os.utime(shards[1], ns=(stamps[shards[1]], stamps[shards[1]]))
    caplog.clear()
    found = first_gradients(build(copy.deepcopy(student), teacher, tmp_path, teacher_cache=cache))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert f"{shards[1].name} in {shards[1].parent}: not what the teacher said, asked again" in caplog.messages
    assert {file for file in shards if file.stat().st_mtime_ns != stamps[file]} == {shards[1]}
    assert shards[1].read_bytes() == content


@pytest.mark.parametrize("change", ["teacher", "rows", "criteria", "labels"])
def test_another_teacher_or_other_rows_get_another_cache(change: str, tmp_path: Path) -> None:
    teacher = teacher_model()
    cache = tmp_path / "cache"
    build(student_of(teacher, 2), teacher, tmp_path, teacher_cache=cache)
    before = {path.name for path in cache.iterdir()}
    settings: dict[str, Any] = {}
    match change:
        case "teacher":
            with torch.no_grad():
                teacher.heads["task_mood"].classifier.bias.add_(1)
        case "rows":
            settings["train_dataset"] = {"mood": tiny_text_rows(8, seed=3)}
        case "criteria":
            settings["criteria"] = ["logits"]
        case "labels":
            teacher.tasks["mood"].labels = ("good", "bad", "plain")
    student = teacher_model(num_hidden_layers=2)
    build(student, teacher, tmp_path, teacher_cache=cache, **settings)
    assert {path.name for path in cache.iterdir()} > before


def test_rows_that_change_when_they_are_read_cannot_be_cached(tmp_path: Path) -> None:
    rows = tiny_text_rows(8)
    encoded = rows.map(lambda row: dict(tiny_tokenizer()(row["text"])), remove_columns=["text", "pair", "topics"])
    generator = np.random.default_rng(0)

    def drop_a_token(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = [[int(token) for token in row] for row in batch["input_ids"]]
        for row in ids:
            row[1] = int(generator.integers(5, 100))
        return {**batch, "input_ids": ids}

    teacher = teacher_model()
    data = encoded.rename_column("label", "labels_mood").with_transform(drop_a_token)
    with pytest.raises(DataError, match="random augmentation"):
        build(student_of(teacher, 2), teacher, tmp_path, train_dataset={"mood": data}, teacher_cache=tmp_path / "c")


def test_several_teachers_are_averaged(tmp_path: Path) -> None:
    """One teacher twice is that teacher; the mean of two is between them."""
    one = teacher_model()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.heads["task_strength"].classifier.bias.add_(2.0)
    student = student_of(one, 2)
    settings = {"label_weight": 0.0, "criteria": ["logits"]}
    alone = losses(build(copy.deepcopy(student), one, tmp_path, **settings))
    twice = losses(build(copy.deepcopy(student), [one, copy.deepcopy(one)], tmp_path, **settings))
    assert twice == pytest.approx(alone, rel=1e-4, abs=1e-6)
    trainer = build(copy.deepcopy(student), [(one, 3.0), (other, 1.0)], tmp_path, **settings)
    features = {key: value for key, value in windows(trainer)[0][0].items() if key in ("input_ids", "attention_mask")}
    tasks = {"strength": student.tasks["strength"]}
    found = trainer.panel.signals(features, tasks, ())["logits_strength"]
    torch.testing.assert_close(found, one(**features).logits_strength + 0.5)


def test_one_teacher_for_each_task(tmp_path: Path) -> None:
    rest = teacher_model()
    mood = copy.deepcopy(rest)
    with torch.no_grad():
        mood.heads["task_mood"].classifier.bias[0] += 3.0
    student = student_of(rest, 2)
    settings = {"label_weight": 0.0, "criteria": ["logits"]}
    single = losses(build(copy.deepcopy(student), rest, tmp_path, **settings))
    found = losses(build(copy.deepcopy(student), {"mood": mood, "strength": rest, "tags": rest}, tmp_path, **settings))
    assert found["mood"] > single["mood"] + 0.01
    assert {name: found[name] for name in ("strength", "tags")} == {name: single[name] for name in ("strength", "tags")}
    with pytest.raises(TaskError, match=r"found none for \['strength', 'tags'\]"):
        build(copy.deepcopy(student), {"mood": mood}, tmp_path)


def stock_teacher(family: str = "bert", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(seed)  # of the head
    model = MultiTaskModel.from_encoder(
        tiny_encoder(family, seed=seed, **overrides), [SequenceClassification("mood", labels=FEELING_LABELS)]
    )
    return model.to_stock("mood")


def stock_rows(n: int = 12, seed: int = 0) -> Dataset:
    rows = tiny_text_rows(n, seed=seed)
    encoded = rows.map(lambda row: dict(tiny_tokenizer()(row["text"])), remove_columns=["text", "pair", "topics"])
    return encoded.map(lambda row: {"label": FEELING_LABELS.index(row["label"])}).remove_columns(["intensity", "same"])


def stock_arguments(folder: Path, **settings: Any) -> TrainingArguments:
    plain = {"report_to": "none", "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True}
    return TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, save_strategy="no", **{**plain, **settings}
    )


def stock_trainer(student: PreTrainedModel, teacher: Any, folder: Path, **settings: Any) -> DistillationTrainer:
    arguments = settings.pop("args", None) or stock_arguments(folder)
    return DistillationTrainer(
        model=student,
        args=arguments,
        teacher=teacher,
        train_dataset=stock_rows(),
        eval_dataset=stock_rows(8, seed=1),
        processing_class=tiny_tokenizer(),
        **{"probe_rows": 0, **settings},
    )


def weights_after(trainer: Trainer) -> torch.Tensor:
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_a_stock_student_drops_in(tmp_path: Path) -> None:
    """A script with `Trainer`, a stock model and plain `TrainingArguments` gets a teacher by two words."""
    teacher = stock_teacher(seed=1)
    before = copy.deepcopy(teacher.state_dict())
    trainer = stock_trainer(stock_teacher(), teacher, tmp_path / "out", criteria=EVERY)
    keys = set(trainer.model.state_dict())
    trainer.train()
    assert set(trainer.model.state_dict()) == keys
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert {"eval_loss", "eval_runtime"} <= trainer.evaluate().keys()
    trainer.save_model()
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_labels_alone_train_a_stock_student_as_trainer_does(tmp_path: Path) -> None:
    teacher = stock_teacher(seed=1)
    plain = Trainer(
        model=stock_teacher(),
        args=stock_arguments(tmp_path),
        train_dataset=stock_rows(),
        processing_class=tiny_tokenizer(),
    )
    ours = stock_trainer(stock_teacher(), teacher, tmp_path, label_weight=1.0, criteria=["logits"])
    torch.testing.assert_close(weights_after(ours), weights_after(plain), rtol=0, atol=2e-7)


@pytest.mark.parametrize("cached", [False, True])
def test_accumulation_changes_nothing_for_a_stock_student(cached: bool, tmp_path: Path) -> None:
    """transformers counts labels only, so criteria would be scaled by the number of pieces."""
    teacher = stock_teacher(seed=1)

    def trained(rows: int, pieces: int) -> torch.Tensor:
        args = DistillationTrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=pieces,
            teacher_cache=str(tmp_path / "cache") if cached else None,
            cache_precision="float32",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        return weights_after(
            stock_trainer(stock_teacher(), teacher, tmp_path, args=args, criteria=["logits", "hidden"])
        )

    torch.testing.assert_close(trained(6, 1), trained(2, 3), rtol=0, atol=3e-5)


def test_a_subclass_of_trainer_gets_teachers_by_the_mixin(tmp_path: Path) -> None:
    class MyTrainer(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.own_optimizer = True
            return super().create_optimizer(model) if model is not None else super().create_optimizer()

    class Mine(DistillationMixin, MyTrainer):
        pass

    trainer = Mine(
        model=stock_teacher(),
        args=stock_arguments(tmp_path),
        teacher=stock_teacher(seed=1),
        criteria=["logits"],
        probe_rows=0,
        train_dataset=stock_rows(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.own_optimizer
    assert not isinstance(trainer, DistillationTrainer)


def one_gradient(trainer: DistillationTrainer, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Gradient of a stock student's embeddings on one window of one batch."""
    trainer.create_optimizer_and_scheduler(10)
    batch = trainer.data_collator(rows)
    batches, counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, dict(batches[0]), num_items_in_batch=counts).backward()
    return trainer.model.get_input_embeddings().weight.grad.clone()


@pytest.mark.parametrize("kind", ["one label", "number", "words"])
def test_a_stock_student_learns_from_rows_without_labels(kind: str, tmp_path: Path) -> None:
    """Beside the teacher alone, labels that are not there change nothing; a missing count would scale the gradient."""
    task: Any = {
        "one label": SequenceClassification("mood", labels=FEELING_LABELS),
        "number": SequenceClassification("mood", problem_type="regression"),
        "words": TokenClassification("mood", labels=TAG_LABELS),
    }[kind]

    def stock(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        return MultiTaskModel.from_encoder(tiny_encoder("bert", seed=seed), [task]).to_stock("mood")

    student = stock(0)
    trainer = stock_trainer(student, stock(1), tmp_path, label_weight=0.0, criteria=["logits"])
    plain = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in stock_rows(8)]
    if kind == "words":
        trainer.data_collator = DataCollatorForTokenClassification(tiny_tokenizer())
        labelled = [{**row, "labels": [0] * len(row["input_ids"])} for row in plain]
    else:
        labelled = [{**row, "label": 1 if kind == "one label" else 0.5} for row in plain]
    found = one_gradient(trainer, plain)
    assert found.abs().max() > 1e-5
    torch.testing.assert_close(found, one_gradient(trainer, labelled), rtol=1e-5, atol=1e-8)


def test_a_script_without_processing_class_is_asked_and_cached(tmp_path: Path) -> None:
    teacher = stock_teacher(seed=1)
    trainer = DistillationTrainer(
        model=stock_teacher(),
        args=stock_arguments(tmp_path),
        teacher=teacher,
        criteria=["logits"],
        teacher_cache=tmp_path / "cache",
        probe_rows=8,
        train_dataset=stock_rows(),
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
    )
    trainer.train()
    assert trainer.caches[0].rows == 12


def test_label_smoothing_is_kept_and_a_loss_of_ones_own_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"label_weight": 1.0, "criteria": ["logits"]}
    smooth = stock_arguments(tmp_path, label_smoothing_factor=0.3)
    plain = Trainer(model=stock_teacher(), args=smooth, train_dataset=stock_rows(), processing_class=tiny_tokenizer())
    ours = stock_trainer(stock_teacher(), stock_teacher(seed=1), tmp_path, args=smooth, **settings)
    torch.testing.assert_close(weights_after(ours), weights_after(plain), rtol=0, atol=2e-6)
    with pytest.raises(TaskError, match="found compute_loss_func"):
        stock_trainer(stock_teacher(), stock_teacher(seed=1), tmp_path, compute_loss_func=lambda *args, **kwargs: 0)

    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    class Mine(DistillationMixin, Own):
        pass

    with pytest.raises(TaskError, match="found compute_loss of Own"):
        Mine(model=stock_teacher(), args=stock_arguments(tmp_path), teacher=stock_teacher(seed=1), probe_rows=0)


def test_the_student_is_no_teacher_and_model_init_no_student(tmp_path: Path) -> None:
    student = stock_teacher()
    with pytest.raises(TaskError, match="found the student; give copy"):
        stock_trainer(student, student, tmp_path)
    trainer = stock_trainer(stock_teacher(), stock_teacher(seed=1), tmp_path, criteria=["logits"])
    trainer.model_init = stock_teacher
    with pytest.raises(TrainingError, match="found model_init"):
        trainer.train()


def test_projections_stay_the_same_from_one_training_to_the_next(tmp_path: Path) -> None:
    """New ones would not be in the optimizer, and never move."""
    teacher = teacher_model()
    trainer = build(teacher_model(hidden_size=16, num_hidden_layers=2), teacher, tmp_path)
    trainer.train()
    before = {name: value.clone() for name, value in trainer._make_projections().state_dict().items()}
    trainer.train()
    after = trainer._make_projections().state_dict()
    assert all((after[name] - before[name]).abs().max() > 0 for name in before if name.endswith("weight"))


def test_a_student_in_bfloat16_learns_through_projections(tmp_path: Path) -> None:
    student = torch.nn.Module.to(teacher_model(hidden_size=16, num_hidden_layers=2), torch.bfloat16)
    build(student, teacher_model(), tmp_path).train()


def test_cached_states_stand_where_they_belong(tmp_path: Path) -> None:
    """Rows are asked in other company, and so with other padding, than they are trained in."""
    rows = {"mood": tiny_text_rows(12)}
    teacher = teacher_model()
    trainer = build(
        copy.deepcopy(teacher),
        teacher,
        tmp_path,
        train_dataset=rows,
        criteria=["hidden", RelationsCriterion(relation_heads=4)],
        label_weight=0.0,
        teacher_cache=tmp_path / "cache",
        cache_precision="float32",
    )
    trainer.model.eval()
    dataset, collate = trainer.train_dataset, trainer.data_collator
    for places in ([0, 5, 7], [3], [1, 2, 11, 10]):
        batch = collate(dataset.__getitems__([(0, place) for place in places]))
        counts = trainer.extra_counts([batch])
        assert float(counts["hidden"]) == float(batch["attention_mask"].sum())
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch={"mood": torch.tensor(1.0), **counts})
        assert float(loss.detach()) < 1e-6


def test_padding_on_the_left_has_no_cache(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.padding_side = "left"
    teacher = teacher_model()
    with pytest.raises(DataError, match="found padding_side='left'"):
        build(
            student_of(teacher, 2),
            teacher,
            tmp_path,
            train_dataset={"mood": tiny_text_rows(8)},
            processing_class=tokenizer,
            teacher_cache=tmp_path / "cache",
        )


def test_values_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    """They would become infinite, and count nowhere in silence."""
    teacher = teacher_model()
    with torch.no_grad():
        teacher.encoder.encoder.layer[2].output.LayerNorm.weight.mul_(1e6)
    student = student_of(teacher, 2)
    with pytest.raises(DataError, match=r"fit float16.*say cache_precision: float32"):
        build(student, teacher, tmp_path, teacher_cache=tmp_path / "cache")
    build(student, teacher, tmp_path, teacher_cache=tmp_path / "cache", cache_precision="float32")


@pytest.mark.parametrize("settings", [{}, {"gradient_combination": "upgrad"}, {"fusion": "gradient_norm"}])
def test_rows_without_any_label_train_in_mixed_batches(settings: dict[str, Any], tmp_path: Path) -> None:
    """A recipe's mixing and fusion hold for its pretrain step too, where no task has labels."""
    teacher = teacher_model()
    data = {
        name: rows.map(lambda row, column=column: {column: None}, remove_columns=[column])
        for name, rows, column in (("mood", tiny_text_rows(8), "label"), ("tags", tiny_token_rows(6), "tags"))
    }
    for criteria in (["logits"], ["hidden"]):
        student = student_of(teacher, 2)
        build(
            student,
            teacher,
            tmp_path,
            train_dataset=data,
            criteria=criteria,
            label_weight=0.0,
            batches="mixed",
            **settings,
        ).train()


# ---- a tokenizer of its own ----


def other_tokenizer() -> BertTokenizer:
    """The same pieces under other ids."""
    pieces = [piece for piece, _ in sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    return BertTokenizer(
        vocab={piece: index for index, piece in enumerate([*pieces[:5], *reversed(pieces[5:])])}, model_max_length=64
    )


def with_other_ids(teacher: MultiTaskModel) -> MultiTaskModel:
    """The same teacher for those ids."""
    copied = copy.deepcopy(teacher)
    words = copied.encoder.embeddings.word_embeddings.weight
    with torch.no_grad():
        words[5:] = words[5:].flip(0)
    return copied


@pytest.mark.parametrize("criteria", [["logits"], ["logits", "hidden", "relations", "embedding"]])
def test_the_same_teacher_with_other_ids_teaches_the_same(criteria: list[str], tmp_path: Path) -> None:
    """Fed with the student's ids it would answer to other texts, and train."""
    teacher = teacher_model()
    student = student_of(teacher, 2)
    plain = first_gradients(build(copy.deepcopy(student), teacher, tmp_path, criteria=criteria))
    trainer = build(
        copy.deepcopy(student),
        with_other_ids(teacher),
        tmp_path,
        criteria=criteria,
        teacher_processing_class=other_tokenizer(),
        cache_precision="float32",
    )
    assert trainer.caches, "asked once, before training"
    if criteria != ["logits"]:
        # The last special token begins nowhere: its states are not compared.
        assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in first_gradients(trainer))
        return
    for one, other in zip(plain, first_gradients(trainer), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_other_ids_teach_every_task_the_same(tmp_path: Path) -> None:
    """Tasks that answer rows of others have no columns there, and their columns must not be looked for."""
    teacher = teacher_model()
    student = student_of(teacher, 2)
    settings: dict[str, Any] = {"criteria": ["logits"], "every_task": True, "label_weight": 0.0}
    plain = build(copy.deepcopy(student), teacher, tmp_path, **settings)
    other = build(
        copy.deepcopy(student),
        with_other_ids(teacher),
        tmp_path,
        teacher_processing_class=other_tokenizer(),
        cache_precision="float32",
        **settings,
    )
    texts = other.train_dataset.signals[0].rows([0])
    assert {"logits_mood", "logits_strength", "logits_tags"} <= set(texts)
    wanted = losses(plain)
    batch = next(iter(other.get_train_dataloader()))
    assert {f"labels_{name}" for name in wanted} <= set(batch)
    with torch.no_grad():
        answers = teacher(**tiny_tokenizer()(tiny_text_rows(8)[0]["text"], return_tensors="pt"))
    np.testing.assert_allclose(texts["logits_mood"][0], answers.logits_mood[0].numpy(), atol=1e-5)
    tags = texts["logits_tags"][0]
    known = np.isfinite(tags).all(-1)
    assert known.sum() >= len(tags) - 1  # the last special token begins nowhere
    np.testing.assert_allclose(tags[known], answers.logits_tags[0].numpy()[known], atol=1e-5)


def test_words_in_other_pieces_are_matched_by_their_first_character(tmp_path: Path) -> None:
    """A teacher that reads letter by letter answers at the first letter of each word."""
    letters = sorted({letter for piece in tiny_tokenizer().get_vocab() for letter in piece if letter.isalpha()})
    pieces = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    spelling = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=64)
    teacher = teacher_model(vocab_size=len(pieces))
    teacher.config.preprocessing["main"]["max_length"] = 64
    trainer = build(teacher_model(), teacher, tmp_path, criteria=["logits"], teacher_processing_class=spelling)
    rows = tiny_token_rows(6)
    table = trainer.train_dataset.signals[1]
    encoded = trainer.train_groups[1].dataset
    for index in range(6):
        found = table.rows([index])["logits_tags"][0]
        labelled = np.asarray(encoded[index]["labels_tags"]) != -100
        assert np.isfinite(found[labelled]).all()
        ids = spelling(rows[index]["tokens"], is_split_into_words=True, return_tensors="pt")
        words = ids.word_ids()
        places = [words.index(word) for word in range(len(rows[index]["tokens"]))]
        with torch.no_grad():
            expected = teacher(**dict(ids.items()), tasks=["tags"]).logits_tags[0][places]
        np.testing.assert_allclose(found[labelled], expected.numpy(), atol=2e-3)


def test_a_teacher_with_its_own_tokenizer_needs_the_texts(tmp_path: Path) -> None:
    encoded = tiny_text_rows(8).map(lambda row: dict(tiny_tokenizer()(row["text"])))
    data = encoded.rename_column("label", "kept").map(lambda row: {"labels_mood": 0}).remove_columns(["text", "kept"])
    teacher = teacher_model()
    with pytest.raises(DataError, match="expected the texts of the rows"):
        build(
            student_of(teacher, 2),
            with_other_ids(teacher),
            tmp_path,
            train_dataset={"mood": data},
            teacher_processing_class=other_tokenizer(),
        )


def test_an_onnx_graph_teaches_its_answers(tmp_path: Path) -> None:
    teacher = teacher_model()
    export_onnx(teacher, tiny_tokenizer(), tmp_path / "graph")
    graph = open_runtime(tmp_path / "graph", threads=1)
    student = student_of(teacher, 2)
    settings: dict[str, Any] = {"criteria": ["logits"], "label_weight": 0.0}
    plain = losses(build(copy.deepcopy(student), teacher, tmp_path, **settings))
    found = losses(build(copy.deepcopy(student), graph, tmp_path, **settings))
    assert found == pytest.approx(plain, rel=1e-3, abs=1e-6)
    with pytest.raises(TaskError, match="a graph, which shows answers only"):
        build(copy.deepcopy(student), graph, tmp_path, criteria=["logits", "hidden"])


# ---- a look at the teacher before ----


def test_a_teacher_that_knows_nothing_is_refused(tmp_path: Path) -> None:
    rows = {"mood": tiny_text_rows(64)}
    teacher = teacher_model()
    with torch.no_grad():
        teacher.heads["task_mood"].classifier.bias[0] = 100.0
    with pytest.raises(TaskError, match=r"task 'mood': expected a teacher that knows it.*answers 'bad' to everything"):
        build(student_of(teacher, 2), teacher, tmp_path, train_dataset=rows, probe_rows=64)


def test_labels_in_another_order_are_named_as_the_cause() -> None:
    task = SequenceClassification("mood", labels=FEELING_LABELS)
    truth = [index % 3 for index in range(30)]
    right = [np.eye(3)[label] for label in truth]
    assert agreement(task, right, truth).value == pytest.approx(1.0)
    turned = [np.eye(3)[(label + 1) % 3] for label in truth]
    found = agreement(task, turned, truth)
    assert found.near_chance
    assert "another order: it says 'plain' for 'bad', 'good' for 'plain', 'bad' for 'good'" in found.cause
    same = agreement(task, [np.eye(3)[0]] * 30, truth)
    assert same.near_chance
    assert "answers 'bad' to everything" in same.cause


def test_numbers_with_the_opposite_sign_are_named_as_the_cause() -> None:
    task = SequenceClassification("strength", problem_type="regression")
    truth = [float(value) for value in range(20)]
    found = agreement(task, [np.asarray([-value]) for value in truth], [*truth])
    assert (found.near_chance, found.cause) == (True, "its numbers have the opposite sign")
    assert not agreement(task, [np.asarray([value * 2 + 1]) for value in truth], truth).near_chance


def test_few_labels_say_nothing() -> None:
    task = SequenceClassification("mood", labels=FEELING_LABELS)
    assert not agreement(task, [np.eye(3)[0]] * 9, [0, 1, 2] * 3).near_chance


# ---- rows without labels ----


def test_the_teacher_labels_rows_that_have_none(tmp_path: Path) -> None:
    """Half of the rows lose their label: beside the teacher they count as before."""
    rows = tiny_text_rows(8)
    blank = rows.map(lambda row, index: {"label": row["label"] if index % 2 else None}, with_indices=True)
    teacher = teacher_model()
    student = student_of(teacher, 2)
    settings: dict[str, Any] = {"criteria": ["logits"], "label_weight": 0.0}
    whole = first_gradients(build(copy.deepcopy(student), teacher, tmp_path, train_dataset={"mood": rows}, **settings))
    half = first_gradients(build(copy.deepcopy(student), teacher, tmp_path, train_dataset={"mood": blank}, **settings))
    assert whole[0].abs().max() > 1e-4
    torch.testing.assert_close(half[0], whole[0], rtol=1e-5, atol=1e-7)


def test_a_weight_can_go_from_the_teacher_to_the_labels(tmp_path: Path) -> None:
    """Teacher annealing: at the first step the teacher alone, at the last the labels alone."""
    teacher = teacher_model()
    student = student_of(teacher, 2)
    settings: dict[str, Any] = {"criteria": ["logits"], "train_dataset": {"mood": tiny_text_rows(8)}}

    def gradient(weight: Any, step: int) -> torch.Tensor:
        trainer = build(copy.deepcopy(student), teacher, tmp_path, label_weight=weight, **settings)
        trainer.state.max_steps, trainer.state.global_step = 11, step
        return first_gradients(trainer)[0]

    torch.testing.assert_close(gradient((0.0, 1.0), 0), gradient(0.0, 0))
    torch.testing.assert_close(gradient((0.0, 1.0), 10), gradient(1.0, 0))
    torch.testing.assert_close(gradient((0.0, 1.0), 5), gradient(0.5, 0))


def test_filler_rows_of_several_processes_count_nowhere(tmp_path: Path) -> None:
    """A process that is out of rows runs one without labels; the teacher must not label it."""
    teacher = teacher_model()
    trainer = build(student_of(teacher, 2), teacher, tmp_path, criteria=["logits", "hidden"])
    rows = [(0, row) for row in range(4)]
    dataset, collate = trainer.train_dataset, trainer.data_collator
    alone = [collate(dataset.__getitems__(rows))]
    filled = [collate(dataset.__getitems__([*rows, (0, -1 - 5)]))]
    trainer.create_optimizer_and_scheduler(10)
    one, other = gradients(trainer, [alone, filled])
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# ---- images ----


def image_model(**overrides: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    tasks = [
        ImageClassification("colour", labels=COLOUR_LABELS, image="image", label="label"),
        ImageClassification("strength", problem_type="regression", image="image", label="intensity"),
    ]
    encoder = tiny_encoder("vit", **overrides)
    return MultiTaskModel.from_encoder(encoder, tasks, image_size=encoder.config.image_size).eval()


def build_images(student: MultiTaskModel, teacher: Any, folder: Path, **settings: Any) -> DistillationTrainer:
    rows = tiny_image_rows(6)
    return build(
        student,
        teacher,
        folder,
        train_dataset={"colour": rows, "strength": rows},
        processing_class=tiny_image_processor("vit"),
        **settings,
    )


def test_images_are_taught_by_every_criterion_live_and_cached(tmp_path: Path) -> None:
    teacher = image_model()
    every = [*EVERY, FeatureMapCriterion()]
    same = losses(build_images(copy.deepcopy(teacher), teacher, tmp_path, criteria=every, label_weight=0.0))
    assert same.keys() == {"colour", "strength", "hidden", "relations", "embedding", "feature_map"}
    assert max(same.values()) < 1e-6
    student = student_of(teacher, 2)
    live = first_gradients(build_images(copy.deepcopy(student), teacher, tmp_path, criteria=every))
    trainer = build_images(
        copy.deepcopy(student),
        teacher,
        tmp_path,
        criteria=every,
        teacher_cache=tmp_path / "cache",
        cache_precision="float32",
    )
    assert trainer.caches[0].rows == 6
    for one, other in zip(live, first_gradients(trainer), strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_teacher_of_finer_patches_shows_where_it_looks_and_what_it_answers(tmp_path: Path) -> None:
    teacher = image_model(patch_size=4)
    student = image_model(num_hidden_layers=2)
    criteria = ["logits", "embedding", "feature_map"]
    found = losses(build_images(student, teacher, tmp_path, criteria=criteria, label_weight=0.0))
    assert all(np.isfinite(value) for value in found.values())
    with pytest.raises(TaskError, match="expected as many patches in student and teacher, found 17 and 65"):
        losses(build_images(student, teacher, tmp_path, criteria=["hidden"]))
    with pytest.raises(TaskError, match="criterion 'feature_map': expected a vision encoder"):
        build(teacher_model(), teacher_model(), tmp_path, criteria=["feature_map"])


def test_a_teacher_reads_pictures_for_itself(tmp_path: Path) -> None:
    """In another size than its own it would teach what it does not know; in grey it would fail."""
    teacher, own = image_model(image_size=2 * IMAGE_SIZE), tiny_image_processor("vit")
    own.size = {"height": 2 * IMAGE_SIZE, "width": 2 * IMAGE_SIZE}
    rows = tiny_image_rows(5)
    grey = rows.map(lambda row: {"image": row["image"].convert("L")})
    trainer = build(
        image_model(),
        teacher,
        tmp_path,
        criteria=["logits"],
        teacher_processing_class=own,
        train_dataset={"colour": grey, "strength": grey},
        processing_class=tiny_image_processor("vit"),
    )
    (_, signals), *_ = [
        (group, trainer._ask_about(group, raw, range(5), ())) for group, raw in trainer._groups("train")
    ]
    pixels = own([image.convert("RGB") for image in grey["image"]], return_tensors="pt")
    with torch.no_grad():
        wanted = teacher(**pixels)
    np.testing.assert_allclose(np.stack(signals["logits_colour"]), wanted.logits_colour, atol=1e-5)
