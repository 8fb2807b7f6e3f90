"""Scores of a saved artefact on labelled rows, whatever it runs on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from hf_mtcompress.data.collator import MultiTaskCollator
from hf_mtcompress.data.preprocessing import EncodedGroup, encode_groups
from hf_mtcompress.data.readers import lengths_of
from hf_mtcompress.formats.predictor import Predictor, load_predictor
from hf_mtcompress.records import SplitScores, TaskScore
from hf_mtcompress.tasks import Task
from hf_mtcompress.tasks.base import UNLABELLED

_PROGRESS_FROM = 50
"""Batches from which on a progress bar is worth a line."""


def evaluate_folder(
    folder: str | Path,
    tasks: Mapping[str, Task],
    datasets: Mapping[str, Dataset],
    *,
    split: str,
    batch_size: int = 64,
    threads: int | None = None,
) -> SplitScores:
    """Score a saved artefact of any form.

    Args:
        folder: what a step saved.
        tasks: tasks by name, with their columns; they say which metrics count.
        datasets: rows by task, raw or encoded; tasks that share their rows are answered in one pass.
        split: name for the record, such as `test`.
        batch_size: rows per call; rows of like length go together.
        threads: threads within an operation; None leaves the runtime's choice.

    Returns:
        Metrics of every task that the artefact answers and that has labelled rows.

    Raises:
        ArtifactError: the folder does not load.
        DataError: rows do not fit the tasks.
    """
    return evaluate_predictor(load_predictor(folder, threads), tasks, datasets, split=split, batch_size=batch_size)


def evaluate_predictor(
    predictor: Predictor,
    tasks: Mapping[str, Task],
    datasets: Mapping[str, Dataset],
    *,
    split: str,
    batch_size: int = 64,
) -> SplitScores:
    """Score a loaded artefact; see `evaluate_folder`."""
    answered = {name: rows for name, rows in datasets.items() if name in predictor.tasks}
    groups = encode_groups(tasks, answered, predictor.reader, split)
    scores: dict[str, TaskScore] = {}
    for group in groups:
        for name, (logits, labels) in _run(predictor, tasks, group, batch_size, split).items():
            rows = labelled_rows(labels)
            if rows:
                scores[name] = TaskScore(rows=rows, metrics=tasks[name].compute_metrics(logits, labels))
    ordered = {name: scores[name] for name in tasks if name in scores}
    return SplitScores(split=split, average=_average(tasks, ordered), tasks=ordered)


def labelled_rows(labels: np.ndarray) -> int:
    """Rows with at least one label: not -100, not NaN."""
    flat = labels.reshape(len(labels), -1)
    known = (flat != UNLABELLED) & ~np.isnan(flat.astype(np.float64))
    return int(known.any(axis=1).sum())


def _run(
    predictor: Predictor, tasks: Mapping[str, Task], group: EncodedGroup, batch_size: int, split: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Logits and labels by task, word-level ones padded to the longest row."""
    own = {name: tasks[name] for name in group.tasks}
    collator = MultiTaskCollator(own, predictor.reader)
    dataset = group.dataset
    order: Sequence[int] = range(len(dataset))
    if (lengths := lengths_of(dataset)) is not None:
        order = sorted(order, key=lambda index: -lengths[index])
    found: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {name: ([], []) for name in own}
    starts = range(0, len(order), batch_size)
    for start in tqdm(
        starts, desc=f"Scoring {group.name} on {split}", disable=len(starts) < _PROGRESS_FROM, leave=False
    ):
        batch = collator(_rows(dataset, list(order[start : start + batch_size])))
        labels = {name: batch.pop(task.label_name).numpy() for name, task in own.items()}
        logits = predictor.logits({name: tensor.numpy() for name, tensor in batch.items()})
        for name in own:
            found[name][0].append(logits[name])
            found[name][1].append(labels[name])
    return {name: (_join(logits, 0.0), _join(labels, UNLABELLED)) for name, (logits, labels) in found.items()}


def _rows(dataset: Dataset, indices: list[int]) -> list[dict[str, Any]]:
    columns = dataset[indices]
    return [{name: values[place] for name, values in columns.items()} for place in range(len(indices))]


def _join(parts: list[np.ndarray], filler: float) -> np.ndarray:
    """Stack batches; a second axis of tokens is filled up to the longest."""
    longest = max((part.shape[1] for part in parts if part.ndim > 1), default=0)
    filled = []
    for part in parts:
        if part.ndim > 1 and part.shape[1] < longest:
            widths = [(0, 0), (0, longest - part.shape[1])] + [(0, 0)] * (part.ndim - 2)
            part = np.pad(part, widths, constant_values=filler)
        filled.append(part)
    return np.concatenate(filled)


def _average(tasks: Mapping[str, Task], scores: Mapping[str, TaskScore]) -> float | None:
    main = [task for task in tasks.values() if task.role == "main"]
    if not main or any(task.name not in scores for task in main):
        return None
    return sum(scores[task.name].metrics[str(task.metric)] for task in main) / len(main)
