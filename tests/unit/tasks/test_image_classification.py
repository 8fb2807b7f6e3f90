"""Laws of tasks about an image: pixels are those of the processor, labels and losses those of every classification."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from torch.nn import functional

from hf_mtcompress import ImageClassification
from hf_mtcompress.errors import DataError
from tests.tiny import COLOUR_LABELS, tiny_image_rows


def colour(**settings: Any) -> ImageClassification:
    return ImageClassification("colour", **{"image": "image", "label": "label", "labels": COLOUR_LABELS, **settings})


def test_numbers_of_a_class_feature_keep_their_names() -> None:
    rows = tiny_image_rows(12)
    feature = rows.features["label"]
    assert isinstance(feature, ClassLabel)
    encoded = colour(labels=feature.names).encode_labels(list(rows["label"]), {})
    assert [COLOUR_LABELS[index] for index in encoded] == feature.int2str(list(rows["label"]))


@pytest.mark.parametrize(
    ("settings", "labels", "expected"),
    [
        ({"class_weights": [1, 2, 4], "label_smoothing": 0.1}, ["blue", None, "red"], functional.cross_entropy),
        ({"problem_type": "regression", "labels": None}, [0.5, None, 1.0], functional.mse_loss),
        (
            {"problem_type": "multi_label_classification"},
            [["blue"], None, ["red", "green"]],
            functional.binary_cross_entropy_with_logits,
        ),
    ],
)
def test_mean_losses_are_those_of_torch(settings: dict[str, Any], labels: list[Any], expected: Any) -> None:
    task = colour(**settings)
    logits = torch.randn(3, task.num_outputs, generator=torch.Generator().manual_seed(0))
    targets = task.collate_labels(task.encode_labels(labels, {}), None)
    found = task.loss_sum(logits, targets) / task.item_count(targets)
    own = logits[[0, 2]] if task.labels else logits[[0, 2], 0]
    extra = {}
    if task.class_weights:
        extra = {"weight": torch.tensor(task.class_weights), "label_smoothing": task.label_smoothing}
    torch.testing.assert_close(found, expected(own, targets[[0, 2]], **extra))


def test_the_strongest_colour_is_the_answer() -> None:
    assert colour().decode(np.log([1.0, 1.0, 6.0])) == {"label": "blue", "score": pytest.approx(0.75)}
    assert colour().compute_metrics(np.eye(3)[[0, 1, 1]], np.array([0, 1, -100]))["accuracy"] == 1.0


@pytest.mark.parametrize("value", ["gren", 3, -1])
def test_a_label_outside_the_list(value: Any) -> None:
    near = "; did you mean 'green'" if value == "gren" else ""
    with pytest.raises(DataError, match=rf"3 labels \(red, green, blue\) in column 'label', found {value!r}{near}"):
        colour().encode_labels([value], {})


@pytest.mark.parametrize(("image", "columns"), [("picture", ("picture",)), (None, ())])
def test_input_columns(image: str | None, columns: tuple[str, ...]) -> None:
    assert colour(image=image).input_columns == columns
