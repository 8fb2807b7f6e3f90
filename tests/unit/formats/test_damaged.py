"""A damaged folder, and one from another version, say what is wrong and what to do; they never just answer."""

import json
import shutil
from pathlib import Path

import onnx
import pytest

from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.formats.graph_settings import read_graph_settings, write_graph_settings
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.records.forms import ONNX_MODEL
from tests.unit.formats.artefacts import saved_text


def _copy(form: str, folder: Path) -> Path:
    return shutil.copytree(saved_text().folders[form], folder / form)


@pytest.mark.parametrize(
    ("form", "file", "message"),
    [
        ("torch", "model.safetensors", "expected whole weights"),
        ("torch", "config.json", "expected JSON"),
        ("torch", "tokenizer.json", "expected a tokenizer or image processor that loads"),
        ("vanilla", "mood/model.safetensors", "expected whole weights"),
        ("onnx", ONNX_MODEL, "found another content"),
        ("int8", "mtcompress_onnx.json", "expected JSON with a format_version"),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["empty", "cut"])
def test_a_download_that_broke_off(form: str, file: str, message: str, share: float, tmp_path: Path):
    path = _copy(form, tmp_path) / file
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ArtifactError, match=message):
        load_predictor(tmp_path / form)


def test_code_of_a_tokenizer_is_refused_without_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers asks at the terminal where nothing was said, and a job waits there."""
    folder = _copy("onnx", tmp_path)
    path = folder / "tokenizer_config.json"
    strange = {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": [None, "code.Strange"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **strange}))
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Strange: pass\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    with pytest.raises(ArtifactError, match="expected a tokenizer or image processor that loads"):
        load_predictor(folder)
    assert not asked
    assert not ran.exists()


def test_a_flipped_bit_of_a_graph(tmp_path: Path):
    """ONNX Runtime would open it and answer wrongly."""
    path = _copy("int8", tmp_path) / ONNX_MODEL
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"found another content; copy or download the folder again"):
        load_predictor(tmp_path / "int8")


def test_a_graph_for_a_newer_runtime(tmp_path: Path):
    """An operator set or a kernel that the installed version does not have."""
    folder = _copy("onnx", tmp_path)
    model = onnx.load(folder / ONNX_MODEL)
    model.graph.node[0].op_type = "OperatorOfTomorrow"
    onnx.save(model, folder / ONNX_MODEL)
    write_graph_settings(folder, read_graph_settings(folder))
    with pytest.raises(ArtifactError, match=r"expected a graph that onnxruntime .* opens.* install that or a newer"):
        load_predictor(folder)


def test_folders_without_a_digest_still_open(tmp_path: Path):
    """Older versions wrote none."""
    folder = _copy("onnx", tmp_path)
    path = folder / "mtcompress_onnx.json"
    text = path.read_text()
    digest = read_graph_settings(folder).sha256
    assert len(digest) == 64
    path.write_text(text.replace(digest, ""))
    assert load_predictor(folder).predict(["a fox"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer_class": -1}, "that loads from"),
        ({"pad_token": 3}, "that loads from"),
        ({"model_input_names": ["x"]}, "that loads from"),
        ({"model_input_names": ["input_ids", "attention_mask"]}, "that makes the graph's inputs"),
        ({"model_max_length": [[]]}, "that loads from"),
    ],
)
def test_settings_of_a_tokenizer_that_cannot_be(values: dict[str, object], message: str, tmp_path: Path):
    """They were noticed at the first text, in the words of another library."""
    folder = _copy("onnx", tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    settings = folder / "mtcompress_onnx.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "preprocessing": {}}))
    with pytest.raises(ArtifactError, match=f"expected a tokenizer or image processor .*{message}"):
        load_predictor(folder)


def test_what_opens_answers(tmp_path: Path):
    """A token beyond the encoder's table, or a setting of its forward, was noticed at the first text."""
    folder = _copy("torch", tmp_path)
    path = folder / "tokenizer_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "cls_token": "[BEGINNING]"}))
    with pytest.raises(ArtifactError, match="IndexError"):
        load_predictor(folder)
    path.write_text(before)
    config = json.loads((folder / "config.json").read_text())
    config["encoders"]["main"]["chunk_size_feed_forward"] = 10**6
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="chunk size 1000000"):
        load_predictor(folder)
