"""The same tiny multi-task models saved in every form, made once for all tests of a process."""

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_mtcompress.formats.onnx.export import export_onnx
from hf_mtcompress.formats.onnx.quantize import quantize_onnx
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import ImageClassification, SequenceClassification, TokenClassification
from tests.tiny import (
    COLOUR_LABELS,
    FEELING_LABELS,
    TAG_LABELS,
    randomize,
    tiny_encoder,
    tiny_image_processor,
    tiny_image_rows,
    tiny_text_rows,
    tiny_tokenizer,
)

MAX_LENGTH = 24


@dataclass
class Saved:
    """A model in memory, and the folders it was saved to."""

    model: MultiTaskModel
    processor: Any
    folders: dict[str, Path]
    samples: list[Any]
    inputs: dict[str, np.ndarray]

    def logits(self) -> dict[str, np.ndarray]:
        """What the model in memory answers to `inputs`."""
        with torch.no_grad():
            output = self.model(**{name: torch.from_numpy(array) for name, array in self.inputs.items()})
        return {name: output[task.logits_name].numpy() for name, task in self.model.tasks.items()}


@cache
def saved_text() -> Saved:
    """Three kinds of answers for a sentence, in all forms."""
    tasks = [
        SequenceClassification("mood", labels=FEELING_LABELS),
        TokenClassification("tags", labels=TAG_LABELS),
        SequenceClassification("intensity", problem_type="regression"),
        SequenceClassification("topics", labels=["fox", "river"], problem_type="multi_label_classification"),
    ]
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks, max_length=MAX_LENGTH)
    tokenizer = tiny_tokenizer()
    samples = list(tiny_text_rows(5, seed=3)["text"])
    inputs = dict(tokenizer(samples, padding=True, return_tensors="np"))
    return _save(model, tokenizer, samples, inputs)


@cache
def saved_images() -> Saved:
    """Two answers for a picture, in all forms."""
    tasks = [
        ImageClassification("colour", labels=COLOUR_LABELS),
        ImageClassification("intensity", problem_type="regression"),
    ]
    model = MultiTaskModel.from_encoder(tiny_encoder("vit"), tasks)
    processor = tiny_image_processor("vit")
    samples = list(tiny_image_rows(3, seed=3)["image"])
    inputs = {"pixel_values": processor(samples, return_tensors="np")["pixel_values"]}
    return _save(model, processor, samples, inputs)


def _save(model: MultiTaskModel, processor: Any, samples: list[Any], inputs: dict[str, np.ndarray]) -> Saved:
    root = Path(tempfile.mkdtemp(prefix="mtcompress-artefacts-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    randomize(model, seed=1)
    folders = {form: root / form for form in ("torch", "vanilla", "onnx", "int8")}
    model.save_pretrained(folders["torch"])
    processor.save_pretrained(folders["torch"])
    for name in model.tasks:
        model.export_task(name, folders["vanilla"] / name, processor)
    export_onnx(model, processor, folders["onnx"])
    quantize_onnx(folders["onnx"], folders["int8"])
    return Saved(model.eval(), processor, folders, samples, inputs)


def moved_by_company(folder: Path, inputs: dict[str, np.ndarray]) -> float:
    """By how much logits of single texts, without padding, differ from those among the others of a batch."""
    predictor = load_predictor(folder, threads=1)
    together = predictor.logits(inputs)
    largest = 0.0
    for row, length in enumerate(inputs["attention_mask"].sum(1)):
        alone = predictor.logits({name: array[row : row + 1, :length] for name, array in inputs.items()})
        for name, answers in alone.items():
            answer = together[name][row]
            known = answer[:length] if answer.ndim > 1 else answer
            largest = max(largest, float(np.abs(answers[0] - known).max()))
    return largest
