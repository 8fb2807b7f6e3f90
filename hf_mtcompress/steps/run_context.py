"""What the steps of one run share, what a step starts from, and what it leaves."""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModel

from hf_mtcompress.data.readers import Reader, load_reader, pretrained_reader
from hf_mtcompress.data.sources import Sources
from hf_mtcompress.errors import ArtifactError, RecipeError, UnsupportedEncoderError, first_line
from hf_mtcompress.formats.onnx.export import check_everything_is_read
from hf_mtcompress.model.inputs import check_picture_size
from hf_mtcompress.model.modeling import MultiTaskModel, load_encoder
from hf_mtcompress.model.surgery import describe_structure
from hf_mtcompress.recipe import (
    DistillStep,
    EncoderConfig,
    ExportStep,
    PretrainStep,
    QuantizeStep,
    Recipe,
    StepConfig,
    restricted,
)
from hf_mtcompress.recipe.lineage import Lineage, lineage_of
from hf_mtcompress.recipe.tasks import Modality
from hf_mtcompress.records import FORMS, Artefact, form_of_backend
from hf_mtcompress.tasks import Task

_PROBE_ROWS = 4


@dataclass
class RunContext:
    """Everything the steps of one run share.

    Attributes:
        recipe: what is wanted.
        output: folder of the run.
        sources: tasks with labels and rows.
        reader: of the recipe's encoder; see `reader_of_step`.
    """

    recipe: Recipe
    output: Path
    sources: Sources
    reader: Reader

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

    def reader_of_step(self, name: str | None) -> Reader:
        """The reader that a step saved; that of the recipe's encoder for None.

        A step may have trimmed the vocabulary, or have made a student of another checkpoint.
        """
        if name is None:
            return self.reader
        found = load_reader(self.step_folder(name), self.reader.max_length)
        return self.reader if found.reads_as(self.reader) else found

    def for_step(self, step: StepConfig) -> "RunContext":
        """The context with the tasks that a step can have: an earlier step may have dropped auxiliary ones."""
        begins = self.lineage[str(step.name)].begins
        names = [name for name in self.sources.tasks if name in begins.tasks]
        if len(names) == len(self.sources.tasks):
            return self
        return dataclasses.replace(self, recipe=restricted(self.recipe, names), sources=self.sources.of(names))


@dataclass
class StepOutcome:
    """What a step leaves: its artefacts (folders relative to the step), the shape of the model, how it was trained."""

    artefacts: list[Artefact]
    reader: Reader
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
    """What a step works on: a model, and what makes its inputs."""

    model: MultiTaskModel
    reader: Reader


def start_of(source: str | None, context: RunContext) -> Start:
    """The model that a step works on, with its reader."""
    return Start(start_model(source, context), context.reader_of_step(source))


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
            f"({first_line(error)}); check the spelling, or download it first where there is no network"
        ) from error
    return MultiTaskModel.from_encoder(
        encoder,
        list(context.sources.tasks.values()),
        **context.reader.preprocessing,
        branches=context.recipe.branches,
        branch_layers=None if context.recipe.branch_layers == "all" else context.recipe.branch_layers,
    )


def loading_options(encoder: EncoderConfig) -> dict[str, Any]:
    """Options of `from_pretrained`. Left out, `trust_remote_code` has it ask at the terminal and wait."""
    pinned = {"revision": encoder.revision} if encoder.revision else {}
    return {"trust_remote_code": encoder.trust_remote_code, **pinned}


def recipe_reader(recipe: Recipe) -> Reader:
    """What makes the inputs of the recipe's encoder, of the wanted length or image size.

    Raises:
        RecipeError: the encoder does not exist, has no reader for what the tasks read, or no places for pictures of the
            wanted size.
    """
    encoder = recipe.encoder
    try:
        reader = pretrained_reader(
            encoder.path,
            modalities(recipe),
            max_length=encoder.max_length,
            image_size=encoder.image_size,
            **loading_options(encoder),
        )
    except ArtifactError as error:
        raise RecipeError(f"encoder.path: {error}") from error
    sizes = {tuple(values.shape[2:]) for values in reader.example(1).values() if values.dim() == 4}
    for height, width in sizes:
        config = AutoConfig.from_pretrained(encoder.path, **loading_options(encoder))
        try:
            check_picture_size(config, height, width, trust_remote_code=encoder.trust_remote_code)
        except UnsupportedEncoderError as error:
            raise RecipeError(f"encoder.image_size: {error}") from error
    return reader


def check_readers(recipe: Recipe) -> Reader:
    """The reader of the recipe's encoder, after a look at those of other checkpoints that students are made of.

    Raises:
        RecipeError: as `recipe_reader`, of each.
    """
    problems: list[str] = []
    for step in recipe.steps:
        if isinstance(step, DistillStep | PretrainStep) and step.student is not None and step.student.path is not None:
            own = EncoderConfig(path=step.student.path, image_size=recipe.encoder.image_size)
            try:
                recipe_reader(dataclasses.replace(recipe, encoder=own))
            except RecipeError as error:
                problems += [f"steps.{step.name}.student, {problem}" for problem in error.problems]
    try:
        reader = recipe_reader(recipe)
    except RecipeError as error:
        raise RecipeError([*error.problems, *problems]) from error
    problems += _left_out_of_graphs(recipe, reader)
    if problems:
        raise RecipeError(problems)
    return reader


def _left_out_of_graphs(recipe: Recipe, reader: Reader) -> list[str]:
    """Steps that make a graph of an encoder which reads more than the rows of a recipe give it."""
    config = AutoConfig.from_pretrained(recipe.encoder.path, **loading_options(recipe.encoder))
    encoder: Any = AutoModel._model_mapping.get(type(config), None)
    if not isinstance(encoder, type):
        return []
    problems = []
    for step in recipe.steps:
        match step:
            case ExportStep(formats=formats):
                graphs = [form for form in formats if form in FORMS and FORMS[form].layout == "graph"]
            case QuantizeStep(backend=backend):
                graphs = [backend] if form_of_backend(backend).layout == "graph" else []
            case _:
                graphs = []
        try:
            if graphs:
                check_everything_is_read(encoder, reader)
        except UnsupportedEncoderError as error:
            problems.append(f"steps.{step.name}: {error}")
    return problems


def modalities(recipe: Recipe) -> set[Modality]:
    """What the tasks of a recipe read."""
    return {modality for task in recipe.tasks.values() for modality in task.reads}


def probe_samples(context: RunContext) -> list[Any]:
    """A few rows as they are given to a pipeline: what every saved form is asked before and after."""
    _, inputs = _probe_inputs(context)
    return list(inputs[0]) if len(inputs) == 1 else list(zip(*inputs, strict=True))


def probe_batch(context: RunContext, reader: Reader) -> dict[str, np.ndarray]:
    """The same rows as model inputs."""
    task, inputs = _probe_inputs(context)
    encoded = reader.encode(inputs, words=task.reads_words)
    batch = reader.collate([{key: values[index] for key, values in encoded.items()} for index in range(len(inputs[0]))])
    return {key: value.numpy() for key, value in batch.items()}


def _probe_inputs(context: RunContext) -> tuple[Task, list[list[Any]]]:
    # A main task: auxiliary ones may be dropped on the way.
    tasks = list(context.sources.tasks.values())
    task = next((task for task in tasks if task.role == "main"), tasks[0])
    rows: Dataset = next(iter(context.sources.splits[task.name].values()))
    rows = rows.select(range(min(_PROBE_ROWS, len(rows))))
    return task, [list(rows[column]) for column in task.input_columns]


def probe(model: MultiTaskModel, context: RunContext, reader: Reader) -> dict[str, np.ndarray]:
    """Logits by task of the model in memory on the probe rows."""
    batch = {key: torch.as_tensor(value) for key, value in probe_batch(context, reader).items()}
    with torch.inference_mode():
        outputs = model.eval()(**batch)
    return {name: outputs[f"logits_{name}"].float().numpy() for name in model.tasks}


def structure_of(model: MultiTaskModel) -> dict[str, Any]:
    """Layers, heads and feed-forward widths of every encoder."""
    return {name: describe_structure(encoder) for name, encoder in model.encoders.items()}  # type: ignore[arg-type]  # a ModuleDict of encoders
