"""What each task alone and all together came to: `compare.json`."""

from dataclasses import dataclass
from typing import Any

from hf_mtcompress.records.run import FORMAT_VERSION


@dataclass(kw_only=True)
class ComparedTask:
    """One main task of a comparison of ways to train, and what it is scored on."""

    metric: str
    split: str
    """`test` where there is one, else `validation`; the same rows in every arm and seed."""
    rows: int
    """Labelled rows that are scored."""


@dataclass(kw_only=True)
class ArmModel:
    """One model of an arm and its budget, which is the same in every seed."""

    tasks: list[str]
    folder: str
    """Relative to the comparison; holds a folder for each seed."""
    epochs: float
    optimizer_steps: int
    rows_seen: int
    """Rows that went through the encoder in training, repetitions counted."""
    task_rows_seen: dict[str, int]
    """By task: how many of them were rows of its source; tasks that share rows see the same ones."""


@dataclass(kw_only=True)
class ArmRecord:
    """One way to train the tasks, over all seeds."""

    name: str
    settings: list[str]
    """What it changes in the recipe, as `a.b.c=value`."""
    models: list[ArmModel]
    scores: dict[str, list[float | None]]
    """By task, and `average` where the arm has all main tasks: primary metric in the order of the seeds."""
    means: dict[str, float | None]
    """The same as means over the seeds."""


@dataclass(kw_only=True)
class TaskDifference:
    """What the company of other tasks did to one task, or to the average, in one arm."""

    arm: str
    task: str
    """Name of the task, or `average`."""
    alone: float | None
    """Mean over the seeds, trained alone."""
    together: float | None
    """Mean over the seeds in this arm."""
    difference: float | None
    """together - alone, paired by seed."""
    low: float | None
    high: float | None
    seeds: int
    verdict: str


@dataclass(kw_only=True)
class TaskComparisonRecord:
    """Every task alone and with others, on the same budget: `compare.json`."""

    format_version: int = FORMAT_VERSION
    name: str
    created: str
    seeds: list[int]
    confidence: float
    """Of every interval by itself."""
    environment: dict[str, Any]
    encoder: dict[str, Any]
    training: dict[str, Any]
    """Settings that all models share."""
    tasks: dict[str, ComparedTask]
    arms: list[ArmRecord]
    differences: list[TaskDifference]
