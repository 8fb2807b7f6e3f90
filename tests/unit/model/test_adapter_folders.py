"""Laws of adapters that are saved without their encoder."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_mtcompress import MultiTaskModel, SequenceClassification, TokenClassification
from hf_mtcompress.compression.quantization import quantize_bitsandbytes, quantize_torchao
from hf_mtcompress.errors import ArtifactError, TaskError, UnsupportedEncoderError
from hf_mtcompress.model.surgery import cut
from tests.tiny import FEELING_LABELS, tiny_encoder, tiny_inputs
from tests.unit.model.test_adapters import adapted, differ, plain, train
from tests.unit.model.test_branches import STOCK, answers, tasks

pytestmark = pytest.mark.filterwarnings(
    # peft's PeftModel asks transformers for it under its old name.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def saved(family: str, folder: Path, **settings: Any) -> MultiTaskModel:
    """A model with trained adapters and heads, and these in a folder."""
    model = differ(adapted(family, **settings))
    train(model, family, ["mood", "strength"], steps=1)
    model.save_adapters(folder)
    return model


@pytest.mark.parametrize("family", STOCK)
def test_they_reload_bit_equal_on_a_fresh_model_of_the_same_encoder(family: str, tmp_path: Path) -> None:
    wanted = answers(saved(family, tmp_path), family)
    fresh = plain(family)
    assert fresh.load_adapters(tmp_path) == ["mood", "strength"]
    found = answers(fresh, family)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not any(parameter.requires_grad for parameter in fresh.encoders.parameters())
    assert all(parameter.requires_grad for parameter in fresh.adapters.parameters())
    assert set(fresh.config.adapters or {}) == {"mood", "strength"}


@pytest.mark.parametrize("family", STOCK)
def test_peft_opens_them_on_the_familys_own_model(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path, dropout=0.25)
    wanted = answers(model, family)
    for name, outputs in (("mood", 3), ("strength", 1)):
        kind = type(model.to_stock(name))
        encoder = tiny_encoder(family)
        stock = kind.from_pretrained(_folder_of(encoder, tmp_path), num_labels=outputs)
        opened = PeftModel.from_pretrained(stock, str(tmp_path / name)).eval()
        with torch.no_grad():
            found = opened(**tiny_inputs(family)).logits
        torch.testing.assert_close(found, wanted[name], rtol=0, atol=1e-6)


def test_a_pooled_head_stands_beside_an_adapter_for_the_bare_encoder(tmp_path: Path) -> None:
    model = plain("bert")
    model.add_task(SequenceClassification("third", labels=FEELING_LABELS, head="mlp", pooling="mean"))
    model.add_adapters(["third"], targets="feed_forward")
    outputs = differ(model).eval()(**tiny_inputs("bert"), tasks=["third"])
    model.save_adapters(tmp_path)
    fresh = plain("bert").eval()
    before = answers(fresh, "bert")
    fresh.load_adapters(tmp_path)
    after = answers(fresh, "bert")
    assert all(torch.equal(after[name], before[name]) for name in before), "tasks that were there answer as before"
    assert torch.equal(fresh(**tiny_inputs("bert"))["logits_third"], outputs["logits_third"])
    opened = PeftModel.from_pretrained(tiny_encoder("bert"), str(tmp_path / "third")).eval()
    torch.testing.assert_close(
        opened(**tiny_inputs("bert")).last_hidden_state, outputs.last_hidden_state, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_encoder_in_half_precision_is_the_same_one(dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = answers(saved("bert", tmp_path / "adapters"), "bert")
    plain("bert").save_pretrained(tmp_path / "base")
    half = AutoModel.from_pretrained(tmp_path / "base", dtype=dtype)
    half.load_adapters(tmp_path / "adapters")
    found = answers(half, "bert")
    torch.testing.assert_close(found["mood"].float(), wanted["mood"], rtol=0, atol=0.05)
    half.save_adapters(tmp_path / "again")
    plain("bert").load_adapters(tmp_path / "again")


def test_a_pooler_that_other_heads_need_or_not_changes_no_encoder(tmp_path: Path) -> None:
    """BERT's pooler is dropped where only token heads are."""
    words = TokenClassification("words", labels=("a", "b"), tokens="tokens", label="tags")
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [*tasks("bert"), words])
    model.add_adapters(["words", "mood"])
    wanted = differ(model).eval()(**tiny_inputs("bert"))["logits_words"]
    model.save_adapters(tmp_path)
    alone = MultiTaskModel.from_encoder(tiny_encoder("bert"), [words]).eval()
    assert alone.encoder.pooler is None
    alone.load_adapters(tmp_path, ["words"])
    assert torch.equal(alone(**tiny_inputs("bert"))["logits_words"], wanted)
    # One after another that could be loaded: nothing of either is there.
    fresh = MultiTaskModel.from_encoder(tiny_encoder("bert"), [words])
    with pytest.raises(TaskError, match="task 'mood': expected an encoder with a pooler"):
        fresh.load_adapters(tmp_path, ["words", "mood"])
    assert (list(fresh.tasks), list(fresh.adapters)) == (["words"], [])


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_of_an_encoder_in_few_bits(bits: Any, tmp_path: Path) -> None:
    """Trained on few bits, they load on the same bits to the last digit, and on the float encoder."""
    model = quantize_bitsandbytes(plain("bert"), bits)
    assert isinstance(model, MultiTaskModel)
    model.save_pretrained(tmp_path / "base")
    model.add_adapters(targets="all", rank=4)
    train(differ(model), "bert", ["mood", "strength"])
    wanted = answers(model, "bert")
    model.save_adapters(tmp_path / "adapters", base_model="org/encoder")
    base = AutoModel.from_pretrained(tmp_path / "base")
    base.load_adapters(tmp_path / "adapters")
    found = answers(base, "bert")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    plain("bert").load_adapters(tmp_path / "adapters")
    described = json.loads((tmp_path / "adapters" / "mood" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "org/encoder"


def test_on_a_pruned_encoder(tmp_path: Path) -> None:
    def pruned() -> MultiTaskModel:
        model = plain("bert")
        cut(model.encoder, heads={0: [1, 2], 1: []}, feed_forward={0: list(range(32)), 2: []})
        model.refresh_config()
        return model

    model = pruned()
    model.add_adapters(targets="all", rank=4)
    wanted = answers(differ(model), "bert")
    model.save_adapters(tmp_path)
    fresh = pruned()
    fresh.load_adapters(tmp_path)
    found = answers(fresh, "bert")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_some_tasks_and_again(tmp_path: Path) -> None:
    model = saved("bert", tmp_path)
    wanted = answers(model, "bert")
    fresh = plain("bert")
    assert fresh.load_adapters(tmp_path, ["mood"]) == ["mood"]
    assert list(fresh.config.adapters or {}) == ["mood"]
    fresh.load_adapters(tmp_path / "strength")
    differ(fresh, seed=3)
    assert not torch.equal(answers(fresh, "bert")["mood"], wanted["mood"])
    fresh.load_adapters(tmp_path)
    found = answers(fresh, "bert")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    model.save_adapters(tmp_path, ["mood"])
    assert sorted(place.name for place in tmp_path.iterdir() if not place.name.startswith(".")) == ["mood", "strength"]


def test_nothing_of_the_encoder_and_no_place_of_this_machine_is_in_the_folder(tmp_path: Path) -> None:
    plain("bert").save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base")
    model.add_adapters()
    model.save_adapters(tmp_path, base_model="org/encoder")
    encoder_shapes = {tuple(value.shape) for value in model.encoder.parameters() if value.ndim > 1}
    for name in ("mood", "strength"):
        state = load_file(tmp_path / name / "adapter_model.safetensors")
        assert not encoder_shapes.intersection(tuple(value.shape) for value in state.values())
        for file in (tmp_path / name).glob("*.json"):
            assert str(tmp_path) not in file.read_text()
    for place in (str(tmp_path / "base"), "/home/me/encoder", str(Path("tests"))):
        with pytest.raises(TaskError, match="expected the id of an encoder on the Hub"):
            model.save_adapters(tmp_path, base_model=place)
    with pytest.raises(TaskError, match=r"with an adapter, among \['mood', 'strength'\], found \['other'\]"):
        model.save_adapters(tmp_path, ["other"])
    with pytest.raises(TaskError, match="expected tasks with an adapter"):
        plain("bert").save_adapters(tmp_path)


def _change_settings(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "strength" / "mtcompress_adapter.json"
        settings = json.loads(file.read_text())
        change(settings)
        file.write_text(json.dumps(settings))

    return damage


def _truncate(folder: Path) -> None:
    file = folder / "strength" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def _change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "strength" / "adapter_model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file)

    return damage


def _first(state: dict[str, torch.Tensor], part: str) -> str:
    return next(key for key in state if part in key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "whole safetensors files"),
        (lambda folder: (folder / "strength" / "adapter_model.safetensors").unlink(), "whole safetensors files"),
        (lambda folder: (folder / "strength" / "mtcompress_adapter.json").write_text("{"), "cannot be read"),
        (
            _change_settings(lambda settings: settings.update(format_version=99)),
            "^expected an adapter of format 1 or older, found 99",
        ),
        (_change_settings(lambda settings: settings.pop("format_version")), "cannot be read"),
        (_change_settings(lambda settings: settings.pop("paths")), "known here, found another one"),
        (_change_settings(lambda settings: settings.update(prefix=None)), "known here, found another one"),
        (_change_settings(lambda settings: settings.update(encoder=None)), "known here, found another one"),
        (_change_settings(lambda settings: settings["task"].update(new=1)), "known here, found another one"),
        (_change_settings(lambda settings: settings["task"].pop("name")), "known here, found another one"),
        (_change_settings(lambda settings: settings["adapter"].update(new=1)), "known here, found another one"),
        (_change_settings(lambda settings: settings["adapter"].update(targets="x")), "known here, found another one"),
        (_change_settings(lambda settings: settings["adapter"].update(rank=2)), "matrices of rank 2"),
        (_change_weights(lambda state: state.pop(_first(state, "lora_B"))), "of all of the 18 linear layers"),
        (_change_weights(lambda state: state.pop(_first(state, "classifier"))), "expected a head with"),
    ],
)
def test_a_damaged_folder_is_refused_and_nothing_changes(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    # What is read after another one that could be loaded.
    saved("bert", tmp_path)
    damage(tmp_path)
    model = plain("bert")
    model.remove_task("strength")
    inputs = tiny_inputs("bert")
    before, config = model.eval()(**inputs)["logits_mood"], copy.deepcopy(model.config.to_dict())
    with pytest.raises(ArtifactError, match=message):
        model.load_adapters(tmp_path)
    assert torch.equal(model(**inputs)["logits_mood"], before)
    assert (list(model.tasks), list(model.heads), len(model.adapters)) == (["mood"], ["task_mood"], 0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.refresh_config()
    assert model.config.to_dict() == config


def test_folders_may_have_any_name_but_one_task_each(tmp_path: Path) -> None:
    wanted = answers(saved("bert", tmp_path), "bert")
    (tmp_path / "mood").rename(tmp_path / "z-mood")
    fresh = plain("bert")
    fresh.remove_task("mood")
    assert set(fresh.load_adapters(tmp_path)) == {"mood", "strength"}
    found = answers(fresh, "bert")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    shutil.copytree(tmp_path / "z-mood", tmp_path / "a-mood")
    with pytest.raises(ArtifactError, match="expected one saved adapter of"):
        plain("bert").load_adapters(tmp_path)
    assert plain("bert").load_adapters(tmp_path, ["strength"]) == ["strength"]


def test_a_folder_with_something_else_is_not_replaced(tmp_path: Path) -> None:
    model = adapted("bert")
    model.export_task("mood", tmp_path / "mood", None)
    with pytest.raises(ArtifactError, match="expected no folder 'mood'"):
        model.save_adapters(tmp_path)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["mood"]
    assert (tmp_path / "mood" / "model.safetensors").exists()


def test_parts_of_an_encoder_and_torchao_take_none(tmp_path: Path) -> None:
    saved("bert", tmp_path)
    deep = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks("bert", layer=1))
    with pytest.raises(UnsupportedEncoderError, match="task 'strength': expected one that reads a whole encoder"):
        deep.load_adapters(tmp_path)
    assert not len(deep.adapters)
    quantized = quantize_torchao(plain("bert"))
    assert isinstance(quantized, MultiTaskModel)
    with pytest.raises(UnsupportedEncoderError, match="found weights of torchao"):
        quantized.load_adapters(tmp_path)
    adapted_first = quantize_torchao(adapted("bert"))
    assert isinstance(adapted_first, MultiTaskModel)
    adapted_first.save_adapters(tmp_path / "again")
    plain("bert").load_adapters(tmp_path / "again")


def test_another_encoder_other_labels_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    saved("bert", tmp_path)
    other = MultiTaskModel.from_encoder(tiny_encoder("bert", seed=5), tasks("bert"))
    with pytest.raises(ArtifactError, match="task 'mood': expected an adapter trained on this encoder"):
        other.load_adapters(tmp_path)
    few_bits = quantize_bitsandbytes(other, 8)
    assert isinstance(few_bits, MultiTaskModel)
    with pytest.raises(ArtifactError, match="trained on this encoder"):
        few_bits.load_adapters(tmp_path)
    # Without biases nothing in float tells of a narrower feed-forward part.
    saved("modernbert", tmp_path / "modernbert")
    narrower = plain("modernbert")
    cut(narrower.encoder, feed_forward={0: list(range(32))})
    narrower.refresh_config()
    few_bits = quantize_bitsandbytes(narrower, 8)
    assert isinstance(few_bits, MultiTaskModel)
    with pytest.raises(ArtifactError, match="trained on this encoder"):
        few_bits.load_adapters(tmp_path / "modernbert")
    relabelled = MultiTaskModel.from_encoder(
        tiny_encoder("bert"), [SequenceClassification("mood", labels=FEELING_LABELS[::-1])]
    )
    with pytest.raises(TaskError, match="task 'mood': expected the kind, labels"):
        relabelled.load_adapters(tmp_path, ["mood"])
    with pytest.raises(ArtifactError, match=r"expected one saved adapter of \['other'\]"):
        plain("bert").load_adapters(tmp_path, ["other"])
    with pytest.raises(ArtifactError, match="one or more tasks"):
        plain("bert").load_adapters(tmp_path / "nowhere")


def _folder_of(encoder: Any, folder: Path) -> Path:
    encoder.save_pretrained(folder / "encoder")
    return folder / "encoder"
