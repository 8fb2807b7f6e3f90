"""Folders for transformers.js hold what it looks for, and answer as the stock models do."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from transformers import pipeline

from hf_mtcompress.errors import TaskError
from hf_mtcompress.formats.onnx.graphs import largest_difference
from hf_mtcompress.formats.onnx.session import run_session
from hf_mtcompress.formats.transformers_js import GRAPH_NAMES, write_transformers_js, wrong_there
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import ImageClassification, SequenceClassification, TokenClassification
from tests.tiny import tiny_encoder
from tests.unit.formats.artefacts import Saved, saved_images, saved_text

TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"  # the version that the slow test was written with


@pytest.fixture(params=[saved_text, saved_images], ids=["text", "images"])
def saved(request: pytest.FixtureRequest) -> Saved:
    return request.param()


def test_files_have_the_names_that_transformers_js_asks_for(saved: Saved, tmp_path: Path):
    """One name off, and it looks for the file on the Hub."""
    found = write_transformers_js(saved.model, saved.processor, saved.folders["onnx"], tmp_path / "js")
    assert list(found) == [name for name in saved.model.tasks if name != "intensity"]
    for name, files in found.items():
        folder = tmp_path / "js" / name
        assert list(files) == [f"onnx/{file}" for file in GRAPH_NAMES.values()]
        assert all((folder / file).stat().st_size == facts["bytes"] for file, facts in files.items())
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == saved.model.encoder.config.model_type
        assert len(config["id2label"]) == saved.model.tasks[name].num_outputs
        reader = "preprocessor_config.json" if "pixel_values" in saved.inputs else "tokenizer.json"
        assert (folder / reader).is_file()


def test_the_float_graph_answers_like_the_model(saved: Saved, tmp_path: Path):
    """The output is called `logits`, and a name that is left behind is a graph that does not load."""
    write_transformers_js(saved.model, saved.processor, saved.folders["onnx"], tmp_path / "js")
    for name, expected in saved.logits().items():
        if name == "intensity":
            continue
        for file in GRAPH_NAMES.values():
            path = tmp_path / "js" / name / "onnx" / file
            assert [output.name for output in onnx.load(path).graph.output] == ["logits"]
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            found = run_session(session, saved.inputs)
            difference = largest_difference(found, {"logits": expected})
            assert difference < (1e-4 if file == "model.onnx" else 1.0), file


@pytest.mark.parametrize("saved_as", [saved_text, saved_images], ids=["text", "images"])
def test_a_number_gets_no_folder(saved_as: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Pipelines of transformers.js take the softmax of one number: 1 for every text and picture."""
    saved = saved_as()
    write_transformers_js(saved.model, saved.processor, saved.folders["onnx"], tmp_path / "js")
    assert not (tmp_path / "js" / "intensity").exists()
    assert "intensity: no folder for transformers.js" in caplog.text


def test_what_transformers_js_answers_rightly():
    several: dict[str, Any] = {"labels": ["fox", "owl"], "problem_type": "multi_label_classification"}
    assert wrong_there(SequenceClassification("topics", **several)) is None
    assert wrong_there(TokenClassification("tags", labels=["O", "B-fox"])) is None
    assert wrong_there(ImageClassification("animal", labels=["fox", "owl"])) is None
    assert "knows one label only" in str(wrong_there(ImageClassification("animals", **several)))


def test_numbers_alone_are_refused(tmp_path: Path):
    task = SequenceClassification("strength", problem_type="regression")
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [task])
    with pytest.raises(TaskError, match=r"expected a task that transformers[.]js answers, found strength, whose"):
        write_transformers_js(model, None, tmp_path, tmp_path / "js")


def test_what_is_measured_is_what_is_written(tmp_path: Path):
    """A score of another graph would be believed."""
    saved = saved_text()
    seen: list[tuple[str, str, int]] = []

    def measure(task: str, folder: Path) -> dict[str, Any]:
        precision = json.loads((folder / "mtcompress_onnx.json").read_text())["precision"]
        seen.append((task, precision, (folder / "model.onnx").stat().st_size))
        return {"accuracy": len(seen)}

    found = write_transformers_js(saved.model, saved.processor, saved.folders["onnx"], tmp_path / "js", measure)
    assert [precision for task, precision, _ in seen if task == "mood"] == ["float32", "int8", "int4"]
    assert found["mood"]["onnx/model_quantized.onnx"]["accuracy"] == 2
    for task, precision, size in seen:
        file = {"float32": "model.onnx", "int8": "model_quantized.onnx", "int4": "model_q4.onnx"}[precision]
        # Renaming an output changes some bytes of names, nothing else.
        assert abs(found[task][f"onnx/{file}"]["bytes"] - size) < 200


_SCRIPT = """
import { env, pipeline, RawImage } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = "/";
const { jobs } = JSON.parse(process.argv[2]);
const results = [];
for (const { task, folder, dtype, input, options } of jobs) {
  const answer = await pipeline(task, folder, { dtype });
  results.push(await answer(input, options));
}
console.log(JSON.stringify(results));
"""


@pytest.mark.slow
def test_transformers_js_answers_like_the_pipelines_of_transformers(tmp_path: Path):
    """Sentences, words and pictures, in Node.js: the folders open without a word about their origin."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("Node.js is not installed")
    install = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", TRANSFORMERS_JS]
    done = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        pytest.skip(f"npm could not fetch transformers.js: {done.stderr.strip().splitlines()[-1:]}")
    text, images = saved_text(), saved_images()
    for kind, saved in (("text", text), ("images", images)):
        write_transformers_js(saved.model, saved.processor, saved.folders["onnx"], tmp_path / kind)
    picture = tmp_path / "picture.png"
    images.samples[0].save(picture)
    sentence = text.samples[0]
    jobs: list[dict[str, Any]] = []
    for dtype in ("fp32", "q8", "q4"):
        for task, folder, given, options in (
            ("text-classification", "text/mood", sentence, {"top_k": None}),
            ("token-classification", "text/tags", sentence, {"ignore_labels": []}),
            ("image-classification", "images/colour", str(picture), {"top_k": 3}),
        ):
            jobs.append(
                {"task": task, "folder": str(tmp_path / folder), "dtype": dtype, "input": given, "options": options}
            )
    (tmp_path / "ask.mjs").write_text(_SCRIPT)
    done = subprocess.run(
        [node, "ask.mjs", json.dumps({"jobs": jobs})], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.strip().splitlines()[-1])
    for job, found in zip(jobs[:3], answers[:3], strict=True):
        name = Path(job["folder"]).name
        kind = Path(job["folder"]).parent.name
        saved = text if kind == "text" else images
        folder = saved.folders["vanilla"] / name
        expected: Any = pipeline(job["task"], model=str(folder))(job["input"], **_python_options(job))
        key = "entity" if job["task"] == "token-classification" else "label"
        assert [item[key] for item in found] == [item[key] for item in expected]
        np.testing.assert_allclose(
            [item["score"] for item in found], [item["score"] for item in expected], atol=1e-3, err_msg=name
        )
    for float_, eight, four in zip(answers[:3], answers[3:6], answers[6:], strict=True):
        assert len(float_) == len(eight) == len(four)


def _python_options(job: dict[str, Any]) -> dict[str, Any]:
    return job["options"] if job["task"] != "token-classification" else {"ignore_labels": []}
