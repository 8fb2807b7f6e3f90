"""Training for few bits: what is computed is what ONNX Runtime will compute, and nothing of it stays in the model."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_mtcompress import MultiTaskModel, MultiTaskTrainer, MultiTaskTrainingArguments, SequenceClassification
from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.formats.onnx.export import export_onnx
from hf_mtcompress.formats.onnx.graphs import run_graph
from hf_mtcompress.formats.onnx.quantize import quantize_onnx
from hf_mtcompress.records.forms import ONNX_MODEL
from hf_mtcompress.trainers.rounding import (
    RoundToBits,
    linear_forward,
    round_block_activations,
    round_blocks,
    round_rows,
    round_tensor,
)
from tests.tiny import (
    FEELING_LABELS,
    HIDDEN,
    LAYERS,
    randomize,
    tiny_encoder,
    tiny_image_processor,
    tiny_inputs,
    tiny_text_rows,
    tiny_tokenizer,
)
from tests.unit.formats.artefacts import Saved, saved_images, saved_text

SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int8, a layer in float": {"bits": 8, "float_layers": [1]},
    "int4": {"bits": 4, "block_size": 16},
    "int4, tables in 8": {"bits": 4, "block_size": 32, "embedding_bits": 8},
    "int8, tables in 4": {"bits": 8, "block_size": 32, "embedding_bits": 4},
    "blocks that do not fit": {"bits": 4, "block_size": 64},
}


def rounded_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__.startswith("Rounded")]


def logits_of(model: MultiTaskModel, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        output = model.eval()(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return {task.logits_name: output[task.logits_name].numpy() for task in model.tasks.values()}


def distance(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], inputs: dict[str, np.ndarray]
) -> list[float]:
    """Mean difference by output; padding does not count."""
    values = []
    for name, array in expected.items():
        moved = np.abs(found[name] - array)
        values.append(float((moved[inputs["attention_mask"].astype(bool)] if moved.ndim == 3 else moved).mean()))
    return values


@pytest.mark.parametrize("saved", [saved_text, saved_images], ids=["text", "images"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_computes_what_onnx_runtime_will(saved: Any, settings: dict[str, Any], tmp_path: Path):
    """Training against other roundings than those of the kernels would repair what is not broken."""
    made: Saved = saved()
    graph = quantize_onnx(made.folders["onnx"], tmp_path, **settings) / ONNX_MODEL
    expected = run_graph(graph, made.inputs)
    in_float = logits_of(made.model, made.inputs)
    rounding = RoundToBits(**settings)
    rounding.install(made.model)
    try:
        rounded = logits_of(made.model, made.inputs)
    finally:
        rounding.remove()
    for own, without in zip(
        distance(rounded, expected, made.inputs), distance(in_float, expected, made.inputs), strict=True
    ):
        # A number halfway between two may go either way.
        assert own < 0.05 * without
    for name, array in logits_of(made.model, made.inputs).items():
        np.testing.assert_array_equal(array, in_float[name])


@pytest.mark.parametrize("family", ["distilbert", "modernbert", "deberta-v2", "dinov2"])
def test_other_families(family: str, tmp_path: Path):
    """Gated, without token types, with relative positions, with pictures: what is fused differs."""
    model = MultiTaskModel.from_encoder(tiny_encoder(family), [SequenceClassification("mood", labels=FEELING_LABELS)])
    randomize(model, seed=2)
    inputs = {name: tensor.numpy() for name, tensor in tiny_inputs(family).items()}
    processor = tiny_image_processor(family) if family == "dinov2" else tiny_tokenizer()
    graph = export_onnx(model, processor, tmp_path / "float")
    expected = run_graph(quantize_onnx(graph, tmp_path / "int4", 4, block_size=16) / ONNX_MODEL, inputs)
    in_float = logits_of(model, inputs)
    rounding = RoundToBits(4, block_size=16)
    rounding.install(model)
    (own,) = distance(logits_of(model, inputs), expected, inputs)
    (without,) = distance(in_float, expected, inputs)
    # DeBERTa reads its table of relative positions without looking anything up in it: that stays in float here.
    assert own < (0.25 if family == "deberta-v2" else 0.05) * without


def test_exact_numbers():
    """Small ones, by hand."""
    rows = torch.tensor([[127.0, -63.4], [1.27, 0.004]])
    torch.testing.assert_close(round_rows(rows), torch.tensor([[127.0, -63.0], [1.27, 0.0]]))
    # From -1 to 254 in steps of 1.
    values = torch.tensor([-1.0, 0.4, 253.6, 254.0])
    torch.testing.assert_close(round_tensor(values), torch.tensor([-1.0, 0.0, 254.0, 254.0]))
    # From -5 to 10 in steps of 1, from 0 to 15 (0 is always among them), and nothing but zeros.
    blocks = torch.tensor([[-5.0, 10.0, 2.4, 0.0, 15.0, 5.0, 7.6, 1.0, 0.0, 0.0]])
    expected = torch.tensor([[-5.0, 10.0, 2.0, 0.0, 15.0, 5.0, 8.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(round_blocks(blocks, 4), expected)
    torch.testing.assert_close(
        round_block_activations(torch.tensor([[127.0, 1.4, -2.54, 0.011]]), 2),
        torch.tensor([[127.0, 1.0, -2.54, 0.02]]),
    )
    for rounded in (round_rows, round_tensor, lambda item: round_blocks(item, 3)):
        assert not rounded(torch.zeros(2, 5)).any()
        once = rounded(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
        torch.testing.assert_close(rounded(once), once)


def test_gradients_pass():
    """Those of the rounded numbers, for weights and inputs alike."""
    layer = torch.nn.Linear(32, 3)
    inputs = torch.randn(5, 32, requires_grad=True)
    rounded_inputs = round_block_activations(inputs.detach(), 16).requires_grad_()
    rounded_weight = round_blocks(layer.weight.detach(), 16).requires_grad_()
    torch.nn.functional.linear(rounded_inputs, rounded_weight, layer.bias.detach()).square().sum().backward()
    linear_forward(4, 16)(layer, inputs).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, rounded_weight.grad)
    torch.testing.assert_close(inputs.grad, rounded_inputs.grad)


def trained(tmp_path: Path, callbacks: list[Any]) -> tuple[MultiTaskModel, MultiTaskTrainer]:
    task = SequenceClassification("mood", label="label", text="text", labels=FEELING_LABELS)
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [task], max_length=24)
    randomize(model, seed=5)
    rows = tiny_text_rows(48, seed=1)
    trainer = MultiTaskTrainer(
        model=model,
        args=MultiTaskTrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            eval_strategy="epoch",
            save_strategy="epoch",
            report_to="none",
            use_cpu=True,
            seed=1,
            dataloader_pin_memory=False,
        ),
        train_dataset={"mood": rows},
        eval_dataset={"mood": tiny_text_rows(24, seed=2)},
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )
    trainer.train()
    return model, trainer


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def test_training_in_four_bits(tmp_path: Path):
    """What the trainer scored while it trained is what the graph scores; the model itself is float again, as if new."""
    model, trainer = trained(tmp_path, [RoundToBits(4, block_size=16)])
    scored = [row["eval_mood_accuracy"] for row in trainer.state.log_history if "eval_mood_accuracy" in row][-1]
    assert not rounded_modules(model)
    assert list(model.state_dict()) == list(MultiTaskModel.from_pretrained(last_checkpoint(tmp_path)).state_dict())
    tokenizer = tiny_tokenizer()
    source = export_onnx(model, tokenizer, tmp_path / "float")
    graph = quantize_onnx(source, tmp_path / "int4", 4, block_size=16)
    held = tiny_text_rows(24, seed=2)
    inputs = {name: np.asarray(array) for name, array in tokenizer(list(held["text"]), padding=True).items()}
    answers = run_graph(graph / ONNX_MODEL, inputs)["logits_mood"].argmax(-1)
    assert np.mean(answers == [FEELING_LABELS.index(label) for label in held["label"]]) == pytest.approx(scored)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_training_repairs_what_rounding_breaks(seed: int):
    """One large weight takes the steps of its block from all others; related inputs can still make up for that."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(256, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    layer = torch.nn.Linear(16, 1, bias=False)
    layer.weight.data = torch.cat([torch.tensor([[2.0]]), 0.3 * torch.randn(1, 15, generator=generator)], dim=1)
    wanted = layer(inputs).detach()
    forward = linear_forward(4, 16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(200):
        losses.append(loss := (forward(layer, inputs) - wanted).square().mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(losses[-50:]) < 0.5 * losses[0]


def test_a_stock_model_in_a_stock_trainer(tmp_path: Path):
    """The encoder is rounded, the head is not."""
    config = AutoConfig.for_model(**tiny_encoder("bert").config.to_dict() | {"num_labels": 3})
    model = AutoModelForSequenceClassification.from_config(config)
    rounding = RoundToBits(8)
    seen: list[int] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(len(rounded_modules(model)))
            assert model.classifier not in rounded_modules(model)

    encoded = tiny_tokenizer()(list(tiny_text_rows(8)["text"]), padding=True)
    rows = [{name: values[place] for name, values in encoded.items()} | {"labels": place % 3} for place in range(8)]
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, dataloader_pin_memory=False
        ),
        train_dataset=rows,  # type: ignore[arg-type]  # a list of rows is one
        callbacks=[rounding, Look()],
    ).train()
    # Six linear layers in each layer, the pooler, and three tables.
    assert seen == [6 * LAYERS + 1 + 3] * 2
    assert not rounded_modules(model)
    assert model.bert.embeddings.word_embeddings.embedding_dim == HIDDEN


def test_what_cannot_be():
    """Each with what was expected."""
    for settings, message in (
        ({"bits": 2}, "bits: expected 8 or 4, found 2"),
        ({"bits": 4, "block_size": 5}, "block_size: expected one of 16, 32, .* found 5"),
        ({"bits": 8, "embedding_bits": 2}, "embedding_bits: expected 8 or 4, found 2"),
    ):
        with pytest.raises(ValueError, match=message):
            RoundToBits(**settings)
    with pytest.raises(UnsupportedEncoderError, match=r"float_layers: expected layers among 0 to 2, found \[7\]"):
        RoundToBits(8, float_layers=[7]).install(saved_text().model)


def test_a_copy_computes_with_its_own_weights():
    """An export copies the model; replicas on several devices are copies, too."""
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [SequenceClassification("mood", labels=FEELING_LABELS)])
    rounding = RoundToBits(8)
    rounding.install(model)
    twin = copy.deepcopy(model)
    rounding.remove()
    layer = twin.encoder.encoder.layer[0].intermediate.dense
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    assert not layer(torch.randn(2, HIDDEN)).any()
    assert rounded_modules(twin)
    assert not rounded_modules(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype):
    """transformers opens a checkpoint in the precision that it was saved in."""
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [SequenceClassification("mood", labels=FEELING_LABELS)])
    model.to(dtype)  # type: ignore[arg-type]  # a dtype is one
    for rounding in (RoundToBits(8), RoundToBits(4, block_size=16)):
        rounding.install(model)
        answers = model(**tiny_inputs("bert"))["logits_mood"]
        rounding.remove()
        assert answers.dtype == dtype
        assert torch.isfinite(answers).all()
