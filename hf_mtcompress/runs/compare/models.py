"""The models that the arms need, each once for each seed: recipes of one finetune step on some of the tasks."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_mtcompress.data.load import content_fingerprint
from hf_mtcompress.data.preprocessing import group_tasks
from hf_mtcompress.data.readers import Reader
from hf_mtcompress.data.sources import Sources, load_sources, task_of
from hf_mtcompress.errors import RecipeError
from hf_mtcompress.recipe import FusionConfig, MixingConfig, Recipe, Role, TaskConfig, restricted
from hf_mtcompress.runs.compare.arms import ALONE, TOGETHER, Arm, Comparison, finetune_step, main_tasks
from hf_mtcompress.steps.run_context import recipe_reader
from hf_mtcompress.steps.training import merged_training

_LONGEST_FOLDER = 120


@dataclass(frozen=True)
class PlannedModel:
    """Some tasks, and how they are trained in every seed."""

    folder: str
    recipe: Recipe
    sources: Sources
    reader: Reader
    steps: int | None
    """Optimizer steps, where the recipe limits them."""

    @property
    def tasks(self) -> list[str]:
        return list(self.sources.tasks)


def models_of(comparison: Comparison, sources: Sources) -> dict[str, list[PlannedModel]]:
    """The models of every arm by its name; arms that need the same model share it."""
    recipe = comparison.recipe
    reader = recipe_reader(recipe)
    arms = {TOGETHER: [planned_model(TOGETHER, recipe, sources, reader, tuple(recipe.tasks))]}
    for task in main_tasks(recipe):
        arms[f"{ALONE}:{task}"] = [planned_model(None, recipe, sources, reader, (task,))]
    problems: list[str] = []
    for arm in comparison.arms:
        own = sources if arm.recipe.tasks == recipe.tasks else load_sources(arm.recipe.tasks, arm.recipe.seed)
        problems += _other_rows(arm, sources, own)
        other = reader if arm.recipe.encoder == recipe.encoder else recipe_reader(arm.recipe)
        if not arm.groups:
            arms[arm.name] = [planned_model(arm.name, arm.recipe, own, other, tuple(arm.recipe.tasks))]
            continue
        arms[arm.name], untouched = [], 0
        for group in arm.groups:
            model = planned_model(f"{arm.name}.{joined(group)}", arm.recipe, own, other, group)
            if set(group) <= set(recipe.tasks):
                plain = planned_model(None, recipe, sources, reader, group)
                if (plain.recipe, plain.steps) == (model.recipe, model.steps):
                    # Trained twice, a difference of 0 would look like a result.
                    model, untouched = plain, untouched + 1
            arms[arm.name].append(model)
        if arm.settings and untouched == len(arm.groups):
            problems.append(
                f"--group {arm.name}: {', '.join(arm.settings)} changes nothing in any of its groups; leave it out"
            )
    problems += combination_problems(arms)
    if problems:
        raise RecipeError(problems)
    return arms


def combination_problems(arms: Mapping[str, Sequence[PlannedModel]]) -> list[str]:
    """Combining gradients needs tasks that meet in a step, which the trainer would find out hours later."""
    return [
        f"arm {name}: expected tasks that meet in a step for fusion.combination, found one in each batch of "
        f"{' + '.join(model.tasks)}; say mixing.batches: mixed, or training.gradient_accumulation_steps of 2 and more"
        for name, models in arms.items()
        for model in models
        if model.recipe.fusion.combination is not None
        and model.recipe.mixing.batches == "one_source"
        and (merged_training(finetune_step(model.recipe), model.recipe.training).gradient_accumulation_steps or 1) == 1
        and all(len(group) == 1 for group in group_tasks(model.sources.tasks, model.sources.role("train")))
    ]


def _other_rows(arm: Arm, sources: Sources, own: Sources) -> list[str]:
    """Scores on other rows are no comparison."""
    if own is sources:
        return []
    problems = []
    for task in main_tasks(arm.recipe):
        if task not in sources.splits:
            continue
        role = scored_role(sources, task)
        rows = [content_fingerprint({role: splits[role]}) for splits in (sources.splits[task], own.splits[task])]
        if rows[0] != rows[1]:
            problems.append(
                f"{'--group' if arm.groups else '--arm'} {arm.name}: expected the {role} rows of task '{task}' as in "
                "the recipe, found others; change its train rows only"
            )
    return problems


def scored_role(sources: Sources, task: str) -> Role:
    """The split that a task is scored on."""
    return "test" if "test" in sources.splits[task] else "validation"


def planned_model(
    folder: str | None, recipe: Recipe, sources: Sources, reader: Reader, names: tuple[str, ...]
) -> PlannedModel:
    """Some tasks of a recipe as a recipe of their own, with the share of steps that their rows have."""
    if set(names) == set(recipe.tasks):
        folder = folder or TOGETHER
    single = len(names) == 1
    tasks: dict[str, TaskConfig] = {}
    for name in names:
        # Rows shared with a task that is left out are found by their own section.
        tasks[name] = dataclasses.replace(recipe.tasks[name], data=sources.configs[name])
        if single:
            tasks[name] = dataclasses.replace(tasks[name], weight=1.0)
    own = restricted(recipe, names)
    part = dataclasses.replace(
        recipe,
        tasks=tasks,
        # A task that stops early would have another budget than its rivals.
        mixing=MixingConfig(cap=recipe.mixing.cap) if single else dataclasses.replace(own.mixing, task_patience=None),
        fusion=FusionConfig() if single else recipe.fusion,
        branches={} if single else own.branches,
        reference=None,
        budget=None,
    )
    labels = {name: sources.tasks[name].labels for name in names}
    rows = dataclasses.replace(
        sources.of(names),
        tasks={name: dataclasses.replace(task_of(name, tasks[name]), labels=labels[name]) for name in names},
    )
    limit = merged_training(finetune_step(recipe), recipe.training).max_steps
    steps = None
    if limit is not None:
        share = sum(counted_rows(rows, recipe.mixing.cap)) / sum(counted_rows(sources, recipe.mixing.cap))
        steps = max(1, round(limit * share))
    if folder is None:
        folder = f"{ALONE}-{names[0]}" if single else joined(names)
    return PlannedModel(folder, part, rows, reader, steps)


def joined(names: Sequence[str]) -> str:
    """Names as one of a folder; of many, the first ones and a digest of all, since file systems take 255 characters."""
    whole = "+".join(names)
    if len(whole) <= _LONGEST_FOLDER:
        return whole
    return f"{whole[:_LONGEST_FOLDER].rpartition('+')[0]}+{hashlib.sha256(whole.encode()).hexdigest()[:12]}"


def counted_rows(sources: Sources, cap: int | None) -> list[int]:
    """Training rows of each source that count for how often it is drawn; tasks over the same rows are one source."""
    train = sources.role("train")
    counts = [len(train[group[0]]) for group in group_tasks(sources.tasks, train)]
    return [count if cap is None else min(count, cap) for count in counts]
