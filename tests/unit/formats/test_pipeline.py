"""`pipeline("multi-task")` answers like `predict`, and transformers finds it by name."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from hf_mtcompress.errors import ArtifactError, DataError, TaskError
from hf_mtcompress.formats.pipeline import MultiTaskPipeline
from hf_mtcompress.formats.predictor import load_predictor
from tests.tiny import tiny_encoder, tiny_tokenizer
from tests.unit.formats.artefacts import saved_images, saved_text
from tests.unit.formats.test_predictor import TEXTS, same

pipeline: Any = transformers.pipeline  # its type lists the tasks of transformers only


def test_texts():
    """The pipeline pads, splits and decodes by itself: each could differ from `predict`."""
    folder = saved_text().folders["torch"]
    pipe = pipeline("multi-task", model=str(folder), device="cpu")
    assert type(pipe) is MultiTaskPipeline
    expected = load_predictor(folder).predict(TEXTS)
    assert same(pipe(TEXTS[0]), expected[0])
    assert same(pipe(list(TEXTS)), expected)
    assert same(pipe(list(TEXTS), batch_size=5), expected)
    assert same(pipe({"text": TEXTS[0].split()}), expected[0])


def test_images():
    """The image processor must be loaded without a tokenizer at hand."""
    saved = saved_images()
    pipe = pipeline("multi-task", model=str(saved.folders["torch"]), device="cpu")
    expected = load_predictor(saved.folders["torch"]).predict(saved.samples)
    assert same(pipe(saved.samples), expected)


def test_chosen_tasks_and_pairs():
    """A pair takes two segments; a word-level task has no answer for it."""
    folder = saved_text().folders["torch"]
    pipe = pipeline("multi-task", model=str(folder), device="cpu")
    pair = {"text": "the fox sleeps", "text_pair": "the owl waits"}
    expected = load_predictor(folder).predict([("the fox sleeps", "the owl waits")], tasks=["mood"])[0]
    assert same(pipe(pair, tasks=["mood"]), expected)
    assert same(pipe(pair, tasks="mood"), expected)
    with pytest.raises(DataError, match=r"expected the keys text and perhaps text_pair, found \['txt'\]"):
        pipe({"txt": "the fox"})
    with pytest.raises(DataError, match="expected one text, found pairs"):
        pipe(pair)
    with pytest.raises(TaskError, match="moods"):
        pipe("the fox", tasks=["moods"])
    with pytest.raises(TypeError, match="top_k"):
        pipe("the fox", top_k=3)


def test_saved_pipeline_opens_again(tmp_path: Path):
    """transformers copies the code of a registered class beside the weights, and then refuses to run it."""
    pipe = pipeline("multi-task", model=str(saved_text().folders["torch"]), device="cpu")
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert same(pipeline("multi-task", model=str(tmp_path), device="cpu")(TEXTS[0]), pipe(TEXTS[0]))


def test_stock_pipelines_open_vanilla_folders():
    """An exported task that needs this package to run would not be vanilla."""
    folder = saved_text().folders["vanilla"]
    answer = pipeline("text-classification", model=str(folder / "mood"), device="cpu")(TEXTS[0])
    expected = load_predictor(saved_text().folders["torch"]).predict([TEXTS[0]])[0]["mood"]
    assert same(answer[0], expected)


def test_what_a_pipeline_lacks_is_told_when_it_is_made(tmp_path: Path):
    """Not at the first text, as an attribute of None."""
    folder = shutil.copytree(saved_text().folders["torch"], tmp_path / "torch")
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ArtifactError, match="expected a tokenizer or image processor beside the model in"):
        pipeline("multi-task", model=str(folder))
    with pytest.raises(ArtifactError, match="found BertModel; use the pipeline of its own task"):
        pipeline("multi-task", model=tiny_encoder("bert"), tokenizer=tiny_tokenizer())
