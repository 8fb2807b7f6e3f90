"""Raw rows to model inputs: which tasks are encoded together, and how."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from hf_mtcompress.data.load import by_name, check_label_order
from hf_mtcompress.data.pixels import undecoded
from hf_mtcompress.data.readers import WORD_IDS, Reader, are_encoded, input_columns, lengths_of
from hf_mtcompress.errors import DataError
from hf_mtcompress.tasks import Task

logger = logging.getLogger(__name__)

_STREAM_BLOCK = 64
"""Rows of a stream that are encoded together."""
_STREAM_SAMPLE = 512
"""Rows of a stream that stand for all of them where a normaliser is wanted."""


@dataclass(frozen=True)
class EncodedGroup:
    """Tasks that share rows and inputs, encoded once.

    Attributes:
        tasks: names of the tasks, in order.
        dataset: model inputs and one `labels_<task>` column for each task.
        guests: those of the tasks that have no labels here, and are answered by a teacher.
    """

    tasks: tuple[str, ...]
    dataset: Dataset
    guests: tuple[str, ...] = ()

    @property
    def own_tasks(self) -> tuple[str, ...]:
        """The tasks that these rows were made for."""
        return tuple(name for name in self.tasks if name not in self.guests)

    @property
    def name(self) -> str:
        """For logs: the names of its own tasks joined by `+`."""
        return "+".join(self.own_tasks)


@dataclass(frozen=True)
class EncodedStream:
    """The same for rows that are encoded while they are read.

    Attributes:
        tasks: names of the tasks, in order.
        dataset: as of `EncodedGroup`.
    """

    tasks: tuple[str, ...]
    dataset: IterableDataset

    @property
    def own_tasks(self) -> tuple[str, ...]:
        """As of `EncodedGroup`: all of them."""
        return self.tasks


def group_tasks(tasks: Mapping[str, Task], datasets: Mapping[str, Dataset | IterableDataset]) -> list[tuple[str, ...]]:
    """Names of tasks that share rows (the same data set) and columns, so that their rows are encoded once.

    They may read different branches or encoders: all encoders of a model have one reader.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, dataset in datasets.items():
        rows = (dataset._fingerprint, len(dataset)) if isinstance(dataset, Dataset) else (id(dataset),)
        groups.setdefault((*rows, *tasks[name].input_columns), []).append(name)
    return [tuple(names) for names in groups.values()]


def encode_groups(
    tasks: Mapping[str, Task],
    datasets: Mapping[str, Dataset],
    reader: Reader | None,
    role: str,
) -> list[EncodedGroup]:
    """Encode each task's rows, those of tasks that share them once.

    Args:
        tasks: tasks by name.
        datasets: rows by task name; rows that hold model inputs pass untouched.
        reader: of the encoder; needed for raw rows.
        role: what the rows are for, for messages: train, validation, test.

    Raises:
        DataError: a column is missing, a split is empty, a label does not fit, or raw rows come without a reader.
    """
    _refuse_unknown(tasks, datasets, role)
    return [
        EncodedGroup(names, encode_dataset(datasets[names[0]], [tasks[name] for name in names], reader, role))
        for names in group_tasks(tasks, datasets)
    ]


def encode_streams(
    tasks: Mapping[str, Task],
    datasets: Mapping[str, IterableDataset],
    reader: Reader | None,
    role: str,
) -> list[EncodedStream]:
    """As `encode_groups`; tasks share a stream where they are given the same object.

    Raises:
        DataError: as `encode_groups`; labels are looked at when a row is read.
    """
    _refuse_unknown(tasks, datasets, role)
    return [
        EncodedStream(names, _encode(datasets[names[0]], [tasks[name] for name in names], reader, role))
        for names in group_tasks(tasks, datasets)
    ]


def _refuse_unknown(tasks: Mapping[str, Task], datasets: Mapping[str, Any], role: str) -> None:
    unknown = [name for name in datasets if name not in tasks]
    if unknown:
        raise DataError(f"{role}: expected rows for the tasks {list(tasks)}, found rows for {unknown}; rename the keys")


def encode_dataset(dataset: Dataset, tasks: Sequence[Task], reader: Reader | None, role: str) -> Dataset:
    """Encode the rows of tasks that share their inputs; see `encode_groups`."""
    return _encode(dataset, tasks, reader, role)


def columns_for(samples: Sequence[Any], tasks: Iterable[Task], reader: Reader) -> list[list[Any]]:
    """Raw inputs as a user gives them, as columns that all of the tasks can read.

    Raises:
        DataError: they are not what the reader reads, or pairs for a task that labels words.
    """
    word_task = next((task for task in tasks if task.reads_words), None)
    columns = reader.columns(samples)
    if word_task is not None and len(columns) > 1:
        raise DataError(
            f"task '{word_task.name}': expected one text, found pairs; name the tasks that take pairs: tasks=[...]"
        )
    return columns


def for_every_task(groups: Sequence[EncodedGroup], tasks: Mapping[str, Task]) -> list[EncodedGroup]:
    """Groups of texts with every task that can read them: those of others' rows have no labels there.

    A task can read rows with as many texts in them, one or a pair, as its own rows have.

    Raises:
        DataError: rows of images.
    """
    widened = []
    for group in groups:
        lengths = lengths_of(group.dataset)
        if lengths is None:
            raise DataError(
                f"every_task: expected texts, found images for {group.name}; give all tasks labels or open labels on "
                "the same rows instead"
            )
        texts = len(tasks[group.tasks[0]].input_columns)
        added = [task for name, task in tasks.items() if name not in group.tasks and len(task.input_columns) == texts]
        dataset = group.dataset
        for task in added:
            open_labels = task.encode_labels([None] * len(dataset), {WORD_IDS: [range(length) for length in lengths]})
            dataset = dataset.add_column(task.label_name, open_labels)  # type: ignore[call-arg]  # the stub wants a fingerprint
        guests = tuple(task.name for task in added)
        widened.append(EncodedGroup((*group.tasks, *guests), dataset, guests))
    return widened


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns, with those that its own transform adds; a stream may not know them before its first row."""
    known = dataset.column_names or []
    if not known or _transform_of(dataset) is not None:
        return list(dict.fromkeys([*known, *next(iter(dataset), {})]))
    return known


def _encode(dataset: Any, tasks: Sequence[Task], reader: Reader | None, role: str) -> Any:
    names = ", ".join(task.name for task in tasks)
    columns = columns_of(dataset)
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise DataError(
            f"task {names}: expected rows in the {role} split, found none; check the source and its filters"
        )
    transform = _transform_of(dataset)
    # What a task names as its input is to be read, whatever it is called.
    if are_encoded([name for name in columns if all(name not in task.input_columns for task in tasks)], reader):
        if transform is not None:
            return _encode_transformed(dataset, tasks, reader, role, encoded=True)
        return _name_labels(dataset, columns, tasks, role)
    if isinstance(dataset, Dataset) and transform is None:
        dataset = dataset.with_format(None)  # plain values, whatever their owner would see
    if reader is None:
        raise DataError(
            f"task {names}: expected a processing_class (tokenizer or image processor) for raw rows with columns "
            f"{columns}, found none; pass processing_class=... or encode the rows yourself"
        )
    for task in tasks:
        if not task.input_columns:
            raise DataError(
                f"task '{task.name}': expected the name of its input column, found none; pass it to the task, or set "
                f"{', '.join(f'.{name}' for name in task.columns)} of model.tasks['{task.name}'], which a saved model "
                "does not keep"
            )
        for column in (*task.input_columns, *([task.label] if task.label else [])):
            require_column(columns, column, f"task '{task.name}'", role)
        if transform is not None and task.label:
            require_column(
                dataset.column_names, task.label, f"task '{task.name}', before the data set's own transform", role
            )
        if task.label and isinstance(dataset, Dataset):
            check_label_order(dataset, task, f"task '{task.name}'")
    if reader.on_read:
        if transform is not None:
            return _encode_transformed(dataset, tasks, reader, role, encoded=False)
        return _encode_on_read(dataset, tasks, reader)
    words = any(task.reads_words for task in tasks)
    features = dict(dataset.features or {})

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        inputs = [rows[column] for column in tasks[0].input_columns]
        encoded = reader.encode(inputs, words=words)
        raw = {**encoded, "words": inputs[0]}
        labels = {
            task.label_name: task.encode_labels(by_name(rows[task.label], features.get(task.label), task), raw)
            for task in tasks
            if task.label
        }
        encoded.pop(WORD_IDS, None)
        return {**encoded, **labels}

    if isinstance(dataset, IterableDataset):
        return dataset.map(encode, batched=True, batch_size=_STREAM_BLOCK, remove_columns=columns)
    if transform is not None:
        logger.warning(
            "%s: texts are encoded once, so the data set's own transform is called once a row: what it draws at random "
            "is the same in every epoch",
            names,
        )
    encoded = dataset.map(
        encode,
        batched=True,
        remove_columns=dataset.column_names,
        desc=f"Encoding {role} rows of {names}",
        load_from_cache_file=True,
    )
    return encoded if transform is None else encoded.with_format(None)


def _transform_of(dataset: Dataset | IterableDataset) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """What a data set's owner has it do to rows when they are read; see `Dataset.with_transform`."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] != "custom":
        return None
    return dataset.format["format_kwargs"]["transform"]


def _encode_on_read(dataset: Any, tasks: Sequence[Task], reader: Reader) -> Any:
    """Labels are encoded now, inputs when a row is read."""
    inputs = tasks[0].input_columns
    dataset = _with_labels(undecoded(dataset), [(task, task.label) for task in tasks if task.label])

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        labels = {task.label_name: rows[task.label_name] for task in tasks if task.label_name in rows}
        found = [rows[column] for column in inputs if column in rows]
        return {**(reader.encode(found) if len(found) == len(inputs) else {}), **labels}

    if isinstance(dataset, IterableDataset):
        columns = columns_of(dataset)
        return dataset.map(encode, batched=True, batch_size=_STREAM_BLOCK, remove_columns=columns)
    return dataset.with_transform(encode)


def _encode_transformed(
    dataset: Dataset, tasks: Sequence[Task], reader: Reader | None, role: str, *, encoded: bool
) -> Dataset:
    """As `_encode_on_read` of rows that their owner transforms when they are read; `encoded`: into model inputs."""
    transform, seen, features = _transform_of(dataset), dataset.format["columns"], dict(dataset.features)
    assert transform is not None
    given = [task.label_name for task in tasks if task.label_name in dataset.column_names]
    labelled = [task for task in tasks if (encoded or task.label) and task.label_name not in given]
    labels = [(task, _label_column(task, dataset.column_names, tasks, role)) for task in labelled]
    dataset = _with_labels(dataset.with_format(None), labels)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        own = {task.label_name: rows[task.label_name] for task in tasks if task.label_name in rows}
        if any(column not in rows for column in seen):
            return own  # somebody asks for labels alone
        made = transform({column: rows[column] for column in seen})
        own |= {name: made[name] for name in given if name in made}
        for task, column in labels:
            if column not in made:
                continue
            found = task.encode_labels(by_name(list(made[column]), features[column], task), {})
            if not _equal(found, own[task.label_name]):
                raise DataError(
                    f"task '{task.name}': expected a transform that leaves the labels in '{column}' alone, found one "
                    "that changes them; change them with Dataset.map before"
                )
        if encoded or reader is None:
            return {**{name: made[name] for name in input_columns(made, reader)}, **own}
        for column in tasks[0].input_columns:
            require_column(made, column, f"task '{tasks[0].name}', after the data set's own transform", role)
        return {**reader.encode([made[column] for column in tasks[0].input_columns]), **own}

    return dataset.with_transform(encode)


def _equal(one: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(one, dtype=float), np.asarray(other, dtype=float), equal_nan=True)


def _with_labels(dataset: Any, labels: Sequence[tuple[Task, str]]) -> Any:
    """The rows with encoded labels of tasks beside the columns that they stand in."""
    features = dict(dataset.features or {})

    def encode_labels(*values: list[Any]) -> dict[str, list[Any]]:
        return {
            task.label_name: task.encode_labels(by_name(rows, features.get(column), task), {})
            for (task, column), rows in zip(labels, values, strict=True)
        }

    columns = [column for _, column in labels]
    return dataset.map(encode_labels, batched=True, input_columns=columns) if columns else dataset


def _name_labels(dataset: Any, columns: Sequence[str], tasks: Sequence[Task], role: str) -> Any:
    """Give the label columns of rows that were encoded elsewhere the names that batches use."""
    for task in tasks:
        if task.label_name not in columns:
            dataset = dataset.rename_column(_label_column(task, columns, tasks, role), task.label_name)
    return dataset


def _label_column(task: Task, columns: Sequence[str], tasks: Sequence[Task], role: str) -> str:
    """Where the labels of a task stand among rows that were encoded elsewhere; `tasks` share the rows.

    Raises:
        DataError: nowhere, or where those of several tasks would.
    """
    found = next((name for name in (task.label, "labels", "label") if name in columns), None)
    if found is None:
        raise DataError(
            f"task '{task.name}': expected labels in column '{task.label_name}', '{task.label}' or 'labels' of the "
            f"{role} rows, found {list(columns)}; rename the column"
        )
    if len(tasks) > 1 and found != task.label:
        raise DataError(
            f"expected one label column for each of {[task.name for task in tasks]}, found only '{found}'; "
            f"name them {[task.label_name for task in tasks]}"
        )
    return found


def require_column(columns: Iterable[str], wanted: str, what: str, role: str) -> None:
    """Make sure that a column is there.

    Raises:
        DataError: it is not; the message lists those found and the nearest.
    """
    found = list(columns)
    if wanted not in found:
        near = get_close_matches(wanted, found, n=1)
        raise DataError(
            f"{what}: expected column '{wanted}' in the {role} rows, found {found}"
            + (f"; did you mean '{near[0]}'?" if near else "; name the right column in the task")
        )


def encoded_labels(dataset: Dataset | IterableDataset, task: Task) -> list[Any]:
    """The encoded labels of one task, without reading inputs; of a stream, those of its first rows."""
    if isinstance(dataset, IterableDataset):
        return [row[task.label_name] for row in dataset.take(_STREAM_SAMPLE)]
    column = dataset.with_format(None).select_columns([task.label_name])[task.label_name]
    return list(column)
