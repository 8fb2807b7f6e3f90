"""Laws of adapters: low-rank layers that tasks have for themselves on a frozen encoder."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_mtcompress import MultiTaskModel, SequenceClassification, prune, student_of
from hf_mtcompress.compression.quantization import quantize_bitsandbytes
from hf_mtcompress.errors import ArtifactError, TaskError, UnsupportedEncoderError
from hf_mtcompress.formats.onnx.export import export_onnx
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.formats.reload.check import ReloadCheck, check_reload
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.surgery import cut
from hf_mtcompress.recipe import AdapterConfig
from tests.tiny import FAMILIES, FEELING_LABELS, LAYERS, tiny_encoder, tiny_inputs, tiny_tokenizer
from tests.unit.model.test_branches import STOCK, answers, tasks

TARGETS: dict[str, Any] = {"mood": torch.tensor([0, 1, 2]), "strength": torch.tensor([0.5, 1.0, 2.0])}


def plain(family: str) -> MultiTaskModel:
    torch.manual_seed(0)
    return MultiTaskModel.from_encoder(tiny_encoder(family), tasks(family))


def adapted(family: str, **settings: Any) -> MultiTaskModel:
    model = plain(family)
    model.add_adapters(**{"targets": "all", "rank": 4, **settings})
    return model


def differ(model: MultiTaskModel, seed: int = 7) -> MultiTaskModel:
    """Give adapters something to add; each something else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def train(model: MultiTaskModel, family: str, names: list[str], steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**tiny_inputs(family), **{f"labels_{name}": TARGETS[name][:3] for name in names}).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("targets", ["attention", "feed_forward", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adding_adapters_changes_nothing_and_reaches_every_layer(family: str, targets: Any) -> None:
    """A family whose layers were found only in part would train, and learn less than it could."""
    wanted = answers(plain(family), family)
    model = adapted(family, targets=targets, dropout=0.5)
    found = answers(model, family)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    expected = []
    for layer in find_anatomy(model.encoder).layers:
        if targets != "feed_forward":
            expected += [*layer.attention.projections, layer.attention.output_name]
        if targets != "attention":
            expected += [*layer.feed_forward.inputs, layer.feed_forward.output_name]
    for adapter in model.adapters.values():
        assert list(adapter.by_path()) == expected
    model.train()(**tiny_inputs(family), labels_mood=TARGETS["mood"]).loss.backward()
    for path, layer in model.adapters["task_mood"].by_path().items():
        # The first gradient reaches B alone, since B is zero.
        assert layer.lora_B["task_mood"].weight.grad.any(), path


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_and_heads_move(family: str) -> None:
    model = adapted(family)
    before = copy.deepcopy(model.state_dict())
    train(model, family, ["mood", "strength"])
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("adapters.", "heads.")) for name in moved)
    assert {name for name in before if name.startswith("adapters.")} <= moved


@pytest.mark.parametrize("family", FAMILIES)
def test_training_one_task_changes_no_answer_of_another(family: str) -> None:
    model = adapted(family)
    before = answers(model, family)
    train(model, family, ["mood"])
    after = answers(model, family)
    assert torch.equal(after["strength"], before["strength"])
    assert not torch.allclose(after["mood"], before["mood"], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_reload_bit_equal_and_frozen(family: str, tmp_path: Path) -> None:
    model = differ(adapted(family, dropout=0.1))
    wanted = answers(model, family)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    found = answers(loaded, family)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert loaded.config.adapters["mood"] == {"rank": 4, "alpha": 16.0, "dropout": 0.1, "targets": "all"}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained
    assert not any(name.startswith("encoders.") for name in trained)


@pytest.mark.parametrize("family", STOCK)
def test_export_merges_the_adapter(family: str, tmp_path: Path) -> None:
    model = differ(adapted(family))
    wanted = answers(model, family)
    for name in wanted:
        model.export_task(name, tmp_path / name, None)
        assert not any("lora" in key for key in model.to_stock(name).state_dict())
        with torch.no_grad():
            found = type(model.to_stock(name)).from_pretrained(tmp_path / name).eval()(**tiny_inputs(family)).logits
        torch.testing.assert_close(found, wanted[name], rtol=0, atol=1e-5)
    again = answers(model, family)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted), "the model itself is left as it was"


def test_the_folder_opens_in_a_fresh_process(tmp_path: Path) -> None:
    model = differ(adapted("bert"))
    wanted = answers(model, "bert")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    inputs = {key: value.numpy() for key, value in tiny_inputs("bert").items()}
    expected = {name: value.numpy() for name, value in wanted.items()}
    (result,) = check_reload([ReloadCheck(folder=tmp_path, inputs=inputs, expected=expected)])
    assert result["passed"], result
    one = AutoModelForSequenceClassification.from_pretrained(tmp_path, task="mood").eval()
    with torch.no_grad():
        torch.testing.assert_close(one(**tiny_inputs("bert")).logits, wanted["mood"], rtol=0, atol=1e-5)
    found = load_predictor(tmp_path).logits(inputs)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["bert", pytest.param("modernbert", marks=pytest.mark.slow)])
def test_onnx_equals_torch(family: str, tmp_path: Path) -> None:
    """One graph with every adapter's run; the encoder's weights stand in it once."""
    model = plain(family)
    model.add_task(SequenceClassification("third", labels=FEELING_LABELS, head="linear"))
    model.add_adapters(["mood", "strength"], targets="all", rank=4)
    export_onnx(differ(model).eval(), tiny_tokenizer(family), tmp_path)
    inputs = tiny_inputs(family)
    with torch.no_grad():
        outputs = model(**inputs)
    found = load_predictor(tmp_path).logits({key: value.numpy() for key, value in inputs.items()})
    for name in ("mood", "strength", "third"):
        torch.testing.assert_close(torch.as_tensor(found[name]), outputs[f"logits_{name}"], rtol=1e-4, atol=1e-5)
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = sum(int(np.prod(item.dims)) for item in graph.initializer if item.data_type == onnx.TensorProto.FLOAT)
    assert stored <= 1.05 * sum(parameter.numel() for parameter in model.parameters())


def test_the_encoder_runs_once_for_each_adapter_that_is_asked() -> None:
    """More runs would be the same answers for more time."""
    model = plain("bert")
    for name in ("third", "fourth"):
        model.add_task(SequenceClassification(name, labels=FEELING_LABELS, head="linear"))
    model.add_adapters(["mood", "strength"])
    runs: list[int] = []
    model.encoder.embeddings.register_forward_hook(lambda *_: runs.append(1))
    for asked, count in ((["mood"], 1), (["third", "fourth"], 1), (["mood", "third", "fourth"], 2), (None, 3)):
        runs.clear()
        model(**tiny_inputs("bert"), tasks=asked)
        assert len(runs) == count, asked


def test_hidden_states_are_those_of_one_run_or_of_none() -> None:
    """Hidden states of one task taken for those of another would be wrong without a sign of it."""
    model = differ(adapted("bert"))
    inputs = tiny_inputs("bert")
    runs = [model(**inputs, tasks=["mood"], output_hidden_states=True) for _ in range(2)]
    # Hooks that collect them, put on what runs share once for each run, would collect twice.
    assert [len(outputs.hidden_states) for outputs in runs] == [LAYERS + 1] * 2
    one = runs[-1]
    assert torch.equal(one.hidden_states[-1], one.last_hidden_state)
    assert not torch.allclose(one.last_hidden_state, model.encoder(**inputs).last_hidden_state, atol=1e-3)
    both = model(**inputs, output_hidden_states=True)
    assert both.last_hidden_state is None
    assert both.hidden_states is None
    model.add_task(SequenceClassification("third", labels=FEELING_LABELS, head="linear"))
    torch.testing.assert_close(model(**inputs).last_hidden_state, model.encoder(**inputs).last_hidden_state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_that_are_computed_again_give_the_same_gradients(reentrant: bool) -> None:
    """The second computation must use the adapter of its own run, not the one that ran last."""

    def gradients(again: bool) -> dict[str, torch.Tensor]:
        model = differ(adapted("bert")).train()
        if again:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(
            **tiny_inputs("bert"), **{f"labels_{name}": TARGETS[name][:3] for name in ("mood", "strength")}
        ).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted, found = gradients(False), gradients(True)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_tasks_and_adapters_come_and_go(tmp_path: Path) -> None:
    model = differ(adapted("bert", tasks=["strength"]))
    wanted = answers(model, "bert")
    model.add_adapters(["mood"], rank=2, alpha=4.0, targets="attention")
    found = answers(model, "bert")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    model.remove_task("mood")
    assert list(model.adapters) == ["task_strength"]
    model.save_pretrained(tmp_path)
    assert list(json.loads((tmp_path / "config.json").read_text())["adapters"]) == ["strength"]
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path)(**tiny_inputs("bert"))
    assert torch.equal(found["logits_strength"], wanted["strength"])


def test_freezing_goes_by_task_and_never_frees_the_encoder() -> None:
    model = adapted("bert")
    model.freeze_encoder(["mood"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith(("heads.task_mood.", "adapters.task_mood.")) for name in trained)
    model.freeze_encoder(frozen=False)
    assert all(parameter.requires_grad != name.startswith("encoders.") for name, parameter in model.named_parameters())


def test_names_that_peft_and_torch_keep_for_themselves() -> None:
    specs = [
        SequenceClassification(name, labels=FEELING_LABELS, text="text", label="label")
        for name in ("keys", "lora_a", "base_layer", "default")
    ]
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), specs)
    model.add_adapters()
    assert len(model.adapters) == len(specs)
    model(**tiny_inputs("bert"))


def test_adapters_on_a_pruned_encoder(tmp_path: Path) -> None:
    """What pruning removed altogether has no adapter; the rest has one of its own shape."""
    model = plain("bert")
    cut(model.encoder, heads={0: [1, 2], 1: []}, feed_forward={0: list(range(32)), 2: []})
    model.refresh_config()
    model.add_adapters(targets="all", rank=4)
    wanted = answers(differ(model), "bert")
    model.save_pretrained(tmp_path)
    found = answers(AutoModel.from_pretrained(tmp_path), "bert")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        stock = model.to_stock("mood").eval()(**tiny_inputs("bert")).logits
    torch.testing.assert_close(stock, wanted["mood"], rtol=0, atol=1e-5)
    empty = plain("bert")
    cut(empty.encoder, feed_forward={layer: [] for layer in range(LAYERS)})
    with pytest.raises(UnsupportedEncoderError, match="pruning left none"):
        empty.add_adapters(targets="feed_forward")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("order", ["adapters last", "adapters first"])
def test_adapters_and_few_bits(bits: Any, order: str, tmp_path: Path) -> None:
    model = plain("bert")
    if order == "adapters first":
        model = quantize_bitsandbytes(differ(adapted("bert")), bits)
        assert isinstance(model, MultiTaskModel)
    else:
        model = quantize_bitsandbytes(model, bits)
        assert isinstance(model, MultiTaskModel)
        before = answers(model, "bert")
        model.add_adapters(targets="all", rank=4)
        after = answers(model, "bert")
        assert all(torch.equal(after[name], before[name]) for name in before)
    packed = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    untrained = answers(model, "bert")
    train(model, "bert", ["mood", "strength"])
    trained = answers(model, "bert")
    assert not torch.allclose(trained["mood"], untrained["mood"], atol=1e-3)
    assert all(torch.equal(value, packed[name]) for name, value in model.encoder.state_dict().items())
    model.freeze_encoder(frozen=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    found = answers(loaded, "bert")
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    assert loaded.is_quantized
    with pytest.raises(UnsupportedEncoderError, match="expected float weights to write a plain"):
        loaded.to_stock("mood")


def test_what_cannot_be_done_with_adapters_is_said() -> None:
    model = adapted("bert")
    with pytest.raises(UnsupportedEncoderError, match="without adapters for pruning"):
        prune(model, [], heads=0.5)
    with pytest.raises(UnsupportedEncoderError, match="without adapters for taking layers"):
        student_of(model, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 1 or more"),
        ({"alpha": 0.0}, "alpha above 0"),
        ({"dropout": 1.0}, "dropout from 0 to below 1"),
        ({"targets": "query"}, r"targets among \['attention', 'feed_forward', 'all'\]"),
        ({"tasks": ["moood"]}, r"among \['mood', 'strength'\], found \['moood'\]"),
        ({"tasks": ["mood", "mood"]}, "different tasks"),
        ({"tasks": []}, "one or more"),
    ],
)
def test_adapters_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    model = plain("bert")
    with pytest.raises(TaskError, match=message):
        model.add_adapters(**settings)
    assert not len(model.adapters)
    assert model.encoder.embeddings.word_embeddings.weight.requires_grad, "nothing is half done"


def test_a_second_adapter_is_refused() -> None:
    model = adapted("bert", tasks=["mood"])
    with pytest.raises(TaskError, match=r"without an adapter, among \['strength'\]"):
        model.add_adapters()


def test_tasks_that_read_a_part_are_refused() -> None:
    branched = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks("bert"), branches={"side": ["strength"]})
    with pytest.raises(UnsupportedEncoderError, match=r"found encoder .side. and layer None"):
        branched.add_adapters()
    deep = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks("bert", layer=1))
    with pytest.raises(UnsupportedEncoderError, match=r"found encoder .main. and layer 1"):
        deep.add_adapters()


@pytest.mark.parametrize("adapters", [{"mood": {"rank": 4, "shape": "round"}}, {"other": {"rank": 4}}])
def test_a_config_of_another_version_is_refused(adapters: dict[str, Any]) -> None:
    config = plain("bert").config
    config.adapters = adapters
    with pytest.raises(ArtifactError, match="expected adapters of the tasks"):
        MultiTaskModel(config)


def test_the_defaults_are_those_of_a_recipe() -> None:
    model = plain("bert")
    model.add_adapters()
    assert model.adapters["task_mood"].settings == AdapterConfig()
