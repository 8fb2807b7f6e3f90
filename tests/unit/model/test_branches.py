"""Laws of sub-models: tasks that read a branch of their own, or a lower layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from hf_mtcompress import (
    ImageClassification,
    MultiTaskModel,
    MultiTaskTrainer,
    SequenceClassification,
    Task,
    prune,
    student_of,
)
from hf_mtcompress import TokenClassification as Tokens
from hf_mtcompress.errors import TaskError, UnsupportedEncoderError
from hf_mtcompress.formats.onnx.export import export_onnx
from hf_mtcompress.formats.predictor import load_predictor
from tests.tiny import (
    COLOUR_LABELS,
    FAMILIES,
    FEELING_LABELS,
    IMAGE_FAMILIES,
    LAYERS,
    TAG_LABELS,
    tiny_encoder,
    tiny_inputs,
    tiny_text_rows,
    tiny_token_rows,
    tiny_tokenizer,
)
from tests.unit.trainers.test_multitask import arguments

STOCK = [family for family in FAMILIES if not family.startswith("clip")]


def tasks(family: str, **second: Any) -> list[Task]:
    """A task on the encoder, and one that `second` puts elsewhere."""
    if family in IMAGE_FAMILIES:
        return [
            ImageClassification("mood", labels=COLOUR_LABELS, image="image", label="label"),
            ImageClassification("strength", problem_type="regression", image="image", label="intensity", **second),
        ]
    return [
        SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label"),
        SequenceClassification("strength", problem_type="regression", text="text", label="intensity", **second),
    ]


def answers(model: Any, family: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        outputs = model.eval()(**tiny_inputs(family))
    return {name: outputs[f"logits_{name}"] for name in ("mood", "strength")}


def branched(family: str, layers: int | None = 2, **settings: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    return MultiTaskModel.from_encoder(
        tiny_encoder(family), tasks(family), branches={"side": ["strength"]}, branch_layers=layers, **settings
    )


def differ(model: MultiTaskModel) -> MultiTaskModel:
    """Give the branch weights of its own, so that nothing is equal by being a copy."""
    own: Any = model.branches["side"] if "side" in model.branches else model.encoders["side"]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("layers", [1, LAYERS, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_starts_as_a_copy(family: str, layers: int | None) -> None:
    """Final norms, poolers, masks and positions are those of the family."""
    torch.manual_seed(0)
    plain = MultiTaskModel.from_encoder(tiny_encoder(family), tasks(family))
    wanted = answers(plain, family)
    found = answers(branched(family, layers), family)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", [2, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_branches_reload_bit_equal_and_export_as_stock_models(family: str, layers: int | None, tmp_path: Path) -> None:
    model = differ(branched(family, layers))
    wanted = answers(model, family)
    plain = answers(branched(family, layers), family)
    assert torch.equal(wanted["mood"], plain["mood"]), "the branch is nobody else's"
    assert not torch.allclose(wanted["strength"], plain["strength"], atol=1e-3)
    model.save_pretrained(tmp_path / "model")
    found = answers(AutoModel.from_pretrained(tmp_path / "model"), family)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    if family in STOCK:
        for name in wanted:
            with torch.no_grad():
                stock = model.to_stock(name).eval()(**tiny_inputs(family)).logits
            torch.testing.assert_close(stock, wanted[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_reads_a_lower_layer_and_exports_as_a_shallower_model(family: str, tmp_path: Path) -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder(family), tasks(family, layer=2))
    wanted = answers(model, family)
    model.save_pretrained(tmp_path / "model")
    found = answers(AutoModel.from_pretrained(tmp_path / "model"), family)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    if family in STOCK:
        stock = model.to_stock("strength").eval()
        assert stock.config.num_hidden_layers == 2
        with torch.no_grad():
            torch.testing.assert_close(stock(**tiny_inputs(family)).logits, wanted["strength"], rtol=0, atol=1e-6)


def test_the_last_layer_by_number_is_the_last_layer() -> None:
    torch.manual_seed(0)
    last = answers(MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks("bert", layer=LAYERS)), "bert")
    torch.manual_seed(0)
    plain = answers(MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks("bert")), "bert")
    torch.testing.assert_close(last["strength"], plain["strength"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", [1, None])
def test_a_task_moves_its_own_branch_and_the_shared_part_only(layers: int | None) -> None:
    model = branched("bert", layers)
    model(**tiny_inputs("bert"), labels_mood=torch.tensor([0, 1, 2])).loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any(name.startswith(("branches.side", "encoders.side")) for name in moved)
    model.zero_grad()
    model(**tiny_inputs("bert"), labels_strength=torch.tensor([0.5, 1.0, 2.0])).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith(("branches.side", "encoders.side")) for name in moved)
    top = f"encoders.main.encoder.layer.{LAYERS - 1}"
    assert not any(name.startswith(top) for name in moved), "the trunk's own top is another task's"
    assert any(name.startswith("encoders.main.encoder.layer.0") for name in moved) == (layers is not None)


@pytest.mark.parametrize("place", ["branch", "layer"])
def test_onnx_equals_torch(place: str, tmp_path: Path) -> None:
    if place == "branch":
        model = differ(branched("bert"))
    else:
        model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks("bert", layer=2))
    export_onnx(model.eval(), tiny_tokenizer(), tmp_path)
    inputs = tiny_inputs("bert")
    wanted = answers(model, "bert")
    found = load_predictor(tmp_path).logits({key: value.numpy() for key, value in inputs.items()})
    for name, value in wanted.items():
        torch.testing.assert_close(torch.as_tensor(found[name]), value, rtol=1e-4, atol=1e-5)


def test_branches_train(tmp_path: Path) -> None:
    """Three tasks, one on a branch and one low, from the trainer; every loss falls."""
    torch.manual_seed(0)
    specs = [*tasks("bert"), Tokens("tags", labels=TAG_LABELS, tokens="tokens", label="tags", layer=2)]
    model = MultiTaskModel.from_encoder(
        tiny_encoder("bert"), specs, branches={"side": ["strength"]}, branch_layers=1, max_length=32
    )
    texts, tokens = tiny_text_rows(32), tiny_token_rows(32)
    data = {"mood": texts, "strength": texts, "tags": tokens}
    trainer = MultiTaskTrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=8, learning_rate=3e-3, batches="mixed"),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for task in trainer.tasks:
        assert after[f"eval_{task}_loss"] < before[f"eval_{task}_loss"], task


@pytest.mark.parametrize("layers", [2, None], ids=["top layers", "an encoder of its own"])
def test_what_cannot_be_done_with_branches_is_said(layers: int | None) -> None:
    """With two whole encoders one was cut, and the other was not."""
    model = branched("bert", layers)
    with pytest.raises(UnsupportedEncoderError, match="read the last layer of one encoder for pruning"):
        prune(model, [], heads=0.5)
    with pytest.raises(UnsupportedEncoderError, match="for taking layers"):
        student_of(model, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branches": {"side": ["strenght"]}}, "different tasks among"),
        ({"branches": {"side": ["strength"], "other": ["strength"]}}, "every task is in one branch"),
        ({"branches": {"main": ["strength"]}}, "other than 'main'"),
        ({"branches": {"side": []}}, "every task is in one branch"),
        ({"branches": {"side": ["strength"]}, "branch_layers": LAYERS + 1}, f"a branch of 1 to {LAYERS} layers"),
    ],
)
def test_branches_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TaskError, UnsupportedEncoderError), match=message):
        MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks("bert"), **settings)


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(TaskError, match=f"expected a layer from 1 to {LAYERS}, found 9"):
        MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks("bert", layer=9))
    with pytest.raises(TaskError, match="expected a layer of at least 1"):
        tasks("bert", layer=0)
