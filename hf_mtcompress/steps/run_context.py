"""What the steps of one run share, what a step starts from, and what it leaves."""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoImageProcessor, AutoTokenizer

from hf_mtcompress.data.collator import MultiTaskCollator
from hf_mtcompress.data.preprocessing import max_length_of
from hf_mtcompress.data.sources import Sources
from hf_mtcompress.errors import RecipeError
from hf_mtcompress.formats.folders import load_processor as read_processor
from hf_mtcompress.model.modeling import MultiTaskModel, load_encoder
from hf_mtcompress.model.surgery import describe_structure
from hf_mtcompress.recipe import EncoderConfig, Recipe, StepConfig, restricted
from hf_mtcompress.recipe.lineage import Lineage, lineage_of
from hf_mtcompress.records import Artefact
from hf_mtcompress.tasks import Task
from hf_mtcompress.trainers.teachers import same_tokenizer

_PROBE_ROWS = 4


@dataclass
class RunContext:
    """Everything the steps of one run share.

    Attributes:
        recipe: what is wanted.
        output: folder of the run.
        sources: tasks with labels and rows.
        processor: tokenizer or image processor of the recipe's encoder; see `processor_of`.
    """

    recipe: Recipe
    output: Path
    sources: Sources
    processor: Any

    @cached_property
    def lineage(self) -> dict[str, Lineage]:
        """What each step starts from, who teaches it, and what its model is before and after."""
        return lineage_of(self.recipe)

    def step_folder(self, name: str) -> Path:
        """Where a step's result lies."""
        return self.output / name

    def load(self, name: str) -> MultiTaskModel:
        """The float model that a step saved."""
        model = MultiTaskModel.from_pretrained(self.step_folder(name))
        for task in self.sources.tasks.values():
            if task.name not in model.tasks:
                continue
            # The saved task has no columns; those of this recipe are put back for training.
            model.tasks[task.name] = dataclasses.replace(
                task,
                labels=model.tasks[task.name].labels,
                encoder=model.tasks[task.name].encoder,
                layer=model.tasks[task.name].layer,
                weight=task.weight,
                final_weight=task.final_weight,
                role=task.role,
            )
        return model

    def processor_of(self, name: str | None) -> Any:
        """Tokenizer or image processor that a step saved; that of the recipe's encoder for None.

        A step may have trimmed the vocabulary, or have made a student of another checkpoint.
        """
        if name is None:
            return self.processor
        found = read_processor(self.step_folder(name))
        return self.processor if same_tokenizer(found, self.processor) else found

    def for_step(self, step: StepConfig) -> "RunContext":
        """The context with the tasks that a step can have: an earlier step may have dropped auxiliary ones."""
        begins = self.lineage[str(step.name)].begins
        names = [name for name in self.sources.tasks if name in begins.tasks]
        if len(names) == len(self.sources.tasks):
            return self
        return dataclasses.replace(self, recipe=restricted(self.recipe, names), sources=self.sources.of(names))

    @property
    def max_length(self) -> int | None:
        """Longest input in tokens; None for images."""
        if "pixel_values" in self.processor.model_input_names:
            return None
        return max_length_of(self.processor, self.recipe.encoder.max_length)


@dataclass
class StepOutcome:
    """What a step leaves: its artefacts (folders relative to the step), the shape of the model, how it was trained."""

    artefacts: list[Artefact]
    processor: Any
    """What the model reads with, for the inputs of the probes."""
    structure: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    interference: dict[str, Any] | None = None
    vocabulary: dict[str, Any] | None = None
    pruning: dict[str, Any] | None = None
    sparsity: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    probes: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """By artefact folder: logits by task of the model in memory, for the check that it reloads."""


@dataclass(frozen=True)
class Start:
    """What a step works on: a model, and the tokenizer or image processor that it reads with."""

    model: MultiTaskModel
    processor: Any


def start_of(source: str | None, context: RunContext) -> Start:
    """The model that a step works on, with what it reads with."""
    return Start(start_model(source, context), context.processor_of(source))


def start_model(source: str | None, context: RunContext) -> MultiTaskModel:
    """The model of the step before; fresh heads on the recipe's encoder for None."""
    if source is not None:
        return context.load(source)
    return new_model(context.recipe.encoder, context)


def reopened(cut: Path, context: RunContext) -> MultiTaskModel:
    """The model of a cut that is done, from its work folder, with the tasks of this recipe."""
    model = MultiTaskModel.from_pretrained(cut)
    for name, task in context.sources.tasks.items():
        model.tasks[name] = task
    return model


def new_model(config: EncoderConfig, context: RunContext) -> MultiTaskModel:
    """Fresh heads on a pretrained encoder."""
    try:
        encoder = load_encoder(config.path, **loading_options(config))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"encoder.path: expected a local folder or a Hub id of a pretrained encoder, found '{config.path}' "
            f"({str(error).splitlines()[0]}); check the spelling, or download it first where there is no network"
        ) from error
    image_size = context.processor.size.get("height") if context.max_length is None else None
    return MultiTaskModel.from_encoder(
        encoder,
        list(context.sources.tasks.values()),
        max_length=context.max_length,
        image_size=image_size,
        branches=context.recipe.branches,
        branch_layers=None if context.recipe.branch_layers == "all" else context.recipe.branch_layers,
    )


def loading_options(encoder: EncoderConfig) -> dict[str, Any]:
    """Options of `from_pretrained`. Left out, `trust_remote_code` has it ask at the terminal and wait."""
    pinned = {"revision": encoder.revision} if encoder.revision else {}
    return {"trust_remote_code": encoder.trust_remote_code, **pinned}


def load_processor(recipe: Recipe) -> Any:
    """Tokenizer or image processor of the recipe's encoder, with the wanted image size.

    Raises:
        RecipeError: the encoder does not exist, or has neither.
    """
    encoder = recipe.encoder
    options = loading_options(encoder)
    images = all(task.kind == "image-classification" for task in recipe.tasks.values())
    try:
        if not images:
            return AutoTokenizer.from_pretrained(encoder.path, **options)
        processor = AutoImageProcessor.from_pretrained(encoder.path, backend="pil", **options)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"encoder.path: expected a local folder or a Hub id of a pretrained encoder with its "
            f"{'image processor' if images else 'tokenizer'}, found '{encoder.path}' ({str(error).splitlines()[0]}); "
            "check the spelling, or download it first where there is no network"
        ) from error
    if encoder.image_size is not None:
        side = {"height": encoder.image_size, "width": encoder.image_size}
        processor.size = side
        if processor.crop_size is not None:
            processor.crop_size = side
    return processor


def probe_samples(context: RunContext) -> list[Any]:
    """A few rows as they are given to a pipeline: what every saved form is asked before and after."""
    _, inputs = _probe_inputs(context)
    return list(inputs[0]) if len(inputs) == 1 else list(zip(*inputs, strict=True))


def probe_batch(context: RunContext, processor: Any) -> dict[str, np.ndarray]:
    """The same rows as model inputs."""
    task, inputs = _probe_inputs(context)
    encoded = task.encode(inputs, processor, context.max_length)
    encoded.pop("word_ids", None)
    batch = MultiTaskCollator({}, processor)(
        [{key: values[index] for key, values in encoded.items()} for index in range(len(inputs[0]))]
    )
    return {key: value.numpy() for key, value in batch.items()}


def _probe_inputs(context: RunContext) -> tuple[Task, list[list[Any]]]:
    # A main task: auxiliary ones may be dropped on the way.
    tasks = list(context.sources.tasks.values())
    task = next((task for task in tasks if task.role == "main"), tasks[0])
    rows: Dataset = next(iter(context.sources.splits[task.name].values()))
    rows = rows.select(range(min(_PROBE_ROWS, len(rows))))
    return task, [list(rows[column]) for column in task.input_columns]


def probe(model: MultiTaskModel, context: RunContext, processor: Any) -> dict[str, np.ndarray]:
    """Logits by task of the model in memory on the probe rows."""
    batch = {key: torch.as_tensor(value) for key, value in probe_batch(context, processor).items()}
    with torch.inference_mode():
        outputs = model.eval()(**batch)
    return {name: outputs[f"logits_{name}"].float().numpy() for name in model.tasks}


def structure_of(model: MultiTaskModel) -> dict[str, Any]:
    """Layers, heads and feed-forward widths of every encoder."""
    return {name: describe_structure(encoder) for name, encoder in model.encoders.items()}  # type: ignore[arg-type]  # a ModuleDict of encoders
