"""What a step left, what a saved folder scores, and what the tasks of a run are for its record."""

import json
from pathlib import Path
from typing import Any

from hf_mtcompress.data.load import by_name
from hf_mtcompress.digests import values_digest
from hf_mtcompress.evaluation.evaluate import evaluate_folder
from hf_mtcompress.recipe import Role
from hf_mtcompress.records import SplitScores, StepRecord, TaskRecord, step_from_dict
from hf_mtcompress.steps.run_context import RunContext


def read_step(path: Path) -> StepRecord | None:
    """What a step left in its folder; None where it is not done."""
    try:
        return step_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def result_digest(record: StepRecord) -> str:
    """Digest of what a step left, for those that build on it: made again, it may be the same or not."""
    return values_digest([record.fingerprint, record.files])


def score_folder(context: RunContext, folder: Path, role: Role) -> SplitScores:
    """Scores of a saved folder on the rows that play a role."""
    return evaluate_folder(
        folder,
        context.sources.tasks,
        context.sources.role(role),
        split=role,
        batch_size=context.recipe.training.eval_batch_size or 64,
    )


def task_record(name: str, context: RunContext) -> TaskRecord:
    """Rows, labels and baselines of a task, as the record holds them."""
    task = context.sources.tasks[name]
    source = context.sources.configs[name]
    labelled: dict[str, int] = {}
    baseline: dict[str, float] = {}
    for role, rows in context.sources.splits[name].items():
        labels = _encoded(task, rows)
        labelled[role] = int(sum(_is_labelled(label) for label in labels))
        if role != "train" and labelled[role]:
            baseline[role] = task.baseline([label for label in labels if _is_labelled(label)])
    return TaskRecord(
        name=name,
        kind=task.kind,
        problem_type=task.problem,
        metric=str(task.metric),
        role=task.role,
        weight=task.weight,
        labels=list(task.labels) if task.labels else None,
        rows=labelled,
        baseline=baseline,
        dataset_id=source.dataset_id,
        dataset_revision=context.sources.revision(name),
        license=source.license,
    )


def _encoded(task: Any, rows: Any) -> list[Any]:
    """Encoded labels of raw rows, one word a position for word labels."""
    values = list(by_name(list(rows[task.label]), rows.features[task.label], task))
    words = (
        {"word_ids": [list(range(len(value or ()))) for value in values]}
        if task.problem == "token_classification"
        else {}
    )
    return task.encode_labels(values, words)


def _is_labelled(label: Any) -> bool:
    if isinstance(label, list):
        return any(item != -100 for item in label)
    return label == label and label != -100
