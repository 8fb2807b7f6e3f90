"""What an artefact keeps of the reference: pure arithmetic on records.

Definitions. `average` is the mean of the main tasks' primary metrics. The retention of a task is s / t, and above
chance (s - b) / (t - b), with the artefact's score s, the reference's score t and the score b of the majority class or
the mean predictor. The retention of an artefact is the mean over the main tasks, its worst task retention the minimum.
Where the reference is not above b there is nothing to keep: both forms are then undefined for that task, which is left
out of means and minimum and named with the reason. That a limit is met is then not decided.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_mtcompress.recipe import BudgetConfig
from hf_mtcompress.records import Artefact, Comparison, LatencyRecord, SplitScores, TaskRecord
from hf_mtcompress.records.retention import why_left_out
from hf_mtcompress.records.timing import BUSY

MEGABYTE = 10**6


def average(tasks: Mapping[str, TaskRecord], scores: Mapping[str, float]) -> float | None:
    """Mean of the main tasks' primary metrics.

    Args:
        tasks: the tasks of the run.
        scores: primary metric by task.

    Returns:
        The mean, or None when a main task has no score.
    """
    main = [name for name, task in tasks.items() if task.role == "main"]
    if not main or any(name not in scores for name in main):
        return None
    return sum(scores[name] for name in main) / len(main)


def primary_scores(tasks: Mapping[str, TaskRecord], scores: SplitScores) -> dict[str, float]:
    """The primary metric of each scored task."""
    return {
        name: score.metrics[tasks[name].metric]
        for name, score in scores.tasks.items()
        if name in tasks and tasks[name].metric in score.metrics
    }


def compare(
    tasks: Mapping[str, TaskRecord],
    reference: Artefact,
    artefact: Artefact,
    *,
    step: str,
    split: str | None = None,
) -> Comparison:
    """Set an artefact against the reference.

    Args:
        tasks: the tasks of the run, with baselines.
        reference: the artefact that counts as 100 %.
        artefact: the one in question.
        step: name of the step that made it.
        split: `test` or `validation`; default: test where both were scored on it, else validation.

    Returns:
        The comparison; auxiliary tasks are listed but do not count in the aggregates. Every aggregate is None when no
        main task has a defined retention.
    """
    if split is None:
        split = "test" if "test" in reference.scores and "test" in artefact.scores else "validation"
    known = primary_scores(tasks, reference.scores[split]) if split in reference.scores else {}
    found = primary_scores(tasks, artefact.scores[split]) if split in artefact.scores else {}
    rows: dict[str, dict[str, float | None]] = {}
    undefined: dict[str, str] = {}
    for name, task in tasks.items():
        score, target = found.get(name), known.get(name)
        baseline = task.baseline.get(split)
        reason = _why_undefined(score, target, baseline, split)
        row: dict[str, float | None] = {
            "score": score,
            "reference": target,
            "difference": None if score is None or target is None else score - target,
            "retention": None,
            "retention_above_chance": None,
        }
        if reason is not None:
            undefined[name] = reason
        elif score is not None and target is not None:
            row["retention"] = score / target
            if baseline is not None:
                row["retention_above_chance"] = (score - baseline) / (target - baseline)
        rows[name] = row
    main = {name: rows[name] for name, task in tasks.items() if task.role == "main"}
    plain = {name: row["retention"] for name, row in main.items() if row["retention"] is not None}
    above = [row["retention_above_chance"] for row in main.values() if row["retention_above_chance"] is not None]
    worst = min(plain, key=lambda name: plain[name], default=None)
    return Comparison(
        step=step,
        folder=artefact.folder,
        split=split,
        retention=_mean(list(plain.values())),
        retention_above_chance=_mean(above),
        worst_task_retention=None if worst is None else plain[worst],
        worst_task=worst,
        tasks=rows,
        undefined=undefined,
    )


def check_budget(
    budget: BudgetConfig, tasks: Mapping[str, TaskRecord], artefact: Artefact, comparison: Comparison | None
) -> dict[str, Any]:
    """Hold an artefact against what the device allows.

    Args:
        budget: the limits; those that are None are not checked.
        tasks: the tasks of the run.
        artefact: with size and latency measured.
        comparison: of this artefact with the reference.

    Returns:
        By limit `{"limit", "found", "met", "why"}`, and `artefact`, its folder. `met` is None where that is not
        decided, and `why` says why: it was not measured, or what is kept is undefined for a main task. Latency ratios
        are those of the minimum times, which other work on the machine disturbs least.
    """
    size = None if artefact.size is None else artefact.size.weights_bytes / MEGABYTE
    at_most = [
        ("latency_b1_ratio", budget.latency_b1_ratio, latency_ratio(artefact.latency, 1)),
        ("latency_b32_ratio", budget.latency_b32_ratio, latency_ratio(artefact.latency, 32)),
        ("size_mb", budget.size_mb, size),
    ]
    at_least = [
        ("retention", budget.retention, comparison and comparison.retention),
        ("worst_task_retention", budget.worst_task_retention, comparison and comparison.worst_task_retention),
    ]
    busy = any(row.not_measured for row in artefact.latency)
    left_out = None if comparison is None else why_left_out(tasks, comparison.undefined)
    checked: dict[str, Any] = {"artefact": artefact.folder}
    for name, limit, found in at_most:
        if limit is not None:
            met = None if found is None else found <= limit
            why = f"not measured: {BUSY}" if busy and name.startswith("latency") else "not measured"
            checked[name] = {"limit": limit, "found": found, "met": met, "why": why if met is None else None}
    for name, limit, found in at_least:
        if limit is not None:
            # Those that are left out could not make it better.
            met = None if found is None or (found >= limit and left_out) else found >= limit
            why = left_out or "not measured"
            checked[name] = {"limit": limit, "found": found, "met": met, "why": why if met is None else None}
    return checked


def check_gate(
    comparison: Comparison, retention: float | None, worst_task_retention: float | None
) -> dict[str, dict[str, Any]]:
    """Hold a quantized artefact against what it must keep of the model it was made from.

    Args:
        comparison: of the artefact with that model, on validation rows.
        retention: smallest mean over the main tasks; None where it is not limited.
        worst_task_retention: smallest of any main task; None where it is not limited.

    Returns:
        By limit `{"limit", "found", "met"}`; what is undefined for all tasks is not met.
    """
    limits = {"retention": retention, "worst_task_retention": worst_task_retention}
    values = {"retention": comparison.retention, "worst_task_retention": comparison.worst_task_retention}
    return {
        name: {"limit": limit, "found": values[name], "met": (found := values[name]) is not None and found >= limit}
        for name, limit in limits.items()
        if limit is not None
    }


def latency_ratio(latency: list[LatencyRecord], batch_size: int) -> float | None:
    """Ratio of the minimum time to the reference's at one batch size, None where it was not measured."""
    for row in latency:
        if row.batch_size == batch_size:
            return row.ratio_minimum
    return None


def _why_undefined(score: float | None, target: float | None, baseline: float | None, split: str) -> str | None:
    if target is None:
        return f"the reference has no score on the {split} split"
    if score is None:
        return f"no score on the {split} split"
    if baseline is not None and target <= baseline:
        return f"the reference ({target:.4g}) is not above the baseline ({baseline:.4g})"
    if target <= 0:
        return f"the reference ({target:.4g}) is not above zero"
    return None


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
