"""Recipes in and out: YAML and overrides become a `Recipe`, with every mistake reported at once; and back to YAML."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hf_mtcompress.errors import RecipeError
from hf_mtcompress.recipe import checks
from hf_mtcompress.recipe.lineage import lineage_of
from hf_mtcompress.recipe.lineage_checks import check_lineage
from hf_mtcompress.recipe.overrides import apply_overrides, resolve_paths, step_names, without_local_paths
from hf_mtcompress.recipe.recipe import FORMAT_VERSION, Recipe
from hf_mtcompress.recipe.sections import WRITTEN_AS, Problems, build_by_kind, build_section, kinds, shown
from hf_mtcompress.recipe.steps import StepConfig
from hf_mtcompress.recipe.tasks import TaskConfig
from hf_mtcompress.recipe.text import read_yaml, write_yaml


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file; paths in it are relative to its folder.
        overrides: `a.b.c=value` each, the value in YAML, paths relative to the current folder. An element of a list is
            named by its index, a step also by its name: `steps.teacher.epochs=1`.

    Returns:
        The recipe; every step has a name, and local paths are absolute.

    Raises:
        RecipeError: the file cannot be read, or the recipe cannot be run as written; all mistakes at once.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"expected a recipe, but there is no file '{path}'; check the path") from None
    except IsADirectoryError:
        raise RecipeError(f"expected a recipe file, found the folder '{path}'; name the file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"expected a recipe, but '{path}' cannot be read as text ({error})") from None
    try:
        raw = read_yaml(text)
    except ValueError as error:
        raise RecipeError(f"not valid YAML: {error}", str(path)) from None
    return parse_recipe(raw, file.parent, overrides, source=str(path))


def parse_recipe(
    raw: Any, base_dir: str | os.PathLike[str] = ".", overrides: Sequence[str] = (), source: str | None = None
) -> Recipe:
    """Build a recipe from what a YAML file holds.

    Args:
        raw: the sections as a mapping.
        base_dir: folder that relative paths start from.
        overrides: as for `load_recipe`.
        source: where the mapping came from, for the message.

    Raises:
        RecipeError: the recipe cannot be run as written; all mistakes at once.
    """
    if not isinstance(raw, Mapping):
        sections = "name, encoder, tasks and steps"
        raise RecipeError(f"expected a mapping with the sections {sections}, found {shown(raw)}", source)
    problems = Problems()
    data = _copy(raw)
    _one_encoder(data, problems)
    apply_overrides(data, overrides, problems)
    _refuse_newer(data.get("format_version"), source)
    data = resolve_paths(data, Path(base_dir))
    tasks = _tasks(data.get("tasks"), problems)
    steps = _steps(data.get("steps"), problems)
    # A section that is missing altogether is reported as such by `build_section`.
    built = {key: value for key, value in (("tasks", tasks), ("steps", steps)) if data.get(key) is not None}
    recipe = build_section(Recipe, data, "", problems, built)
    _check_sections(data, recipe, problems)
    if problems.lines:
        raise RecipeError(problems.lines, source)
    return recipe


def _copy(value: Any) -> Any:
    match value:
        case Mapping():
            return {str(key): _copy(item) for key, item in value.items()}
        case list() | tuple():
            return [_copy(item) for item in value]
        case _:
            return value


def _one_encoder(data: dict[str, Any], problems: Problems) -> None:
    """Accept `encoders: {main: {...}}`, the spelling that has room for several, as long as there is one."""
    encoders = data.pop("encoders", None)
    if encoders is None:
        return
    if "encoder" in data:
        problems.add("encoders", "expected 'encoder' or 'encoders', found both; keep one")
    elif not isinstance(encoders, dict) or not encoders:
        problems.add("encoders", f"expected a section such as main: {{path: ...}}, found {shown(encoders)}")
        data["encoder"] = {"path": "unknown"}  # so that it is not reported as missing too
    else:
        if len(encoders) > 1:
            names = ", ".join(encoders)
            problems.add("encoders", f"expected one encoder, found {len(encoders)} ({names}); keep one of them")
        data["encoder"] = next(iter(encoders.values()))


def _refuse_newer(found: Any, source: str | None) -> None:
    if isinstance(found, int) and found > FORMAT_VERSION:
        # Alone: what else looks wrong may be right in the newer format.
        raise RecipeError(
            f"format_version: expected {FORMAT_VERSION} or older, found {found}; the recipe needs a version of "
            f"hf_mtcompress that reads format {found}: pip install --upgrade hf_mtcompress",
            source,
        )


def _tasks(raw: Any, problems: Problems) -> dict[str, TaskConfig]:
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not raw:
        problems.add("tasks", f"expected a section with at least one task by name, found {shown(raw)}")
        return {}
    classes = kinds(TaskConfig)
    tasks: dict[str, TaskConfig] = {}
    for name, section in raw.items():
        checks.check_task_name(name, problems)
        task = build_by_kind(classes, section, f"tasks.{name}", problems)
        if task is not None:
            tasks[name] = task
            checks.check_task(name, task, list(raw), problems)
    checks.check_shared_data(tasks, problems)
    return tasks


def _steps(raw: Any, problems: Problems) -> tuple[StepConfig, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list) or not raw:
        problems.add("steps", f"expected a list of at least one step, found {shown(raw)}")
        return ()
    classes = kinds(StepConfig)
    names = step_names(raw)
    step_kinds = [step.get("kind") if isinstance(step, dict) else None for step in raw]
    paths = [
        f"steps.{index}" + (f" ({kind})" if isinstance(kind, str) and kind in classes else "")
        for index, kind in enumerate(step_kinds)
    ]
    steps: list[StepConfig | None] = [
        build_by_kind(classes, step, path, problems) for step, path in zip(raw, paths, strict=True)
    ]
    checks.check_step_names(names, paths, problems)
    checks.check_steps(steps, names, step_kinds, paths, problems)
    return tuple(
        dataclasses.replace(step, name=name) for step, name in zip(steps, names, strict=True) if step is not None
    )


def _check_sections(data: Mapping[str, Any], recipe: Recipe | None, problems: Problems) -> None:
    """What the sections say of each other, as far as they could be read."""
    steps = data.get("steps")
    if isinstance(steps, list) and steps and isinstance(data.get("reference"), str):
        step_kinds = [step.get("kind") if isinstance(step, dict) else None for step in steps]
        checks.check_reference(data["reference"], step_names(steps), step_kinds, problems)
    if isinstance(data.get("name"), str):
        checks.check_recipe_name(data["name"], problems)
    if recipe is not None:
        checks.check_benchmark(recipe.benchmark, problems)
        checks.check_branches(recipe, problems)
        check_lineage(recipe, lineage_of(recipe), problems)
        checks.check_kinds_and_roles(recipe, problems)
        checks.check_vocabulary(recipe, problems)
        checks.check_mixing(recipe.mixing, recipe.fusion, list(recipe.tasks), problems)
        if recipe.search is not None:
            step_kinds = [step.kind for step in recipe.steps]
            names = [str(step.name) for step in recipe.steps]
            checks.check_search(recipe.search, recipe.budget, names, step_kinds, recipe.reference or names[0], problems)
        if recipe.publish is not None:
            checks.check_publish(recipe.publish, problems)


def dump_recipe(recipe: Recipe, *, portable: bool = False) -> str:
    """The recipe as YAML, such that reading it gives the same recipe again.

    What was left at its default is left out.

    Args:
        recipe: what `load_recipe` returned.
        portable: replace every absolute local path by its last component (the encoder's by `hub_id` where that is
            given), for texts that leave this machine. Such a recipe names its data and models, but does not find them.
    """
    data = _plain(recipe)
    if portable:
        if recipe.encoder.hub_id is not None:
            data["encoder"]["path"] = recipe.encoder.hub_id
        data = without_local_paths(data)
    return write_yaml(data)


_ALWAYS = ("format_version", "seed", "kind", "name")
"""Keys that are written even when they hold their default."""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if item is not None and (field.name in _ALWAYS or item != default):
                plain[WRITTEN_AS.get(field.name, field.name)] = _plain(item)
        first = [key for key in ("format_version", "kind", "name", "from") if key in plain]
        return {key: plain[key] for key in [*first, *(key for key in plain if key not in first)]}
    match value:
        case Mapping():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors that complete and check YAML while it is written."""
    schema = TypeAdapter(Recipe).json_schema()
    for title, section in {"Recipe": schema, **schema["$defs"]}.items():
        if "properties" in section:
            section["properties"] = {WRITTEN_AS.get(key, key): value for key, value in section["properties"].items()}
            section["additionalProperties"] = title == "DataConfig"
    return schema
