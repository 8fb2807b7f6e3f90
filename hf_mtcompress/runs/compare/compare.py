"""Every task alone and all together on the same budget, over seeds: what sharing an encoder does to each task.

plan: arms (together, alone:TASK, changed recipes, groups of tasks) -> the models they need, each once
for each seed, for each model: skip if done, else train, score, delete the weights
with `encoders`: groups by what sharing cost each task on validation rows -> their models, likewise
differences, compare.json, picture
Several processes with the same command share the trainings: each takes those that no other holds.

A model is a recipe of one finetune step on some of the tasks, and is trained by a run's own `do_step`: it is
skipped when its fingerprint is that of a finished one, and goes on from its checkpoint when it was killed.

The budget of all arms is the same: the recipe's first finetune step, from the encoder, with the same epochs over each
task's own rows. With `max_steps`, a model gets the share of steps that its rows have among all rows. The weights of the
last step are kept, so that no validation score decides anything. A model with one task has no weights, no mixing and no
fusion of losses, since these only say how tasks stand to each other.
"""

import dataclasses
import datetime
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock
from transformers.utils import logging as transformers_logging

from hf_mtcompress import records
from hf_mtcompress.artifacts import COMPARISON, COMPARISON_PICTURE, RECIPE, RECORD, STEP_RECORD, WORK, write_text
from hf_mtcompress.data.sources import Sources, load_sources
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.errors import ArtifactError, RecipeError
from hf_mtcompress.locks import share_work
from hf_mtcompress.losses.grouping import grouped_by_cost
from hf_mtcompress.publishing.task_comparison import draw_differences
from hf_mtcompress.recipe import Recipe
from hf_mtcompress.recipe.load import dump_recipe
from hf_mtcompress.records import (
    ComparedTask,
    StepRecord,
    TaskComparisonRecord,
)
from hf_mtcompress.runs.compare.arms import (
    ALONE,
    GROUPED,
    TOGETHER,
    Comparison,
    finetune_step,
    main_tasks,
    training_step,
)
from hf_mtcompress.runs.compare.differences import arm_record, compared_task, differences, mean_of, score_of
from hf_mtcompress.runs.compare.models import PlannedModel, combination_problems, models_of, planned_model
from hf_mtcompress.runs.compare.statistics import CONFIDENCE
from hf_mtcompress.runs.run import do_step, prepare_output
from hf_mtcompress.steps.run_context import RunContext, recipe_reader
from hf_mtcompress.steps.scoring import read_step, score_folder
from hf_mtcompress.steps.training import merged_training

logger = logging.getLogger(__name__)


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
    arms = models_of(comparison, sources)
    prepare_output(output)
    write_text(output / RECIPE, dump_recipe(recipe))
    done = _train_all(arms, comparison.seeds, output, keep_models)
    if comparison.encoders is not None:
        groups = _found_groups(recipe, sources, arms, done, comparison.encoders)
        logger.warning("%s: %s", GROUPED, "/".join("+".join(group) for group in groups))
        reader = recipe_reader(recipe)
        arms[GROUPED] = [planned_model(None, recipe, sources, reader, group) for group in groups]
        if problems := combination_problems({GROUPED: arms[GROUPED]}):
            raise RecipeError(problems)
        done |= _train_all({GROUPED: arms[GROUPED]}, comparison.seeds, output, keep_models)
    record = _record(comparison, sources, arms, done)
    with FileLock(output / WORK / f"{COMPARISON}.lock"):
        write_text(output / COMPARISON, records.to_json(record))
        draw_differences(record, output / COMPARISON_PICTURE)
    return record


def _train_all(
    arms: Mapping[str, Sequence[PlannedModel]], seeds: Sequence[int], output: Path, keep_models: bool
) -> dict[str, list[StepRecord]]:
    """By folder of a model: the records of all seeds, when all are there."""
    models = list({model.folder: model for parts in arms.values() for model in parts}.values())
    trainings = [(seed, model) for seed in seeds for model in models]

    def train(training: tuple[int, PlannedModel]) -> StepRecord:
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
        for task in main_tasks(recipe)
        if not {"validation", "test"} <= set(sources.splits[task])
    ]
    if problems:
        raise RecipeError(problems)


def _found_groups(
    recipe: Recipe,
    sources: Sources,
    arms: Mapping[str, Sequence[PlannedModel]],
    done: Mapping[str, Sequence[StepRecord]],
    encoders: int,
) -> list[tuple[str, ...]]:
    """Main tasks by what sharing cost them on validation rows, mean over seeds; auxiliary ones help in each group.

    Raises:
        RecipeError: a task has no validation score.
    """
    costs: dict[str, float] = {}
    for name in main_tasks(recipe):
        task = ComparedTask(metric=str(sources.tasks[name].metric), split="validation", rows=0)
        alone, together = (
            mean_of([score_of(step, name, task) for step in done[arms[arm][0].folder]])
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


def _train(model: PlannedModel, seed: int, output: Path, keep_models: bool) -> StepRecord:
    """Train and score a model in one seed, unless that is done."""
    step = training_step(model.recipe, seed, model.steps)
    recipe = dataclasses.replace(model.recipe, seed=seed, steps=(step,))
    context = RunContext(recipe, output / model.folder, model.sources, model.reader)
    folder = context.step_folder(str(step.name))
    before = read_step(folder / STEP_RECORD)
    record = do_step(step, {}, context)
    artefact = record.artefacts[0]
    fresh = before != record
    if context.sources.role("test") and "test" not in artefact.scores:
        artefact.scores["test"] = score_folder(context, folder, "test")
        write_text(folder / STEP_RECORD, records.to_json(record))
        fresh = True
    if fresh and not keep_models:
        # From here on they are not missed.
        record.files = None
        write_text(folder / STEP_RECORD, records.to_json(record))
        for item in folder.iterdir():
            if item.name != STEP_RECORD:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
    return record


def _record(
    comparison: Comparison,
    sources: Sources,
    arms: Mapping[str, Sequence[PlannedModel]],
    done: Mapping[str, Sequence[StepRecord]],
) -> TaskComparisonRecord:
    recipe = comparison.recipe
    settings = {arm.name: list(arm.settings) for arm in comparison.arms}
    tasks = {name: compared_task(name, sources, arms, done) for name in main_tasks(recipe)}
    found = [arm_record(name, settings.get(name, []), models, tasks, done) for name, models in arms.items()]
    first = done[TOGETHER][0].training or {}
    config = merged_training(finetune_step(recipe), recipe.training)
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
            "step": finetune_step(recipe).name,
            "epochs": first.get("epochs") if config.max_steps is not None else config.epochs or first.get("epochs"),
            "max_steps": config.max_steps,
            "batch_size": first.get("batch_size"),
            "gradient_accumulation_steps": config.gradient_accumulation_steps or 1,
            "learning_rate": first.get("learning_rate"),
            "keep": "last",
        },
        tasks=tasks,
        arms=found,
        differences=differences(found, list(tasks)),
    )
