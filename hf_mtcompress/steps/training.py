"""Finetune steps, and how every step trains: arguments, checkpoints, the way back after a kill."""

import dataclasses
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from accelerate.utils import extract_model_from_parallel
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_mtcompress.errors import RecipeError, TrainingError, first_line
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.recipe import FinetuneStep, Recipe, TrainingConfig
from hf_mtcompress.records import Artefact
from hf_mtcompress.steps.run_context import RunContext, Start, StepOutcome, probe, start_of, structure_of
from hf_mtcompress.trainers.arguments import MultiTaskTrainingArguments
from hf_mtcompress.trainers.distillation import DistillationTrainer
from hf_mtcompress.trainers.multitask import MultiTaskTrainer

logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments", bound=MultiTaskTrainingArguments)
_COMPLETE = "complete"
_ELSEWHERE = "a run keeps its checkpoints in its own folder; choose that one with --output"
_PUSH = "a run uploads nothing; push it when it is done, with hf-mtcompress push"
_OF_THE_RUN = {
    "output_dir": _ELSEWHERE,
    "resume_from_checkpoint": "a killed run goes on by itself when it is started again",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_revision"), _PUSH),
}
"""Training arguments that a run sets for itself."""


def finetune_step(step: FinetuneStep, source: str | None, context: RunContext, folder: Path, work: Path) -> StepOutcome:
    """Train heads and encoder on labels, or adapters alone."""
    start = start_of(source, context)
    if step.adapters is not None:
        start.model.add_adapters(**dataclasses.asdict(step.adapters))
    fit = train_finetune(step, start, context, work)
    if step.drop_auxiliary:
        drop_auxiliary(start.model)
    return save_trained(start, context, folder, fit)


def drop_auxiliary(model: MultiTaskModel) -> None:
    """Take the auxiliary tasks out of a model."""
    for name in [name for name, task in model.tasks.items() if task.role == "auxiliary"]:
        model.remove_task(name)


@dataclass(frozen=True)
class Fit:
    """How a model was trained, and how its tasks got along where that was measured."""

    training: dict[str, Any]
    interference: dict[str, Any] | None


def train_finetune(
    step: FinetuneStep, start: Start, context: RunContext, work: Path, callbacks: Sequence[TrainerCallback] = ()
) -> Fit:
    """Train a model on labels; a killed training goes on."""
    config = merged_training(step, context.recipe.training)
    arguments = training_arguments(MultiTaskTrainingArguments, config, context, work)
    trainer = MultiTaskTrainer(
        model=start.model,
        args=arguments,
        train_dataset=context.sources.role("train"),
        eval_dataset=context.sources.role("validation"),
        processing_class=start.reader.processor,
        callbacks=[*callbacks, MarkComplete()],
    )
    return fit_of(trainer, work)


def fit_of(trainer: MultiTaskTrainer, work: Path) -> Fit:
    """Train from the last whole checkpoint.

    Raises:
        TrainingError: the loss is not finite.
    """
    result = trainer.train(resume_from_checkpoint=last_checkpoint(work))
    # A model that was trained in mixed precision would go on to run in it: what is saved does not.
    extract_model_from_parallel(trainer.model, keep_fp32_wrapper=False)
    history = [row for row in trainer.state.log_history if "train_runtime" not in row]
    if not math.isfinite(result.training_loss):
        raise TrainingError(f"expected a finite training loss, found {result.training_loss}; lower the learning rate")
    training = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "best_step": trainer.state.best_global_step,
        "batch_size": trainer.args.train_batch_size,
        "learning_rate": trainer.args.learning_rate,
        "mixing": dict(zip([group.name for group in trainer.train_groups], trainer.mixing_sampler.shares, strict=True)),
        "log": history,
    }
    if isinstance(trainer, DistillationTrainer) and trainer.caches:
        training["teacher_cache"] = {
            "rows": sum(cache.rows for cache in trainer.caches),
            "megabytes": sum(cache.bytes for cache in trainer.caches) / 1e6,
            "seconds": sum(cache.seconds for cache in trainer.caches),
            "precision": trainer.caches[0].precision,
        }
    return Fit(training, trainer.interference())


def merged_training(step: TrainingConfig, defaults: TrainingConfig) -> TrainingConfig:
    """A step's training settings, the recipe's where it has none."""
    values = {}
    for item in dataclasses.fields(TrainingConfig):
        own = getattr(step, item.name)
        values[item.name] = own if own is not None else getattr(defaults, item.name)
    values["arguments"] = {**defaults.arguments, **step.arguments}
    return TrainingConfig(**values)


def training_arguments(
    cls: type[Arguments], config: TrainingConfig, context: RunContext, work: Path, *, labelled: bool = True
) -> Arguments:
    """Training arguments of a step; what the recipe leaves open is the default of `TrainingArguments`.

    Args:
        cls: their class.
        config: settings of the step.
        context: what the run has.
        work: folder for checkpoints.
        labelled: whether rows have labels; without them nothing can follow validation scores or
            compare tasks.

    Raises:
        RecipeError: `arguments` holds a name or value that `TrainingArguments` refuses.
    """
    best = config.keep != "last"
    mixing = {**_mixing_arguments(context.recipe), **config.arguments}
    if not labelled:
        for key in ("task_patience", "measure_interference"):
            mixing.pop(key, None)
        if mixing.get("mixing") == "score_gap":
            mixing["mixing"] = "proportional"
    # Some settings follow validation scores, whatever weights are kept.
    scored = best or mixing.get("mixing") == "score_gap" or mixing.get("task_patience") is not None
    strategy = "epoch" if config.save_steps is None else "steps"
    settings: dict[str, Any] = {
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "head_learning_rate": config.head_learning_rate,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.eval_batch_size or config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "l1_penalty": config.l1_penalty,
        "l2_penalty": config.l2_penalty,
        "lr_scheduler_type": config.lr_scheduler_type,
        "bf16": config.bf16,
        "save_steps": config.save_steps,
        "eval_steps": config.save_steps,
        "save_strategy": strategy,
        "eval_strategy": strategy if scored else "no",
        "load_best_model_at_end": best,
        "metric_for_best_model": "average" if best else None,
        "greater_is_better": True if best else None,
        "save_total_limit": 2,
        "seed": context.recipe.seed,
        "logging_steps": 25,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
        **mixing,
    }
    _check_arguments(cls, config.arguments)
    try:
        return cls(output_dir=str(work), **{key: value for key, value in settings.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"training.arguments: expected fields of transformers.TrainingArguments, found {config.arguments} "
            f"({first_line(error)})"
        ) from error


def _check_arguments(cls: type[MultiTaskTrainingArguments], arguments: Mapping[str, Any]) -> None:
    """Make sure that values are of the kinds that transformers declares, and leave the run its own.

    Raises:
        RecipeError: one line for each that is not.
    """
    kinds, problems = get_type_hints(cls), []
    for name, value in arguments.items():
        if name in _OF_THE_RUN and value not in (None, False):
            problems.append(f"training.arguments.{name}: expected no such key, found {value!r}; {_OF_THE_RUN[name]}")
        elif name in kinds:
            try:
                TypeAdapter(kinds[name]).validate_python(value, strict=True)
            except ValidationError:
                kind = getattr(kinds[name], "__name__", str(kinds[name]).replace("typing.", ""))
                problems.append(
                    f"training.arguments.{name}: expected {kind}, found {value!r}; correct it or leave it out"
                )
            except PydanticUserError:
                continue  # of a class that pydantic knows nothing of
    if problems:
        raise RecipeError(problems)


def _mixing_arguments(recipe: Recipe) -> dict[str, Any]:
    """Mixing and fusion as `MultiTaskTrainingArguments` name them."""
    mixing, fusion = recipe.mixing, recipe.fusion
    options = {key: getattr(fusion, key) for key in ("rate", "temperature", "share")}
    return {
        "mixing": mixing.strategy,
        "mixing_temperature": mixing.temperature,
        "mixing_cap": mixing.cap,
        "mixing_weights": mixing.weights,
        "mixing_targets": mixing.targets,
        "batches": mixing.batches,
        "task_patience": mixing.task_patience,
        "fusion": fusion.kind,
        "fusion_options": {key: value for key, value in options.items() if value is not None} or None,
        "normalize_losses": fusion.normalize,
        "gradient_combination": fusion.combination,
        "surgery_scope": fusion.scope,
        "measure_interference": fusion.measure_every,
        "measure_on": fusion.measure_on,
    }


class MarkComplete(TrainerCallback):
    """Marks a checkpoint when all its files are written, so that a half-written one is never resumed."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        (folder / _COMPLETE).touch()


def last_checkpoint(work: Path) -> str | None:
    """The newest complete checkpoint; incomplete ones are removed."""
    found: list[tuple[int, Path]] = []
    for folder in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (folder / _COMPLETE).exists():
            found.append((int(folder.name.rsplit("-", 1)[1]), folder))
        else:
            shutil.rmtree(folder)
    if not found:
        return None
    newest = max(found)[1]
    logger.info("going on from %s", newest.name)
    return str(newest)


def save_trained(made: Start, context: RunContext, folder: Path, fit: Fit | None) -> StepOutcome:
    """Save a model with its reader, and its answers for the check that it reloads."""
    model = made.model
    torch.nn.Module.to(model, "cpu")
    model.eval()
    probes = {".": probe(model, context, made.reader)}
    model.save_pretrained(folder)
    made.reader.save(folder)
    return StepOutcome(
        artefacts=[Artefact(form="torch", folder=".", precision="float32")],
        reader=made.reader,
        structure=structure_of(model),
        training=fit.training if fit else None,
        interference=fit.interference if fit else None,
        probes=probes,
    )
