"""Scores of a saved artefact equal those computed by hand on the model in memory."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_mtcompress.evaluation.evaluate import evaluate_folder, labelled_rows
from hf_mtcompress.tasks import ImageClassification, SequenceClassification, Task, TokenClassification
from tests.tiny import COLOUR_LABELS, FEELING_LABELS, TAG_LABELS, tiny_image_rows, tiny_text_rows, tiny_token_rows
from tests.unit.formats.artefacts import saved_images, saved_text

TEXT_TASKS: dict[str, Task] = {
    "mood": SequenceClassification("mood", text="text", label="label", labels=FEELING_LABELS),
    "intensity": SequenceClassification("intensity", text="text", label="intensity", problem_type="regression"),
    "tags": TokenClassification("tags", tokens="tokens", label="tags", labels=TAG_LABELS, role="auxiliary"),
}


def text_data() -> dict[str, Dataset]:
    rows = tiny_text_rows(23, seed=4)
    return {"mood": rows, "intensity": rows, "tags": tiny_token_rows(17, seed=5)}


def test_scores_equal_those_of_the_model():
    """Rows are sorted by length and padded batch by batch: labels that do not follow their rows give chance."""
    saved = saved_text()
    data = text_data()
    scores = evaluate_folder(saved.folders["torch"], TEXT_TASKS, data, split="test", batch_size=5)
    model = saved.model
    batch = saved.processor(list(data["mood"]["text"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch)
    labels = np.array([FEELING_LABELS.index(label) for label in data["mood"]["label"]])
    expected = TEXT_TASKS["mood"].compute_metrics(output.logits_mood.numpy(), labels)
    assert scores.tasks["mood"].metrics == pytest.approx(expected)
    numbers = np.array(data["intensity"]["intensity"])
    expected = TEXT_TASKS["intensity"].compute_metrics(output.logits_intensity.numpy(), numbers)
    assert scores.tasks["intensity"].metrics == pytest.approx(expected, abs=1e-5)
    predicted, true = [], []
    for words, tags in zip(data["tags"]["tokens"], data["tags"]["tags"], strict=True):
        encoded = saved.processor([words], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            rows = model(**encoded).logits_tags[0].argmax(-1).tolist()
        ids = encoded.word_ids(0)
        predicted += [TAG_LABELS[rows[ids.index(index)]] for index in range(len(words))]
        true += tags
    found = scores.tasks["tags"].metrics["token_accuracy"]
    assert found == pytest.approx(np.mean([left == right for left, right in zip(predicted, true, strict=True)]))
    assert {name: score.rows for name, score in scores.tasks.items()} == {"mood": 23, "intensity": 23, "tags": 17}
    # Auxiliary tasks do not count.
    assert scores.average == pytest.approx(
        (scores.tasks["mood"].metrics["accuracy"] + scores.tasks["intensity"].metrics["pearson"]) / 2
    )
    assert scores.split == "test"


@pytest.mark.parametrize("form", ["vanilla", "onnx"])
def test_scores_are_the_same_in_every_form(form: str):
    """A form whose labels or padding differ scores lower, which would look like the price of compression."""
    saved = saved_text()
    expected = evaluate_folder(saved.folders["torch"], TEXT_TASKS, text_data(), split="validation", batch_size=4)
    found = evaluate_folder(saved.folders[form], TEXT_TASKS, text_data(), split="validation", batch_size=9)
    for name, score in expected.tasks.items():
        assert found.tasks[name].metrics == pytest.approx(score.metrics, abs=1e-4), name


def test_images_are_scored():
    """Pictures are processed row by row when read, not before."""
    saved = saved_images()
    tasks = {"colour": ImageClassification("colour", image="image", label="label", labels=COLOUR_LABELS)}
    data = {"colour": tiny_image_rows(11, seed=6)}
    scores = evaluate_folder(saved.folders["torch"], tasks, data, split="test", batch_size=4)
    pixels = saved.processor(list(data["colour"]["image"]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        chosen = saved.model(pixel_values=pixels).logits_colour.argmax(-1).numpy()
    assert scores.tasks["colour"].metrics["accuracy"] == pytest.approx(np.mean(chosen == data["colour"]["label"]))
    assert evaluate_folder(saved.folders["onnx"], tasks, data, split="test").tasks == scores.tasks


def test_unlabelled_rows_do_not_count():
    """A row count that includes them would overstate what a score rests on."""
    saved = saved_text()
    rows = tiny_text_rows(8, seed=4)
    labels = [None] * 5 + list(rows["label"])[5:]
    data = Dataset.from_dict({"text": list(rows["text"]), "label": labels, "intensity": [None] * 8})
    tasks = {name: TEXT_TASKS[name] for name in ("mood", "intensity")}
    scores = evaluate_folder(saved.folders["torch"], tasks, {"mood": data, "intensity": data}, split="test")
    assert scores.tasks["mood"].rows == 3
    assert "intensity" not in scores.tasks
    assert scores.average is None
    assert labelled_rows(np.array([[-100, 2], [-100, -100]])) == 1
    assert labelled_rows(np.array([0.0, np.nan, -3.0])) == 2
