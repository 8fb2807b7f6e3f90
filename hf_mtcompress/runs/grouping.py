"""Which tasks of a run should share an encoder, from gradients on validation rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hf_mtcompress.artifacts import (
    RECIPE,
)
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.errors import ArtifactError, DataError, RecipeError
from hf_mtcompress.evaluation.affinity import held_out_cosines
from hf_mtcompress.losses.grouping import Grouping, best_grouping, encoders_within
from hf_mtcompress.publishing.facts import tasks_of
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import StepRecord, TaskRecord
from hf_mtcompress.runs.results import load_record
from hf_mtcompress.steps.rows import validation_rows
from hf_mtcompress.steps.run_context import RunContext, recipe_reader, start_of
from hf_mtcompress.tasks import Task


def group_tasks_of(
    folder: Path, *, encoders: int | None = None, parameters: int | None = None, rows: int = 200
) -> Grouping:
    """The grouping of a run's tasks into encoders, from gradients on validation rows.

    Looks that the run took in training (`fusion.measure_every` with `measure_on: validation`) are what it goes by;
    without any, one look at its trained model is taken, which is mostly chance.

    Args:
        folder: of the run. Of its finetune and distill steps, the one with the most tasks is asked; among those, the
            one with the most looks, else the last.
        encoders: at most so many; default 2.
        parameters: at most so many in all encoders together, instead of `encoders`.
        rows: of a look at the trained model: at most so many of each source of rows.

    Raises:
        ArtifactError: there is no run, or no such step in it.
        RecipeError: both limits, or one that allows no encoder.
        DataError: a task has no validation rows.
        UnsupportedEncoderError: tasks do not share a whole encoder.
    """
    record = load_record(folder)
    trained = [step for step in reversed(record.steps) if step.kind in ("finetune", "distill")]
    step = max(trained, key=lambda step: (len(tasks_of(record, step)), _looks(step)), default=None)
    if step is None:
        raise ArtifactError(f"expected a run with a finetune or distill step, found none in {folder.name}; run one")
    if encoders is not None and parameters is not None:
        raise RecipeError("expected --encoders or --parameters, found both; give one")
    if rows < 1:
        raise RecipeError(f"--rows: expected at least 1 validation row of each source, found {rows}")
    try:
        if parameters is not None:
            size = step.artefacts[0].size
            if size is None or not size.encoder_parameters:
                raise ArtifactError(
                    f"expected the number of parameters of the step '{step.name}' in the record, found none; say "
                    "--encoders instead"
                )
            encoders = encoders_within(parameters, size.encoder_parameters)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    encoders = 2 if encoders is None else encoders
    if encoders < 1:
        raise RecipeError(f"--encoders: expected at least 1, found {encoders}")
    if _looks(step):
        return _grouped_by_looks(step, tasks_of(record, step), encoders)
    recipe = load_recipe(folder / RECIPE)
    context = RunContext(recipe, folder, load_sources(recipe.tasks, recipe.seed), recipe_reader(recipe))
    start = start_of(step.name, context)
    if torch.accelerator.is_available():
        torch.nn.Module.to(start.model, torch.accelerator.current_accelerator())
    chosen = validation_rows(context, rows)
    cosines = held_out_cosines(start.model, chosen, start.reader)
    return _grouped(start.model.tasks, list(start.model.tasks), cosines.tolist(), encoders)


def _looks(step: StepRecord) -> int:
    """How often a step compared gradients on validation rows."""
    report = step.interference or {}
    return int(report["steps"]) if report.get("rows") == "validation" else 0


def _grouped_by_looks(step: StepRecord, tasks: Mapping[str, TaskRecord], encoders: int) -> Grouping:
    """From the mean cosines in a step's record, of the tasks that its model answers."""
    report = step.interference or {}
    unseen = [name for name in tasks if report["norms"].get(name) is None]
    if unseen:
        raise DataError(
            f"step '{step.name}': expected validation rows with a label of every task, found none of "
            f"{', '.join(unseen)} in {report['steps']} looks; add rows, or leave the task out"
        )
    return _grouped(tasks, report["tasks"], report["cosine"], encoders, report["steps"])


def _grouped(
    tasks: Mapping[str, Task | TaskRecord],
    names: Sequence[str],
    cosines: Sequence[Sequence[float | None]],
    encoders: int,
    looks: int = 1,
) -> Grouping:
    """Main tasks by their part of a matrix of `names`; auxiliary ones help in every group, as in `compare-tasks`."""
    main = [name for name, task in tasks.items() if task.role == "main"]
    places = [names.index(name) for name in main]
    matrix = [[cosines[row][column] for column in places] for row in places]
    helpers = tuple(name for name in tasks if name not in main)
    return dataclasses.replace(best_grouping(main, matrix, encoders, looks), helpers=helpers)
