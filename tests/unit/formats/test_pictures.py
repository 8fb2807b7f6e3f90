"""A picture is read the same way wherever it is read: training, scoring, `predict`, pipeline. What is none, nowhere.

Photographs are stored lying, with a note on how to turn them: a model that was trained on upright ones and is asked
about lying ones is wrong without a word.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from transformers import pipeline

from hf_mtcompress import MultiTaskTrainer, MultiTaskTrainingArguments
from hf_mtcompress.data.preprocessing import encode_dataset
from hf_mtcompress.data.readers import reader_of
from hf_mtcompress.errors import DataError
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import ImageClassification
from tests.pictures import REFUSED, SAME, upright
from tests.tiny import COLOUR_LABELS, tiny_encoder, tiny_image_processor
from tests.unit.formats.artefacts import saved_images

LABELLED = Features({"image": ImageFeature(), "label": ClassLabel(names=list(COLOUR_LABELS))})
PATHS = Features({**LABELLED, "image": Value("string")})


Ways = dict[str, Callable[[Path], np.ndarray]]
"""By name: from a file to numbers that depend on every pixel of it."""
WAYS = ("training", "training on paths", "scoring", "predict", "pipeline", "a teacher's own processor")


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Ways:
    task = ImageClassification("colour", labels=COLOUR_LABELS, image="image", label="label")
    model = MultiTaskModel.from_encoder(tiny_encoder("vit"), [task]).eval()
    processor, folder = tiny_image_processor(), tmp_path_factory.mktemp("pictures")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    predictor, pipe = load_predictor(folder / "model"), pipeline("multi-task", model=str(folder / "model"))
    arguments = MultiTaskTrainingArguments(str(folder / "run"), report_to=[], disable_tqdm=True, use_cpu=True)

    def rows(path: Path, features: Features) -> Dataset:
        return Dataset.from_dict({"image": [str(path)], "label": [1]}, features=features)

    def encoded(features: Features) -> Callable[[Path], np.ndarray]:
        return lambda path: np.asarray(
            encode_dataset(rows(path, features), [task], reader_of(processor), "train")[0]["pixel_values"]
        )

    def score(path: Path) -> np.ndarray:
        trainer = MultiTaskTrainer(
            model=model, args=arguments, eval_dataset=rows(path, LABELLED), processing_class=processor
        )
        return np.array([trainer.evaluate()["eval_colour_loss"]])

    return {
        "training": encoded(LABELLED),
        "training on paths": encoded(PATHS),
        "scoring": score,
        "predict": lambda path: np.array([predictor.predict([str(path)])[0]["colour"]["score"]]),
        "pipeline": lambda path: np.array([pipe(str(path))["colour"]["score"]]),
        "a teacher's own processor": lambda path: np.asarray(
            reader_of(processor).encode_with_starts([[path]])[0]["pixel_values"][0]
        ),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SAME)
def test_a_file_is_read_as_the_picture_that_it_shows(name: str, way: str, ways: Ways, tmp_path: Path):
    write, truth = SAME[name]
    shown = tmp_path / "shown.png"
    truth().convert("RGB").save(shown)
    read = ways[way]
    np.testing.assert_array_equal(read(write(tmp_path)), read(shown))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_shows_none_is_refused_by_name(name: str, way: str, ways: Ways, tmp_path: Path):
    write, message = REFUSED[name]
    path = write(tmp_path)
    with pytest.raises(DataError, match=message):
        ways[way](path)


def test_one_picture_in_no_list_is_one_picture(tmp_path: Path):
    """The rows of an array would be answered as so many grey pictures."""
    predictor = load_predictor(saved_images().folders["torch"])
    upright().save(tmp_path / "fox.png")
    path = tmp_path / "fox.png"
    (expected,) = predictor.predict([upright()])
    array = np.asarray(upright())
    for given in (array, torch.tensor(array.copy()), upright(), path, str(path), path.read_bytes(), array[None]):
        assert predictor.predict(given) == [expected]
    assert len(predictor.predict(np.stack([array, array]))) == 2
