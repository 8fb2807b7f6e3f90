"""Adapters in training: what moves, in which batches, and that a resumed run goes on."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, set_seed

from hf_mtcompress import DistillationTrainer, MultiTaskModel, MultiTaskTrainer
from hf_mtcompress.compression.quantization import quantize_bitsandbytes
from hf_mtcompress.errors import TaskError, TrainingError
from tests.tiny import tiny_encoder, tiny_text_rows, tiny_token_rows, tiny_tokenizer
from tests.unit.trainers.test_multitask import arguments, gradients, tag_task, text_tasks


def adapted(seed: int = 0, **settings: Any) -> MultiTaskModel:
    set_seed(seed)
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [*text_tasks(), tag_task()], max_length=32)
    model.add_adapters(**{"targets": "all", **settings})
    return model


def data(rows: int = 12) -> dict[str, Any]:
    texts, tokens = tiny_text_rows(rows), tiny_token_rows(rows // 2)
    return {"mood": texts, "strength": texts, "tags": tokens}


def build(folder: Path, model: MultiTaskModel | None = None, rows: int = 12, **settings: Any) -> MultiTaskTrainer:
    """Three tasks over two sources: two share rows, one has its own."""
    return MultiTaskTrainer(
        model=adapted() if model is None else model,
        args=arguments(folder, **settings),
        train_dataset=data(rows),
        eval_dataset=data(rows),
        processing_class=tiny_tokenizer(),
    )


@pytest.mark.parametrize("batches", ["one_source", "mixed"])
def test_every_task_learns_on_a_frozen_encoder(tmp_path: Path, batches: str) -> None:
    trainer = build(tmp_path, rows=32, num_train_epochs=8, learning_rate=1e-2, batches=batches)
    encoder = {name: value.clone() for name, value in trainer.model.encoder.state_dict().items()}
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for task in trainer.tasks:
        assert after[f"eval_{task}_loss"] < before[f"eval_{task}_loss"], task
    assert all(torch.equal(value, encoder[name]) for name, value in trainer.model.encoder.state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"batches": "mixed"}, {"fusion": "uncertainty"}, {"task_patience": 1}],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 13, "eval_strategy": "epoch", **settings}
    whole = build(tmp_path / "whole", adapted(dropout=0.1), **settings)
    whole.train()
    stopped = build(tmp_path / "stopped", adapted(seed=1, dropout=0.1), **settings)
    stopped.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, stopped.model.state_dict()[name]), name


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_encoder_with_adapters_trains_and_resumes(tmp_path: Path, bits: Any) -> None:
    """Trainer itself takes no quantized model unless it knows of adapters; saving must not know."""

    def quantized(seed: int) -> MultiTaskModel:
        set_seed(0)
        model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [*text_tasks(), tag_task()], max_length=32)
        found = quantize_bitsandbytes(model, bits)
        assert isinstance(found, MultiTaskModel)
        set_seed(seed)
        found.add_adapters()
        return found

    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    whole = build(tmp_path / "whole", quantized(0), **settings)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train()
    after = whole.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("adapters.", "heads.")) for name in moved)
    stopped = build(tmp_path / "stopped", quantized(1), **settings)
    stopped.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(value, after[name]) for name, value in stopped.model.state_dict().items())
    whole.save_model(str(tmp_path / "saved"))
    loaded = MultiTaskModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, after[name]) for name, value in loaded.state_dict().items())


def test_four_bits_come_back_without_a_word_and_other_ones_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Dozens of keys were called unexpected, among which one that matters could not be seen."""

    def quantized(seed: int) -> MultiTaskModel:
        model = MultiTaskModel.from_encoder(tiny_encoder("bert", seed), text_tasks(), max_length=32)
        found = quantize_bitsandbytes(model, 4)
        assert isinstance(found, MultiTaskModel)
        found.add_adapters()
        return found

    def run(folder: str, seed: int, checkpoint: str | None = None) -> None:
        trainer = MultiTaskTrainer(
            model=quantized(seed),
            args=arguments(tmp_path / folder, save_strategy="steps", save_steps=1, max_steps=2),
            train_dataset=tiny_text_rows(12),
            processing_class=tiny_tokenizer(),
        )
        trainer.train(resume_from_checkpoint=checkpoint)

    logger = logging.getLogger("transformers")
    logger.propagate, before = True, logger.propagate
    try:
        run("whole", 0)
        run("again", 0, str(tmp_path / "whole" / "checkpoint-1"))
    finally:
        logger.propagate = before
    assert "unexpected keys" not in caplog.text
    with pytest.raises(TrainingError, match="expected the quantized encoder of checkpoint-1, found one whose"):
        run("other", 1, str(tmp_path / "whole" / "checkpoint-1"))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_best_weights_come_back_into_a_quantized_encoder(tmp_path: Path, bits: Any) -> None:
    """bitsandbytes moves the scales of 8-bit layers when they run, and then takes no checkpoint any more."""
    set_seed(0)
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [*text_tasks(), tag_task()], max_length=32)
    quantized = quantize_bitsandbytes(model, bits)
    assert isinstance(quantized, MultiTaskModel)
    quantized.add_adapters()
    epochs = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 3, "learning_rate": 0.3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    trainer = build(tmp_path, quantized, **epochs, **best)
    trainer.train()
    checkpoint = trainer.state.best_model_checkpoint
    assert checkpoint is not None
    loaded = MultiTaskModel.from_pretrained(checkpoint)
    found = trainer.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in loaded.state_dict().items())
    assert any("SCB" in name for name in found) == (bits == 8)
    row = {"input_ids": torch.tensor([[2, 7, 9, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        one, other = (each.eval()(**row) for each in (trainer.model, loaded))
    assert torch.equal(one.logits_mood, other.logits_mood)


def test_a_quantized_encoder_without_adapters_is_still_refused(tmp_path: Path) -> None:
    set_seed(0)
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), text_tasks(), max_length=32)
    quantized = quantize_bitsandbytes(model, 8)
    with pytest.raises(ValueError, match="purely quantized"):
        MultiTaskTrainer(model=quantized, args=arguments(tmp_path))
    assert issubclass(MultiTaskTrainer, Trainer)


def test_mixed_batches_give_the_gradients_of_separate_ones(tmp_path: Path) -> None:
    """Every adapter learns from the rows of its own task, whatever else is in the batch."""
    trainer = build(tmp_path)
    with torch.no_grad():
        for parameter in trainer.model.adapters.parameters():
            parameter.add_(0.1)
    texts, tags = (group.dataset.with_format(None) for group in trainer.train_groups)
    collate = trainer.data_collator
    apart = [collate([texts[0], texts[1], texts[2]]), collate([tags[0], tags[1]])]
    mixed = [collate([texts[0], tags[0], texts[1]]), collate([tags[1], texts[2]])]
    trainer.create_optimizer_and_scheduler(10)
    one, other = gradients(trainer, [apart, mixed])
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_task_that_stopped_keeps_its_adapter(tmp_path: Path) -> None:
    """Momentum and weight decay would move it without any gradient."""
    trainer = build(tmp_path, weight_decay=0.1)

    class Stop(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer.stopped_tasks = ["mood"]

    trainer.add_callback(Stop())
    kept = {name: value.clone() for name, value in trainer.model.adapters["task_mood"].state_dict().items()}
    other = {name: value.clone() for name, value in trainer.model.adapters["task_tags"].state_dict().items()}
    trainer.train()
    for name, value in trainer.model.adapters["task_mood"].state_dict().items():
        assert torch.equal(value, kept[name])
    assert any(not torch.equal(v, other[n]) for n, v in trainer.model.adapters["task_tags"].state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_combination": "upgrad", "batches": "mixed"},
        {"measure_interference": 2},
        {"fusion": "gradient_norm"},
    ],
    ids=str,
)
def test_what_compares_gradients_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="that compare the tasks' gradients with adapters"):
        build(tmp_path, **settings)


def test_distillation_of_logits_works_and_of_hidden_states_is_refused(tmp_path: Path) -> None:
    set_seed(0)
    teacher = MultiTaskModel.from_encoder(tiny_encoder("bert", seed=1), [*text_tasks(), tag_task()], max_length=32)
    settings: dict[str, Any] = {
        "args": arguments(tmp_path),
        "train_dataset": data(),
        "processing_class": tiny_tokenizer(),
        "probe_rows": 0,  # the teacher is random
    }
    with pytest.raises(TaskError, match="found 'hidden' too"):
        DistillationTrainer(adapted(), teacher=teacher, criteria=("logits", "hidden"), **settings)
    student = MultiTaskModel.from_encoder(tiny_encoder("bert"), [*text_tasks(), tag_task()], max_length=32)
    with pytest.raises(TaskError, match="found 'hidden' too"):
        DistillationTrainer(student, teacher=adapted(), criteria=("hidden",), **settings)
    DistillationTrainer(adapted(), teacher=teacher, criteria=("logits",), **settings).train()
