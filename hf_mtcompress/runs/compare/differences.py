"""What came out: scores by arm and seed, and how the arms differ from each task alone."""

import math
from collections.abc import Mapping, Sequence

from hf_mtcompress.data.preprocessing import group_tasks
from hf_mtcompress.data.sources import Sources
from hf_mtcompress.records import (
    ArmModel,
    ArmRecord,
    ComparedTask,
    StepRecord,
    TaskDifference,
)
from hf_mtcompress.runs.compare.arms import ALONE
from hf_mtcompress.runs.compare.models import PlannedModel, counted_rows, scored_role
from hf_mtcompress.runs.compare.statistics import paired_difference, verdict

AVERAGE = "average"


def compared_task(
    name: str, sources: Sources, arms: Mapping[str, Sequence[PlannedModel]], done: Mapping[str, Sequence[StepRecord]]
) -> ComparedTask:
    """The metric, split and rows that a task is compared by."""
    role = scored_role(sources, name)
    scores = done[arms[f"{ALONE}:{name}"][0].folder][0].artefacts[0].scores[role].tasks.get(name)
    return ComparedTask(metric=str(sources.tasks[name].metric), split=role, rows=scores.rows if scores else 0)


def arm_record(
    name: str,
    settings: list[str],
    models: Sequence[PlannedModel],
    tasks: Mapping[str, ComparedTask],
    done: Mapping[str, Sequence[StepRecord]],
) -> ArmRecord:
    """What the models of an arm came to, task by task and seed by seed."""
    scores: dict[str, list[float | None]] = {}
    for model in models:
        for task in (task for task in model.tasks if task in tasks):
            scores[task] = [score_of(step, task, tasks[task]) for step in done[model.folder]]
    scores = {task: scores[task] for task in tasks if task in scores}
    if len(scores) == len(tasks):
        scores[AVERAGE] = _averages(list(scores.values()))
    return ArmRecord(
        name=name,
        settings=settings,
        models=[_budget(model, done[model.folder][0]) for model in models],
        scores=scores,
        means={task: mean_of(values) for task, values in scores.items()},
    )


def score_of(step: StepRecord, name: str, task: ComparedTask) -> float | None:
    """The primary metric; None where there is none or it is no number (a correlation of constants)."""
    scores = step.artefacts[0].scores[task.split].tasks.get(name)
    value = None if scores is None else scores.metrics.get(task.metric)
    return value if value is not None and math.isfinite(value) else None


def _averages(columns: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean over tasks for each seed; None where a task has no score."""
    return [mean_of(row) if None not in row else None for row in zip(*columns, strict=True)]


def mean_of(values: Sequence[float | None]) -> float | None:
    """Of all values; None where one is missing, since means of other seeds would not compare."""
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def _budget(model: PlannedModel, step: StepRecord) -> ArmModel:
    """Steps and rows of one training; every seed has the same."""
    training = step.training or {}
    epochs = float(training["epochs"])
    counts = counted_rows(model.sources, model.recipe.mixing.cap)
    seen = epochs * sum(counts)
    # An epoch of proportional mixing is one pass over each source; others say how many batches each had at last.
    shares = counts if model.recipe.mixing.strategy == "proportional" else list(training["mixing"].values())
    groups = group_tasks(model.sources.tasks, model.sources.role("train"))
    by_task = {
        name: round(seen * share / sum(shares)) for group, share in zip(groups, shares, strict=True) for name in group
    }
    return ArmModel(
        tasks=model.tasks,
        folder=model.folder,
        epochs=epochs,
        optimizer_steps=int(training["steps"]),
        rows_seen=round(seen),
        task_rows_seen={name: by_task[name] for name in model.tasks},
    )


def differences(arms: Sequence[ArmRecord], tasks: Sequence[str]) -> list[TaskDifference]:
    """Every arm that has all tasks against each task alone."""
    alone = {task: next(arm for arm in arms if arm.name == f"{ALONE}:{task}") for task in tasks}
    reference = {task: arm.scores[task] for task, arm in alone.items()}
    reference[AVERAGE] = _averages([reference[task] for task in tasks])
    found = []
    for arm in (arm for arm in arms if arm not in alone.values()):
        folders = {task: model.folder for model in arm.models for task in model.tasks}
        for task in (*tasks, AVERAGE):
            same = task != AVERAGE and folders[task] == alone[task].models[0].folder
            found.append(_difference(arm.name, task, arm.scores[task], reference[task], same=same))
    return found


def _difference(
    arm: str, task: str, scores: Sequence[float | None], reference: Sequence[float | None], *, same: bool
) -> TaskDifference:
    result = TaskDifference(
        arm=arm,
        task=task,
        alone=mean_of(reference),
        together=mean_of(scores),
        difference=None,
        low=None,
        high=None,
        seeds=len(scores),
        verdict="alone in this arm" if same else "no score",
    )
    ours = [value for value in scores if value is not None]
    others = [value for value in reference if value is not None]
    if not same and len(ours) == len(others) == len(scores):
        found = paired_difference(ours, others)
        result.difference, result.low, result.high = found.mean, found.low, found.high
        result.verdict = verdict(found)
    return result
