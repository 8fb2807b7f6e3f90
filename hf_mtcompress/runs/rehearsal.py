"""What a run will meet, met before it begins: a training of hours is not the place to learn of a slip.

Layers are counted through all steps; every training's arguments are built, with trainer, optimizer and trackers; the
encoder that the recipe names reads two rows of every source and an input of the greatest length.
"""

import gc
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from datasets.utils.logging import is_progress_bar_enabled

from hf_mtcompress.data.preprocessing import group_tasks
from hf_mtcompress.data.sources import Sources
from hf_mtcompress.errors import MTCompressError, RecipeError, first_line
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.recipe import (
    DistillStep,
    FinetuneStep,
    PretrainStep,
    PruneStep,
    QuantizeStep,
    Recipe,
    Role,
    StepConfig,
    TrimWeightsStep,
)
from hf_mtcompress.runs.plan import layer_problems
from hf_mtcompress.steps.pruning import recoveries
from hf_mtcompress.steps.run import check_steps_fit
from hf_mtcompress.steps.run_context import RunContext, check_readers, new_model
from hf_mtcompress.steps.training import merged_training, training_arguments
from hf_mtcompress.tasks.classification import is_unlabelled
from hf_mtcompress.trainers.arguments import DistillationTrainingArguments, MultiTaskTrainingArguments
from hf_mtcompress.trainers.multitask import MultiTaskTrainer

_ROWS_AT_ONCE = 10_000


def check_run(recipe: Recipe, sources: Sources, output: Path | None = None) -> RunContext:
    """Look for everything that would stop a run, before anything is trained.

    Args:
        recipe: what is wanted.
        sources: its data.
        output: folder of the run, if it is known; trainings are not rehearsed where its first step is done.

    Returns:
        What the steps of the run work with.

    Raises:
        RecipeError: one line for each problem.
    """
    check_steps_fit(recipe, sources.tasks)
    context = RunContext(recipe, output or Path(), sources, check_readers(recipe))
    problems = layer_problems(recipe)
    if not problems and (output is None or not context.step_folder(str(recipe.steps[0].name)).is_dir()):
        problems = _problems_of_trainings(context)
    if problems:
        raise RecipeError(problems)
    return context


def _problems_of_trainings(context: RunContext) -> list[str]:
    """What stops a training with two rows of every source."""
    problems = []
    with _nothing_left_behind() as scratch:
        try:
            model = new_model(context.recipe.encoder, context)
        except MTCompressError as error:
            return [*getattr(error, "problems", [str(error)])]
        problems += _problems_of_inputs(model, context)
        for step in context.recipe.steps:
            problems += _problems_of_arguments(step, model, context.for_step(step), scratch)
    return list(dict.fromkeys(problems))


def _problems_of_inputs(model: MultiTaskModel, context: RunContext) -> list[str]:
    """Whether the encoder takes what its reader makes, of the greatest length too, and heads and labels fit."""
    reader = context.reader
    longest = {name: torch.as_tensor(values) for name, values in reader.unpadded(reader.samples()[:1], 10**9).items()}
    try:
        with torch.inference_mode():
            model.eval()(**model.inputs_in(longest))
    except Exception as error:
        limit = f"encoder.max_length of {reader.max_length} tokens" if reader.max_length else "encoder.image_size"
        return [
            f"{limit}: expected an input of this size to pass through {type(model.encoder).__name__}, found that it "
            f"does not ({type(error).__name__}: {first_line(error)}); give one that fits its positions"
        ]
    return []


def _problems_of_arguments(step: StepConfig, model: MultiTaskModel, context: RunContext, scratch: Path) -> list[str]:
    """Whether a trainer can be made with the arguments of each training of a step."""
    problems = []
    for training in _trainings_of(step, context.recipe):
        taught = isinstance(training, DistillStep | PretrainStep)
        cls = DistillationTrainingArguments if taught else MultiTaskTrainingArguments
        config = merged_training(training, context.recipe.training)
        labelled = not isinstance(training, PretrainStep)
        try:
            arguments = training_arguments(cls, config, context, scratch, labelled=labelled)
            count = max(2, arguments.train_batch_size, arguments.eval_batch_size)
            rows = {role: _some_rows(context.sources, role, count) for role in ("train", "validation")}
            trainer = MultiTaskTrainer(
                model=model,
                args=arguments,
                train_dataset=rows["train"],
                eval_dataset=rows["validation"],
                processing_class=context.reader.processor,
            )
            trainer.create_optimizer_and_scheduler(num_training_steps=2)
            trainer.get_train_dataloader()
            trainer.get_eval_dataloader()
            dataset: Any = trainer.train_dataset
            with torch.no_grad():
                trainer.compute_loss(model, trainer.data_collator([dataset[(0, 0)]]))
        except MTCompressError as error:
            problems += getattr(error, "problems", [f"steps.{step.name}: {first_line(error)}"])
        except Exception as error:
            problems.append(
                f"steps.{step.name}: expected settings that a training can begin with, found "
                f"{config.arguments or 'none beside the keys of the recipe'} ({type(error).__name__}: "
                f"{first_line(error)}); correct or leave them out"
            )
    return problems


def _trainings_of(step: StepConfig, recipe: Recipe) -> list[FinetuneStep | DistillStep | PretrainStep]:
    match step:
        case FinetuneStep() | DistillStep() | PretrainStep():
            return [step]
        case PruneStep():
            return list(recoveries(step, recipe.training)[:1])
        case TrimWeightsStep() | QuantizeStep():
            return [] if step.recover is None else [step.recover]
        case _:
            return []


def _some_rows(sources: Sources, role: Role, count: int) -> dict[str, Dataset]:
    """Some rows of every source, a labelled one of each task among them; tasks that share rows still share them."""
    found: dict[str, Dataset] = {}
    rows = sources.role(role)
    for names in group_tasks(sources.tasks, rows):
        own = rows[names[0]]
        labelled = [_first_labelled(own, str(sources.tasks[name].label)) for name in names]
        chosen = list(dict.fromkeys([*labelled, *range(min(count, len(own)))]))
        found |= dict.fromkeys(names, own.select(chosen))
    return {name: found[name] for name in rows}


def _first_labelled(rows: Dataset, column: str) -> int:
    """Index of the first row with a label, 0 where none has one."""
    first = 0
    batch: Any
    for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        values = batch[column]
        for index, label in enumerate(values.to_pylist() if values.null_count < len(values) else ()):
            if not is_unlabelled(label):
                return first + index
        first += len(values)
    return 0


@contextmanager
def _nothing_left_behind() -> Iterator[Path]:
    """A scratch folder; draws after it are as if nothing had been drawn, and no bar is shown."""
    # transformers draws from the old generator of NumPy.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - as above
    scratch = Path(tempfile.mkdtemp(prefix="hf-mtcompress-"))
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield scratch
    finally:
        if shown:
            enable_progress_bars()
        shutil.rmtree(scratch, ignore_errors=True)
        gc.collect()  # trainers and models hold each other: a large encoder would stay beside that of the run
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002 - as above
        torch.set_rng_state(states[2])
