"""The OpenVINO graph answers like the model, and eight bits reach matrices and tables."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_mtcompress.errors import ArtifactError, RecipeError
from hf_mtcompress.evaluation.benchmark import benchmark, measure_size
from hf_mtcompress.formats.folders import folder_form
from hf_mtcompress.formats.graph_settings import read_graph_settings, write_graph_settings
from hf_mtcompress.formats.onnx.graphs import largest_difference
from hf_mtcompress.formats.openvino.export import convert_openvino
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.recipe import BenchmarkConfig
from hf_mtcompress.records.forms import OPENVINO_MODEL, OPENVINO_SETTINGS, OPENVINO_WEIGHTS
from tests.unit.formats.artefacts import Saved, moved_by_company, saved_images, saved_text


@pytest.fixture(params=[saved_text, saved_images], ids=["text", "images"])
def saved(request: pytest.FixtureRequest) -> Saved:
    return request.param()


@cache
def converted(kind: str, bits: int) -> Path:
    """Made once; tests that change it take a copy."""
    saved = saved_text() if kind == "text" else saved_images()
    rows = [{name: array[row : row + 1] for name, array in saved.inputs.items()} for row in range(3)]
    folder = saved.folders["onnx"].parent / f"openvino{bits}"
    return convert_openvino(saved.folders["onnx"], folder, bits, rows=rows if bits == 8 else ())


def _kind(saved: Saved) -> str:
    return "images" if "pixel_values" in saved.inputs else "text"


def test_graph_equals_model(saved: Saved):
    """On any batch and length, not only on those that it was traced with."""
    predictor = load_predictor(converted(_kind(saved), 32), threads=1)
    assert largest_difference(predictor.logits(saved.inputs), saved.logits()) < 1e-4
    one = {name: array[:1] for name, array in saved.inputs.items()}
    found, expected = predictor.logits(one), load_predictor(saved.folders["onnx"], threads=1).logits(one)
    assert largest_difference(found, expected) < 1e-4


def test_eight_bits_are_near_and_small(saved: Saved):
    """Matrices and tables in 8 bits; a table left in float would be half of a small encoder."""
    kind = _kind(saved)
    found = load_predictor(converted(kind, 8), threads=1).logits(saved.inputs)
    assert largest_difference(found, saved.logits()) < 0.5
    settings = read_graph_settings(converted(kind, 8), "openvino")
    assert settings.precision == "int8"
    assert settings.quantization["calibration"] == {"method": "nncf", "batches": 3}
    whole = read_graph_settings(converted(kind, 32), "openvino")
    assert sum(whole.stored_bytes.values()) / sum(settings.stored_bytes.values()) > 2
    size, before = measure_size(converted(kind, 8)), measure_size(converted(kind, 32))
    assert size.parameters == before.parameters
    assert size.weights_bytes < before.weights_bytes
    if kind == "text":
        table = saved.model.encoder.get_input_embeddings().weight
        assert whole.embedding_bytes is not None
        assert settings.embedding_bytes is not None
        assert whole.embedding_bytes >= 4 * table.numel()
        assert settings.embedding_bytes < whole.embedding_bytes / 3


def test_answers_do_not_depend_on_their_company():
    """What is offered to those who cannot have that of dynamic 8 bits."""
    saved = saved_text()
    assert moved_by_company(converted("text", 8), saved.inputs) == 0


def test_a_call_leaves_the_answers_of_the_last_one_alone():
    """OpenVINO writes every result into the same memory."""
    saved = saved_text()
    predictor = load_predictor(converted("text", 32), threads=1)
    first = predictor.logits({name: array[:2] for name, array in saved.inputs.items()})
    kept = {name: array.copy() for name, array in first.items()}
    predictor.logits({name: array[2:4] for name, array in saved.inputs.items()})
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])


def test_threads_do_not_disturb_each_other():
    """A server shares one predictor among its threads, and one request would be written into by all of them."""
    saved = saved_text()
    predictor = load_predictor(converted("text", 32), threads=1)
    batches = [{name: array[row : row + 1] for name, array in saved.inputs.items()} for row in range(5)]
    expected = [predictor.logits(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(lambda number: predictor.logits(batches[number % 5]), range(200))):
            for name, array in found.items():
                np.testing.assert_array_equal(array, expected[number % 5][name])


def test_answers_are_those_of_another_process():
    """Bit for bit, in 8 bits too."""
    saved = saved_text()
    folder = converted("text", 8)
    np.savez(folder.parent / "inputs.npz", **saved.inputs)
    script = (
        "import sys, numpy as np; from hf_mtcompress.formats.predictor import load_predictor\n"
        "found = load_predictor(sys.argv[1], threads=1).logits(dict(np.load(sys.argv[2])))\n"
        "np.savez(sys.argv[3], **found)\n"
    )
    place = folder.parent / "answers.npz"
    command = [sys.executable, "-c", script, str(folder), str(folder.parent / "inputs.npz"), str(place)]
    subprocess.run(command, check=True, capture_output=True)
    other = np.load(place)
    for name, array in load_predictor(folder, threads=1).logits(saved.inputs).items():
        np.testing.assert_array_equal(other[name], array)


def test_no_paths_of_this_machine():
    """The graph is XML and goes up to the Hub as it is."""
    for bits in (32, 8):
        text = (converted("text", bits) / OPENVINO_MODEL).read_text(encoding="utf-8")
        assert str(saved_text().folders["onnx"].parent) not in text
        assert "site-packages" not in text


def test_it_is_timed_beside_other_forms():
    saved = saved_text()
    folders = {"torch": saved.folders["torch"], "openvino": converted("text", 8)}
    config = BenchmarkConfig(tokens=8, batch_sizes=(1,), repetitions=2, threads=1)
    result = benchmark(folders, reference="torch", config=config, samples=saved.samples)
    assert (result.latency["openvino"][0].minimum_ms or 0) > 0
    assert result.latency["openvino"][0].tokens == result.latency["torch"][0].tokens


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (OPENVINO_WEIGHTS, "found another content"),
        (OPENVINO_MODEL, "found another content"),
        (OPENVINO_SETTINGS, "expected JSON with a format_version"),
    ],
)
def test_damaged_folders_are_refused(file: str, message: str, tmp_path: Path):
    folder = shutil.copytree(converted("text", 32), tmp_path / "openvino")
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    assert folder_form(folder) == "openvino"
    with pytest.raises(ArtifactError, match=message):
        load_predictor(folder)
    (folder / file).unlink()
    with pytest.raises(ArtifactError, match="expected"):
        load_predictor(folder)


def test_a_graph_for_a_newer_runtime(tmp_path: Path):
    folder = shutil.copytree(converted("text", 32), tmp_path / "openvino")
    path = folder / OPENVINO_MODEL
    path.write_text(path.read_text().replace('type="MatMul"', 'type="MatMulOfTomorrow"'))
    write_graph_settings(folder, read_graph_settings(folder, "openvino"), "openvino")
    with pytest.raises(ArtifactError, match=r"openvino .* opens .* install that or a newer one"):
        load_predictor(folder)


def test_what_cannot_be_converted_is_refused(tmp_path: Path):
    saved = saved_text()
    arguments: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (saved.folders["onnx"], {"bits": 4}, RecipeError, "bits: expected 32 or 8"),
        (saved.folders["onnx"], {"bits": 8}, RecipeError, "calibration: expected at least one row"),
        (saved.folders["int8"], {}, ArtifactError, "expected a float32 graph"),
        (saved.folders["torch"], {}, ArtifactError, "expected 'mtcompress_onnx.json'"),
    ]
    for source, options, kind, message in arguments:
        with pytest.raises(kind, match=message):
            convert_openvino(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
