"""Distill and pretrain steps: teachers, the students made of them, and the answers that are kept."""

import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
import transformers
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)

from hf_mtcompress.artifacts import WORK
from hf_mtcompress.compression.importance import block_influence
from hf_mtcompress.compression.measuring import leave_one_out
from hf_mtcompress.compression.pruning import prune
from hf_mtcompress.compression.selection import select_layers
from hf_mtcompress.data.readers import Reader, load_reader, pretrained_reader
from hf_mtcompress.errors import ArtifactError, RecipeError, first_line
from hf_mtcompress.formats.runtime import Runtime
from hf_mtcompress.formats.runtimes import open_runtime
from hf_mtcompress.losses.criteria import Criterion, criterion_of
from hf_mtcompress.losses.fusion import Weight
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.loading import load_whole
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.student import fresh_student_of, student_of, with_tasks
from hf_mtcompress.recipe import (
    DistillStep,
    EncoderConfig,
    FinetuneStep,
    PretrainStep,
    StudentConfig,
    WeightSchedule,
    teachers_of,
)
from hf_mtcompress.steps.rows import calibration_batches, inputs_of, rows_to_pretrain_on, rows_with_unlabelled
from hf_mtcompress.steps.run_context import (
    RunContext,
    Start,
    StepOutcome,
    modalities,
    new_model,
    recipe_reader,
    start_of,
)
from hf_mtcompress.steps.saved_models import graph_form, teacher_config
from hf_mtcompress.steps.training import (
    Fit,
    MarkComplete,
    drop_auxiliary,
    fit_of,
    merged_training,
    save_trained,
    train_finetune,
    training_arguments,
)
from hf_mtcompress.trainers.arguments import DistillationTrainingArguments
from hf_mtcompress.trainers.distillation import DistillationTrainer
from hf_mtcompress.trainers.teachers import OpenTeachers, TeacherModel

logger = logging.getLogger(__name__)
_INFLUENCE_ROWS = 256
"""Rows on which the change that each layer makes is measured."""


@dataclass(frozen=True)
class Faculty:
    """Who teaches in a step.

    Attributes:
        teachers: one model, one for each task, or pairs of model and weight.
        readers: by identity of a model: what makes its inputs.
        trusted: whether all of them are of this run, with its tasks, and were scored in it.
        answers: whether the heads of the first one were trained.
    """

    teachers: OpenTeachers
    readers: dict[int, Reader]
    trusted: bool = True
    answers: bool = True

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

    def processing_classes(self, student: Reader) -> Any:
        """As `DistillationTrainer` takes them: None for a teacher that reads what the student's reader makes."""

        def own(model: TeacherModel) -> Any:
            reader = self.readers[id(model)]
            return None if reader is student else reader.processor

        match self.teachers:
            case Mapping():
                return {name: own(model) for name, model in self.teachers.items()}
            case PreTrainedModel() | Runtime():
                return own(self.teachers)
            case _:
                return [own(item[0] if isinstance(item, tuple) else item) for item in self.teachers]


def teach_step(
    step: DistillStep | PretrainStep, source: str | None, context: RunContext, folder: Path, work: Path
) -> StepOutcome:
    """Train a student on what its teachers answer or hold."""
    faculty, start = _teacher_and_student(step, source, context)
    fit = train_taught(step, start, faculty, context, work)
    if isinstance(step, DistillStep) and step.drop_auxiliary:
        drop_auxiliary(start.model)
    return save_trained(start, context, folder, fit)


def ask_teacher(
    step: DistillStep | PretrainStep, source: str | None, context: RunContext, part: tuple[int, int]
) -> tuple[int, int]:
    """Ask the teacher of a step about its training rows, or a part of them, and keep the answers for the step.

    Args:
        step: with `teacher_cache`.
        source: the step that it starts from, if any.
        context: the run, with the steps before this one done.
        part: (number, of), counted from 0.

    Returns:
        Files of answers that are there, and files that there must be.

    Raises:
        RecipeError: the step keeps no cache.
        ArtifactError: a step that it needs is not done.
    """
    folder = _cache_folder(step, context)
    if folder is None:
        raise RecipeError(f"steps.{step.name}.teacher_cache: expected true or a folder to keep answers in, found false")
    own = [other.name for other in context.recipe.steps]
    for needed in (*teachers_of(step), *([source] if source else [])):
        if needed in own and not context.step_folder(needed).is_dir():
            raise ArtifactError(
                f"expected the step '{needed}' to be done before its answers are asked for; run it first"
            )
    set_seed(context.recipe.seed)
    with tempfile.TemporaryDirectory() as scratch:
        faculty, start = _teacher_and_student(step, source, context)
        trainer = _taught_trainer(step, start, faculty, context, Path(scratch), False)
        return trainer.ask_teachers(folder, part)


def train_taught(
    step: DistillStep | PretrainStep,
    start: Start,
    faculty: Faculty,
    context: RunContext,
    work: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Fit:
    """Train a model on the answers of teachers; a killed training goes on."""
    return fit_of(_taught_trainer(step, start, faculty, context, work, _cache_folder(step, context), callbacks), work)


def recover(
    section: FinetuneStep | DistillStep,
    start: Start,
    context: RunContext,
    work: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Fit:
    """Train what a cut has left, on labels or on the answers of teachers."""
    match section:
        case FinetuneStep():
            return train_finetune(section, start, context, work, callbacks)
        case DistillStep():
            return train_taught(section, start, load_faculty(section, context), context, work, callbacks)
        case _:
            assert_never(section)


def _taught_trainer(
    step: DistillStep | PretrainStep,
    start: Start,
    faculty: Faculty,
    context: RunContext,
    work: Path,
    cache: Path | Literal[False] | None,
    callbacks: Sequence[TrainerCallback] = (),
) -> DistillationTrainer:
    """The trainer of a step with a teacher; a pretrain step has no labels, so none to score or to keep weights by."""
    config = merged_training(step, context.recipe.training)
    match step:
        case DistillStep():
            rows, scored = context.sources.role("train"), context.sources.role("validation")
            rows = rows_with_unlabelled(rows, context.sources) if step.unlabelled else rows
            label_weight = _weight(step.label_weight)
        case PretrainStep():
            rows, scored = rows_to_pretrain_on(step, context), None
            config, label_weight = dataclasses.replace(config, keep="last"), 0.0
    arguments = training_arguments(
        DistillationTrainingArguments, config, context, work, labelled=isinstance(step, DistillStep)
    )
    arguments.cache_precision = step.cache_precision
    return DistillationTrainer(
        model=start.model,
        teacher=faculty.teachers,
        teacher_processing_class=faculty.processing_classes(start.reader),
        args=arguments,
        criteria=_criteria(step),
        label_weight=label_weight,
        teacher_cache=cache,
        every_task=isinstance(step, DistillStep) and step.every_task,
        # Nobody asks the teacher of a pretrain step for answers.
        probe_rows=0 if faculty.trusted or isinstance(step, PretrainStep) else None,
        train_dataset=rows,
        eval_dataset=scored,
        processing_class=start.reader.processor,
        callbacks=[*callbacks, MarkComplete()],
    )


def _cache_folder(step: DistillStep | PretrainStep, context: RunContext) -> Path | None:
    match step.teacher_cache:
        case bool():
            return context.output / WORK / "teacher_cache" if step.teacher_cache else None
        case str():
            return Path(step.teacher_cache)


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


def _teacher_and_student(
    step: DistillStep | PretrainStep, source: str | None, context: RunContext
) -> tuple[Faculty, Start]:
    faculty = load_faculty(step, context) if isinstance(step, DistillStep) else _load_encoding_teacher(step, context)
    student = step.student
    return faculty, start_of(source, context) if student is None else _student(student, step, faculty, context)


def load_faculty(step: DistillStep, context: RunContext) -> Faculty:
    """Load every teacher of a step once."""
    steps = [other.name for other in context.recipe.steps]
    where = f"steps.{step.name}.{'teachers' if step.teachers else 'teacher'}"
    by_task = step.teachers if isinstance(step.teachers, dict) else {}
    # Auxiliary tasks may have been dropped; a name that is none is refused where the teachers are asked.
    dropped = [task for task in by_task if task in context.recipe.tasks and task not in context.sources.tasks]
    by_task = {task: place for task, place in by_task.items() if task not in dropped}
    places = dict.fromkeys(by_task.values()) or teachers_of(step)
    models = {place: load_teacher(place, context, where) for place in places}
    readers = {
        id(model): context.reader_of_step(place) if place in steps else _own_reader(place, context)
        for place, model in models.items()
    }
    trusted = all(place in steps for place in models)
    match step.teachers:
        case dict():
            return Faculty({task: models[place] for task, place in by_task.items()}, readers, trusted)
        case tuple() as averaged:
            return Faculty([(models[item.path], item.weight) for item in averaged], readers, trusted)
        case _:
            return Faculty(models[str(step.teacher)], readers, trusted)


def _load_encoding_teacher(step: PretrainStep, context: RunContext) -> Faculty:
    """The teacher of a pretrain step, whose answers nobody asks for."""
    own = any(other.name == step.teacher for other in context.recipe.steps)
    saved = own or isinstance(
        teacher_config(step.teacher, f"steps.{step.name}.teacher", answers=False), MultiTaskConfig
    )
    if own:
        teacher, reader = context.load(step.teacher), context.reader_of_step(step.teacher)
    else:
        place = step.teacher
        teacher = MultiTaskModel.from_pretrained(place) if saved else new_model(EncoderConfig(path=place), context)
        reader = _own_reader(step.teacher, context)
    return Faculty(teacher, {id(teacher): reader}, own, saved)


def _own_reader(place: str, context: RunContext) -> Reader:
    """The reader of a saved teacher; the run's own where it has none."""
    folder, length = Path(place), context.reader.max_length
    try:
        if folder.is_dir():
            return load_reader(folder, length)
        return pretrained_reader(place, modalities(context.recipe), max_length=length, trust_remote_code=False)
    except ArtifactError:
        logger.warning("teacher '%s' has no tokenizer or image processor of its own: it reads the run's", place)
        return context.reader


def load_teacher(name: str, context: RunContext, where: str) -> TeacherModel:
    """The teacher: a step of this run, or a saved multi-task or stock model, or a graph.

    Args:
        name: of the step, or folder or Hub id.
        context: what the run has.
        where: the key of the recipe that names it, for messages.

    Raises:
        RecipeError: it cannot be loaded.
    """
    if any(step.name == name for step in context.recipe.steps):
        return context.load(name)
    if graph_form(name) is not None:
        return open_runtime(Path(name))
    config = teacher_config(name, where, answers=True)
    try:
        if isinstance(config, MultiTaskConfig):
            return MultiTaskModel.from_pretrained(name)
        return load_whole(getattr(transformers, (config.architectures or [""])[0]), name, dtype=torch.float32)[0]
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"{where}: expected a step of this recipe or a saved model with a head, found '{name}' "
            f"({first_line(error)})"
        ) from error


def _student(wanted: StudentConfig, step: DistillStep | PretrainStep, faculty: Faculty, context: RunContext) -> Start:
    """Make the student that a step asks for, which reads as what it is made of does."""
    if wanted.path is not None:
        # What was said of the recipe's encoder, such as that its code may run, was not said of this one.
        encoder = EncoderConfig(path=wanted.path, image_size=context.recipe.encoder.image_size)
        own = recipe_reader(dataclasses.replace(context.recipe, encoder=encoder))
        reader = context.reader if own.reads_as(context.reader) else own.limited(context.reader.max_length)
        return Start(new_model(encoder, context), reader)
    teacher = faculty.first
    reader = faculty.readers[id(teacher)]
    if not isinstance(teacher, MultiTaskModel):
        raise RecipeError(
            f"steps.{step.name}.student: expected a multi-task teacher to make a student of, found a "
            f"{type(teacher).__name__}; give student.path instead"
        )
    fresh: list[str] = []
    if not faculty.trusted:
        # A saved model does not say which columns its tasks read, and may know other tasks or labels in another order.
        teacher, fresh = with_tasks(teacher, list(context.sources.tasks.values()))
    if fresh:
        logger.warning(
            "student: new heads for %s, since the teacher has none there of this shape with these labels in this order",
            ", ".join(fresh),
        )
    if wanted.config is not None:
        return Start(fresh_student_of(teacher, wanted.config), reader)
    assert wanted.layers is not None
    if wanted.choose == "leave_one_out" and (fresh or not faculty.answers):
        raise RecipeError(
            f"steps.{step.name}.student.choose: expected a teacher with a trained head for each task of this run (of "
            "this shape, with these labels in this order) for leave_one_out, found none for "
            f"{', '.join(fresh or context.sources.tasks)}; use redundancy, which asks for no answers"
        )
    depth = teacher.encoder.config.num_hidden_layers
    if isinstance(wanted.layers, int) and wanted.layers > depth:
        raise RecipeError(
            f"steps.{step.name}.student.layers: expected at most the teacher's {depth} layers, found {wanted.layers}"
        )
    if isinstance(wanted.layers, int) and wanted.choose in ("redundancy", "leave_one_out"):
        rows = calibration_batches(Start(teacher, reader), context, _INFLUENCE_ROWS)
        if wanted.choose == "redundancy":
            worth = block_influence(teacher.encoder, [inputs_of(batch) for batch in rows])
        else:
            worth = leave_one_out(teacher, teacher.encoder, rows)
        student = student_of(teacher, select_layers(worth, depth - wanted.layers))
    else:
        choose = "spaced" if wanted.choose in ("redundancy", "leave_one_out") else wanted.choose
        student = student_of(teacher, wanted.layers, choose=choose)
    if wanted.heads or wanted.feed_forward:
        prune(student, [], heads=wanted.heads, feed_forward=wanted.feed_forward, importance="magnitude")
    return Start(student, reader)
