"""Folders of stock models, one for each task; every task runs an encoder of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_mtcompress.data.readers import load_reader
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.formats.folders import task_folders
from hf_mtcompress.formats.runtime import Runtime
from hf_mtcompress.formats.torch import as_array, as_tensors, load_config, set_threads
from hf_mtcompress.model.base import align_weights
from hf_mtcompress.model.inputs import taken_by
from hf_mtcompress.model.loading import load_whole
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import ImageClassification, SequenceClassification, Task, TokenClassification

_AUTO_CLASSES: dict[str, Any] = {
    SequenceClassification.kind: AutoModelForSequenceClassification,
    TokenClassification.kind: AutoModelForTokenClassification,
    ImageClassification.kind: AutoModelForImageClassification,
}


class VanillaRuntime(Runtime):
    """A folder of plain transformers folders, one for each task; every task runs an encoder of its own."""

    form = "vanilla"

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        set_threads(threads)
        self.folder = folder
        folders = task_folders(folder)
        self.models: dict[str, PreTrainedModel] = {}
        self.tasks = {}
        for name, path in folders.items():
            config = load_config(path)
            self.tasks[name] = stock_task(name, config, path)
            model = load_whole(_AUTO_CLASSES[self.tasks[name].kind], path, use_safetensors=True)[0].eval()
            align_weights(model)
            self.models[name] = model
        reader = load_reader(next(iter(folders.values())))
        self.reader = reader.limited(reader.own_limit)

    def logits(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        answers = {}
        with torch.inference_mode():
            for name, model in self.models.items():
                answers[name] = as_array(model(**taken_by(model, as_tensors(batch))).logits)
        return answers


def write_vanilla(model: MultiTaskModel, processor: Any, folder: Path) -> None:
    """Write one folder for each task of a model; see `MultiTaskModel.export_task`."""
    for name in model.tasks:
        model.export_task(name, folder / name, processor)


def stock_task(name: str, config: PreTrainedConfig, folder: Path) -> Task:
    """The task that a plain transformers folder answers, as its config tells it.

    Raises:
        ArtifactError: its architecture is none of sequence, token or image classification.
    """
    architecture = (config.architectures or [""])[0]
    names: dict[Any, str] = config.id2label or {}
    count = len(names)
    labels = tuple(names[index] for index in range(count))
    problem = config.problem_type or ("regression" if count == 1 else "single_label_classification")
    if architecture.endswith("ForTokenClassification"):
        return TokenClassification(name, labels=labels)
    known = None if problem == "regression" else labels
    if architecture.endswith("ForSequenceClassification"):
        return SequenceClassification(name, labels=known, problem_type=problem)
    if architecture.endswith("ForImageClassification"):
        return ImageClassification(name, labels=known, problem_type=problem)
    raise ArtifactError(
        f"expected a model for sequence, token or image classification in {folder}, found '{architecture}'; "
        "only folders written by export_task, or like them, open here"
    )
