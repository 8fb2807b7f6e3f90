"""What steps cannot do with the models that they start from or learn from, said before anything is trained.

The loader asks with what a recipe says; plan, validate and run ask again when they know what the saved models are that
it names. A mistake has one message, whether a step makes the model or a folder holds it.
"""

import dataclasses
from collections.abc import Mapping

from hf_mtcompress.recipe.checks import gradient_settings
from hf_mtcompress.recipe.lineage import Lineage, student_in
from hf_mtcompress.recipe.recipe import Recipe
from hf_mtcompress.recipe.sections import Problems, join
from hf_mtcompress.recipe.steps import (
    DistillStep,
    FinetuneStep,
    PretrainStep,
    PruneStep,
    QuantizeStep,
    StepConfig,
    TrimWeightsStep,
)


def check_lineage(recipe: Recipe, lineage: Mapping[str, Lineage], problems: Problems) -> None:
    """Look at each step, and at what a search would do, with what is known of its models."""
    for step in recipe.steps:
        found, path = lineage[str(step.name)], f"steps.{step.name}"
        _check_start(step, found, path, lineage, problems)
        match step:
            case FinetuneStep():
                _check_dropping(step, found, path, recipe, problems)
                _check_new_adapters(step, found, path, recipe, problems)
            case DistillStep() | PretrainStep():
                if isinstance(step, DistillStep):
                    _check_dropping(step, found, path, recipe, problems)
                refused = _check_student(step, found, path, lineage, problems)
                _check_teachers(step, found, path, lineage, problems, refused)
            case PruneStep() | TrimWeightsStep() | QuantizeStep():
                _check_recovery(step.recover, found, join(path, "recover"), lineage, problems)
            case _:
                pass
    if recipe.search is not None:
        start = recipe.search.source or recipe.reference or next(iter(lineage))
        if start in lineage:
            cut = dataclasses.replace(recipe.search.prune or PruneStep(), latency=0.5)
            found = dataclasses.replace(lineage[start], parent=start, begins=lineage[start].ends)
            _check_start(cut, found, "search.prune", lineage, problems)


# ---- the model that a step starts from ----


def _check_start(
    step: StepConfig, found: Lineage, path: str, lineage: Mapping[str, Lineage], problems: Problems
) -> None:
    begins = found.begins
    in_torch = isinstance(step, QuantizeStep) and step.backend in ("bitsandbytes", "torchao")
    if not begins.whole and (isinstance(step, PruneStep) or in_torch):
        problems.add(path, f"works on models whose tasks read one whole encoder, found {begins.places}")
    if isinstance(step, PruneStep) and begins.uneven is not None:
        if step.width:
            problems.add(join(path, "width"), _needs_alike(begins.uneven, lineage))
        if step.shape == "vanilla":
            problems.add(join(path, "shape"), f"{_needs_alike(begins.uneven, lineage)}, or say shape: free")
    if begins.adapted and isinstance(step, PruneStep | TrimWeightsStep):
        verb = "prune" if isinstance(step, PruneStep) else "trim"
        problems.add(path, f"{verb}s models without adapters, found those of '{found.parent}'; {verb} before them")
    if isinstance(step, QuantizeStep) and step.recover is not None:
        if begins.adapted:
            words = f"trains models without adapters, found those of '{found.parent}'; remove it"
            problems.add(join(path, "recover"), words)
        if step.float_layers and not begins.whole:
            problems.add(
                join(path, "float_layers"),
                f"needs tasks that read one whole encoder with 'recover' beside it, found {begins.places}; remove one "
                "of both",
            )


def _needs_alike(uneven: str, lineage: Mapping[str, Lineage]) -> str:
    if uneven in lineage:
        return f"needs layers that are alike, but '{uneven}' cuts them unevenly before; put this step before that one"
    return f"needs layers that are alike, but those of '{uneven}' are cut unevenly; start from the model before that"


def _check_dropping(
    step: FinetuneStep | DistillStep, found: Lineage, path: str, recipe: Recipe, problems: Problems
) -> None:
    """A step can drop auxiliary tasks where there are some, and main ones to keep."""
    if not step.drop_auxiliary:
        return
    place = join(path, "drop_auxiliary")
    missing = sorted({"auxiliary", "main"} - {task.role for task in recipe.tasks.values()})
    if missing:
        words = f"expected tasks of role main and auxiliary, found none of role {missing[0]}; remove the key"
        problems.add(place, words)
    elif len(found.begins.tasks) < len(recipe.tasks):
        problems.add(place, "expected auxiliary tasks to drop, but a step before did that; remove the key")


def _check_new_adapters(step: FinetuneStep, found: Lineage, path: str, recipe: Recipe, problems: Problems) -> None:
    if step.adapters is None:
        return
    place = join(path, "adapters")
    if found.begins.adapted:
        problems.add(place, "the model that is trained on has adapters already; remove the key to train these on")
    if not found.begins.whole:
        problems.add(place, f"need tasks that read one whole encoder, found {found.begins.places}")
    for key in gradient_settings(recipe):
        problems.add(
            place,
            f"expected no fusion.{key} with adapters, which compares the tasks' gradients at weights that they "
            "share; here they share none that are trained, remove one of both",
        )


def _check_recovery(
    recover: FinetuneStep | DistillStep | None,
    found: Lineage,
    path: str,
    lineage: Mapping[str, Lineage],
    problems: Problems,
) -> None:
    """The training after a cut has no adapters of its own; its teacher may have some."""
    if isinstance(recover, FinetuneStep) and recover.adapters is not None:
        problems.add(
            join(path, "adapters"),
            "recovery trains the cut model itself; remove the key, and add a finetune step that has it",
        )
    elif isinstance(recover, DistillStep):
        # That a model with adapters cannot be cut is said already.
        without = dataclasses.replace(found, begins=dataclasses.replace(found.begins, adapted=False))
        _check_teachers(recover, without, path, lineage, problems)


# ---- those that a step learns from ----


def _check_student(
    step: DistillStep | PretrainStep, found: Lineage, path: str, lineage: Mapping[str, Lineage], problems: Problems
) -> str | None:
    """A student is made of a teacher in float, with one whole encoder and no adapters; the teacher that is none."""
    student = student_in(step)
    if student is None or student.path is not None:
        return None
    place, teacher = next(iter(found.teachers.items()), ("", None))
    whole = "works on models whose tasks read one whole encoder, found"
    if not found.begins.whole:
        problems.add(path, f"{whole} {found.begins.places}")
    elif teacher is not None and not teacher.whole:
        problems.add(path, f"{whole} {teacher.places} in '{place}'")
    if teacher is None:
        return None
    key = join(path, "student.config" if student.layers is None else "student.layers")
    words = "a graph" if teacher.layout == "graph" else "a stock model"
    if teacher.layout == "graph" or (teacher.layout == "stock" and isinstance(step, DistillStep)):
        problems.add(
            join(path, "student"),
            f"expected a multi-task teacher to make a student of, found {words} in '{place}'; give "
            "student.path instead",
        )
    elif teacher.adapted and (student.layers is not None or place not in lineage):
        problems.add(
            key,
            f"takes layers of models without adapters, found those of '{place}'; name a checkpoint in student.path, or "
            "another teacher",
        )
    elif teacher.few_bits and student.layers is not None:
        problems.add(
            key,
            f"expected a teacher in float to take layers of, found '{place}' in few bits; name the model that it was "
            "made of, or another checkpoint in student.path",
        )
    else:
        return None
    return place


def _check_teachers(
    section: DistillStep | PretrainStep,
    found: Lineage,
    path: str,
    lineage: Mapping[str, Lineage],
    problems: Problems,
    refused: str | None = None,
) -> None:
    """Teachers answer the tasks that they are asked about, and show the states that are imitated."""
    by_task = section.teachers if isinstance(section, DistillStep) and isinstance(section.teachers, dict) else None
    showing = []
    for number, (place, teacher) in enumerate(found.teachers.items()):
        asked = [task for task in found.begins.tasks if by_task is None or by_task.get(task) == place]
        if teacher is None or place == refused:
            continue
        if (by_task is not None and asked) or (by_task is None and number == 0):
            showing.append(teacher)
        if not isinstance(section, DistillStep):
            continue
        key = join(path, "teacher" if section.teachers is None else "teachers")
        copied = number == 0 and section.student is not None and section.student.path is None
        if place in lineage:
            # The heads of a student are copies of its first teacher's.
            if not set(found.begins.tasks if copied else asked) <= set(teacher.tasks):
                problems.add(
                    path,
                    f"expected teachers that answer the auxiliary tasks of the model, found '{place}', which dropped "
                    "them; teach with a step from before that, or start from one that dropped them",
                )
        elif teacher.layout == "stock":
            if by_task is None and len(asked) > 1:
                problems.add(
                    key,
                    f"expected a multi-task teacher for the tasks {', '.join(asked)}, found a stock model in "
                    f"'{place}'; give one teacher for each task: teachers: {{task: model}}",
                )
        elif missing := [task for task in asked if task not in teacher.tasks]:
            problems.add(
                key,
                f"expected a teacher with the task '{missing[0]}', found {', '.join(teacher.tasks)} in '{place}'; give "
                "the task the same name in both, or leave it out",
            )
    states = [item.kind for item in section.criteria if item.kind != "logits"]
    if states and (found.begins.adapted or any(teacher.adapted for teacher in showing)):
        problems.add(
            join(path, "criteria"),
            f"expected [logits] with adapters, found {', '.join(states)} too; every task has states of its own then",
        )
    if states and any(teacher.layout == "graph" for teacher in showing):
        problems.add(
            join(path, "criteria"),
            f"expected a teacher in torch for {', '.join(states)}, found a graph, which shows answers only; name the "
            "checkpoint that it was made of" + (", or say [logits]" if isinstance(section, DistillStep) else ""),
        )
