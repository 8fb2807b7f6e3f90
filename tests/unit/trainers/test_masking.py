"""Trimmed weights stay 0 in training."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_mtcompress.compression.sparsity import trim_weights
from hf_mtcompress.errors import TrainingError
from hf_mtcompress.model.matrices import encoder_matrices
from hf_mtcompress.trainers.masking import KeepTrimmed
from tests.tiny import FEELING_LABELS, randomize, tiny_config, tiny_text_rows, tiny_tokenizer


def trimmed(seed: int = 0, sparsity: float = 0.6) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=3))
    assert isinstance(model, PreTrainedModel)
    trim_weights(randomize(model, seed), sparsity=sparsity)
    return model


def trainer_of(model: PreTrainedModel, folder: Path, callback: KeepTrimmed | None = None, **settings: Any) -> Trainer:
    """A plain `Trainer` with momentum, decay and accumulation, all of which move weights whose gradient is 0."""
    rows = tiny_text_rows(16)
    encoded = tiny_tokenizer()(list(rows["text"]), padding="max_length", max_length=16)
    labels = [FEELING_LABELS.index(label) for label in rows["label"]]
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    set_seed(1)
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **{**arguments, **settings}),
        train_dataset=Dataset.from_dict({**encoded, "labels": labels}),
        callbacks=[callback or KeepTrimmed(model)],
    )


def zeros(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: matrix.detach() == 0 for name, matrix in encoder_matrices(model).items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adamw_torch"},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"},
    ],
)
def test_zeros_stay_where_they_are(settings: dict[str, Any], tmp_path: Path) -> None:
    """The others move, or the mask is too wide."""
    model = trimmed()
    before = {name: matrix.detach().clone() for name, matrix in encoder_matrices(model).items()}
    trainer_of(model, tmp_path, **settings).train()
    for name, matrix in encoder_matrices(model).items():
        assert torch.equal(matrix == 0, before[name] == 0), name
        kept = before[name] != 0
        assert bool((matrix.detach()[kept] != before[name][kept]).all()), name
        assert not matrix._backward_hooks


def test_resume_keeps_the_places_and_the_weights(tmp_path: Path) -> None:
    """A mask made of a checkpoint would grow by every weight that training brought to 0."""
    whole, killed = trimmed(), trimmed()
    trainer_of(whole, tmp_path / "whole", save_strategy="steps", save_steps=2).train()
    trainer_of(killed, tmp_path / "killed", save_strategy="steps", save_steps=2).train()
    shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
    again = trimmed()
    trainer = trainer_of(again, tmp_path / "killed")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    for (name, one), other in zip(encoder_matrices(whole).items(), encoder_matrices(again).values(), strict=True):
        assert torch.equal(one, other), name
    # A model that was trimmed in other places must not go on from there.
    with pytest.raises(TrainingError, match="expected weights of 0 where the model was trimmed"):
        trainer_of(trimmed(seed=1), tmp_path / "killed").train(resume_from_checkpoint=True)


def test_trimmed_weights_do_not_count_in_the_clipping_of_gradients(tmp_path: Path) -> None:
    """With most weights trimmed, their gradients would decide how far the others move."""
    model = trimmed(sparsity=0.9)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    settings = {"optim": "sgd", "max_grad_norm": 0.001, "max_steps": 1, "lr_scheduler_type": "constant"}
    trainer_of(model, tmp_path, **settings, weight_decay=0.0, learning_rate=100.0).train()
    moved = torch.cat([(value.detach() - before[name]).flatten() for name, value in model.named_parameters()])
    assert float(moved.norm()) == pytest.approx(0.1, rel=1e-2)


def test_what_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="expected a model with trimmed weights, found none that are 0"):
        KeepTrimmed(trimmed(sparsity=0.0))
    other = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=3, hidden_size=16))
    assert isinstance(other, PreTrainedModel)
    with pytest.raises(TrainingError, match="expected the model that it was made with"):
        trainer_of(other, tmp_path, KeepTrimmed(trimmed())).train()
