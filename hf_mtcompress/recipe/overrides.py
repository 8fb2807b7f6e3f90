"""The raw recipe before it is checked: values given on the command line, and paths that become absolute."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_mtcompress.recipe.sections import Problems, near, shown
from hf_mtcompress.recipe.text import read_yaml

PACKAGED_BUILDERS = frozenset(
    {"json", "csv", "parquet", "text", "arrow", "xml", "imagefolder", "audiofolder", "videofolder", "webdataset"}
)
"""Values of `data.path` that name a file format, not a place."""


_KEYS = 20
"""Keys of the deepest place that an override may name, and more."""
_SHOWN = 200


class _Given(str):
    """Text from the command line, so that a path in it is looked up from the current folder."""


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str], problems: Problems) -> None:
    """Set `a.b.c=value` for each override, in place.

    Values are YAML. An element of a list is named by its index, a step also by its name; missing sections are made.
    """
    for override in overrides:
        place, equals, text = override.partition("=")
        keys = place.strip().split(".")
        if not equals or not all(keys) or len(keys) > _KEYS:
            shown_override = override if len(override) < _SHOWN else f"{override[:_SHOWN]}..."
            problems.add("", f"override '{shown_override}': expected section.key=value, such as encoder.max_length=64")
            continue
        try:
            value = _mark(read_yaml(text))
        except ValueError as error:
            problems.add("", f"override '{override}': the value is not YAML ({error}); put it in quotes")
            continue
        if keys[0] == "encoders" and "encoder" in raw and len(keys) > 2:  # the other spelling of the section
            keys = ["encoder", *keys[2:]]
        problem = _set(raw, keys, value)
        if problem:
            problems.add("", f"override '{override}': {problem}")


def step_names(steps: Sequence[Any]) -> list[str]:
    """The name of every raw step: as given, else its kind, made unique by a number from 2 on."""
    given = [step.get("name") if isinstance(step, Mapping) else None for step in steps]
    taken = {name for name in given if isinstance(name, str)}
    names = []
    for step, name in zip(steps, given, strict=True):
        if not isinstance(name, str):
            kind = step.get("kind") if isinstance(step, Mapping) else None
            base = name = kind if isinstance(kind, str) else "step"
            number = 2
            while name in taken:
                name, number = f"{base}_{number}", number + 1
            taken.add(name)
        names.append(str(name))
    return names


def _set(raw: dict[str, Any], keys: list[str], value: Any) -> str | None:
    """Put `value` at the end of `keys`; returns what is wrong, if anything."""
    node: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        path = ".".join(keys[:depth])
        if isinstance(node, list):
            index = _index(node, key, is_steps=path == "steps")
            if isinstance(index, str):
                return f"{path}: {index}"
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            elif node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            return f"'{path}' is {shown(node)}, not a section with keys"
    return None


def _index(items: list[Any], key: str, *, is_steps: bool) -> int | str:
    if key.isdecimal():
        return int(key) if int(key) < len(items) else f"expected an index below {len(items)}, found {key}"
    if is_steps:
        names = step_names(items)
        return names.index(key) if key in names else f"no step named '{key}', {near(key, names)}"
    return f"expected an index such as 0, found '{key}'"


def _mark(value: Any) -> Any:
    match value:
        case str():
            return _Given(value)
        case list():
            return [_mark(item) for item in value]
        case dict():
            return {key: _mark(item) for key, item in value.items()}
        case _:
            return value


# ---- paths ----


def resolve_paths(raw: dict[str, Any], base_dir: Path) -> dict[str, Any]:
    """A copy of the raw recipe in which what names a place of this machine is absolute.

    A path from the recipe starts at `base_dir`, one from the command line at the current folder. Names of the Hub
    (`org/name`, where nothing of that name lies there) and URLs stay as they are.
    """
    raw = dict(raw)
    if isinstance(raw.get("encoder"), dict):
        raw["encoder"] = _with_place(raw["encoder"], "path", base_dir)
    tasks = raw.get("tasks")
    if isinstance(tasks, dict):
        raw["tasks"] = {
            name: {
                **task,
                **{
                    key: _data(task[key], base_dir) for key in ("data", "unlabelled") if isinstance(task.get(key), dict)
                },
            }
            if isinstance(task, dict)
            else task
            for name, task in tasks.items()
        }
    steps = raw.get("steps")
    if isinstance(steps, list):
        names = set(step_names(steps))
        raw["steps"] = [_step(step, names, base_dir) if isinstance(step, dict) else step for step in steps]
    return _unmark(raw)


def _step(step: dict[str, Any], names: set[str], base_dir: Path) -> dict[str, Any]:
    step = dict(step)
    if isinstance(step.get("student"), dict):
        step["student"] = _with_place(step["student"], "path", base_dir)
    if not _is_one_of(step.get("teacher"), names):
        step = _with_place(step, "teacher", base_dir)
    match step.get("teachers"):
        case dict() as teachers:
            step["teachers"] = {
                task: place if _is_one_of(place, names) else _with_place({"": place}, "", base_dir)[""]
                for task, place in teachers.items()
            }
        case list() as teachers:
            step["teachers"] = [
                _with_place(item, "path", base_dir)
                if isinstance(item, dict) and not _is_one_of(item.get("path"), names)
                else item
                for item in teachers
            ]
        case _:
            pass
    if isinstance(step.get("teacher_cache"), str):
        step["teacher_cache"] = _absolute(step["teacher_cache"], base_dir)
    for key in ("data", "corpus"):
        if isinstance(step.get(key), dict):
            step[key] = _data(step[key], base_dir)
    if isinstance(step.get("recover"), dict):
        step["recover"] = _step(step["recover"], names, base_dir)
    return step


def _is_one_of(value: Any, names: Collection[str]) -> bool:
    """Nothing is checked yet: a value may be of any kind."""
    return isinstance(value, str) and value in names


def _data(data: dict[str, Any], base_dir: Path) -> dict[str, Any]:
    data = dict(data)
    if not _is_one_of(data.get("path"), PACKAGED_BUILDERS):
        # Of a folder or a data set of the Hub, `data_dir` and `data_files` name parts.
        return _with_place(data, "path", base_dir)
    directory = data.get("data_dir")
    if isinstance(directory, str):
        data["data_dir"] = _absolute(directory, base_dir)
    data["data_files"] = _files(data.get("data_files"), None if directory else base_dir)
    return data


def _files(files: Any, base_dir: Path | None) -> Any:
    """Files become absolute where no `data_dir` says where they lie, or where the command line names existing ones."""
    match files:
        case str() if "://" in files or (base_dir is None and not _lies_here(files)):
            return files
        case str():
            return _absolute(files, base_dir or Path.cwd())
        case list():
            return [_files(item, base_dir) for item in files]
        case dict():
            return {role: _files(item, base_dir) for role, item in files.items()}
        case _:
            return files


def _lies_here(files: str) -> bool:
    return isinstance(files, _Given) and (os.path.isabs(files) or (files != "" and any(Path.cwd().glob(str(files)))))


def _with_place(section: dict[str, Any], key: str, base_dir: Path) -> dict[str, Any]:
    """Make a value absolute that may be a name of the Hub: when it exists here, or is written as a path."""
    value = section.get(key)
    if not isinstance(value, str) or not value:
        return section
    absolute = _absolute(value, base_dir)
    is_path = value.startswith((".", "~", os.sep)) or os.path.exists(absolute)
    return {**section, key: absolute} if is_path else section


def _absolute(value: str, base_dir: Path) -> str:
    base = Path.cwd() if isinstance(value, _Given) else base_dir
    return os.path.abspath(os.path.join(base, os.path.expanduser(value)))


def _unmark(value: Any) -> Any:
    match value:
        case str():
            return str(value)
        case list():
            return [_unmark(item) for item in value]
        case dict():
            return {_unmark(key): _unmark(item) for key, item in value.items()}
        case _:
            return value


def without_local_paths(value: Any) -> Any:
    """A copy in which an absolute local path is replaced by its last component."""
    match value:
        case str():
            return os.path.basename(value.rstrip("/\\").replace("\\", "/")) or value if is_local(value) else value
        case list():
            return [without_local_paths(item) for item in value]
        case dict():
            return {key: without_local_paths(item) for key, item in value.items()}
        case _:
            return value


def is_local(text: str) -> bool:
    """Whether text is an absolute path of some machine, of whatever operating system."""
    return text.startswith(("/", "~/", "file://")) or text[1:3] in (":\\", ":/")
