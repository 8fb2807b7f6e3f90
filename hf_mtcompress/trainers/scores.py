"""Scores by task and metric, and the flat names under which logs, callbacks and the choice of a checkpoint see them."""

from collections import Counter
from collections.abc import Iterable, Mapping

from hf_mtcompress.tasks import Task
from hf_mtcompress.tasks.metrics import METRICS_BY_PROBLEM

Scores = dict[str, dict[str, float]]
"""By task: its loss and metrics."""
LOSS = "loss"
AVERAGE = "average"
_OF_THE_EVALUATION = frozenset(
    {
        LOSS,
        AVERAGE,
        "runtime",
        "samples_per_second",
        "steps_per_second",
        "model_preparation_time",
        "jit_compilation_time",
    }
)
"""Names that an evaluation gives itself, beside those of its tasks."""


def known_scores(tasks: Iterable[Task]) -> list[tuple[str, str]]:
    """Task and metric of what every evaluation may hold, whatever functions of the user's add."""
    return [(task.name, metric) for task in tasks for metric in (LOSS, *METRICS_BY_PROBLEM[task.problem])]


def flat_names(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """`task_metric`; `task/metric` where two would have one name, as `mood` and `mood_balanced` may.

    Args:
        pairs: task and metric.
    """
    pairs = list(dict.fromkeys(pairs))
    counts = Counter(f"{task}_{metric}" for task, metric in pairs)
    return {
        (task, metric): f"{task}_{metric}"
        if counts[f"{task}_{metric}"] == 1 and f"{task}_{metric}" not in _OF_THE_EVALUATION
        else f"{task}/{metric}"
        for task, metric in pairs
    }


def average(tasks: Iterable[Task], scores: Mapping[str, Mapping[str, float]]) -> float | None:
    """Mean of the main tasks' primary metrics, of those that have one; None where none has."""
    found = [
        scores[task.name][task.metric]
        for task in tasks
        if task.role == "main" and task.metric is not None and task.metric in scores.get(task.name, {})
    ]
    return sum(found) / len(found) if found else None
