"""What is compared: each task alone, all together, changed recipes, groups of tasks; read from the command line."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_mtcompress.errors import RecipeError
from hf_mtcompress.recipe import FinetuneStep, Recipe
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.recipe.overrides import without_local_paths
from hf_mtcompress.recipe.sections import near
from hf_mtcompress.steps.training import merged_training

TOGETHER = "together"

ALONE = "alone"

GROUPED = "grouped"

_ARM_NAME = re.compile(r"[a-z][a-z0-9_-]*")

_NEXT_SETTING = re.compile(r",(?=\s*[\w-]+(?:\.[\w-]+)*\s*=)")
"""A comma before another `a.b.c=`; others belong to a value, as in `[a, b]`."""


@dataclass(frozen=True)
class Arm:
    """A recipe, changed by `settings`, for all tasks or (with `groups`) for several models with some tasks each."""

    name: str
    recipe: Recipe
    settings: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What is to be compared; made by `load_comparison`."""

    recipe: Recipe
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    """Beside `together` and those alone."""
    encoders: int | None = None
    """Of the arm `grouped`, whose groups are found by what sharing costs; None for no such arm."""


def load_comparison(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    seeds: int = 3,
    arms: Sequence[str] = (),
    groups: Sequence[str] = (),
    encoders: int | None = None,
) -> Comparison:
    """Read a recipe and the arms that are wanted beside `together` and `alone:TASK`.

    Args:
        path: the recipe.
        overrides: `a.b.c=value` each, for all arms.
        seeds: how many; the first is the recipe's.
        arms: `NAME=a.b.c=value[,a.b.c=value]` each: all tasks with a changed recipe.
        groups: `NAME=task+task/task[,a.b.c=value]` each: one model for each part between slashes, with a changed recipe
            if settings follow.
        encoders: add the arm `grouped`: tasks that lose much by sharing, on validation rows, get another encoder, up to
            so many in all.

    Raises:
        RecipeError: the recipe cannot be run, has no finetune step or nothing to compare, or an arm is wrong; all
            mistakes of the arms at once.
    """
    recipe = load_recipe(path, overrides)
    problems: list[str] = []
    if seeds < 1:
        problems.append(f"--seeds: expected at least 1, found {seeds}; 3 or more give intervals worth reading")
    if not any(isinstance(step, FinetuneStep) for step in recipe.steps):
        kinds = ", ".join(step.kind for step in recipe.steps)
        problems.append(f"steps: expected a finetune step to compare, found {kinds}; add {{kind: finetune}}")
    elif "max_steps" in merged_training(finetune_step(recipe), recipe.training).arguments:
        problems.append("training.arguments.max_steps: expected it as training.max_steps, of which models get a share")
    if len(recipe.tasks) < 2:
        problems.append(f"tasks: expected at least 2 tasks to compare, found {len(recipe.tasks)}; add another")
    elif encoders is not None and not 2 <= encoders <= max(2, len(main_tasks(recipe))):
        problems.append(
            f"--encoders: expected from 2 up to the {len(main_tasks(recipe))} main tasks, found {encoders}; all in one "
            "and each alone are compared anyway"
        )
    if problems:
        raise RecipeError(problems)
    names = [TOGETHER, *([GROUPED] if encoders is not None else [])]
    found: list[Arm] = []
    for text in arms:
        name, settings = _name_of(text, "--arm NAME=a.b.c=value", names, problems)
        if (
            name is not None
            and (arm := _changed("--arm", name, settings, path, overrides, recipe, problems)) is not None
        ):
            found.append(arm)
    for text in groups:
        name, parts = _name_of(text, "--group NAME=task+task/task", names, problems)
        if name is None:
            continue
        parts, *settings = _NEXT_SETTING.split(parts, maxsplit=1)
        arm = Arm(name, recipe)
        if settings:
            arm = _changed("--group", name, settings[0], path, overrides, recipe, problems)
        if arm is not None and (arm := _grouped(arm, parts, problems)) is not None:
            found.append(arm)
    if problems:
        raise RecipeError(problems)
    return Comparison(recipe, tuple(range(recipe.seed, recipe.seed + seeds)), tuple(found), encoders)


def finetune_step(recipe: Recipe) -> FinetuneStep:
    """The recipe's first finetune step."""
    return next(step for step in recipe.steps if isinstance(step, FinetuneStep))


def training_step(recipe: Recipe, seed: int, steps: int | None) -> FinetuneStep:
    """The recipe's first finetune step, from the encoder, with all its settings and the last weights kept."""
    step = finetune_step(recipe)
    config = merged_training(step, recipe.training)
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    values |= {"keep": "last", "max_steps": config.max_steps if steps is None else steps}
    return FinetuneStep(name=f"seed-{seed}", adapters=step.adapters, **values)


def main_tasks(recipe: Recipe) -> list[str]:
    """Names of the main tasks."""
    return [name for name, task in recipe.tasks.items() if task.role == "main"]


def _name_of(text: str, form: str, names: list[str], problems: list[str]) -> tuple[str | None, str]:
    """Take an arm's name off; what follows it. The name is None where it cannot be used."""
    name, equals, rest = text.partition("=")
    option = form.split()[0]
    if not equals or not rest:
        problems.append(f"{option} {text}: expected {form}")
    elif not _ARM_NAME.fullmatch(name) or name == ALONE or name.startswith(f"{ALONE}-"):
        problems.append(
            f"{option} {text}: expected a name of lower-case letters, digits, '_' and '-' that is not 'alone', "
            f"found '{name}'"
        )
    elif name in names:
        problems.append(f"{option} {text}: there is an arm '{name}' already; choose another name")
    else:
        names.append(name)
        return name, rest
    return None, rest


def _changed(
    option: str, name: str, text: str, path: Path, overrides: Sequence[str], recipe: Recipe, problems: list[str]
) -> Arm | None:
    """An arm with other settings, scored on the same tasks."""
    settings = [setting.strip() for setting in _NEXT_SETTING.split(text)]
    try:
        changed = load_recipe(path, [*overrides, *settings])
    except RecipeError as error:
        problems += [f"{option} {name}: {problem}" for problem in error.problems]
        return None
    before = len(problems)
    if changed.seed != recipe.seed:
        problems.append(f"{option} {name}: expected the recipe's seed, found {changed.seed}; arms are paired by seed")
    for task in main_tasks(recipe):
        if task not in changed.tasks or changed.tasks[task].role != "main":
            problems.append(
                f"{option} {name}: expected the main task '{task}' as in the recipe; do not change its role"
            )
            continue
        for key in ("kind", "label", "metric"):
            if getattr(changed.tasks[task], key) != getattr(recipe.tasks[task], key):
                problems.append(f"{option} {name}: expected the {key} of task '{task}' as in the recipe, found another")
    if not any(isinstance(step, FinetuneStep) for step in changed.steps):
        problems.append(f"{option} {name}: expected a finetune step, found none; do not replace it")
    elif "max_steps" in merged_training(finetune_step(changed), changed.training).arguments:
        problems.append(f"{option} {name}: expected training.max_steps, found max_steps among arguments")
    elif _essence(changed) == _essence(recipe):
        problems.append(
            f"{option} {name}: '{text}' changes nothing in how the first finetune step trains; expected a setting of "
            "tasks, mixing, fusion, training, encoder or that step"
        )
    shown = tuple(_without_path(setting) for setting in settings)
    return Arm(name, changed, shown) if len(problems) == before else None


def _essence(recipe: Recipe) -> tuple[Any, ...]:
    """What the result of an arm depends on."""
    shared = recipe.encoder, recipe.branches, recipe.branch_layers
    return *shared, recipe.tasks, recipe.mixing, recipe.fusion, training_step(recipe, recipe.seed, None)


def _without_path(setting: str) -> str:
    place, _, value = setting.partition("=")
    return f"{place.strip()}={without_local_paths(value.strip())}"


def _grouped(arm: Arm, text: str, problems: list[str]) -> Arm | None:
    """The arm as several models; every main task is in one of them."""
    name, recipe = arm.name, arm.recipe
    parts = [tuple(word.strip() for word in part.split("+")) for part in text.split("/")]
    before = len(problems)
    given = [task for part in parts for task in part]
    main = main_tasks(recipe)
    for task in dict.fromkeys(given):
        if task not in recipe.tasks:
            problems.append(f"--group {name}: there is no task '{task}', {near(task, list(recipe.tasks))}")
        elif task in main and given.count(task) > 1:
            problems.append(f"--group {name}: expected task '{task}' in one group, found it {given.count(task)} times")
    missing = [task for task in main if task not in given]
    if missing:
        problems.append(f"--group {name}: expected every main task, found none of {', '.join(missing)}; add a group")
    problems += [
        f"--group {name}: expected different tasks with a main one in each group, found {'+'.join(part)}"
        for part in parts
        if set(part) <= set(recipe.tasks) and (len(set(part)) < len(part) or not set(part) & set(main))
    ]
    if len(problems) > before:
        return None
    ordered = tuple(tuple(task for task in recipe.tasks if task in part) for part in parts)
    return dataclasses.replace(arm, groups=ordered)
