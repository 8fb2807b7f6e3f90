"""What every step of a recipe starts from, who teaches it, and what its model is before and after it.

All of it follows from the steps before a step, and from what the saved models are that a recipe names. It is settled
here, once: checks, plan, run, fingerprint and record read it.
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, assert_never

from hf_mtcompress.recipe.recipe import Recipe
from hf_mtcompress.recipe.schedules import GradualSchedule
from hf_mtcompress.recipe.steps import (
    FLOAT_STEPS,
    DistillStep,
    ExportStep,
    FinetuneStep,
    PretrainStep,
    PruneStep,
    QuantizeStep,
    StepConfig,
    StudentConfig,
    TrimVocabularyStep,
    TrimWeightsStep,
    teachers_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """What a model is, as far as it is known before it is made or loaded."""

    layout: Literal["model", "stock", "graph"] = "model"
    """One model with the heads of all tasks, a model of transformers' own with one head or none, or a graph."""
    tasks: tuple[str, ...] = ()
    """Those that it answers; none for a stock model, which does not know what its task is called here."""
    uneven: str | None = None
    """The step that cuts its layers unevenly, or the saved model that has such layers; None where they are alike."""
    adapted: bool = False
    """Whether it has adapters."""
    branches: Mapping[str, int | str] = field(default_factory=dict)
    """By name of a branch: how many top layers are its own, or `all`."""
    deep: tuple[str, ...] = ()
    """Tasks that read a layer below the last one."""
    few_bits: bool = False
    """Whether its weights are stored in 8 or 4 bits."""

    @property
    def whole(self) -> bool:
        """Whether all tasks read one encoder at its end."""
        return not (self.branches or self.deep)

    @property
    def places(self) -> str:
        """What tasks read where they do not, in words."""
        if self.branches:
            return f"branches {', '.join(self.branches)}"
        return f"tasks with a layer: {', '.join(self.deep)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Where the model of one step comes from, and what becomes of it."""

    parent: str | None
    """The step that it starts from; None for the recipe's encoder, or for a student that is made anew."""
    origin: str | None
    """The step or saved model whose weights it begins with: `parent`, the teacher that a student has layers of, the
    `path` of a student, or the recipe's encoder; None for fresh weights."""
    teachers: Mapping[str, Traits | None]
    """By step or saved model, also of a recovery: what each is; None for a saved model that nobody has looked at."""
    begins: Traits
    """What the model is before the step."""
    ends: Traits
    """What it is after it. Forms that are quantized or exported are of the model before."""


def lineage_of(recipe: Recipe, saved: Mapping[str, Traits] = types.MappingProxyType({})) -> dict[str, Lineage]:
    """The lineage of each step, by name and in order.

    Args:
        recipe: a step that starts from one which is not there, by mistake, starts from the encoder.
        saved: what the saved models are that it names, by place; of those left out nothing is known.
    """
    main = tuple(name for name, task in recipe.tasks.items() if task.role == "main")
    found: dict[str, Lineage] = {}
    kinds: dict[str, str] = {}
    for step in recipe.steps:
        name = str(step.name)
        parent = origin = parent_of(step, kinds)
        teachers = {place: found[place].ends if place in found else saved.get(place) for place in teachers_of(step)}
        if parent is not None and parent in found:
            begins = found[parent].ends
        else:
            origin, source = _source_of(step, recipe, teachers, saved)
            # A student has the tasks of its teachers: auxiliary ones may be gone.
            alone = (
                student_in(step) is not None
                and bool(teachers)
                and all(place in found and found[place].ends.tasks == main for place in teachers)
            )
            begins = _made(recipe, main if alone else tuple(recipe.tasks), source)
        ends = _after(step, begins, recipe, main)
        found[name] = Lineage(parent=parent, origin=origin, teachers=teachers, begins=begins, ends=ends)
        kinds[name] = step.kind
    return found


def parent_of(step: StepConfig, earlier: Mapping[str, Any]) -> str | None:
    """The step that a step starts from: `from`, else the latest float one; None for the encoder or a new student.

    Args:
        step: the step.
        earlier: kinds of the steps before it, by name and in order.
    """
    if student_in(step) is not None:
        return None
    return step.source or next((name for name in reversed(list(earlier)) if earlier[name] in FLOAT_STEPS), None)


def student_in(step: StepConfig) -> StudentConfig | None:
    """The student that a step makes, instead of going on from another step."""
    return step.student if isinstance(step, DistillStep | PretrainStep) else None


def _source_of(
    step: StepConfig, recipe: Recipe, teachers: Mapping[str, Traits | None], saved: Mapping[str, Traits]
) -> tuple[str | None, Traits | None]:
    """Whose weights a model that is made anew begins with, and what that is."""
    match student_in(step):
        case None:
            return recipe.encoder.path, saved.get(recipe.encoder.path)
        case StudentConfig(path=str() as path):
            return path, saved.get(path)
        case StudentConfig(config=None):
            return next(iter(teachers.items()), (None, None))
        case _:
            return None, None


def _made(recipe: Recipe, tasks: tuple[str, ...], source: Traits | None) -> Traits:
    """Tasks on an encoder, with the branches that the recipe gives them."""
    branches = {name: recipe.branch_layers for name, own in recipe.branches.items() if not set(own).isdisjoint(tasks)}
    deep = tuple(name for name in tasks if recipe.tasks[name].layer is not None)
    return Traits(tasks=tasks, uneven=None if source is None else source.uneven, branches=branches, deep=deep)


def _after(step: StepConfig, begins: Traits, recipe: Recipe, main: tuple[str, ...]) -> Traits:
    """What a model is after a step."""
    uneven = str(step.name) if _cuts_unevenly(step) else begins.uneven
    match step:
        case FinetuneStep() | DistillStep():
            left = _made(recipe, main, begins) if step.drop_auxiliary else begins
            added = isinstance(step, FinetuneStep) and step.adapters is not None
            return replace(left, uneven=uneven, adapted=begins.adapted or added)
        case PruneStep() | TrimWeightsStep():
            # With adapters it is refused, and what comes after it need not be.
            return replace(begins, uneven=uneven, adapted=False)
        case PretrainStep() | TrimVocabularyStep() | QuantizeStep() | ExportStep():
            return replace(begins, uneven=uneven)
        case _:
            assert_never(step)


def _cuts_unevenly(step: StepConfig) -> bool:
    student = student_in(step)
    if student is not None:
        return bool(student.heads or student.feed_forward)
    if not isinstance(step, PruneStep):
        return False
    free = step.shape == "free" and (step.feed_forward or step.compute or step.latency)
    return bool(step.heads or free or isinstance(step.schedule, GradualSchedule))
