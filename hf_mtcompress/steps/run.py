"""What each step of a recipe does: take a saved model, write the next one.

Every step gets a `RunContext` and an empty folder that the run moves into place when the step is done, and returns
a `StepOutcome`. Half-done training lies in the step's work folder, from where a killed run goes on.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from transformers import set_seed

from hf_mtcompress.environment import require_extra
from hf_mtcompress.errors import MissingExtraError, RecipeError
from hf_mtcompress.formats.transformers_js import wrong_there
from hf_mtcompress.recipe import (
    DistillStep,
    ExportStep,
    FinetuneStep,
    PretrainStep,
    PruneStep,
    QuantizeStep,
    Recipe,
    StepConfig,
    TrimVocabularyStep,
    TrimWeightsStep,
)
from hf_mtcompress.recipe.lineage import lineage_of
from hf_mtcompress.records import FORMS, form_of_backend
from hf_mtcompress.steps.exporting import export_step
from hf_mtcompress.steps.pruning import prune_step
from hf_mtcompress.steps.quantizing import quantize_step
from hf_mtcompress.steps.run_context import RunContext, StepOutcome
from hf_mtcompress.steps.saved_models import lineage_with_saved_models
from hf_mtcompress.steps.teaching import teach_step
from hf_mtcompress.steps.training import finetune_step
from hf_mtcompress.steps.trimming import trim_vocabulary_step, trim_weights_step
from hf_mtcompress.tasks import Task

logger = logging.getLogger(__name__)


def run_step(step: StepConfig, source: str | None, context: RunContext, folder: Path, work: Path) -> StepOutcome:
    """Do one step.

    Args:
        step: what is wanted.
        source: name of the step to start from; None for the recipe's encoder.
        context: the run.
        folder: empty, for the result.
        work: for checkpoints; kept when the run is killed.
    """
    set_seed(context.recipe.seed)
    match step:
        case FinetuneStep():
            return finetune_step(step, source, context, folder, work)
        case PretrainStep() | DistillStep():
            return teach_step(step, source, context, folder, work)
        case PruneStep():
            return prune_step(step, source, context, folder, work)
        case TrimVocabularyStep():
            return trim_vocabulary_step(step, source, context, folder)
        case TrimWeightsStep():
            return trim_weights_step(step, source, context, folder, work)
        case QuantizeStep():
            return quantize_step(step, source, context, folder, work)
        case ExportStep():
            return export_step(step, source, context, folder)


def check_steps_fit(recipe: Recipe, tasks: Mapping[str, Task]) -> None:
    """Look for what would stop a run late: packages that are not there, and what a step cannot do with its models.

    Raises:
        RecipeError: one line for each.
    """
    problems = []
    for extra in _extras_of(recipe):
        try:
            require_extra(extra)
        except MissingExtraError as error:
            problems.append(str(error))
    try:
        lineage_with_saved_models(recipe)
    except RecipeError as error:
        problems += error.problems
    lineage = lineage_of(recipe)
    problems += [
        f"steps.{step.name}: a plain transformers folder needs a stock head, but task '{name}' has head '{task.head}'"
        for step in recipe.steps
        if isinstance(step, ExportStep) and {"vanilla", "transformers_js"}.intersection(step.formats)
        for name, task in tasks.items()
        if task.head != "stock" and name in lineage[str(step.name)].begins.tasks
    ]
    problems += _without_transformers_js(recipe, tasks)
    if problems:
        raise RecipeError(problems)


def _without_transformers_js(recipe: Recipe, tasks: Mapping[str, Task]) -> list[str]:
    """Steps for transformers.js that would find no task there; single tasks that get no folder are said."""
    lineage, problems = lineage_of(recipe), []
    for step in recipe.steps:
        if not isinstance(step, ExportStep) or "transformers_js" not in step.formats:
            continue
        own = [name for name in tasks if name in lineage[str(step.name)].begins.tasks]
        reasons = {name: reason for name in own if (reason := wrong_there(tasks[name]))}
        if own and len(reasons) == len(own):
            problems.append(
                f"steps.{step.name}.formats: expected a task that transformers.js answers, found {', '.join(reasons)}, "
                f"{reasons[own[0]]}; leave transformers_js out"
            )
            continue
        for name, reason in reasons.items():
            logger.warning("%s: task '%s' gets no folder for transformers.js, %s", step.name, name, reason)
    return problems


def _extras_of(recipe: Recipe) -> list[str]:
    """The extras that a recipe needs."""
    needed = ["surgery"] if recipe.fusion.combination not in (None, "mean") else []
    if recipe.search is not None and recipe.search.timing.runtime != "torch":
        needed.append("onnx")
    for step in recipe.steps:
        match step:
            case QuantizeStep():
                needed += form_of_backend(step.backend).extras_to_write
            case ExportStep():
                for form in FORMS.values():
                    needed += form.extras_to_write if form.name in step.formats else ()
            case PruneStep() if step.latency and step.timing.runtime != "torch":
                needed.append("onnx")
            case _:
                pass
    return list(dict.fromkeys(needed))
