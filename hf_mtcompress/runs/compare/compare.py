"""Every task alone and all together on the same budget, over seeds: what sharing an encoder does to each task.

plan: arms (together, alone:TASK, changed recipes, groups of tasks) -> the models they need, each once
for each seed, for each model: skip if done, else train, score, delete the weights
with `encoders`: groups by what sharing cost each task on validation rows -> their models, likewise
differences, compare.json, picture
Several processes with the same command share the trainings: each takes those that no other holds.

A model is a recipe of one finetune step on some of the tasks, and is trained by the workflow's own `do_step`: it is
skipped when its fingerprint is that of a finished one, and goes on from its checkpoint when it was killed.

The budget of all arms is the same: the recipe's first finetune step, from the encoder, with the same epochs over each
task's own rows. With `max_steps`, a model gets the share of steps that its rows have among all rows. The weights of the
last step are kept, so that no validation score decides anything. A model with one task has no weights, no mixing and no
fusion of losses, since these only say how tasks stand to each other.
"""

import dataclasses
import datetime
import hashlib
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers.utils import logging as transformers_logging

from hf_mtcompress import records
from hf_mtcompress.artifacts import (
    COMPARISON,
    COMPARISON_PICTURE,
    RECIPE,
    RECORD,
    STEP_RECORD,
    WORK,
    share_work,
    write_text,
)
from hf_mtcompress.config import FinetuneStep, FusionConfig, MixingConfig, Recipe, Role, TaskConfig, restricted
from hf_mtcompress.config.load import dump_recipe, load_recipe
from hf_mtcompress.config.overrides import without_local_paths
from hf_mtcompress.config.sections import near
from hf_mtcompress.data.load import content_fingerprint
from hf_mtcompress.data.preprocessing import group_tasks
from hf_mtcompress.data.sources import Sources, load_sources, task_of
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.errors import ArtifactError, RecipeError
from hf_mtcompress.evaluation.statistics import CONFIDENCE, paired_difference, verdict
from hf_mtcompress.losses.grouping import grouped_by_cost
from hf_mtcompress.publishing.task_comparison import draw_differences
from hf_mtcompress.records import (
    ArmModel,
    ArmRecord,
    ComparedTask,
    StepRecord,
    TaskComparisonRecord,
    TaskDifference,
)
from hf_mtcompress.steps.bench import Bench, load_processor
from hf_mtcompress.steps.scoring import read_step, score_folder
from hf_mtcompress.steps.training import merged_training
from hf_mtcompress.workflow import do_step, prepare_output

logger = logging.getLogger(__name__)

TOGETHER = "together"
ALONE = "alone"
GROUPED = "grouped"
AVERAGE = "average"
_LONGEST_FOLDER = 120
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
    elif "max_steps" in merged_training(_finetune_step(recipe), recipe.training).arguments:
        problems.append("training.arguments.max_steps: expected it as training.max_steps, of which models get a share")
    if len(recipe.tasks) < 2:
        problems.append(f"tasks: expected at least 2 tasks to compare, found {len(recipe.tasks)}; add another")
    elif encoders is not None and not 2 <= encoders <= max(2, len(_main(recipe))):
        problems.append(
            f"--encoders: expected from 2 up to the {len(_main(recipe))} main tasks, found {encoders}; all in one and "
            "each alone are compared anyway"
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


def _finetune_step(recipe: Recipe) -> FinetuneStep:
    return next(step for step in recipe.steps if isinstance(step, FinetuneStep))


def _main(recipe: Recipe) -> list[str]:
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
    for task in _main(recipe):
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
    elif "max_steps" in merged_training(_finetune_step(changed), changed.training).arguments:
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
    return *shared, recipe.tasks, recipe.mixing, recipe.fusion, _training_step(recipe, recipe.seed, None)


def _without_path(setting: str) -> str:
    place, _, value = setting.partition("=")
    return f"{place.strip()}={without_local_paths(value.strip())}"


def _grouped(arm: Arm, text: str, problems: list[str]) -> Arm | None:
    """The arm as several models; every main task is in one of them."""
    name, recipe = arm.name, arm.recipe
    parts = [tuple(word.strip() for word in part.split("+")) for part in text.split("/")]
    before = len(problems)
    given = [task for part in parts for task in part]
    main = _main(recipe)
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


# ---- the models that the arms need ----


@dataclass(frozen=True)
class _Model:
    """Some tasks, and how they are trained in every seed."""

    folder: str
    recipe: Recipe
    sources: Sources
    processor: Any
    steps: int | None
    """Optimizer steps, where the recipe limits them."""

    @property
    def tasks(self) -> list[str]:
        return list(self.sources.tasks)


def compare_tasks(comparison: Comparison, output: Path, *, keep_models: bool = False) -> TaskComparisonRecord:
    """Train and score every arm in every seed, and write what the differences are.

    A repeated call skips what is done; a killed one goes on from its last checkpoint. Processes that are called with
    the same arguments at the same time share the work; all of them return the whole record. The rows are drawn with the
    recipe's seed and are the same in all trainings; seeds change the heads at the start, the order and dropout.

    Args:
        comparison: what `load_comparison` returned.
        output: folder for `compare.json`, the picture and the trainings; made when it is not there.
        keep_models: keep the weights of what is trained in this call; they are deleted after scoring otherwise.

    Raises:
        RecipeError: the recipe or an arm does not fit its data or models.
        ArtifactError: the folder cannot be written, or is that of a run.
    """
    transformers_logging.set_verbosity_error()
    if (output / RECORD).exists():
        raise ArtifactError(
            f"expected a folder of its own for the comparison, found a run in {output}; choose another with --output"
        )
    recipe = comparison.recipe
    sources = load_sources(recipe.tasks, recipe.seed)
    if comparison.encoders is not None:
        _check_rows_to_group_by(recipe, sources)
    arms = _models_of(comparison, sources)
    prepare_output(output)
    write_text(output / RECIPE, dump_recipe(recipe))
    done = _train_all(arms, comparison.seeds, output, keep_models)
    if comparison.encoders is not None:
        groups = _found_groups(recipe, sources, arms, done, comparison.encoders)
        logger.warning("%s: %s", GROUPED, "/".join("+".join(group) for group in groups))
        processor = load_processor(recipe)
        arms[GROUPED] = [_model(None, recipe, sources, processor, group) for group in groups]
        if problems := _cannot_combine({GROUPED: arms[GROUPED]}):
            raise RecipeError(problems)
        done |= _train_all({GROUPED: arms[GROUPED]}, comparison.seeds, output, keep_models)
    record = _record(comparison, sources, arms, done)
    with FileLock(output / WORK / f"{COMPARISON}.lock"):
        write_text(output / COMPARISON, records.to_json(record))
        draw_differences(record, output / COMPARISON_PICTURE)
    return record


def _train_all(
    arms: Mapping[str, Sequence[_Model]], seeds: Sequence[int], output: Path, keep_models: bool
) -> dict[str, list[StepRecord]]:
    """By folder of a model: the records of all seeds, when all are there."""
    models = list({model.folder: model for parts in arms.values() for model in parts}.values())
    trainings = [(seed, model) for seed in seeds for model in models]

    def train(training: tuple[int, _Model]) -> StepRecord:
        seed, model = training
        number = trainings.index(training) + 1
        logger.warning("%s, seed %d (%d of %d)", model.folder, seed, number, len(trainings))
        return _train(model, seed, output, keep_models)

    locks = [output / WORK / f"{model.folder}-seed-{seed}.lock" for seed, model in trainings]
    steps = share_work(train, trainings, locks)
    return {
        model.folder: [step for step, (_, own) in zip(steps, trainings, strict=True) if own is model]
        for model in models
    }


def _check_rows_to_group_by(recipe: Recipe, sources: Sources) -> None:
    """Groups are chosen on validation rows, so scores on these would flatter them."""
    problems = [
        f"--encoders: expected validation and test rows of task '{task}', found {', '.join(sources.splits[task])}; add "
        "the split, or name groups with --group"
        for task in _main(recipe)
        if not {"validation", "test"} <= set(sources.splits[task])
    ]
    if problems:
        raise RecipeError(problems)


def _found_groups(
    recipe: Recipe,
    sources: Sources,
    arms: Mapping[str, Sequence[_Model]],
    done: Mapping[str, Sequence[StepRecord]],
    encoders: int,
) -> list[tuple[str, ...]]:
    """Main tasks by what sharing cost them on validation rows, mean over seeds; auxiliary ones help in each group.

    Raises:
        RecipeError: a task has no validation score.
    """
    costs: dict[str, float] = {}
    for name in _main(recipe):
        task = ComparedTask(metric=str(sources.tasks[name].metric), split="validation", rows=0)
        alone, together = (
            _mean([_score(step, name, task) for step in done[arms[arm][0].folder]])
            for arm in (f"{ALONE}:{name}", TOGETHER)
        )
        if alone is None or together is None:
            raise RecipeError(
                f"--encoders: expected a validation score of task '{name}' in every seed, found none in some (a "
                "correlation of constants, or no row with a label); the same command without --encoders writes down "
                "what is trained, --group adds groups"
            )
        costs[name] = alone - together
    shown = ", ".join(f"{name} {100 * cost:.1f}" for name, cost in sorted(costs.items(), key=lambda item: -item[1]))
    logger.warning("what sharing cost on validation rows, in points: %s", shown)
    helpers = set(recipe.tasks) - set(costs)
    return [
        tuple(name for name in recipe.tasks if name in helpers or name in group)
        for group in grouped_by_cost(costs, encoders)
    ]


def _models_of(comparison: Comparison, sources: Sources) -> dict[str, list[_Model]]:
    """The models of every arm by its name; arms that need the same model share it."""
    recipe = comparison.recipe
    processor = load_processor(recipe)
    arms = {TOGETHER: [_model(TOGETHER, recipe, sources, processor, tuple(recipe.tasks))]}
    for task in _main(recipe):
        arms[f"{ALONE}:{task}"] = [_model(None, recipe, sources, processor, (task,))]
    problems: list[str] = []
    for arm in comparison.arms:
        own = sources if arm.recipe.tasks == recipe.tasks else load_sources(arm.recipe.tasks, arm.recipe.seed)
        problems += _other_rows(arm, sources, own)
        other = processor if arm.recipe.encoder == recipe.encoder else load_processor(arm.recipe)
        if not arm.groups:
            arms[arm.name] = [_model(arm.name, arm.recipe, own, other, tuple(arm.recipe.tasks))]
            continue
        arms[arm.name], untouched = [], 0
        for group in arm.groups:
            model = _model(f"{arm.name}.{_joined(group)}", arm.recipe, own, other, group)
            if set(group) <= set(recipe.tasks):
                plain = _model(None, recipe, sources, processor, group)
                if (plain.recipe, plain.steps) == (model.recipe, model.steps):
                    # Trained twice, a difference of 0 would look like a result.
                    model, untouched = plain, untouched + 1
            arms[arm.name].append(model)
        if arm.settings and untouched == len(arm.groups):
            problems.append(
                f"--group {arm.name}: {', '.join(arm.settings)} changes nothing in any of its groups; leave it out"
            )
    problems += _cannot_combine(arms)
    if problems:
        raise RecipeError(problems)
    return arms


def _cannot_combine(arms: Mapping[str, Sequence[_Model]]) -> list[str]:
    """Combining gradients needs tasks that meet in a step, which the trainer would find out hours later."""
    return [
        f"arm {name}: expected tasks that meet in a step for fusion.combination, found one in each batch of "
        f"{' + '.join(model.tasks)}; say mixing.batches: mixed, or training.gradient_accumulation_steps of 2 and more"
        for name, models in arms.items()
        for model in models
        if model.recipe.fusion.combination is not None
        and model.recipe.mixing.batches == "one_source"
        and (merged_training(_finetune_step(model.recipe), model.recipe.training).gradient_accumulation_steps or 1) == 1
        and all(len(group) == 1 for group in group_tasks(model.sources.tasks, model.sources.role("train")))
    ]


def _other_rows(arm: Arm, sources: Sources, own: Sources) -> list[str]:
    """Scores on other rows are no comparison."""
    if own is sources:
        return []
    problems = []
    for task in _main(arm.recipe):
        if task not in sources.splits:
            continue
        role = _scored_role(sources, task)
        rows = [content_fingerprint({role: splits[role]}) for splits in (sources.splits[task], own.splits[task])]
        if rows[0] != rows[1]:
            problems.append(
                f"{'--group' if arm.groups else '--arm'} {arm.name}: expected the {role} rows of task '{task}' as in "
                "the recipe, found others; change its train rows only"
            )
    return problems


def _scored_role(sources: Sources, task: str) -> Role:
    return "test" if "test" in sources.splits[task] else "validation"


def _model(folder: str | None, recipe: Recipe, sources: Sources, processor: Any, names: tuple[str, ...]) -> _Model:
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
    limit = merged_training(_finetune_step(recipe), recipe.training).max_steps
    steps = None
    if limit is not None:
        share = sum(_counted_rows(rows, recipe.mixing.cap)) / sum(_counted_rows(sources, recipe.mixing.cap))
        steps = max(1, round(limit * share))
    if folder is None:
        folder = f"{ALONE}-{names[0]}" if single else _joined(names)
    return _Model(folder, part, rows, processor, steps)


def _joined(names: Sequence[str]) -> str:
    """Names as one of a folder; of many, the first ones and a digest of all, since file systems take 255 characters."""
    whole = "+".join(names)
    if len(whole) <= _LONGEST_FOLDER:
        return whole
    return f"{whole[:_LONGEST_FOLDER].rpartition('+')[0]}+{hashlib.sha256(whole.encode()).hexdigest()[:12]}"


def _counted_rows(sources: Sources, cap: int | None) -> list[int]:
    """Training rows of each source that count for how often it is drawn; tasks over the same rows are one source."""
    train = sources.role("train")
    counts = [len(train[group[0]]) for group in group_tasks(sources.tasks, train)]
    return [count if cap is None else min(count, cap) for count in counts]


def _training_step(recipe: Recipe, seed: int, steps: int | None) -> FinetuneStep:
    """The recipe's first finetune step, from the encoder, with all its settings and the last weights kept."""
    step = _finetune_step(recipe)
    config = merged_training(step, recipe.training)
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    values |= {"keep": "last", "max_steps": config.max_steps if steps is None else steps}
    return FinetuneStep(name=f"seed-{seed}", adapters=step.adapters, **values)


# ---- one training ----


def _train(model: _Model, seed: int, output: Path, keep_models: bool) -> StepRecord:
    """Train and score a model in one seed, unless that is done."""
    step = _training_step(model.recipe, seed, model.steps)
    recipe = dataclasses.replace(model.recipe, seed=seed, steps=(step,))
    bench = Bench(recipe, output / model.folder, model.sources, model.processor)
    folder = bench.step_folder(str(step.name))
    before = read_step(folder / STEP_RECORD)
    record = do_step(step, None, {}, bench)
    artefact = record.artefacts[0]
    fresh = before is None or before.fingerprint != record.fingerprint
    if bench.sources.role("test") and "test" not in artefact.scores:
        artefact.scores["test"] = score_folder(bench, folder, "test")
        write_text(folder / STEP_RECORD, records.to_json(record))
        fresh = True
    if fresh and not keep_models:
        for item in folder.iterdir():
            if item.name != STEP_RECORD:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
    return record


# ---- what came out ----


def _record(
    comparison: Comparison,
    sources: Sources,
    arms: Mapping[str, Sequence[_Model]],
    done: Mapping[str, Sequence[StepRecord]],
) -> TaskComparisonRecord:
    recipe = comparison.recipe
    settings = {arm.name: list(arm.settings) for arm in comparison.arms}
    tasks = {name: _compared_task(name, sources, arms, done) for name in _main(recipe)}
    found = [_arm_record(name, settings.get(name, []), models, tasks, done) for name, models in arms.items()]
    first = done[TOGETHER][0].training or {}
    config = merged_training(_finetune_step(recipe), recipe.training)
    encoder, path = recipe.encoder, Path(recipe.encoder.path)
    local = path.is_absolute() or path.exists()
    return TaskComparisonRecord(
        name=recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seeds=list(comparison.seeds),
        confidence=CONFIDENCE,
        environment=environment_facts(),
        encoder={
            "path_or_id": path.name if local else encoder.path,
            "hub_id": encoder.hub_id or (None if local else encoder.path),
            "revision": encoder.revision,
            "max_length": encoder.max_length,
        },
        training={
            "step": _finetune_step(recipe).name,
            "epochs": first.get("epochs") if config.max_steps is not None else config.epochs or first.get("epochs"),
            "max_steps": config.max_steps,
            "batch_size": first.get("batch_size"),
            "gradient_accumulation_steps": config.gradient_accumulation_steps or 1,
            "learning_rate": first.get("learning_rate"),
            "keep": "last",
        },
        tasks=tasks,
        arms=found,
        differences=_differences(found, list(tasks)),
    )


def _compared_task(
    name: str, sources: Sources, arms: Mapping[str, Sequence[_Model]], done: Mapping[str, Sequence[StepRecord]]
) -> ComparedTask:
    role = _scored_role(sources, name)
    scores = done[arms[f"{ALONE}:{name}"][0].folder][0].artefacts[0].scores[role].tasks.get(name)
    return ComparedTask(metric=str(sources.tasks[name].metric), split=role, rows=scores.rows if scores else 0)


def _arm_record(
    name: str,
    settings: list[str],
    models: Sequence[_Model],
    tasks: Mapping[str, ComparedTask],
    done: Mapping[str, Sequence[StepRecord]],
) -> ArmRecord:
    scores: dict[str, list[float | None]] = {}
    for model in models:
        for task in (task for task in model.tasks if task in tasks):
            scores[task] = [_score(step, task, tasks[task]) for step in done[model.folder]]
    scores = {task: scores[task] for task in tasks if task in scores}
    if len(scores) == len(tasks):
        scores[AVERAGE] = _averages(list(scores.values()))
    return ArmRecord(
        name=name,
        settings=settings,
        models=[_budget(model, done[model.folder][0]) for model in models],
        scores=scores,
        means={task: _mean(values) for task, values in scores.items()},
    )


def _score(step: StepRecord, name: str, task: ComparedTask) -> float | None:
    """The primary metric; None where there is none or it is no number (a correlation of constants)."""
    scores = step.artefacts[0].scores[task.split].tasks.get(name)
    value = None if scores is None else scores.metrics.get(task.metric)
    return value if value is not None and math.isfinite(value) else None


def _averages(columns: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean over tasks for each seed; None where a task has no score."""
    return [_mean(row) if None not in row else None for row in zip(*columns, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    """Of all values; None where one is missing, since means of other seeds would not compare."""
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def _budget(model: _Model, step: StepRecord) -> ArmModel:
    """Steps and rows of one training; every seed has the same."""
    training = step.training or {}
    epochs = float(training["epochs"])
    counts = _counted_rows(model.sources, model.recipe.mixing.cap)
    seen = epochs * sum(counts)
    # An epoch of proportional mixing is one pass over each source; others say how many batches each had at last.
    shares = counts if model.recipe.mixing.strategy == "proportional" else list(training["mixing"].values())
    groups = group_tasks(model.sources.tasks, model.sources.role("train"))
    by_task = {
        name: round(seen * share / sum(shares)) for group, share in zip(groups, shares, strict=True) for name in group
    }
    return ArmModel(
        tasks=model.tasks,
        folder=model.folder,
        epochs=epochs,
        optimizer_steps=int(training["steps"]),
        rows_seen=round(seen),
        task_rows_seen={name: by_task[name] for name in model.tasks},
    )


def _differences(arms: Sequence[ArmRecord], tasks: Sequence[str]) -> list[TaskDifference]:
    """Every arm that has all tasks against each task alone."""
    alone = {task: next(arm for arm in arms if arm.name == f"{ALONE}:{task}") for task in tasks}
    reference = {task: arm.scores[task] for task, arm in alone.items()}
    reference[AVERAGE] = _averages([reference[task] for task in tasks])
    found = []
    for arm in (arm for arm in arms if arm not in alone.values()):
        folders = {task: model.folder for model in arm.models for task in model.tasks}
        for task in (*tasks, AVERAGE):
            same = task != AVERAGE and folders[task] == alone[task].models[0].folder
            found.append(_difference(arm.name, task, arm.scores[task], reference[task], same=same))
    return found


def _difference(
    arm: str, task: str, scores: Sequence[float | None], reference: Sequence[float | None], *, same: bool
) -> TaskDifference:
    result = TaskDifference(
        arm=arm,
        task=task,
        alone=_mean(reference),
        together=_mean(scores),
        difference=None,
        low=None,
        high=None,
        seeds=len(scores),
        verdict="alone in this arm" if same else "no score",
    )
    ours = [value for value in scores if value is not None]
    others = [value for value in reference if value is not None]
    if not same and len(ours) == len(others) == len(scores):
        found = paired_difference(ours, others)
        result.difference, result.low, result.high = found.mean, found.low, found.high
        result.verdict = verdict(found)
    return result
