"""From the `data` section of a task to rows: one `datasets.Dataset` for each role, and the labels in them.

Everything is read by `datasets`, so local files, folders and Hub datasets work alike, are cached and memory-mapped.
What can go wrong in a recipe (a missing file, a misspelled argument, a split that is not there) ends in one DataError.
"""

import dataclasses
import glob
import hashlib
import itertools
import math
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas
from datasets import (
    ClassLabel,
    Dataset,
    DatasetBuilder,
    DownloadConfig,
    Features,
    Image,
    LargeList,
    List,
    ReadInstruction,
    Value,
    load_dataset_builder,
)
from datasets.config import DOWNLOADED_DATASETS_PATH
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from hf_mtcompress.data.alignment import as_text
from hf_mtcompress.data.pixels import named, problem_of, undecoded
from hf_mtcompress.digests import file_digest, values_digest
from hf_mtcompress.errors import DataError
from hf_mtcompress.recipe import DataConfig, Role
from hf_mtcompress.recipe.overrides import PACKAGED_BUILDERS
from hf_mtcompress.tasks.base import UNLABELLED, Task
from hf_mtcompress.tasks.classification import is_unlabelled, label_index

ROLES: tuple[Role, ...] = get_args(Role)
SPLIT_NAMES: Mapping[Role, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test",),
}
"""Names under which a role's split is looked for when the recipe does not say."""
CARVED_FRACTION = 0.1
CARVED_MAXIMUM = 1000

# pandas reads words such as "None", "NA" and "null" as missing, which are labels and texts of their own.
CSV_DEFAULTS: Mapping[str, Any] = {"keep_default_na": False, "na_values": [""]}
HASHED_ROWS = 1000
_DESCRIPTIONS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
"""Files in which a local folder may say which files are data; they go unread where the files are named."""
_PICTURES = ("imagefolder",)
_OPENED_AT_ONCE = 64
_OPENED_HOW = 1
"""To be raised where other pictures are refused: what was found before is then not taken from the cache."""
_NUMBERS = ("int64", "float64")
_LONG_LINE = 2**16
"""Bytes of a file that is more than a header, whatever stands in it."""


def load_splits(
    config: DataConfig,
    base_dir: Path | None,
    seed: int,
    what: str,
    label_columns: Collection[str] = (),
    picture_columns: Collection[str] = (),
) -> dict[Role, Dataset]:
    """Read the splits of a data source, one for each role.

    Where there is no validation split, a tenth of the training rows (at most 1,000) is drawn with the seed and taken
    out of them. `max_rows` is applied after that. Rows keep their order.

    Args:
        config: what to read.
        base_dir: folder that relative local paths start from; default: the current one.
        seed: seed of every draw, at least 0.
        what: the source in words, for messages, such as `task 'intent'`.
        label_columns: those with names of labels, which a table must not read as numbers that merge them.
        picture_columns: those whose texts are paths of pictures, relative to `data_dir`, or else to the file they stand
            in.

    Returns:
        Rows by role: always `train` and `validation`; `test` where the source has one.

    Raises:
        DataError: the source cannot be read, or lacks a split, a split is empty, or two of them have rows in common.
    """
    builder = _prepared_builder(config, base_dir or Path(), what)
    specs = _split_of_roles(config, _split_rows(builder), what)
    _check_apart(specs, builder, what)
    if config.path == "csv":
        _check_table(builder, config, label_columns, what)
    splits: dict[Role, Dataset] = {}
    for role, spec in specs.items():
        try:
            rows = builder.as_dataset(split=spec)
        except TypeError as error:
            raise DataError(
                f"{what}: expected keys of data that '{config.path}' takes, found a problem: {_first_line(error)}; "
                f"correct {', '.join(config.builder_arguments) or 'them'}"
            ) from error
        except (ValueError, AssertionError, DatasetsError) as error:
            raise DataError(
                f"{what}: expected a split such as train or train[:1000] for {role}, found '{spec}' "
                f"({_first_line(error)}); correct it under data.splits"
            ) from error
        assert isinstance(rows, Dataset)
        if rows.num_rows == 0:
            raise DataError(
                f"{what}: expected rows in the {role} split '{spec}', found none; "
                "give another file or split, or leave this one out"
            )
        splits[role] = _with_pictures(rows, picture_columns, _picture_folders(builder, spec, config, base_dir))
    if "validation" not in splits:
        splits["train"], splits["validation"] = _carve(splits["train"], seed, what)
    return {role: _capped(splits[role], config, role, seed, what) for role in ROLES if role in splits}


def load_unlabelled(
    config: DataConfig,
    columns: Sequence[str],
    base_dir: Path | None,
    seed: int,
    what: str,
    picture_columns: Collection[str] = (),
) -> Dataset:
    """Read the train split of a source whose labels, if any, do not count.

    Args:
        config: what to read.
        columns: with the inputs; others are left out.
        base_dir: folder that relative local paths start from; default: the current one.
        seed: of `max_rows`.
        what: the source in words, for messages.
        picture_columns: those of the columns with pictures, read as by `load_splits`.

    Raises:
        DataError: the source cannot be read, or lacks a column or its train split, or a picture does not open.
    """
    builder = _prepared_builder(config, base_dir or Path(), what)
    spec = config.splits.get("train", next(iter(_split_rows(builder))) if len(_split_rows(builder)) == 1 else "train")
    try:
        rows = builder.as_dataset(split=spec)
    except (ValueError, AssertionError, DatasetsError) as error:
        raise DataError(
            f"{what}: expected a split such as train, found '{spec}' ({_first_line(error)}); correct it under splits"
        ) from error
    assert isinstance(rows, Dataset)
    missing = [column for column in columns if column not in rows.column_names]
    if missing or rows.num_rows == 0:
        raise DataError(
            f"{what}: expected rows with the columns {list(columns)}, found {rows.num_rows} rows with "
            f"{rows.column_names}; name the columns as those of the labelled rows"
        )
    folders = _picture_folders(builder, spec, config, base_dir)
    rows = _with_pictures(rows.select_columns(list(columns)), picture_columns, folders)
    rows = _capped(rows, config, "train", seed, what)
    check_pictures({"train": rows}, picture_columns, what)
    return rows


def dataset_revision(splits: Mapping[Role, Dataset]) -> str | None:
    """Commit of the Hub dataset that the rows came from; None for local files."""
    for rows in splits.values():
        for url in rows.info.download_checksums or {}:
            if found := re.match(r"hf://datasets/[^@]+@([0-9a-f]{7,40})/", str(url)):
                return found[1]
    return None


def content_fingerprint(splits: Mapping[Role, Dataset]) -> str:
    """Digest of the rows in all splits: the same for the same content in every process and on every machine.

    Names of columns, label names and values count; where the files lie, how they are cached and when they were
    changed does not. Images count by the bytes of their files.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for role in sorted(splits):
        rows = splits[role]
        names = {column: _class_names(feature) for column, feature in rows.features.items()}
        digest.update(repr((role, rows.num_rows, names)).encode())
        batch: Any
        for batch in rows.with_format("arrow").iter(batch_size=HASHED_ROWS):
            for column, feature in rows.features.items():
                values = batch[column].to_pylist()
                content = [_image_digest(value) for value in values] if isinstance(feature, Image) else values
                digest.update(repr(content).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def check_columns(splits: Mapping[Role, Dataset], columns: Iterable[str], what: str, *, texts: bool = False) -> None:
    """Make sure that every split has these input columns, and in each of their rows what can be read.

    Args:
        splits: rows by role.
        columns: input columns.
        what: the task in words, for messages.
        texts: whether they are to hold texts or lists of words.

    Raises:
        DataError: a column is missing, or a row of it holds nothing, or something else.
    """
    for role, rows in splits.items():
        for column in columns:
            _check_column(rows, column, role, what)
            for index, value in _values({role: rows}, column, decode=False):
                if value is None:
                    raise DataError(
                        f"{what}: expected a value in every row of column '{column}', found nothing in {index}; "
                        "remove the row or fill it"
                    )
                if texts:
                    _check_text(value, f"{what}: column '{column}', {index}")


def check_pictures(splits: Mapping[Role, Dataset], columns: Iterable[str], what: str) -> None:
    """Open every picture once, and tell of all that do not; what was found is kept as long as they stay the same.

    Raises:
        DataError: some do not open.
    """
    problems = []
    for role, rows in splits.items():
        for column in columns:
            own = undecoded(rows.select_columns([column]))
            opened = own.map(
                _picture_problems,
                batched=True,
                batch_size=_OPENED_AT_ONCE,
                remove_columns=[column],
                features=Features({"problem": Value("string")}),
                new_fingerprint=values_digest([_OPENED_HOW, content_fingerprint({role: own})])[:32],
                desc=f"Opening the pictures of {what}, {role}",
            )
            problems += [
                f"row {row} of the {role} split: {found}" for row, found in enumerate(opened["problem"]) if found
            ]
    if problems:
        raise DataError(f"{what}: expected pictures that open, found {len(problems):,} that do not:\n{named(problems)}")


def _picture_problems(rows: Mapping[str, list[Any]]) -> dict[str, list[str]]:
    (values,) = rows.values()
    return {"problem": [problem_of(value) or "" for value in values]}


def _with_pictures(rows: Dataset, columns: Iterable[str], folders: Sequence[str]) -> Dataset:
    """The rows with paths in these columns as pictures, which lie in one of the folders."""
    for column in columns:
        if getattr(rows.features.get(column), "dtype", None) in ("string", "large_string"):
            rows = rows.map(
                _located,
                batched=True,
                input_columns=[column],
                features=Features({**rows.features, column: Image()}),
                fn_kwargs={"column": column, "folders": folders},
            )
    return rows


def _located(names: list[str | None], column: str, folders: Sequence[str]) -> dict[str, list[Any]]:
    return {column: [None if name is None else {"bytes": None, "path": _place_of(name, folders)} for name in names]}


def _place_of(name: str, folders: Sequence[str]) -> str:
    if "://" in name:
        return name
    places = list(dict.fromkeys(str(Path(folder, name).expanduser()) for folder in folders)) or [name]
    found = [place for place in places if os.path.isfile(place)]  # a name may be too long for a path
    if len(found) > 1:
        raise DataError(f"expected one picture '{name}', found {' and '.join(found)}; give paths from data_dir")
    return (found or places)[0]


def _picture_folders(builder: DatasetBuilder, spec: str, config: DataConfig, base_dir: Path | None) -> list[str]:
    """Where the paths in rows start: from `data_dir` if it is given, else from the files that the rows stand in."""
    start = (base_dir or Path()).expanduser().absolute()
    if config.data_dir is not None:
        return [str((start if config.path in PACKAGED_BUILDERS else start / config.path) / config.data_dir)]
    splits = [part.split("[")[0].strip() for part in spec.split("+")]
    return list(dict.fromkeys(str(Path(name).parent) for split in splits for name in _local_files(builder, split)))


def _check_text(value: Any, what: str) -> None:
    try:
        as_text(value)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def infer_labels(
    splits: Mapping[Role, Dataset], column: str, kind: str, problem_type: str | None, what: str = "data"
) -> tuple[str, ...] | None:
    """Label names of a task, in the order that the model's outputs will have.

    The names of the ClassLabel feature where there is one, else the sorted values of all splits (numbers by size).
    None, NaN and -100 mean unlabelled and are no labels.

    Args:
        splits: rows by role.
        column: the column with labels.
        kind: such as `sequence-classification`.
        problem_type: of classification tasks; None for token classification.
        what: the task in words, for messages.

    Returns:
        Label names; None for regression, which has none.

    Raises:
        DataError: the column is missing or does not hold labels.
    """
    for role, rows in splits.items():
        _check_column(rows, column, role, what)
    if problem_type == "regression":
        return None
    names = _class_names(next(iter(splits.values())).features[column])
    if names is not None:
        return names
    multi_label = problem_type == "multi_label_classification"
    in_lists = multi_label or kind == "token-classification"
    found: set[Any] = set()
    for index, value in _values(splits, column):
        if is_unlabelled(value):
            continue
        if isinstance(value, list) != in_lists:
            expected = "a list of labels" if in_lists else "one label"
            raise DataError(
                f"{what}: expected {expected} in each row of column '{column}', found {value!r} in {index}; "
                "choose another column, or a kind of task and problem_type that fits"
            )
        for item in value if in_lists else [value]:
            if not is_unlabelled(item):
                _check_label_value(item, column, index, what)
                found.add(item)
    if multi_label and found <= {0, 1} and _holds_vectors(splits, column):
        raise DataError(
            f"{what}: expected names of labels in column '{column}', found vectors of zeros and ones; "
            "give the names in order under labels (of one or two labels, write 0.0 and 1.0, or false and true)"
        )
    labels = tuple(dict.fromkeys(_label_name(value) for value in sorted(found, key=_label_order)))
    _check_alike(labels, column, what)
    least = 1 if multi_label else 2
    if len(labels) < least:
        raise DataError(
            f"{what}: expected at least {least} different labels in column '{column}', "
            f"found {', '.join(labels) or 'none'}; choose another column or give more rows"
        )
    return labels


def check_labels(splits: Mapping[Role, Dataset], task: Task, what: str) -> None:
    """Make sure, before anything is trained, that every label in the data is one of the task's.

    Raises:
        DataError: the first value that is not, with its split and row; or the data number the labels otherwise.
    """
    assert task.label is not None
    accepted: set[Any] = set()
    for role, rows in splits.items():
        _check_column(rows, task.label, role, what)
        check_label_order(rows, task, what)
    feature = next(iter(splits.values())).features[task.label]
    for index, value in _values(splits, task.label):
        if is_unlabelled(value):
            continue
        if task.problem == "regression":
            if not _is_number(value):
                raise DataError(
                    f"{what}: expected a number in each row of column '{task.label}', found {value!r} in {index}; "
                    "correct the row, or use another problem_type"
                )
            continue
        items = value if isinstance(value, list) else [value]
        if task.problem == "multi_label_classification":
            try:
                task.encode_labels(by_name([value], feature, task), {})
            except DataError as error:
                raise DataError(f"{what}, {index}: {str(error).removeprefix(f'{what}: ')}") from error
            continue
        for item in items:
            if item not in accepted and not is_unlabelled(item):
                try:
                    label_index(task, item)
                except DataError as error:
                    raise DataError(f"{what}, {index}: {str(error).removeprefix(f'{what}: ')}") from error
                accepted.add(item)


def check_label_order(rows: Dataset, task: Task, what: str) -> None:
    """Make sure that the numbers in a ClassLabel column mean the same labels to the task.

    A task may rename labels, or add some at the end. The same names in another order would be swapped in silence.

    Raises:
        DataError: a label has one number in the data and another in the task.
    """
    names = _class_names(rows.features[str(task.label)])
    if names is None or task.labels is None:
        return
    moved = [name for index, name in enumerate(names) if name in task.labels and task.labels.index(name) != index]
    if moved:
        raise DataError(
            f"{what}: expected the labels in the order of column '{task.label}' ({', '.join(names)}), found "
            f"({', '.join(task.labels)}); give them in that order, or leave them out"
        )


def by_name(values: Sequence[Any], feature: Any, task: Task) -> Sequence[Any]:
    """Labels of a column as `Task.encode_labels` takes them: numbers in lists of a ClassLabel by their names.

    A list of two numbers may else be one of zeros and ones.
    """
    if task.problem != "multi_label_classification" or _class_names(feature) is None:
        return values
    labels = dict(enumerate(task.labels or ()))
    return [row if is_unlabelled(row) else [labels.get(item, item) for item in row] for row in values]


# ------------------------------------------------------------------------------------------------ reading the source


def _prepared_builder(config: DataConfig, base_dir: Path, what: str) -> DatasetBuilder:
    """The builder of `config` with its rows in the cache."""
    arguments = _location(config, base_dir.expanduser().absolute(), what)
    extra = {**(CSV_DEFAULTS if config.path == "csv" else {}), **config.builder_arguments}
    download = None
    try:
        builder = load_dataset_builder(**arguments, name=config.name, revision=config.revision, **extra)
        if content := _content_of_local_files(builder):
            # `datasets` knows a local file by its time of change, and what it unpacks by its path alone: others may
            # have had both. So the content is a part of the names in the cache.
            arguments["config_id"] = f"{builder.config_id}-{content[:16]}"
            if not any(Path(arguments["path"], name).is_file() for name in _DESCRIPTIONS):
                # Not looked for twice: among many pictures that takes minutes.
                arguments["data_files"] = builder.config.data_files
            builder = load_dataset_builder(**arguments, name=config.name, revision=config.revision, **extra)
            unpacked = Path(DOWNLOADED_DATASETS_PATH, content[:16])
            download = DownloadConfig(cache_dir=str(unpacked), use_etag=False)
    except TypeError as error:
        raise _argument_error(error, arguments, config, extra, what) from error
    except (DatasetNotFoundError, ConnectionError) as error:
        near = get_close_matches(config.path, PACKAGED_BUILDERS, n=1)
        hint = f"did you mean '{near[0]}'? Otherwise " if near else ""
        raise DataError(
            f"{what}: expected a local folder, a dataset of the Hub or one of {', '.join(sorted(PACKAGED_BUILDERS))}, "
            f"found '{config.path}', which is no folder here and not on the Hub as far as it could be reached "
            f"({_first_line(error)}); {hint}check the spelling and the network, or give a local folder"
        ) from error
    except (DatasetsError, ValueError, LookupError, AttributeError, ImportError, OSError) as error:
        raise DataError(
            f"{what}: expected data that can be read as '{config.path}', found a problem: {_first_line(error)}; "
            "check path, name, data_dir, data_files and the builder's arguments"
        ) from error
    try:
        builder.download_and_prepare(download_config=download)
    except StopIteration as error:
        raise DataError(f"{what}: expected rows in every file of '{config.path}', found a file without rows") from error
    except (DatasetsError, ValueError, LookupError, AttributeError, ImportError, OSError, TypeError) as error:
        raise DataError(
            f"{what}: expected files that can be read as '{config.path}' and have the same columns, found a problem: "
            f"{_first_line(error.__cause__ or error)}; correct the files or the builder arguments"
        ) from error
    return builder


def _content_of_local_files(builder: DatasetBuilder) -> str | None:
    """Digest of the files of this machine that a builder reads; None where it reads none."""
    files = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    # A file in an archive is written `zip://FILE::ARCHIVE`.
    places = [file.split("::")[-1].removeprefix("file://") for file in files]
    local = [place for place in places if not _is_remote(place)]
    return values_digest([file_digest(place) for place in local]) if local else None


def _location(config: DataConfig, base_dir: Path, what: str) -> dict[str, Any]:
    """`path`, `data_dir` and `data_files` for `load_dataset_builder`, local ones absolute and known to exist."""
    if config.path not in PACKAGED_BUILDERS:
        folder = base_dir / Path(config.path).expanduser()
        if folder.is_file():
            raise DataError(
                f"{what}: expected a folder, a dataset of the Hub or a builder as data.path, found the file "
                f"'{config.path}'; write the builder there (such as {_builder_of(folder)}), the file under data_files"
            )
        if not folder.is_dir():
            if config.path.startswith((".", "/", "~")):
                raise DataError(f"{what}: expected a folder at {folder}, found none; {_near_path(folder)}")
            return {"path": config.path, "data_dir": config.data_dir, "data_files": config.data_files}
        if config.data_dir is None and config.data_files is None:
            return {"path": str(folder)}
        _check_files(_files_by_split(config), folder / (config.data_dir or ""), what)
        return {"path": str(folder), "data_dir": config.data_dir, "data_files": config.data_files}

    if config.data_dir is None and config.data_files is None:
        raise DataError(
            f"{what}: expected data_files or data_dir with the builder '{config.path}', found neither; "
            "say which files to read"
        )
    folder = base_dir / Path(config.data_dir or "").expanduser()
    if config.data_files is None:
        if not folder.is_dir():
            raise DataError(f"{what}: expected a folder at {folder}, found none; {_near_path(folder)}")
        return {"path": config.path, "data_dir": str(folder)}
    files = _files_by_split(config)
    _check_files(files, folder, what)
    absolute = {
        split: [name if _is_remote(name) else str(folder / Path(name).expanduser()) for name in names]
        for split, names in files.items()
    }
    return {"path": config.path, "data_files": absolute}


def _files_by_split(config: DataConfig) -> dict[str, list[str]]:
    files = config.data_files or {}
    by_split = files if isinstance(files, Mapping) else {"train": files}
    return {split: [names] if isinstance(names, str) else list(names) for split, names in by_split.items()}


def _is_remote(name: str) -> bool:
    return "://" in name


def _check_files(files: Mapping[str, Sequence[str]], folder: Path, what: str) -> None:
    if not folder.is_dir() and not all(_is_remote(name) for names in files.values() for name in names):
        raise DataError(f"{what}: expected a folder at {folder}, found none; {_near_path(folder)}")
    for split, names in files.items():
        for name in names:
            if _is_remote(name):
                continue
            path = folder / Path(name).expanduser()
            found = [Path(match) for match in glob.glob(str(path), recursive=True)] or [path]
            if not found[0].exists():
                raise DataError(
                    f"{what}: expected a file for split '{split}' at {path}, found none; {_near_path(path)}"
                )
            if all(match.is_file() and match.stat().st_size == 0 for match in found):
                raise DataError(f"{what}: expected rows for split '{split}', found the empty file {path}; give another")


def _near_path(path: Path) -> str:
    """What to do about a path that is not there."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return "check data_dir, which is relative to the recipe (on the command line: to the current folder)"
    near = get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    shown = ", ".join(sorted(names)[:8]) or "nothing"
    return f"{path.parent.name or path.parent} holds {shown}: correct the name, or fetch the data first"


def _builder_of(path: Path) -> str:
    match path.suffix.lower():
        case ".json" | ".jsonl":
            return "json"
        case ".parquet" | ".arrow" | ".csv":
            return path.suffix.lower().removeprefix(".")
        case ".tsv":
            return 'csv with delimiter: "\\t"'
        case _:
            return "text"


def _argument_error(
    error: TypeError, arguments: Mapping[str, Any], config: DataConfig, extra: Mapping[str, Any], what: str
) -> DataError:
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if found is None or found[1] not in extra:
        return DataError(
            f"{what}: expected arguments that the builder '{config.path}' takes, found {dict(extra)} "
            f"({_first_line(error)}); correct them"
        )
    # The builder without the extra arguments knows which ones there are.
    plain = load_dataset_builder(**arguments, name=config.name, revision=config.revision)
    known = sorted(
        {field.name for field in dataclasses.fields(plain.config)}
        - {"name", "version", "data_dir", "data_files", "description"}
    )
    near = get_close_matches(found[1], known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(known)}"
    return DataError(
        f"{what}: expected a key of data or an argument of the builder '{config.path}', found '{found[1]}'; {hint}"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


# --------------------------------------------------------------------------------------------------- splits and roles


def _split_rows(builder: DatasetBuilder) -> dict[str, int]:
    return {str(name): split.num_examples for name, split in (builder.info.splits or {}).items()}


def _split_of_roles(config: DataConfig, available: Mapping[str, int], what: str) -> dict[Role, str]:
    """Which split (or slice of one) plays each role."""
    specs: dict[Role, str] = {}
    named: set[str] = set()
    for role, spec in config.splits.items():
        for part in spec.split("+"):
            base = part.split("[")[0].strip()
            named.add(base)
            if base not in available:
                near = get_close_matches(base, available, n=1)
                hint = f"did you mean '{near[0]}'?" if near else "correct it under data.splits"
                raise DataError(
                    f"{what}: expected the split '{base}' for {role}, found {', '.join(available) or 'none'}; {hint}"
                )
        specs[role] = spec
    for role in ROLES:
        if role not in specs:
            # A split that plays a part already must not play a second one.
            names = [name for name in SPLIT_NAMES[role] if name in available and name not in named]
            if names:
                specs[role] = names[0]
    if "train" not in specs and named & set(SPLIT_NAMES["train"]):
        raise DataError(
            f"{what}: expected a split for training, found train in use for {', '.join(config.splits)} only; "
            "say which rows of it are for training with data.splits, such as {train: 'train[1000:]'}"
        )
    if "train" not in specs:
        raise DataError(
            f"{what}: expected a split named train, found {', '.join(available) or 'none'}; "
            "say which one is for training with data.splits, such as {train: NAME}"
        )
    for role, spec in specs.items():
        if available.get(spec) == 0:
            raise DataError(
                f"{what}: expected rows in the {role} split '{spec}', found none; "
                "give another file or split, or leave this one out"
            )
    return {role: specs[role] for role in ROLES if role in specs}


def _check_apart(specs: Mapping[Role, str], builder: DatasetBuilder, what: str) -> None:
    """Make sure that no row plays two roles: its score would be one of rows that were trained on.

    Raises:
        DataError: slices overlap, or splits come of files with the same content.
    """
    rows = _split_rows(builder)
    # Splits of the same files, under two names, are one.
    files = {
        split: {
            file_digest(name): name for name in _local_files(builder, split) if builder.name != "csv" or _has_rows(name)
        }
        for split in rows
    }
    first_of: dict[tuple[str, ...], str] = {}
    one = {split: first_of.setdefault(tuple(sorted(found)) or (split,), split) for split, found in files.items()}
    taken: list[tuple[Role, str, int, int]] = []
    for role, spec in specs.items():
        try:
            parts = ReadInstruction.from_spec(spec).to_absolute(rows)
        except (ValueError, AssertionError):
            continue  # told where the rows are read
        for part in parts:
            first, last = part.from_ or 0, rows[part.splitname] if part.to is None else part.to
            for other, split, start, end in taken:
                if one[split] == one[part.splitname] and (common := min(last, end) - max(first, start)) > 0:
                    same = "" if split == part.splitname else ", which hold the same files"
                    raise DataError(
                        f"{what}: expected splits without common rows, found {common} rows both in '{specs[other]}' "
                        f"for {other} and in '{spec}' for {role}{same}; give slices that do not overlap, such as "
                        "train[:90%] and train[90%:], or leave validation out to have it drawn from train"
                    )
            taken.append((role, part.splitname, first, last))
    for split, other in itertools.combinations(dict.fromkeys(split for _, split, *_ in taken), 2):
        common_files = files[split].keys() & files[other].keys()
        # Single pictures may well come twice; a table, or all pictures of a split, hardly.
        whole = common_files in (files[split].keys(), files[other].keys())
        if one[split] != one[other] and common_files and (builder.name not in _PICTURES or whole):
            name, its_name = (Path(files[key][min(common_files)]).name for key in (split, other))
            raise DataError(
                f"{what}: expected splits without common rows, found the same content in '{name}' of {split} and "
                f"'{its_name}' of {other}; give each split rows of its own (validation may be left out: it is then "
                "drawn from train)"
            )


def _has_rows(name: str) -> bool:
    """Whether a table holds more than a line, which is its header."""
    if os.path.getsize(name) > _LONG_LINE:
        return True
    with open(name, "rb") as file:
        return len(file.read().splitlines()) > 1


def _local_files(builder: DatasetBuilder, split: str) -> list[str]:
    """Files of this machine that a split is read from, those in archives left out."""
    names = [str(name) for name in (builder.config.data_files or {}).get(split, ())]
    return [name for name in names if not _is_remote(name)]


def _check_table(builder: DatasetBuilder, config: DataConfig, label_columns: Collection[str], what: str) -> None:
    """Make sure that a table was read as it is written.

    Raises:
        DataError: rows have one field more than the header, or label names that differ became one number.
    """
    features = builder.info.features or {}
    settings: Any = builder.config  # of a table: it has more than those of all builders
    if "__index_level_0__" in features and "index_col" not in config.builder_arguments:
        raise DataError(
            f"{what}: expected as many fields in a row as column names, {[*features][:-1]}, found one more in each "
            "row; name every column in the first line, or give column_names"
        )
    for column in label_columns:
        if getattr(features.get(column), "dtype", "string") not in _NUMBERS:
            continue
        for split in builder.config.data_files or {}:
            for name in _local_files(builder, str(split)):
                _check_numbers(name, column, settings.pd_read_csv_kwargs, what)


def _check_numbers(name: str, column: str, options: Mapping[str, Any], what: str) -> None:
    """Make sure that no two labels are one number with more and with fewer zeros before it."""
    given = {**options, "usecols": [column], "dtype": str, "chunksize": None, "index_col": None, "converters": None}
    try:
        values = pandas.read_csv(name, **given)[column].dropna().unique()
    except (ValueError, KeyError, OSError):
        return  # a table that only its own options can read
    by_number: dict[str, str] = {}
    for value in (value.strip() for value in values if value.strip().isdigit()):
        if (other := by_number.setdefault(value.lstrip("0") or "0", value)) != value:
            raise DataError(
                f"{what}: expected labels that stay apart, found '{other}' and '{value}' in column '{column}' of "
                f"{Path(name).name}, which a table reads as one number; write them alike, or with a letter"
            )


def _carve(train: Dataset, seed: int, what: str) -> tuple[Dataset, Dataset]:
    rows = train.num_rows
    if rows < 2:
        raise DataError(
            f"{what}: expected a validation split or at least 2 training rows to draw one from, found {rows}; "
            "give a validation split"
        )
    count = min(CARVED_MAXIMUM, max(1, round(rows * CARVED_FRACTION)))
    order = _generator(seed, "carve").permutation(rows)
    return train.select(np.sort(order[count:])), train.select(np.sort(order[:count]))


def _capped(rows: Dataset, config: DataConfig, role: Role, seed: int, what: str) -> Dataset:
    limit = config.max_rows.get(role) if isinstance(config.max_rows, Mapping) else config.max_rows
    if limit is None or limit >= rows.num_rows:
        return rows
    if limit < 1:
        raise DataError(
            f"{what}: expected max_rows of at least 1, found {limit} for {role}; give more, or leave it out"
        )
    return rows.select(np.sort(_generator(seed, role).permutation(rows.num_rows)[:limit]))


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """Draws for different purposes must not be the same numbers."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big")])


# ------------------------------------------------------------------------------------------------- columns and labels


def _check_column(rows: Dataset, column: str, role: Role, what: str) -> None:
    if column in rows.column_names:
        return
    near = get_close_matches(column, rows.column_names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "name one of them in the task"
    raise DataError(
        f"{what}: expected a column '{column}' in the {role} split, found {', '.join(rows.column_names)}; {hint}"
    )


def _values(splits: Mapping[Role, Dataset], column: str, decode: bool = True) -> Iterator[tuple[str, Any]]:
    """Every value of a column with the words for its place; images are not opened."""
    for role, rows in splits.items():
        column_rows = rows.select_columns([column]).with_format(None if decode else "arrow")
        first = 0
        batch: Any
        for batch in column_rows.iter(batch_size=HASHED_ROWS):
            values = batch[column] if decode else batch[column].to_pylist()
            for offset, value in enumerate(values):
                yield f"row {first + offset} of the {role} split", value
            first += len(values)


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """Names of a ClassLabel feature, or of a list of them."""
    while isinstance(feature, List | LargeList):
        feature = feature.feature
    return tuple(feature.names) if isinstance(feature, ClassLabel) and feature.names else None


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _holds_vectors(splits: Mapping[Role, Dataset], column: str) -> bool:
    """Whether lists of zeros and ones are vectors: of one length, and some value twice, which no set of labels has."""
    lists = [value for _, value in _values(splits, column) if not is_unlabelled(value)]
    return len({len(value) for value in lists}) == 1 and any(len(set(value)) < len(value) for value in lists)


def _check_alike(labels: Iterable[str], column: str, what: str) -> None:
    """Make sure that no two labels look like one label that was written in two ways."""
    seen: dict[str, str] = {}
    for label in labels:
        plain = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
        plain = plain.lstrip("0") or "0" if plain.isdigit() else plain
        if (other := seen.setdefault(plain, label)) != label:
            raise DataError(
                f"{what}: expected labels that differ by more than capitals, spaces and leading zeros, found {other!r} "
                f"and {label!r} in column '{column}'; write them alike, or list all labels under labels"
            )


def _check_label_value(value: Any, column: str, index: str, what: str) -> None:
    if not isinstance(value, str | int | float | bool):
        raise DataError(
            f"{what}: expected names or numbers as labels in column '{column}', found {value!r} in {index}; "
            "choose another column"
        )
    if isinstance(value, float) and not value.is_integer():
        raise DataError(
            f"{what}: expected labels in column '{column}', found the number {value!r} in {index}; "
            "use problem_type: regression for numbers"
        )
    if isinstance(value, int | float) and value < 0:
        raise DataError(
            f"{what}: expected label numbers from 0, or {UNLABELLED} for an unlabelled row, in column '{column}', "
            f"found {value!r} in {index}; if the split has no labels, leave it out or name another one in data.splits"
        )


def _label_name(value: Any) -> str:
    # A column of whole numbers with a gap is read as floats.
    return str(int(value)) if isinstance(value, float) else str(value)


def _label_order(value: Any) -> tuple[int, float, str]:
    return (1, 0.0, value) if isinstance(value, str) else (0, float(value), "")


def _image_digest(value: Any) -> str | None:
    """Digest of one undecoded image, `{"bytes": ..., "path": ...}`; its path where no file is."""
    if value is None:
        return None
    if value["bytes"] is not None:
        return hashlib.sha256(value["bytes"]).hexdigest()
    return file_digest(value["path"]) if Path(value["path"]).is_file() else value["path"]
