"""A saved folder opens whole or not at all, by every way of opening; what is wrong is told before memory is taken."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, BertForMaskedLM, pipeline

from hf_mtcompress import MultiTaskModel, load_predictor, save_sparse
from hf_mtcompress.errors import ArtifactError, MTCompressError, UnsupportedEncoderError
from hf_mtcompress.model.surgery import cut
from tests.tiny import tiny_config, tiny_encoder, tiny_tokenizer
from tests.unit.formats.artefacts import saved_text

WEIGHTS = "model.safetensors"
MATRIX = "encoder.layer.1.output.dense.weight"

WAYS: dict[str, Callable[[Path], Any]] = {
    "predictor": load_predictor,
    "model": MultiTaskModel.from_pretrained,
    "auto": AutoModel.from_pretrained,
    "one task": lambda folder: AutoModelForSequenceClassification.from_pretrained(folder, task="mood"),
}


def _copy(form: str, folder: Path) -> Path:
    return shutil.copytree(saved_text().folders[form], folder / form)


def _drop(folder: Path, is_dropped: Callable[[str], bool]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    kept = {name: value for name, value in tensors.items() if not is_dropped(name)}
    save_file(kept, folder / WEIGHTS, {"format": "pt"})
    return folder


def _change(folder: Path, value: Any, *path: Any, file: str = "config.json") -> Path:
    """Put a value into a settings file."""
    values = json.loads((folder / file).read_text())
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / file).write_text(json.dumps(values))
    return folder


# ---- tensors ----


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("is_dropped", "message"),
    [
        (lambda name: name.endswith(MATRIX), f"found 1 missing .encoders.main.{MATRIX}"),
        (lambda name: "task_mood" in name, "found 2 missing .heads.task_mood.classifier.bias"),
        (lambda name: True, "found 63 missing"),
    ],
    ids=["a tensor", "a head", "all"],
)
def test_what_is_missing_is_not_drawn_at_random(way: str, is_dropped: Any, message: str, tmp_path: Path):
    """It opened, and answered otherwise from load to load."""
    folder = _drop(_copy("torch", tmp_path), is_dropped)
    with pytest.raises(ArtifactError, match=message):
        WAYS[way](folder)


def test_a_pipeline_tells_the_same(tmp_path: Path):
    """transformers puts what happened into an error of its own."""
    folder = _drop(_copy("torch", tmp_path), lambda name: "task_mood" in name)
    with pytest.raises(ValueError, match=r"2 missing \(heads.task_mood"):
        pipeline("multi-task", model=str(folder))


@pytest.mark.parametrize("way", WAYS)
def test_layers_that_the_config_does_not_have(way: str, tmp_path: Path):
    """A config with fewer layers opened, and answered with fewer."""
    folder = _change(_copy("torch", tmp_path), 2, "encoders", "main", "num_hidden_layers")
    with pytest.raises(ArtifactError, match=r"found 16 unexpected \(encoders.main.encoder.layer.2"):
        WAYS[way](folder)


def test_mis_shaped_tensors_are_told_by_name(tmp_path: Path):
    folder = _change(_copy("torch", tmp_path), 80, "encoders", "main", "intermediate_size")
    with pytest.raises(ArtifactError, match=r"9 mis-shaped \(encoders.main.encoder.layer.0.intermediate.dense.b"):
        load_predictor(folder)


def test_tensors_of_a_plain_folder_and_its_layers(tmp_path: Path):
    folder = _copy("vanilla", tmp_path)
    _drop(folder / "mood", lambda name: "classifier" in name)
    with pytest.raises(ArtifactError, match=r"mood, found 2 missing \(classifier.bias"):
        load_predictor(folder)
    shutil.rmtree(folder)
    _change(_copy("vanilla", tmp_path) / "mood", 0, "num_hidden_layers")
    with pytest.raises(ArtifactError, match=r"mood, found 48 unexpected \(bert.encoder.layer.0"):
        load_predictor(folder)


def test_tensors_of_unevenly_cut_folders(tmp_path: Path):
    """Opened by the family's own Auto class, which draws what is missing."""
    model = MultiTaskModel.from_pretrained(saved_text().folders["torch"])
    cut(model.encoder, heads={0: [0], 1: [0, 1]}, feed_forward={0: list(range(10))})
    folder = model.export_task("mood", tmp_path, tiny_tokenizer())
    whole = load_file(folder / WEIGHTS)
    assert AutoModelForSequenceClassification.from_pretrained(folder).num_labels == 3
    _drop(folder, lambda name: name.endswith(MATRIX))
    with pytest.raises(ArtifactError, match=f"found 1 missing .bert.{MATRIX}"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    save_file(whole, folder / WEIGHTS, {"format": "pt"})
    _change(folder, 10**8, "vocab_size")
    with pytest.raises(ArtifactError, match=r"expected a config.json that fits the weights"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_adapters_that_lack_matrices(tmp_path: Path):
    model = MultiTaskModel.from_pretrained(saved_text().folders["torch"])
    model.add_adapters(["mood"], rank=2)
    model.save_pretrained(tmp_path)
    _drop(tmp_path, lambda name: "lora_A" in name)
    with pytest.raises(ArtifactError, match=r"found 12 missing \(adapters.task_mood"):
        MultiTaskModel.from_pretrained(tmp_path)


# ---- other models ----


def test_an_encoder_is_no_multi_task_model(tmp_path: Path):
    """It gave a model without a part."""
    tiny_encoder("bert").save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=r"found a model of type 'bert'; put heads on .*from_encoder"):
        MultiTaskModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_encoder_saved_as_a_masked_language_model(layers: int, tmp_path: Path):
    """It has no pooler, which in a small encoder is more than one tensor in twenty."""
    BertForMaskedLM(tiny_config("bert", num_hidden_layers=layers)).save_pretrained(tmp_path)
    model = MultiTaskModel.from_encoder(tmp_path, list(saved_text().model.tasks.values()))
    assert model.config.encoder_config().num_hidden_layers == layers
    _drop(tmp_path, lambda name: name.endswith("layer.0.output.dense.weight"))
    with pytest.raises(UnsupportedEncoderError, match=r"1 of .* are missing \(such as 'encoder.layer.0.output.dense"):
        MultiTaskModel.from_encoder(tmp_path, list(saved_text().model.tasks.values()))


# ---- configs ----


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("encoders", "main", "num_hidden_layers"), 0, "num_hidden_layers of at least 1"),
        (("encoders", "main", "num_attention_heads"), 0, "num_attention_heads of at least 1"),
        (("encoders", "main", "num_attention_heads"), -4, "num_attention_heads of at least 1"),
        (("encoders", "main", "hidden_size"), "a", "that opens, found one that does not"),
        (("encoders", "main"), {"vocab_size": 3}, "a config with a model_type for the encoder 'main'"),
        (("encoders",), "x", "that opens, found one that does not"),
        (("encoders",), {}, "expected an encoder among "),
        (("preprocessing", "main", "max_length"), -5, "found preprocessing.main.max_length: Input should be greater"),
        (("tasks",), [], "with encoders and tasks"),
        (("tasks", 0, "labels"), "abc", "expected a list of labels"),
        (("tasks", 0, "name"), "tags", "tasks of different names"),
        (("tasks", 0, "kind"), ["a"], "expected a task kind"),
        (("tasks", 0, "weight"), "a", "expected the fields of a task"),
        (("tasks", 0, "strange"), 1, "expected the fields of a task"),
        (("branches",), {"a": 3}, "found branches.a"),
        (("adapters",), {"mood": {"rank": 0}}, "that opens, found one that does not"),
        (("structure",), {"main": {"layers": [{"heads": -4, "feed_forward": 3}] * 3}}, "heads"),
        (("structure",), {"main": {"layers": [3] * 3}}, "that opens, found one that does not"),
    ],
)
def test_configs_that_cannot_be(path: tuple[Any, ...], value: Any, message: str, tmp_path: Path):
    """ZeroDivisionError, KeyError and AttributeError of other libraries, or answers that fail at the first text."""
    folder = _change(_copy("torch", tmp_path), value, *path)
    for way in ("predictor", "model"):
        with pytest.raises(MTCompressError, match=message):
            WAYS[way](folder)


@pytest.mark.parametrize("text", ["[1]", "3", "[" * 5000])
def test_a_config_that_is_no_object(text: str, tmp_path: Path):
    (_copy("torch", tmp_path) / "config.json").write_text(text)
    for way in ("predictor", "model"):
        with pytest.raises(ArtifactError, match=r"expected (JSON|a JSON object)"):
            WAYS[way](tmp_path / "torch")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("encoders", "main", "num_hidden_layers"), 10**9),
        (("encoders", "main", "intermediate_size"), 10**8),
        (("encoders", "main", "vocab_size"), 10**9),
        (("encoders", "main", "max_position_embeddings"), 10**9),
        (("adapters",), {"mood": {"rank": 10**8}}),
    ],
)
@pytest.mark.parametrize("way", ["predictor", "auto"])
def test_numbers_of_a_config_take_no_memory(way: str, path: tuple[Any, ...], value: int, tmp_path: Path):
    """They were taken at their word: gigabytes, or a machine that swaps."""
    folder = _change(_copy("torch", tmp_path), value, *path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=r"fits the weights|of at most 1024"):
        WAYS[way](folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_numbers_of_other_configs_take_no_memory(tmp_path: Path):
    """Of an encoder, of a plain folder, of an adapter, and of a mask of zeros."""
    saved = saved_text()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    BertForMaskedLM(tiny_config("bert")).save_pretrained(tmp_path / "encoder")
    _change(tmp_path / "encoder", 10**9, "max_position_embeddings")
    with pytest.raises(ArtifactError, match="fits the weights"):
        MultiTaskModel.from_encoder(tmp_path / "encoder", list(saved.model.tasks.values()))
    _change(_copy("vanilla", tmp_path) / "mood", 10**9, "num_labels")
    with pytest.raises(ArtifactError, match="'num_labels' of at most"):
        load_predictor(tmp_path / "vanilla")
    model = MultiTaskModel.from_pretrained(saved.folders["torch"])
    with torch.no_grad():
        model.encoder.embeddings.word_embeddings.weight[3:] = 0
    save_sparse(model, tmp_path / "sparse")
    tensors = load_file(tmp_path / "sparse" / WEIGHTS)
    mask = next(name for name in tensors if name.endswith("_mask"))
    save_file({**tensors, mask: torch.zeros(10**8, dtype=torch.uint8)}, tmp_path / "sparse" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ArtifactError, match="automatic conversion"):
        AutoModel.from_pretrained(tmp_path / "sparse")
    model = MultiTaskModel.from_pretrained(saved.folders["torch"])
    model.add_adapters(["mood"], rank=2)
    model.save_adapters(tmp_path / "adapters")
    _change(tmp_path / "adapters" / "mood", 10**8, "adapter", "rank", file="mtcompress_adapter.json")
    with pytest.raises(ArtifactError, match="expected matrices of rank 100000000"):
        MultiTaskModel.from_pretrained(saved.folders["torch"]).load_adapters(tmp_path / "adapters")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kilobytes


@pytest.mark.parametrize("content", [b"\x80\x04cposix\nsystem\n(X\x02\x00\x00\x00idtR.", b"", None])
def test_pickles_are_not_opened(content: bytes | None, tmp_path: Path):
    """torch's own message proposes to run them."""
    folder = _copy("torch", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if content is None:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(content)
    for way in ("predictor", "model"):
        with pytest.raises(ArtifactError, match=r"pytorch_model.bin, which is not opened: pickles run code"):
            WAYS[way](folder)


# ---- graphs ----


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("tasks", 0, "labels"), ["a", "b"], r"expected logits for {'mood': 2} .* found {'mood': 3}"),
        (("tasks", 0, "name"), "other", r"expected logits for {'other': 3} .* found {'other': 'none'}"),
        (("tasks",), [], "found tasks: List should have at least 1 item"),
        (("tasks",), "abc", "found tasks: Input should be a valid"),
        (("preprocessing", "max_length"), -5, "found preprocessing.max_length: Input should be greater"),
        (("format_version",), "x", "expected JSON with a format_version"),
    ],
)
def test_settings_that_do_not_fit_a_graph(path: tuple[Any, ...], value: Any, message: str, tmp_path: Path):
    """They opened, and failed at the first text."""
    folder = _change(_copy("onnx", tmp_path), value, *path, file="mtcompress_onnx.json")
    with pytest.raises(ArtifactError, match=message):
        load_predictor(folder)
