"""What each step of a recipe does: take a saved model, write the next one.

Every function here gets a `Bench` and an empty folder that the workflow moves into place when the step is done, and
returns a `StepOutcome`. Half-done training lies in the step's work folder, from where a killed run goes on.
"""

import dataclasses
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_mtcompress.artifacts import ONNX, ONNX_SETTINGS, VANILLA, WORK, whole_folder
from hf_mtcompress.compression.importance import block_influence
from hf_mtcompress.compression.pruning import prune
from hf_mtcompress.compression.quantization import quantize_bitsandbytes
from hf_mtcompress.compression.vocabulary import Text, compare_readings, trim_vocabulary
from hf_mtcompress.config import (
    DistillStep,
    ExportStep,
    FinetuneStep,
    PretrainStep,
    PruneStep,
    QuantizeStep,
    Recipe,
    Role,
    StepConfig,
    StudentConfig,
    TrainingConfig,
    TrimVocabularyStep,
    WeightSchedule,
    teachers_of,
)
from hf_mtcompress.data.alignment import columns_of_rows
from hf_mtcompress.data.collator import MultiTaskCollator
from hf_mtcompress.data.load import load_unlabelled
from hf_mtcompress.data.mixing import MixedDataset, MixingSampler
from hf_mtcompress.data.preprocessing import EncodedGroup, encode_groups, max_length_of
from hf_mtcompress.data.sources import Sources, with_unlabelled, without_labels
from hf_mtcompress.environment import require_extra
from hf_mtcompress.errors import (
    ArtifactError,
    DataError,
    MissingExtraError,
    MTCompressError,
    RecipeError,
    TrainingError,
)
from hf_mtcompress.exporting.onnx import export_onnx, quantize_onnx
from hf_mtcompress.inference.predictor import load_predictor
from hf_mtcompress.inference.runtimes import Runtime, open_runtime
from hf_mtcompress.inference.runtimes import load_processor as read_processor
from hf_mtcompress.losses.criteria import Criterion, criterion_of
from hf_mtcompress.losses.fusion import Weight
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.modeling import MultiTaskModel, load_encoder
from hf_mtcompress.model.student import fresh_student_of, student_of
from hf_mtcompress.model.surgery import describe_structure
from hf_mtcompress.records import Artefact
from hf_mtcompress.tasks import Task
from hf_mtcompress.trainers.arguments import DistillationTrainingArguments, MultiTaskTrainingArguments
from hf_mtcompress.trainers.distillation import DistillationTrainer
from hf_mtcompress.trainers.multitask import MultiTaskTrainer
from hf_mtcompress.trainers.teachers import TeacherModel, Teachers, same_tokenizer

logger = logging.getLogger(__name__)

Arguments = TypeVar("Arguments", bound=MultiTaskTrainingArguments)
_COMPLETE = "complete"
_PROBE_ROWS = 4
_INFLUENCE_ROWS = 256
"""Rows on which the change that each layer makes is measured."""


@dataclass
class Bench:
    """Everything the steps of one run share.

    Attributes:
        recipe: what is wanted.
        output: folder of the run.
        sources: tasks with labels and rows.
        processor: tokenizer or image processor of the recipe's encoder; see `processor_of`.
    """

    recipe: Recipe
    output: Path
    sources: Sources
    processor: Any

    def step_folder(self, name: str) -> Path:
        """Where a step's result lies."""
        return self.output / name

    def load(self, name: str) -> MultiTaskModel:
        """The float model that a step saved."""
        model = MultiTaskModel.from_pretrained(self.step_folder(name))
        for task in self.sources.tasks.values():
            # The saved task has no columns; those of this recipe are put back for training.
            model.tasks[task.name] = dataclasses.replace(
                task,
                labels=model.tasks[task.name].labels,
                encoder=model.tasks[task.name].encoder,
                layer=model.tasks[task.name].layer,
                weight=task.weight,
                final_weight=task.final_weight,
                role=task.role,
            )
        return model

    def processor_of(self, name: str | None) -> Any:
        """Tokenizer or image processor that a step saved; that of the recipe's encoder for None."""
        if name is None or not any(isinstance(step, TrimVocabularyStep) for step in self.recipe.steps):
            return self.processor
        found = read_processor(self.step_folder(name))
        return self.processor if same_tokenizer(found, self.processor) else found

    @property
    def max_length(self) -> int | None:
        """Longest input in tokens; None for images."""
        if "pixel_values" in self.processor.model_input_names:
            return None
        return max_length_of(self.processor, self.recipe.encoder.max_length)


@dataclass
class StepOutcome:
    """What a step leaves: its artefacts (folders relative to the step), the shape of the model, how it was trained."""

    artefacts: list[Artefact]
    processor: Any
    """What the model reads with, for the inputs of the probes."""
    structure: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    interference: dict[str, Any] | None = None
    vocabulary: dict[str, Any] | None = None
    probes: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """By artefact folder: logits by task of the model in memory, for the check that it reloads."""


def run_step(step: StepConfig, source: str | None, bench: Bench, folder: Path, work: Path) -> StepOutcome:
    """Do one step.

    Args:
        step: what is wanted.
        source: name of the step to start from; None for the recipe's encoder.
        bench: the run.
        folder: empty, for the result.
        work: for checkpoints; kept when the run is killed.
    """
    set_seed(bench.recipe.seed)
    match step:
        case FinetuneStep():
            return _finetune(step, source, bench, folder, work)
        case PretrainStep() | DistillStep():
            return _teach(step, source, bench, folder, work)
        case PruneStep():
            return _prune(step, source, bench, folder, work)
        case TrimVocabularyStep():
            return _trim_vocabulary(step, source, bench, folder)
        case QuantizeStep():
            return _quantize(step, source, bench, folder, work)
        case ExportStep():
            return _export(step, source, bench, folder)


# ---- training steps ----


def _finetune(step: FinetuneStep, source: str | None, bench: Bench, folder: Path, work: Path) -> StepOutcome:
    start = _start(source, bench)
    if step.adapters is not None:
        start.model.add_adapters(**dataclasses.asdict(step.adapters))
    return _save_trained(start, bench, folder, _train_finetune(step, start, bench, work))


def _teach(step: DistillStep | PretrainStep, source: str | None, bench: Bench, folder: Path, work: Path) -> StepOutcome:
    faculty, start = _teacher_and_student(step, source, bench)
    return _save_trained(start, bench, folder, _train_taught(step, start, faculty, bench, work))


def _teacher_and_student(
    step: DistillStep | PretrainStep, source: str | None, bench: Bench
) -> "tuple[_Faculty, _Start]":
    faculty = _load_faculty(step, bench) if isinstance(step, DistillStep) else _load_encoding_teacher(step, bench)
    student = step.student
    return faculty, _start(source, bench) if student is None else _student(student, step, faculty, bench)


@dataclass(frozen=True)
class _Start:
    """What a step works on: a model, and the tokenizer or image processor that it reads with."""

    model: MultiTaskModel
    processor: Any


def _start(source: str | None, bench: Bench) -> _Start:
    return _Start(_start_model(source, bench), bench.processor_of(source))


def _start_model(source: str | None, bench: Bench) -> MultiTaskModel:
    if source is not None:
        return bench.load(source)
    encoder = bench.recipe.encoder
    return new_model(encoder.path, bench, revision=encoder.revision, trust_remote_code=encoder.trust_remote_code)


def new_model(path: str, bench: Bench, **kwargs: Any) -> MultiTaskModel:
    """Fresh heads on a pretrained encoder."""
    try:
        encoder = load_encoder(path, **kwargs)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"encoder.path: expected a local folder or a Hub id of a pretrained encoder, found '{path}' "
            f"({str(error).splitlines()[0]}); check the spelling, or download it first where there is no network"
        ) from error
    image_size = bench.processor.size.get("height") if bench.max_length is None else None
    return MultiTaskModel.from_encoder(
        encoder,
        list(bench.sources.tasks.values()),
        max_length=bench.max_length,
        image_size=image_size,
        branches=bench.recipe.branches,
        branch_layers=None if bench.recipe.branch_layers == "all" else bench.recipe.branch_layers,
    )


@dataclass(frozen=True)
class _Faculty:
    """Who teaches in a step.

    Attributes:
        teachers: one model, one for each task, or pairs of model and weight.
        processors: by identity of a model: its own tokenizer or image processor.
        trusted: whether all of them were scored in this run, so that nobody has to look at what they know.
    """

    teachers: Teachers
    processors: dict[int, Any]
    trusted: bool = True

    @property
    def first(self) -> TeacherModel:
        """The one whose layers a student is made of."""
        match self.teachers:
            case Mapping():
                return next(iter(self.teachers.values()))
            case PreTrainedModel() | Runtime():
                return self.teachers
            case _:
                first = self.teachers[0]
                return first[0] if isinstance(first, tuple) else first

    def processing_classes(self, students: Any) -> Any:
        """As `DistillationTrainer` takes them: None for a teacher that reads what the student's processor makes."""

        def own(model: TeacherModel) -> Any:
            processor = self.processors[id(model)]
            return None if processor is students else processor

        match self.teachers:
            case Mapping():
                return {name: own(model) for name, model in self.teachers.items()}
            case PreTrainedModel() | Runtime():
                return own(self.teachers)
            case _:
                return [own(item[0] if isinstance(item, tuple) else item) for item in self.teachers]


def _load_faculty(step: DistillStep, bench: Bench) -> _Faculty:
    """Load every teacher of a step once."""
    steps = [other.name for other in bench.recipe.steps]
    models = {place: load_teacher(place, bench) for place in teachers_of(step)}
    processors = {
        id(model): bench.processor_of(place) if place in steps else _own_processor(place, bench)
        for place, model in models.items()
    }
    trusted = all(place in steps for place in models)
    match step.teachers:
        case dict() as by_task:
            return _Faculty({task: models[place] for task, place in by_task.items()}, processors, trusted)
        case tuple() as averaged:
            return _Faculty([(models[item.path], item.weight) for item in averaged], processors, trusted)
        case _:
            return _Faculty(models[str(step.teacher)], processors, trusted)


def _load_encoding_teacher(step: PretrainStep, bench: Bench) -> _Faculty:
    """The teacher of a pretrain step, whose answers nobody asks for; with the tasks of the run, for its students."""
    own = any(other.name == step.teacher for other in bench.recipe.steps)
    teacher = bench.load(step.teacher) if own else _as_encoder(step.teacher, bench)
    if {name: task.labels for name, task in teacher.tasks.items()} != {
        name: task.labels for name, task in bench.sources.tasks.items()
    }:
        teacher = MultiTaskModel.from_encoder(
            teacher.encoder, list(bench.sources.tasks.values()), **(teacher.config.preprocessing or {}).get("main", {})
        )
    processor = bench.processor_of(step.teacher) if own else _own_processor(step.teacher, bench)
    return _Faculty(teacher, {id(teacher): processor})


def _own_processor(place: str, bench: Bench) -> Any:
    """The tokenizer or image processor that a saved teacher reads with; the run's own where it has none."""
    folder = Path(place)
    try:
        if folder.is_dir():
            return read_processor(folder)
        return (AutoImageProcessor if bench.max_length is None else AutoTokenizer).from_pretrained(place)
    except (ArtifactError, OSError, ValueError):
        logger.warning("teacher '%s' has no tokenizer or image processor of its own: it reads the run's", place)
        return bench.processor


def _as_encoder(path: str, bench: Bench) -> MultiTaskModel:
    """A saved multi-task model, or a pretrained encoder with heads that nobody asks."""
    try:
        saved = AutoConfig.from_pretrained(path).model_type == MultiTaskConfig.model_type
    except (OSError, ValueError) as error:
        raise RecipeError(
            "teacher: expected a step of this recipe, a saved multi-task model or a pretrained encoder, found "
            f"'{path}' ({str(error).splitlines()[0]})"
        ) from error
    return MultiTaskModel.from_pretrained(path) if saved else new_model(path, bench)


def _student(wanted: StudentConfig, step: DistillStep | PretrainStep, faculty: _Faculty, bench: Bench) -> _Start:
    """Make the student that a step asks for; one made of its teacher reads as that does."""
    if wanted.path is not None:
        return _Start(new_model(wanted.path, bench), bench.processor)
    teacher = faculty.first
    processor = faculty.processors[id(teacher)]
    if not isinstance(teacher, MultiTaskModel):
        raise RecipeError(
            f"steps.{step.name}.student: expected a multi-task teacher to make a student of, found a "
            f"{type(teacher).__name__}; give student.path instead"
        )
    if wanted.config is not None:
        return _Start(fresh_student_of(teacher, wanted.config), processor)
    assert wanted.layers is not None
    if wanted.choose == "redundancy" and isinstance(wanted.layers, int):
        rows = [_inputs(batch) for batch in calibration_batches(_Start(teacher, processor), bench, _INFLUENCE_ROWS)]
        influence = block_influence(teacher.encoder, rows)
        student = student_of(teacher, influence.argsort(descending=True)[: wanted.layers].tolist())
    else:
        choose = "spaced" if wanted.choose == "redundancy" else wanted.choose
        student = student_of(teacher, wanted.layers, choose=choose)
    if wanted.heads or wanted.feed_forward:
        prune(student, [], heads=wanted.heads, feed_forward=wanted.feed_forward, importance="magnitude")
    return _Start(student, processor)


def _inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if not key.startswith(("labels_", "rows_"))}


def load_teacher(name: str, bench: Bench) -> TeacherModel:
    """The teacher: a step of this run, or a saved multi-task, stock or ONNX model.

    Raises:
        RecipeError: it cannot be loaded.
    """
    if any(step.name == name for step in bench.recipe.steps):
        return bench.load(name)
    if (Path(name) / ONNX_SETTINGS).is_file():
        return open_runtime(Path(name))
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type == MultiTaskConfig.model_type:
            return MultiTaskModel.from_pretrained(name)
        import transformers

        stock = getattr(transformers, (config.architectures or [""])[0])
        return stock.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"teacher: expected a step of this recipe or a saved model with a head, found '{name}' "
            f"({str(error).splitlines()[0]})"
        ) from error


@dataclass(frozen=True)
class Fit:
    """How a model was trained, and how its tasks got along where that was measured."""

    training: dict[str, Any]
    interference: dict[str, Any] | None


def _train_finetune(step: FinetuneStep, start: _Start, bench: Bench, work: Path) -> Fit:
    config = merged_training(step, bench.recipe.training)
    arguments = training_arguments(MultiTaskTrainingArguments, config, bench, work)
    trainer = MultiTaskTrainer(
        model=start.model,
        args=arguments,
        train_dataset=bench.sources.role("train"),
        eval_dataset=bench.sources.role("validation"),
        processing_class=start.processor,
        callbacks=[MarkComplete()],
    )
    return _fit(trainer, work)


def _train_taught(step: DistillStep | PretrainStep, start: _Start, faculty: _Faculty, bench: Bench, work: Path) -> Fit:
    return _fit(_taught_trainer(step, start, faculty, bench, work, _cache_folder(step, bench)), work)


def _taught_trainer(
    step: DistillStep | PretrainStep,
    start: _Start,
    faculty: _Faculty,
    bench: Bench,
    work: Path,
    cache: Path | Literal[False] | None,
) -> DistillationTrainer:
    """The trainer of a step with a teacher; a pretrain step has no labels, so none to score or to keep weights by."""
    config = merged_training(step, bench.recipe.training)
    match step:
        case DistillStep():
            rows, scored = bench.sources.role("train"), bench.sources.role("validation")
            rows = _with_unlabelled(rows, bench.sources) if step.unlabelled else rows
            label_weight = _weight(step.label_weight)
        case PretrainStep():
            rows, scored = _rows_to_pretrain_on(step, bench), None
            config, label_weight = dataclasses.replace(config, keep="last"), 0.0
    arguments = training_arguments(DistillationTrainingArguments, config, bench, work)
    arguments.cache_precision = step.cache_precision
    return DistillationTrainer(
        model=start.model,
        teacher=faculty.teachers,
        teacher_processing_class=faculty.processing_classes(start.processor),
        args=arguments,
        criteria=_criteria(step),
        label_weight=label_weight,
        teacher_cache=cache,
        probe_rows=0 if faculty.trusted else None,
        train_dataset=rows,
        eval_dataset=scored,
        processing_class=start.processor,
        callbacks=[MarkComplete()],
    )


def ask_teacher(
    step: DistillStep | PretrainStep, source: str | None, bench: Bench, part: tuple[int, int]
) -> tuple[int, int]:
    """Ask the teacher of a step about its training rows, or a part of them, and keep the answers for the step.

    Args:
        step: with `teacher_cache`.
        source: the step that it starts from, if any.
        bench: the run, with the steps before this one done.
        part: (number, of), counted from 0.

    Returns:
        Files of answers that are there, and files that there must be.

    Raises:
        RecipeError: the step keeps no cache.
        ArtifactError: a step that it needs is not done.
    """
    folder = _cache_folder(step, bench)
    if folder is None:
        raise RecipeError(f"steps.{step.name}.teacher_cache: expected true or a folder to keep answers in, found false")
    own = [other.name for other in bench.recipe.steps]
    for needed in (*teachers_of(step), *([source] if source else [])):
        if needed in own and not bench.step_folder(needed).is_dir():
            raise ArtifactError(
                f"expected the step '{needed}' to be done before its answers are asked for; run it first"
            )
    set_seed(bench.recipe.seed)
    with tempfile.TemporaryDirectory() as scratch:
        faculty, start = _teacher_and_student(step, source, bench)
        trainer = _taught_trainer(step, start, faculty, bench, Path(scratch), False)
        return trainer.ask_teachers(folder, part)


def _criteria(step: DistillStep | PretrainStep) -> list[Criterion]:
    """The criteria of a step as objects; a section's fields are the arguments of its criterion."""
    found = []
    for section in step.criteria:
        options = {item.name: getattr(section, item.name) for item in dataclasses.fields(section)}
        options["weight"] = _weight(options["weight"])
        found.append(criterion_of(options.pop("kind"), **options))
    return found


def _weight(value: float | WeightSchedule) -> Weight:
    return (value.source, value.to) if isinstance(value, WeightSchedule) else value


def _cache_folder(step: DistillStep | PretrainStep, bench: Bench) -> Path | None:
    match step.teacher_cache:
        case bool():
            return bench.output / WORK / "teacher_cache" if step.teacher_cache else None
        case str():
            return Path(step.teacher_cache)


def _with_unlabelled(rows: Mapping[str, Dataset], sources: Sources) -> dict[str, Dataset]:
    """Training rows, with those without labels after them; tasks that share rows still share them."""
    made: dict[int, Dataset] = {}
    for name in rows:
        more = sources.unlabelled.get(name)
        if more is not None and id(more) not in made:
            sharing = [task for other, task in sources.tasks.items() if sources.unlabelled.get(other) is more]
            made[id(more)] = with_unlabelled(rows[name], more, sharing)
    return {
        name: made[id(sources.unlabelled[name])] if name in sources.unlabelled else own for name, own in rows.items()
    }


def _rows_to_pretrain_on(step: PretrainStep, bench: Bench) -> dict[str, Dataset]:
    """Inputs by task, labels left open: rows of the step's own, else those of all tasks."""
    tasks = bench.sources.tasks
    if step.data is not None:
        task = next((task for task in tasks.values() if len(task.input_columns) == 1), None)
        if task is None:
            raise RecipeError(
                f"steps.{step.name}.data: expected a task with one input column to read it like, found "
                f"{ {name: task.input_columns for name, task in tasks.items()} }; leave data out to train on their rows"
            )
        what = f"steps.{step.name}.data"
        try:
            rows = load_unlabelled(step.data, [step.column], Path.cwd(), bench.recipe.seed, what)
        except DataError as error:
            raise RecipeError(str(error)) from error
        if step.column != task.input_columns[0]:
            rows = rows.rename_column(step.column, task.input_columns[0])
        return {task.name: without_labels(rows, [task])}
    rows = bench.sources.role("train")
    made: dict[int, Dataset] = {}
    for name, own in rows.items():
        if id(own) not in made:
            sharing = [tasks[other] for other in rows if rows[other] is own]
            plain = without_labels(own, sharing)
            more = bench.sources.unlabelled.get(name)
            made[id(own)] = plain if more is None else concatenate_datasets([plain, without_labels(more, sharing)])
    return {name: made[id(own)] for name, own in rows.items()}


def _fit(trainer: MultiTaskTrainer, work: Path) -> Fit:
    result = trainer.train(resume_from_checkpoint=last_checkpoint(work))
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


def training_arguments(cls: type[Arguments], config: TrainingConfig, bench: Bench, work: Path) -> Arguments:
    """Training arguments of a step; what the recipe leaves open is the default of `TrainingArguments`.

    Raises:
        RecipeError: `arguments` holds a name or value that `TrainingArguments` refuses.
    """
    best = config.keep != "last"
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
        "lr_scheduler_type": config.lr_scheduler_type,
        "bf16": config.bf16,
        "save_steps": config.save_steps,
        "eval_steps": config.save_steps,
        "save_strategy": strategy,
        "eval_strategy": strategy if best else "no",
        "load_best_model_at_end": best,
        "metric_for_best_model": "average" if best else None,
        "greater_is_better": True if best else None,
        "save_total_limit": 2,
        "seed": bench.recipe.seed,
        **_mixing_arguments(bench.recipe),
        "logging_steps": 25,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
        **config.arguments,
    }
    try:
        return cls(output_dir=str(work), **{key: value for key, value in settings.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"training.arguments: expected fields of transformers.TrainingArguments, found {config.arguments} "
            f"({str(error).splitlines()[0]})"
        ) from error


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


def _save_trained(made: _Start, bench: Bench, folder: Path, fit: Fit | None) -> StepOutcome:
    model = made.model
    torch.nn.Module.to(model, "cpu")
    model.eval()
    probes = {".": probe(model, bench, made.processor)}
    model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return StepOutcome(
        artefacts=[Artefact(form="torch", folder=".", precision="float32")],
        processor=made.processor,
        structure=structure_of(model),
        training=fit.training if fit else None,
        interference=fit.interference if fit else None,
        probes=probes,
    )


def structure_of(model: MultiTaskModel) -> dict[str, Any]:
    """Layers, heads and feed-forward widths of every encoder."""
    return {name: describe_structure(encoder) for name, encoder in model.encoders.items()}  # type: ignore[arg-type]  # a ModuleDict of encoders


# ---- compression steps ----


def _prune(step: PruneStep, source: str | None, bench: Bench, folder: Path, work: Path) -> StepOutcome:
    cut, processor = work / "cut", bench.processor_of(source)
    if not cut.exists():
        model = _start_model(source, bench)
        try:
            report = prune(
                model,
                calibration_batches(_Start(model, processor), bench, step.rows),
                heads=step.heads,
                feed_forward=step.feed_forward,
                layers=step.layers,
                compute=step.compute,
                length=step.length,
                importance=step.importance,
                combine=step.combine,
                rearrange=step.rearrange,
                repair=step.repair,
                multiple_of=step.multiple_of,
                seed=bench.recipe.seed,
            )
        except MTCompressError:
            raise
        except ValueError as error:
            # What no recipe shows: the encoder has fewer layers, or its layers keep more than the wanted share.
            raise RecipeError(f"steps.{step.name}.{error}") from error
        for task, share in report.lost_importance.items():
            logger.info(
                "%s: task '%s' lost %.1f %% of the importance of heads and neurons", step.name, task, 100 * share
            )
        if report.repair is not None:
            logger.info(
                "%s: repair brought the distance from %.3g to %.3g",
                step.name,
                report.repair["error_before"],
                report.repair["error_after"],
            )
        with whole_folder(cut) as scratch:
            model.save_pretrained(scratch)
            (scratch / "report.json").write_text(json.dumps(dataclasses.asdict(report), default=str))
    model = MultiTaskModel.from_pretrained(cut)
    for name, task in bench.sources.tasks.items():
        model.tasks[name] = task
    start, fit = _Start(model, processor), None
    if isinstance(step.recover, FinetuneStep):
        fit = _train_finetune(step.recover, start, bench, work)
    elif isinstance(step.recover, DistillStep):
        fit = _train_taught(step.recover, start, _load_faculty(step.recover, bench), bench, work)
    return _save_trained(start, bench, folder, fit)


def _trim_vocabulary(step: TrimVocabularyStep, source: str | None, bench: Bench, folder: Path) -> StepOutcome:
    start = _start(source, bench)
    try:
        trimmed, report = trim_vocabulary(
            start.model,
            start.processor,
            texts_to_keep(step, bench),
            minimum_count=step.minimum_count,
            size=step.size,
        )
    except DataError as error:
        raise RecipeError(f"steps.{step.name}.{error}") from error
    outcome = _save_trained(_Start(start.model, trimmed), bench, folder, None)
    roles: list[Role] = ["train", "validation", "test"]
    outcome.vocabulary = {
        **dataclasses.asdict(report),
        "splits": {
            role: dataclasses.asdict(compare_readings(start.processor, trimmed, texts_of(bench.sources, [role])))
            for role in roles
            if bench.sources.role(role)
        },
    }
    return outcome


def texts_to_keep(step: TrimVocabularyStep, bench: Bench) -> list[list[Text]]:
    """Columns of texts whose tokens stay: of the step's corpus, else of the training and validation rows.

    Raises:
        RecipeError: the corpus cannot be read.
    """
    if step.corpus is None:
        return texts_of(bench.sources, ["train", "validation"])
    try:
        rows = load_unlabelled(step.corpus, [step.column], Path.cwd(), bench.recipe.seed, f"steps.{step.name}.corpus")
    except DataError as error:
        raise RecipeError(str(error)) from error
    return columns_of_rows(rows[:], [step.column], split=False)


def texts_of(sources: Sources, roles: Sequence[Role]) -> list[list[Text]]:
    """Columns of texts that the tasks read in some splits, each once, split into words where a task reads words."""
    found: dict[tuple[str, bool], list[Text]] = {}
    for role in roles:
        for name, rows in sources.role(role).items():
            task = sources.tasks[name]
            split = task.problem == "token_classification"
            for column in task.input_columns:
                key = (f"{rows._fingerprint} {column}", split or not isinstance(rows[0][column], str))
                if key not in found:
                    (found[key],) = columns_of_rows(rows[:], [column], split=key[1])
    return list(found.values())


def calibration_batches(start: _Start, bench: Bench, rows: int) -> list[dict[str, torch.Tensor]]:
    """About `rows` training rows in batches of one source each, with the labels of all its tasks."""
    model, processor = start.model, start.processor
    groups = encode_groups(
        model.tasks, bench.sources.role("train"), processor, bench.recipe.encoder.max_length, "train"
    )
    shares = [math.ceil(rows * len(group.dataset) / sum(len(group.dataset) for group in groups)) for group in groups]
    generator = np.random.default_rng(bench.recipe.seed)
    chosen = []
    for group, share in zip(groups, shares, strict=True):
        order = generator.permutation(len(group.dataset))[:share]
        chosen.append(EncodedGroup(group.tasks, group.dataset.select(sorted(order.tolist()))))
    sampler = MixingSampler([len(group.dataset) for group in chosen], 16, seed=bench.recipe.seed)
    loader: DataLoader[Any] = DataLoader(
        MixedDataset([group.dataset for group in chosen]),
        batch_sampler=sampler,
        collate_fn=MultiTaskCollator(model.tasks, processor if bench.max_length is not None else None),
    )
    return list(loader)


def _quantize(step: QuantizeStep, source: str | None, bench: Bench, folder: Path, work: Path) -> StepOutcome:
    assert source is not None
    model, processor = bench.load(source).eval(), bench.processor_of(source)
    match step.backend:
        case "bitsandbytes":
            quantized = quantize_bitsandbytes(model, step.bits)
            assert isinstance(quantized, MultiTaskModel)
            probes = {".": probe(quantized, bench, processor)}
            quantized.save_pretrained(folder)
            processor.save_pretrained(folder)
            precision = (
                "int8 linear layers, float32 embeddings" if step.bits == 8 else "nf4 linear layers, float32 embeddings"
            )
            artefact = Artefact(form="bitsandbytes", folder=".", precision=precision)
            return StepOutcome([artefact], processor, structure_of(model), probes=probes)
        case "onnxruntime":
            with whole_folder(work / "float32") as scratch:
                export_onnx(model, processor, scratch)
            quantize_onnx(work / "float32", folder, bits=step.bits)
            artefact = Artefact(form="onnx", folder=".", precision=f"int{step.bits}, dynamic, per channel")
            # There is no model in memory with these weights: the graph is held against itself in another process.
            answers = load_predictor(folder).logits(probe_batch(bench, processor))
            return StepOutcome([artefact], processor, structure_of(model), probes={".": answers})


def _export(step: ExportStep, source: str | None, bench: Bench, folder: Path) -> StepOutcome:
    assert source is not None
    model, processor = bench.load(source).eval(), bench.processor_of(source)
    outcome = StepOutcome([], processor, structure_of(model))
    for form in step.formats:
        match form:
            case "vanilla":
                for name in model.tasks:
                    model.export_task(name, folder / VANILLA / name, processor)
                outcome.artefacts.append(Artefact(form="vanilla", folder=VANILLA, precision="float32"))
                outcome.probes[VANILLA] = {
                    **probe(model, bench, processor),
                    **_probe_merged(model, bench, processor),
                }
            case "onnx":
                export_onnx(model, processor, folder / ONNX)
                outcome.artefacts.append(Artefact(form="onnx", folder=ONNX, precision="float32"))
                outcome.probes[ONNX] = probe(model, bench, processor)
    return outcome


# ---- what every step needs ----


def load_processor(recipe: Recipe) -> Any:
    """Tokenizer or image processor of the recipe's encoder, with the wanted image size.

    Raises:
        RecipeError: the encoder does not exist, or has neither.
    """
    encoder = recipe.encoder
    options = {"revision": encoder.revision, "trust_remote_code": encoder.trust_remote_code}
    options = {key: value for key, value in options.items() if value}
    images = all(task.kind == "image-classification" for task in recipe.tasks.values())
    try:
        if not images:
            return AutoTokenizer.from_pretrained(encoder.path, **options)
        processor = AutoImageProcessor.from_pretrained(encoder.path, backend="pil", **options)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"encoder.path: expected a local folder or a Hub id of a pretrained encoder with its "
            f"{'image processor' if images else 'tokenizer'}, found '{encoder.path}' ({str(error).splitlines()[0]}); "
            "check the spelling, or download it first where there is no network"
        ) from error
    if encoder.image_size is not None:
        side = {"height": encoder.image_size, "width": encoder.image_size}
        processor.size = side
        if processor.crop_size is not None:
            processor.crop_size = side
    return processor


def probe_samples(bench: Bench) -> list[Any]:
    """A few rows as they are given to a pipeline: what every saved form is asked before and after."""
    _, inputs = _probe_inputs(bench)
    return list(inputs[0]) if len(inputs) == 1 else list(zip(*inputs, strict=True))


def probe_batch(bench: Bench, processor: Any) -> dict[str, np.ndarray]:
    """The same rows as model inputs."""
    task, inputs = _probe_inputs(bench)
    encoded = task.encode(inputs, processor, bench.max_length)
    encoded.pop("word_ids", None)
    batch = MultiTaskCollator({}, processor)(
        [{key: values[index] for key, values in encoded.items()} for index in range(len(inputs[0]))]
    )
    return {key: value.numpy() for key, value in batch.items()}


def _probe_inputs(bench: Bench) -> tuple[Task, list[list[Any]]]:
    task = next(iter(bench.sources.tasks.values()))
    rows: Dataset = next(iter(bench.sources.splits[task.name].values()))
    rows = rows.select(range(min(_PROBE_ROWS, len(rows))))
    return task, [list(rows[column]) for column in task.input_columns]


def probe(model: MultiTaskModel, bench: Bench, processor: Any) -> dict[str, np.ndarray]:
    """Logits by task of the model in memory on the probe rows."""
    batch = {key: torch.as_tensor(value) for key, value in probe_batch(bench, processor).items()}
    with torch.inference_mode():
        outputs = model.eval()(**batch)
    return {name: outputs[f"logits_{name}"].float().numpy() for name in model.tasks}


def _probe_merged(model: MultiTaskModel, bench: Bench, processor: Any) -> dict[str, np.ndarray]:
    """Logits of tasks with an adapter as their plain models give them, since a sum of weights rounds otherwise."""
    batch = {key: torch.as_tensor(value) for key, value in probe_batch(bench, processor).items()}
    found = {}
    for name in model.config.adapters or {}:
        stock = model.to_stock(name).eval()
        known = {key: value for key, value in batch.items() if key != "token_type_ids" or _has_token_types(stock)}
        with torch.inference_mode():
            found[name] = stock(**known).logits.float().numpy()
    return found


def _has_token_types(model: PreTrainedModel) -> bool:
    return "type_vocab_size" in model.config.to_dict()


def _extras_of(recipe: Recipe) -> list[str]:
    """The extras that a recipe needs."""
    needed = ["surgery"] if recipe.fusion.combination not in (None, "mean") else []
    for step in recipe.steps:
        match step:
            case QuantizeStep():
                needed.append("onnx" if step.backend == "onnxruntime" else "bitsandbytes")
            case ExportStep() if "onnx" in step.formats:
                needed.append("onnx")
            case _:
                pass
    return list(dict.fromkeys(needed))


def check_steps_fit(recipe: Recipe, tasks: Mapping[str, Any]) -> None:
    """Look for what would stop a run late: exports that a head cannot take, packages that are not there.

    Raises:
        RecipeError: one line for each.
    """
    problems = []
    for extra in _extras_of(recipe):
        try:
            require_extra(extra)
        except MissingExtraError as error:
            problems.append(str(error))
    problems += [
        f"steps.{step.name}: a plain transformers folder needs a stock head, but task '{name}' has head '{task.head}'"
        for step in recipe.steps
        if isinstance(step, ExportStep) and "vanilla" in step.formats
        for name, task in tasks.items()
        if task.head != "stock"
    ]
    if problems:
        raise RecipeError(problems)
