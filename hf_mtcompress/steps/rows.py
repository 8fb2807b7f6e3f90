"""The rows that a step reads besides those it is trained on: for calibration, for a vocabulary, without labels."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader

from hf_mtcompress.data.alignment import as_text
from hf_mtcompress.data.collator import MultiTaskCollator
from hf_mtcompress.data.load import load_unlabelled
from hf_mtcompress.data.mixing import MixedDataset, MixingSampler
from hf_mtcompress.data.preprocessing import EncodedGroup, encode_groups
from hf_mtcompress.data.readers import lies_in_files, positions_of
from hf_mtcompress.data.sources import Sources, with_unlabelled, without_labels
from hf_mtcompress.errors import DataError, RecipeError
from hf_mtcompress.recipe import PretrainStep, Role, TrimVocabularyStep
from hf_mtcompress.steps.run_context import RunContext, Start, modalities


def inputs_of(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch without labels."""
    return {key: value for key, value in batch.items() if not key.startswith(("labels_", "rows_"))}


def calibration_batches(start: Start, context: RunContext, rows: int) -> list[dict[str, torch.Tensor]]:
    """About `rows` training rows in batches of one source each, with the labels of all its tasks."""
    model, reader = start.model, start.reader
    groups = encode_groups(model.tasks, context.sources.role("train"), reader, "train")
    shares = [math.ceil(rows * len(group.dataset) / sum(len(group.dataset) for group in groups)) for group in groups]
    generator = np.random.default_rng(context.recipe.seed)
    chosen = []
    for group, share in zip(groups, shares, strict=True):
        order = generator.permutation(len(group.dataset))[:share]
        chosen.append(EncodedGroup(group.tasks, group.dataset.select(sorted(order.tolist()))))
    sampler = MixingSampler([len(group.dataset) for group in chosen], 16, seed=context.recipe.seed)
    loader: DataLoader[Any] = DataLoader(
        MixedDataset([group.dataset for group in chosen]),
        batch_sampler=sampler,
        collate_fn=MultiTaskCollator(model.tasks, reader),
    )
    return list(loader)


def calibration_rows(start: Start, context: RunContext, rows: int) -> list[dict[str, np.ndarray]]:
    """About `rows` training rows as model inputs, one in each batch and none padded.

    Padding would count among the activations whose ranges are measured.
    """
    found = []
    for batch in calibration_batches(start, context, rows):
        counted = positions_of(batch).numpy()
        inputs = {name: tensor.numpy() for name, tensor in inputs_of(batch).items()}
        for row in range(len(counted)):
            end = int(counted[row].sum())
            found.append(
                {
                    name: array[row : row + 1, :end] if array.shape == counted.shape else array[row : row + 1]
                    for name, array in inputs.items()
                }
            )
    return found


def validation_rows(context: RunContext, rows: int) -> dict[str, Dataset]:
    """At most `rows` validation rows of each source, by task; tasks that share rows still share them."""
    generator = np.random.default_rng(context.recipe.seed)
    made: dict[int, Dataset] = {}
    found = context.sources.role("validation")
    for own in found.values():
        if id(own) not in made:
            made[id(own)] = own.select(sorted(generator.permutation(len(own))[:rows].tolist()))
    return {name: made[id(own)] for name, own in found.items()}


def texts_to_keep(step: TrimVocabularyStep, context: RunContext) -> list[list[str]]:
    """Columns of texts whose tokens stay: of the step's corpus, else of the training and validation rows.

    Raises:
        RecipeError: the corpus cannot be read.
    """
    if step.corpus is None:
        return texts_of(context.sources, ["train", "validation"])
    try:
        rows = load_unlabelled(step.corpus, [step.column], Path.cwd(), context.recipe.seed, f"steps.{step.name}.corpus")
    except DataError as error:
        raise RecipeError(str(error)) from error
    return [[as_text(row) for row in rows[step.column]]]


def texts_of(sources: Sources, roles: Sequence[Role]) -> list[list[str]]:
    """Columns of texts that the tasks read in some splits, each once."""
    found: dict[str, list[str]] = {}
    for role in roles:
        for name, rows in sources.role(role).items():
            for column in sources.tasks[name].input_columns:
                key = f"{rows._fingerprint} {column}"
                if key not in found:
                    found[key] = [as_text(row) for row in rows[column]]
    return list(found.values())


def rows_with_unlabelled(rows: Mapping[str, Dataset], sources: Sources) -> dict[str, Dataset]:
    """Training rows, with those without labels after them; tasks that share rows still share them."""
    made: dict[int, Dataset] = {}
    for name in rows:
        more = sources.unlabelled.get(name)
        if more is not None and id(more) not in made:
            sharing = [task for other, task in sources.tasks.items() if sources.unlabelled.get(other) is more]
            made[id(more)] = with_unlabelled(rows[name], more, sharing)
    return {
        name: made[id(sources.unlabelled[name])] if name in sources.unlabelled else own for name, own in rows.items()
    }


def rows_to_pretrain_on(step: PretrainStep, context: RunContext) -> dict[str, Dataset]:
    """Inputs by task, labels left open: rows of the step's own, else those of all tasks."""
    tasks = context.sources.tasks
    if step.data is not None:
        task = next((task for task in tasks.values() if len(task.input_columns) == 1), None)
        if task is None:
            raise RecipeError(
                f"steps.{step.name}.data: expected a task with one input column to read it like, found "
                f"{ {name: task.input_columns for name, task in tasks.items()} }; leave data out to train on their rows"
            )
        what = f"steps.{step.name}.data"
        try:
            pictures = [step.column] if lies_in_files(modalities(context.recipe)) else []
            rows = load_unlabelled(step.data, [step.column], Path.cwd(), context.recipe.seed, what, pictures)
        except DataError as error:
            raise RecipeError(str(error)) from error
        if step.column != task.input_columns[0]:
            rows = rows.rename_column(step.column, task.input_columns[0])
        return {task.name: without_labels(rows, [task])}
    rows = context.sources.role("train")
    made: dict[int, Dataset] = {}
    for name, own in rows.items():
        if id(own) not in made:
            sharing = [tasks[other] for other in rows if rows[other] is own]
            plain = without_labels(own, sharing)
            more = context.sources.unlabelled.get(name)
            made[id(own)] = plain if more is None else concatenate_datasets([plain, without_labels(more, sharing)])
    return {name: made[id(own)] for name, own in rows.items()}
