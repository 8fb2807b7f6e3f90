"""One `predict` over every form gives the same answers in the words of the tasks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_mtcompress.errors import ArtifactError, DataError, TaskError
from hf_mtcompress.formats.folders import folder_form
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.formats.vanilla import stock_task
from hf_mtcompress.records.forms import ONNX_SETTINGS
from tests.tiny import tiny_image_rows, tiny_text_rows, tiny_token_rows
from tests.unit.formats.artefacts import MAX_LENGTH, saved_images, saved_text

TEXTS = list(tiny_text_rows(12, seed=8)["text"])


def same(found: Any, expected: Any) -> bool:
    """Equal, with scores and numbers equal to 1e-4."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return found == pytest.approx(expected, abs=1e-4)
    return found == expected


@pytest.mark.parametrize("form", ["vanilla", "onnx"])
def test_text_answers_are_the_same_in_every_form(form: str):
    """Another order of labels or of rows gives other answers without any error."""
    saved = saved_text()
    expected = load_predictor(saved.folders["torch"]).predict(TEXTS, batch_size=4)
    found = load_predictor(saved.folders[form]).predict(TEXTS, batch_size=5)
    assert all(set(row) == {"mood", "tags", "intensity", "topics"} for row in expected)
    for left, right in zip(found, expected, strict=True):
        assert same(dict(sorted(left.items())), dict(sorted(right.items())))


@pytest.mark.parametrize("form", ["vanilla", "onnx"])
def test_image_answers_are_the_same_in_every_form(form: str):
    """Pixels that are scaled or ordered otherwise in one form change answers a little, everywhere."""
    saved = saved_images()
    images = list(tiny_image_rows(5, seed=8)["image"])
    expected = load_predictor(saved.folders["torch"]).predict(images, batch_size=2)
    found = load_predictor(saved.folders[form]).predict(images)
    assert all(same(left, right) for left, right in zip(found, expected, strict=True))


def test_answers_do_not_depend_on_the_company():
    """Rows are sorted by length for speed: a wrong way back, or padding that leaks, shows here."""
    predictor = load_predictor(saved_text().folders["torch"])
    together = predictor.predict(TEXTS, batch_size=7)
    alone = [predictor.predict([text])[0] for text in TEXTS]
    assert all(same(left, right) for left, right in zip(together, alone, strict=True))


def test_answers_are_what_the_logits_say():
    """The label of the largest logit, a number, labels above one half, one label a word."""
    saved = saved_text()
    logits = saved.logits()
    answers = load_predictor(saved.folders["torch"]).predict(saved.samples)
    for row, answer in enumerate(answers):
        labels = saved.model.tasks["mood"].labels
        assert labels is not None
        assert answer["mood"]["label"] == labels[int(logits["mood"][row].argmax())]
        assert answer["intensity"] == pytest.approx(float(logits["intensity"][row, 0]), abs=1e-4)
        above = [label for label, value in zip(["fox", "river"], logits["topics"][row], strict=True) if value > 0]
        assert [item["label"] for item in answer["topics"]] == above
        assert len(answer["tags"]["labels"]) == len(saved.samples[row].split())


def test_words_and_text_give_the_same():
    """A text for a word-level task is split at white space; anything else would shift the labels."""
    predictor = load_predictor(saved_text().folders["torch"])
    words = list(tiny_token_rows(4)["tokens"])
    assert predictor.predict(words) == predictor.predict([" ".join(row) for row in words])
    for row, answer in zip(words, predictor.predict(words), strict=True):
        for span in answer["tags"]["spans"]:
            assert span["text"] == " ".join(row[span["start"] : span["end"]])


def test_long_texts_are_cut_where_the_model_says():
    """Without the saved max_length a text longer than the position table crashes, or is answered untrained."""
    saved = saved_text()
    predictor = load_predictor(saved.folders["torch"])
    assert predictor.reader.max_length == load_predictor(saved.folders["onnx"]).reader.max_length == MAX_LENGTH
    answer = predictor.predict(["fox " * 500])[0]
    labels = answer["tags"]["labels"]
    assert len(labels) == 500
    assert labels[MAX_LENGTH - 2 :] == [None] * (502 - MAX_LENGTH)
    assert None not in labels[: MAX_LENGTH - 2]


def test_pairs_and_chosen_tasks():
    """A pair is one input of two texts, not two inputs; a word-level task has no answer for it."""
    predictor = load_predictor(saved_text().folders["torch"])
    pair = ("the fox sleeps", "the owl waits")
    answer = predictor.predict([pair], tasks=["mood"])[0]
    assert list(answer) == ["mood"]
    assert not same(answer["mood"], predictor.predict(["the fox sleeps"], tasks=["mood"])[0]["mood"])
    with pytest.raises(DataError, match="task 'tags': expected one text, found pairs"):
        predictor.predict([pair])


def test_one_input_and_one_task():
    """A string iterates as letters, so a missing pair of brackets would give one answer a letter."""
    predictor = load_predictor(str(saved_text().folders["torch"]))
    several = predictor(["the fox sleeps", "an owl"])
    assert same(several, predictor.predict(["the fox sleeps", "an owl"]))
    assert same(predictor("the fox sleeps"), predictor.predict(["the fox sleeps"])[0])
    assert same(predictor.predict("the fox sleeps"), predictor.predict(["the fox sleeps"]))
    assert list(predictor("the fox sleeps", tasks="mood")) == ["mood"]
    picture = saved_images().samples[0]
    painter = load_predictor(saved_images().folders["torch"])
    assert same(painter(picture), painter.predict([picture])[0])


def test_folders_around_a_model(tmp_path: Path):
    """What an export step writes holds the folder of its form; a run holds a folder for each step."""
    folders = saved_text().folders
    shutil.copytree(folders["vanilla"], tmp_path / "vanilla" / "vanilla")
    assert list(load_predictor(tmp_path / "vanilla").tasks) == sorted(saved_text().model.tasks)
    assert load_predictor(tmp_path).runtime.form == "vanilla"
    shutil.copytree(folders["torch"], tmp_path / "student")
    shutil.copytree(folders["onnx"], tmp_path / "export" / "onnx")
    with pytest.raises(ArtifactError, match="with 3 in it; give one of them: export/onnx, student, vanilla/vanilla"):
        load_predictor(tmp_path)
    with pytest.raises(ArtifactError, match="or the id of one on the Hub, found 'somebody/model'"):
        load_predictor("somebody/model")


def test_wrong_inputs_are_refused():
    """Before anything is computed."""
    predictor = load_predictor(saved_text().folders["torch"])
    with pytest.raises(DataError, match="all of one kind"):
        predictor.predict(["the fox sleeps", ["the", "owl"]])
    with pytest.raises(DataError, match="int"):
        predictor.predict([3])
    with pytest.raises(TaskError, match="moods"):
        predictor.predict(["the fox"], tasks=["moods"])
    with pytest.raises(DataError, match="expected a picture at 'the fox', found no file"):
        load_predictor(saved_images().folders["torch"]).predict(["the fox"])
    assert predictor.predict([]) == []


def test_folders_that_are_no_model_are_refused(tmp_path: Path):
    """A KeyError from deep inside a library tells nobody which folder is wrong."""
    with pytest.raises(ArtifactError, match="found no folder"):
        load_predictor(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ArtifactError, match=r"notes\.txt"):
        load_predictor(tmp_path)
    with pytest.raises(ArtifactError, match="found a model of type 'bert'"):
        load_predictor(saved_text().folders["vanilla"] / "mood")


def test_newer_formats_are_refused(tmp_path: Path):
    """A newer format may mean other things by the same keys."""
    for form, name in (("torch", "config.json"), ("onnx", ONNX_SETTINGS)):
        folder = tmp_path / form
        shutil.copytree(saved_text().folders[form], folder)
        values = json.loads((folder / name).read_text())
        values["format_version"] = 99
        (folder / name).write_text(json.dumps(values))
        with pytest.raises(ArtifactError, match="99"):
            load_predictor(folder)


def test_missing_parts_are_named(tmp_path: Path):
    """A half-copied folder must not be answered by defaults."""
    folder = tmp_path / "onnx"
    shutil.copytree(saved_text().folders["onnx"], folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        load_predictor(folder)
    folder = tmp_path / "torch"
    shutil.copytree(saved_text().folders["torch"], folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ArtifactError, match="expected a tokenizer or image processor"):
        load_predictor(folder)


def test_stock_folders_tell_their_task():
    """Labels in another order, or a regression taken for a class, would be silent."""
    saved = saved_text()
    predictor = load_predictor(saved.folders["vanilla"])
    assert folder_form(saved.folders["vanilla"]) == "vanilla"
    for name, task in saved.model.tasks.items():
        assert predictor.tasks[name].kind == task.kind
        assert predictor.tasks[name].problem == task.problem
        assert predictor.tasks[name].labels == task.labels
    config = saved.model.to_stock("mood").config
    config.architectures = ["BertForMaskedLM"]
    with pytest.raises(ArtifactError, match="BertForMaskedLM"):
        stock_task("mood", config, Path("folder"))


def test_logits_are_plain_arrays():
    """float16 or torch tensors would leak the runtime to the caller."""
    saved = saved_text()
    for form in ("torch", "vanilla", "onnx"):
        for array in load_predictor(saved.folders[form]).logits(saved.inputs).values():
            assert isinstance(array, np.ndarray)
            assert array.dtype == np.float32
