"""Penalties on weights, in exact numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_mtcompress.errors import TrainingError
from hf_mtcompress.model.matrices import encoder_matrices
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import SequenceClassification
from hf_mtcompress.trainers.arguments import MultiTaskTrainingArguments
from hf_mtcompress.trainers.multitask import MultiTaskTrainer
from tests.tiny import FEELING_LABELS, randomize, tiny_config, tiny_encoder, tiny_text_rows, tiny_tokenizer

RATE = 0.5


def multi_task() -> MultiTaskModel:
    torch.manual_seed(0)
    tasks = [
        SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label"),
        SequenceClassification("strength", problem_type="regression", text="text", label="intensity"),
    ]
    return MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks, max_length=32)


def stock() -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=3))
    assert isinstance(model, PreTrainedModel)
    return randomize(model)


def trained(model: PreTrainedModel, folder: Path, **settings: Any) -> MultiTaskTrainer:
    """One step of plain SGD on eight rows, in four batches."""
    rows: Any = tiny_text_rows(8)
    if not isinstance(model, MultiTaskModel):
        encoded = tiny_tokenizer()(list(rows["text"]), padding="max_length", max_length=16)
        labels = [FEELING_LABELS.index(label) for label in rows["label"]]
        rows = Dataset.from_dict({**encoded, "labels": labels})
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 1,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    trainer = MultiTaskTrainer(
        model=model,
        args=MultiTaskTrainingArguments(str(folder), **{**arguments, **settings}),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in encoder_matrices(model).items()}


@pytest.mark.parametrize("build", [multi_task, stock])
def test_one_step(build: Any, tmp_path: Path) -> None:
    """Both count once in a window of four batches; L1 brings weights to 0 and no further.

    Added to every batch, L2 would count four times. A subgradient would jump over 0, and no weight would ever be 0.
    """
    before = weights(build())
    plain, pulled = build(), build()
    trained(plain, tmp_path)
    trainer = trained(pulled, tmp_path, l1_penalty=0.2, l2_penalty=0.1)
    zeros, total, size = 0, 0, 0.0
    for name, weight in weights(plain).items():
        moved = weight - RATE * 0.1 * before[name]
        expected = moved.sign() * (moved.abs() - RATE * 0.2).clamp(min=0.0)
        found = weights(pulled)[name]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        zeros, total = zeros + int((found == 0).sum()), total + weight.numel()
        size += float(found.abs().sum())
    assert 0.2 < zeros / total < 0.9
    row = next(row for row in trainer.state.log_history if "penalty_l1" in row)
    assert row["penalty_l1"] == pytest.approx(0.2 * size)
    assert row["zero_weights"] == pytest.approx(zeros / total)
    others = dict(pulled.named_parameters())
    for name, parameter in plain.named_parameters():
        if name not in before:
            torch.testing.assert_close(others[name], parameter, rtol=0, atol=1e-6)


def test_both_with_adam_and_autocast(tmp_path: Path) -> None:
    """L2 goes through Adam, L1 past it; bfloat16 of the forward pass touches neither."""
    plain, pulled = stock(), stock()
    settings: dict[str, Any] = {"optim": "adamw_torch", "bf16": True, "learning_rate": 0.01, "weight_decay": 0.0}
    trained(plain, tmp_path, **settings)
    trained(pulled, tmp_path, **settings, l1_penalty=1.0)
    for name, weight in weights(plain).items():
        torch.testing.assert_close(
            weights(pulled)[name], torch.nn.functional.softshrink(weight, 0.01), rtol=0, atol=1e-6
        )
    decayed = stock()
    trainer = trained(decayed, tmp_path, **settings, l2_penalty=1e6)
    # So strong that it is all of the gradient: Adam then moves every weight by the learning rate.
    for name, weight in weights(stock()).items():
        moved = weights(decayed)[name] - weight
        torch.testing.assert_close(moved, -0.01 * weight.sign(), rtol=0.01, atol=1e-5)
    squares = sum(float(weight.square().sum()) for weight in weights(decayed).values())
    row = next(row for row in trainer.state.log_history if "penalty_l2" in row)
    assert row["penalty_l2"] == pytest.approx(0.5e6 * squares)
    assert "penalty_l1" not in row


def test_l2_is_clipped_with_the_gradients(tmp_path: Path) -> None:
    """As a part of the loss it counts in the length that gradients are clipped to."""
    pulled = stock()
    before = {name: value.detach().clone() for name, value in pulled.named_parameters()}
    trained(pulled, tmp_path, l2_penalty=1e4, max_grad_norm=1.0)
    moved = torch.cat([(value.detach() - before[name]).flatten() for name, value in pulled.named_parameters()])
    assert float(moved.norm()) == pytest.approx(RATE, rel=1e-3)


def test_what_cannot_be_pulled(tmp_path: Path) -> None:
    frozen = multi_task()
    frozen.freeze_encoder()
    with pytest.raises(TrainingError, match="expected an encoder whose linear layers are trained"):
        trained(frozen, tmp_path, l1_penalty=0.1)
    with pytest.raises(TrainingError, match="l2_penalty: expected a finite number of at least 0, found -1"):
        trained(multi_task(), tmp_path, l2_penalty=-1.0)
