"""From the `tasks` section of a recipe to tasks with labels and rows."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from datasets import Dataset, concatenate_datasets
from pyarrow import ArrowInvalid, ArrowNotImplementedError

from hf_mtcompress.data.load import (
    check_columns,
    check_labels,
    check_pictures,
    content_fingerprint,
    dataset_revision,
    infer_labels,
    load_splits,
    load_unlabelled,
)
from hf_mtcompress.data.preprocessing import require_column
from hf_mtcompress.data.readers import lies_in_files
from hf_mtcompress.errors import DataError, MTCompressError, RecipeError
from hf_mtcompress.recipe import (
    DataConfig,
    ImageClassificationConfig,
    Role,
    SequenceClassificationConfig,
    TaskConfig,
    TokenClassificationConfig,
    WeightSchedule,
)
from hf_mtcompress.tasks import ImageClassification, SequenceClassification, Task, TokenClassification

Value = TypeVar("Value")


@dataclass(frozen=True)
class Sources:
    """Tasks with known labels, and their rows.

    Attributes:
        tasks: by name.
        splits: rows by task name and role; tasks that share rows hold the same objects.
        fingerprints: digest of the rows by task name.
        configs: the data source of each task, followed through shared names.
        unlabelled: rows without labels by task name, of tasks that have some; those that share rows share the object.
    """

    tasks: dict[str, Task]
    splits: dict[str, dict[Role, Dataset]]
    fingerprints: dict[str, str]
    configs: dict[str, DataConfig]
    unlabelled: dict[str, Dataset] = field(default_factory=dict)

    def role(self, role: Role) -> dict[str, Dataset]:
        """The rows that play a role, by task; tasks without such a split are left out."""
        return {name: splits[role] for name, splits in self.splits.items() if role in splits}

    def of(self, names: Collection[str]) -> "Sources":
        """These tasks alone, with their rows."""

        def kept(values: dict[str, Value]) -> dict[str, Value]:
            return {name: value for name, value in values.items() if name in names}

        return Sources(
            kept(self.tasks), kept(self.splits), kept(self.fingerprints), kept(self.configs), kept(self.unlabelled)
        )

    def revision(self, name: str) -> str | None:
        """Commit of the Hub data set of one task."""
        return dataset_revision(self.splits[name])


def load_sources(configs: Mapping[str, TaskConfig], seed: int) -> Sources:
    """Read every source once, and settle labels.

    Args:
        configs: tasks of the recipe, paths absolute or relative to the current folder.
        seed: of row limits and of validation splits that are carved from train.

    Raises:
        RecipeError: one line for each task whose data do not fit.
    """
    origins = {name: _origin(name, configs) for name in configs}
    loaded: dict[str, dict[Role, Dataset]] = {}
    problems: list[str] = []
    for origin in dict.fromkeys(origins.values()):
        data = configs[origin].data
        assert isinstance(data, DataConfig)
        try:
            named = [
                config.label for name, config in configs.items() if origins[name] == origin and _names_labels(config)
            ]
            pictures = [
                column
                for name, config in configs.items()
                if origins[name] == origin
                for column in _picture_columns(task_of(name, config), config)
            ]
            loaded[origin] = load_splits(data, Path.cwd(), seed, f"task '{origin}'", named, pictures)
        except DataError as error:
            problems.append(str(error))
    tasks: dict[str, Task] = {}
    for name, config in configs.items():
        if origins[name] not in loaded:
            continue
        try:
            tasks[name] = _build_task(name, config, loaded[origins[name]])
        except MTCompressError as error:
            problems.append(str(error))
    for origin, splits in loaded.items():
        # Other columns may be called as model inputs are.
        used = {column for name in tasks if origins[name] == origin for column in _columns(tasks[name])}
        loaded[origin] = {
            role: rows.select_columns([column for column in rows.column_names if column in used])
            for role, rows in splits.items()
        }
    unlabelled: dict[str, Dataset] = {}
    for origin in (origin for origin in loaded if configs[origin].unlabelled is not None):
        own = [(task_of(name, configs[name]), configs[name]) for name in origins if origins[name] == origin]
        columns = [column for task, _ in own for column in task.input_columns]
        try:
            found = load_unlabelled(
                _unlabelled_config(configs[origin]),
                list(dict.fromkeys(columns)),
                Path.cwd(),
                seed,
                f"task '{origin}', unlabelled",
                [column for task, config in own for column in _picture_columns(task, config)],
            )
            unlabelled |= {name: found for name in origins if origins[name] == origin}
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError(problems, "the data")
    digests = {
        origin: content_fingerprint(splits)
        + (content_fingerprint({"train": unlabelled[origin]}) if origin in unlabelled else "")
        for origin, splits in loaded.items()
    }
    return Sources(
        tasks=tasks,
        splits={name: loaded[origin] for name, origin in origins.items()},
        fingerprints={name: digests[origin] for name, origin in origins.items()},
        configs={name: _data_config(configs[origin]) for name, origin in origins.items()},
        unlabelled=unlabelled,
    )


def _origin(name: str, configs: Mapping[str, TaskConfig]) -> str:
    """The task whose source this one uses, through any number of names."""
    seen = [name]
    while isinstance(data := configs[seen[-1]].data, str):
        if data in seen:
            raise RecipeError([f"tasks.{name}.data: expected rows in the end, found a circle {' -> '.join(seen)}"])
        seen.append(data)
    return seen[-1]


def _unlabelled_config(config: TaskConfig) -> DataConfig:
    assert config.unlabelled is not None
    return config.unlabelled


def without_labels(rows: Dataset, tasks: Sequence[Task]) -> Dataset:
    """The same inputs with the label of every task left open."""
    columns = list(dict.fromkeys(column for task in tasks for column in task.input_columns))
    rows = rows.select_columns(columns)
    for label in dict.fromkeys(str(task.label) for task in tasks):
        rows = rows.add_column(label, [None] * len(rows))  # type: ignore[call-arg]  # the stub wants a fingerprint
    return rows


def with_unlabelled(rows: Dataset, more: Dataset, tasks: Sequence[Task]) -> Dataset:
    """Labelled rows, and after them those without labels.

    Raises:
        DataError: the inputs are of different types.
    """
    kept = list(dict.fromkeys(column for task in tasks for column in (*task.input_columns, str(task.label))))
    rows = rows.select_columns(kept)
    try:
        return concatenate_datasets([rows, without_labels(more, tasks).select_columns(kept).cast(rows.features)])
    except (TypeError, ValueError, ArrowInvalid, ArrowNotImplementedError) as error:
        raise DataError(
            f"task '{tasks[0].name}': expected unlabelled rows of the same types as the labelled ones "
            f"({rows.features}), found {more.features}; convert the columns"
        ) from error


def _names_labels(config: TaskConfig) -> bool:
    return getattr(config, "problem_type", None) != "regression"


def _picture_columns(task: Task, config: TaskConfig) -> tuple[str, ...]:
    return task.input_columns if lies_in_files(config.reads) else ()


def _columns(task: Task) -> tuple[str, ...]:
    return (*task.input_columns, str(task.label))


def _data_config(config: TaskConfig) -> DataConfig:
    assert isinstance(config.data, DataConfig)
    return config.data


def _build_task(name: str, config: TaskConfig, splits: dict[Role, Dataset]) -> Task:
    """The task with its labels, after a look at every column and every label."""
    what = f"task '{name}'"
    task = task_of(name, config)
    for role, rows in splits.items():
        for column in (*task.input_columns, config.label):
            require_column(rows.column_names, column, what, role)
    check_columns(splits, task.input_columns, what, texts="text" in config.reads)
    check_pictures(splits, _picture_columns(task, config), what)
    if config.labels is None:
        problem = None if task.problem == "token_classification" else task.problem
        task = dataclasses.replace(task, labels=infer_labels(splits, config.label, config.kind, problem, what))
    check_labels(splits, task, what)
    return task


def _weights(weight: float | WeightSchedule) -> dict[str, float]:
    if isinstance(weight, WeightSchedule):
        return {"weight": weight.source, "final_weight": weight.to}
    return {"weight": weight}


def task_of(name: str, config: TaskConfig) -> Task:
    """The task as the recipe declares it; labels may still be open."""
    shared = {
        "label": config.label,
        "labels": config.labels,
        "metric": config.metric,
        "role": config.role,
        **_weights(config.weight),
        "head": config.head,
        "pooling": config.pooling,
        "layer": config.layer,
        "class_weights": config.class_weights,
        "label_smoothing": config.label_smoothing,
    }
    match config:
        case SequenceClassificationConfig():
            return SequenceClassification(
                name, text=config.text, text_pair=config.text_pair, problem_type=config.problem_type, **shared
            )
        case TokenClassificationConfig():
            return TokenClassification(name, tokens=config.tokens, **shared)
        case ImageClassificationConfig():
            return ImageClassification(name, image=config.image, problem_type=config.problem_type, **shared)
