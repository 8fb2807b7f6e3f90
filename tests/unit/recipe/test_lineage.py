"""What each step starts from, who teaches it, and what its model is: settled once, so right here or nowhere."""

import dataclasses
import random
import re
from typing import Any

import pytest

from hf_mtcompress.errors import RecipeError
from hf_mtcompress.recipe import (
    AdapterConfig,
    DistillStep,
    ExportStep,
    FinetuneStep,
    PretrainStep,
    PruneStep,
    QuantizeStep,
    Recipe,
    StepConfig,
    StudentConfig,
    TeacherConfig,
    TrimVocabularyStep,
    TrimWeightsStep,
)
from hf_mtcompress.recipe.lineage import Traits, lineage_of
from hf_mtcompress.recipe.lineage_checks import check_lineage
from hf_mtcompress.recipe.load import parse_recipe
from hf_mtcompress.recipe.sections import Problems
from hf_mtcompress.recipe.steps import FLOAT_STEPS

TASK: dict[str, Any] = {
    "kind": "sequence-classification",
    "data": {"path": "json", "data_files": {"train": "train.jsonl"}},
    "text": "text",
    "label": "label",
}
SECTIONS: dict[str, Any] = {
    "name": "small",
    "encoder": {"path": "org/encoder"},
    "tasks": {"mood": TASK, "tone": {**TASK, "data": "mood"}, "helper": {**TASK, "data": "mood", "role": "auxiliary"}},
}
ALL, MAIN = ("mood", "tone", "helper"), ("mood", "tone")


def recipe_of(*steps: StepConfig, **sections: Any) -> Recipe:
    """A recipe as the loader makes it, whatever its steps are."""
    base = parse_recipe({**SECTIONS, "steps": [{"kind": "finetune"}], **sections})
    return dataclasses.replace(base, steps=steps)


FIRST = FinetuneStep(name="first")
BARE = FinetuneStep(name="bare", drop_auxiliary=True)
TWO_LAYERS = StudentConfig(layers=2)


# ---- where a model comes from ----


@pytest.mark.parametrize(
    ("step", "parent", "origin", "teachers"),
    [
        (FinetuneStep(name="x"), "second", "second", []),
        (FinetuneStep(name="x", source="first"), "first", "first", []),
        (PruneStep(name="x"), "second", "second", []),
        (PruneStep(name="x", recover=DistillStep(teacher="first")), "second", "second", ["first"]),
        (TrimVocabularyStep(name="x"), "second", "second", []),
        (TrimWeightsStep(name="x", recover=DistillStep(teacher="org/large")), "second", "second", ["org/large"]),
        (QuantizeStep(name="x", backend="onnxruntime", source="first"), "first", "first", []),
        (ExportStep(name="x"), "second", "second", []),
        (DistillStep(name="x", teacher="first"), "second", "second", ["first"]),
        (PretrainStep(name="x", teacher="org/large", source="first"), "first", "first", ["org/large"]),
        (DistillStep(name="x", teacher="first", student=TWO_LAYERS), None, "first", ["first"]),
        (PretrainStep(name="x", teacher="org/large", student=TWO_LAYERS), None, "org/large", ["org/large"]),
        (DistillStep(name="x", teacher="first", student=StudentConfig(path="org/small")), None, "org/small", ["first"]),
        (DistillStep(name="x", teacher="first", student=StudentConfig(config={"a": 1})), None, None, ["first"]),
        (
            DistillStep(
                name="x", teachers=(TeacherConfig(path="second"), TeacherConfig(path="first")), student=TWO_LAYERS
            ),
            None,
            "second",
            ["second", "first"],
        ),
        (
            DistillStep(name="x", teachers={"mood": "first", "tone": "org/tone"}, student=TWO_LAYERS),
            None,
            "first",
            ["first", "org/tone"],
        ),
    ],
    ids=lambda value: value.kind if dataclasses.is_dataclass(value) else None,
)
def test_parent_origin_and_teachers(step: StepConfig, parent: str | None, origin: str | None, teachers: list[str]):
    """Another parent is another model; another origin is another tree in the card and another size in the plan."""
    leaf = ExportStep(name="leaf")
    found = lineage_of(recipe_of(FIRST, FinetuneStep(name="second"), leaf, step))["x"]
    assert (found.parent, found.origin, list(found.teachers)) == (parent, origin, teachers)


def test_the_first_step_starts_from_the_encoder():
    found = lineage_of(recipe_of(FIRST))["first"]
    assert (found.parent, found.origin, found.teachers) == (None, "org/encoder", {})
    assert found.begins == found.ends == Traits(tasks=ALL)


# ---- what it is ----


@pytest.mark.parametrize(
    ("step", "uneven"),
    [
        (PruneStep(name="x", heads=0.5), "x"),
        (PruneStep(name="x", feed_forward=0.5), "x"),
        (PruneStep(name="x", compute=0.5), "x"),
        (PruneStep(name="x", latency=0.5), "x"),
        (PruneStep(name="x", feed_forward=0.5, shape="vanilla"), None),
        (PruneStep(name="x", compute=0.5, shape="vanilla"), None),
        (PruneStep(name="x", layers=1), None),
        (PruneStep(name="x", width=0.5), None),
        (TrimWeightsStep(name="x", sparsity=0.5), None),
        (TrimVocabularyStep(name="x"), None),
        (DistillStep(name="x", teacher="first", student=TWO_LAYERS), None),
        (DistillStep(name="x", teacher="first", student=StudentConfig(layers=2, heads=0.5)), "x"),
        (DistillStep(name="x", teacher="first", student=StudentConfig(layers=2, feed_forward=0.5)), "x"),
    ],
)
def test_steps_that_leave_layers_that_differ(step: StepConfig, uneven: str | None):
    assert lineage_of(recipe_of(FIRST, step))["x"].ends.uneven == uneven


@pytest.mark.parametrize(
    ("student", "uneven"),
    [
        (None, "cut"),
        (StudentConfig(layers=2), "cut"),
        (StudentConfig(path="org/small"), None),
        (StudentConfig(config={"hidden_size": 8}), None),
    ],
)
def test_an_uneven_shape_goes_with_the_layers(student: StudentConfig | None, uneven: str | None):
    """It was said of every student of such a teacher, which refused those of another checkpoint for nothing."""
    cut = PruneStep(name="cut", heads=0.5)
    found = lineage_of(recipe_of(FIRST, cut, DistillStep(name="x", teacher="cut", student=student)))["x"]
    assert (found.begins.uneven, found.ends.uneven) == (uneven, uneven)


def test_adapters_stay_until_a_model_is_made_anew():
    adapted = FinetuneStep(name="adapted", adapters=AdapterConfig())
    after = [
        FinetuneStep(name="longer"),
        TrimVocabularyStep(name="words"),
        DistillStep(name="taught", teacher="first"),
        ExportStep(name="out"),
        DistillStep(name="student", teacher="adapted", student=StudentConfig(path="org/small")),
    ]
    found = lineage_of(recipe_of(FIRST, adapted, *after))
    assert not found["adapted"].begins.adapted
    assert [name for name, lineage in found.items() if lineage.ends.adapted] == [
        *("adapted", "longer", "words", "taught", "out")
    ]
    assert found["student"].teachers["adapted"] == found["adapted"].ends


@pytest.mark.parametrize(
    ("step", "begins", "ends"),
    [
        (FinetuneStep(name="x"), MAIN, MAIN),
        (FinetuneStep(name="x", source="first"), ALL, ALL),
        (DistillStep(name="x", source="first", teacher="first", drop_auxiliary=True), ALL, MAIN),
        (QuantizeStep(name="x", backend="torchao"), MAIN, MAIN),
        (DistillStep(name="x", teacher="bare", student=TWO_LAYERS), MAIN, MAIN),
        (DistillStep(name="x", teacher="bare", student=StudentConfig(path="org/small")), MAIN, MAIN),
        (DistillStep(name="x", teacher="first", student=TWO_LAYERS), ALL, ALL),
        (DistillStep(name="x", teacher="org/large", student=TWO_LAYERS), ALL, ALL),
        (DistillStep(name="x", teachers={"mood": "bare", "helper": "first"}, student=TWO_LAYERS), ALL, ALL),
    ],
)
def test_tasks_before_and_after(step: StepConfig, begins: tuple[str, ...], ends: tuple[str, ...]):
    """A step that is given rows of a task which its model does not answer fails; one that is not, forgets it."""
    found = lineage_of(recipe_of(FIRST, BARE, step))["x"]
    assert (found.begins.tasks, found.ends.tasks) == (begins, ends)


@pytest.mark.parametrize("layers", [1, "all"])
def test_branches_go_with_the_last_task_that_reads_them(layers: Any):
    recipe = recipe_of(FIRST, BARE, branches={"side": ["helper"], "own": ["tone"]}, branch_layers=layers)
    found = lineage_of(recipe)
    assert found["bare"].begins.branches == {"side": layers, "own": layers}
    assert found["bare"].ends.branches == {"own": layers}
    assert found["bare"].ends.places == "branches own"
    recipe = dataclasses.replace(recipe, branches={"side": ("helper",)})
    assert [lineage.ends.whole for lineage in lineage_of(recipe).values()] == [False, True]


def test_tasks_that_read_a_lower_layer():
    tasks = {"mood": TASK, "helper": {**TASK, "data": "mood", "role": "auxiliary", "layer": 1}}
    found = lineage_of(recipe_of(FIRST, BARE, tasks=tasks))
    assert found["first"].ends.deep == ("helper",)
    assert found["first"].ends.places == "tasks with a layer: helper"
    assert found["bare"].ends.whole


# ---- saved models ----


def test_what_a_saved_model_is_goes_into_the_same_object():
    saved = {
        "org/encoder": Traits(layout="stock", uneven="org/encoder"),
        "org/small": Traits(layout="stock", uneven="org/small"),
        "org/large": Traits(tasks=("mood",), adapted=True),
    }
    steps = (
        FIRST,
        DistillStep(name="student", teacher="org/large", student=StudentConfig(path="org/small")),
        DistillStep(name="again", teacher="org/unknown", source="first"),
    )
    found = lineage_of(recipe_of(*steps), saved)
    assert {name: lineage.ends.uneven for name, lineage in found.items()} == {
        "first": "org/encoder",
        "student": "org/small",
        "again": "org/encoder",
    }
    assert found["student"].teachers == {"org/large": saved["org/large"]}
    assert found["again"].teachers == {"org/unknown": None}
    assert found["student"].begins.tasks == ALL, "the heads are new"


def test_saved_models_change_no_parent_and_no_tasks():
    """Else the plan, which reads them, and the run would tell of different steps."""
    recipe = recipe_of(FIRST, DistillStep(name="x", teacher="org/large", student=TWO_LAYERS), PruneStep(name="y"))
    saved = dict.fromkeys(["org/encoder", "org/large"], Traits(tasks=("mood",), uneven="it", few_bits=True))
    for one, other in zip(lineage_of(recipe).values(), lineage_of(recipe, saved).values(), strict=True):
        assert (one.parent, one.origin, list(one.teachers)) == (other.parent, other.origin, list(other.teachers))
        assert (one.begins.tasks, one.ends.tasks) == (other.begins.tasks, other.ends.tasks)


def problems(recipe: Recipe, **saved: Traits) -> list[str]:
    found = Problems()
    check_lineage(recipe, lineage_of(recipe, saved), found)
    return found.lines


@pytest.mark.parametrize(
    ("step", "teacher", "message"),
    [
        (
            DistillStep(name="x", teacher="t", student=TWO_LAYERS),
            {"adapted": True},
            "x.student.layers: takes",
        ),
        (DistillStep(name="x", teacher="t", source="first"), {"adapted": True}, r"x.criteria: expected \[logits\]"),
        (DistillStep(name="x", teacher="t", student=TWO_LAYERS), {"few_bits": True}, "found 't' in few bits"),
        (DistillStep(name="x", teacher="t", student=TWO_LAYERS), {"deep": ("mood",)}, "found tasks with a layer: mood"),
        (DistillStep(name="x", teacher="t", student=TWO_LAYERS), {"branches": {"a": 1}}, "found branches a in 't'"),
        (DistillStep(name="x", teacher="t", source="first"), {"tasks": MAIN}, "x.teacher: expected a teacher with the"),
        (DistillStep(name="x", teacher="t", source="first"), {"layout": "graph"}, "x.criteria: expected a teacher in"),
        (DistillStep(name="x", teacher="t", student=TWO_LAYERS), {"layout": "stock"}, "x.student: expected a multi-ta"),
        (DistillStep(name="x", teacher="t", student=TWO_LAYERS), {"layout": "graph"}, "x.student: expected a multi-ta"),
        (PretrainStep(name="x", teacher="t", student=TWO_LAYERS), {"layout": "graph"}, "x.student: expected a multi"),
        (DistillStep(name="x", teacher="t", source="first"), {"layout": "stock"}, "x.teacher: expected a multi-task"),
        (PretrainStep(name="x", teacher="t", source="first"), {"layout": "graph"}, "x.criteria: expected a teacher in"),
        (PruneStep(name="x", heads=0.5, recover=DistillStep(teacher="t")), {"tasks": MAIN}, "x.recover.teacher: exp"),
        (PruneStep(name="x", heads=0.5, recover=DistillStep(teacher="t")), {"adapted": True}, "x.recover.criteria: ex"),
    ],
)
def test_what_saved_teachers_cannot_do(step: StepConfig, teacher: dict[str, Any], message: str):
    """It was said after the steps before had been trained."""
    traits = Traits(**{"tasks": ALL, **teacher})
    (found,) = problems(recipe_of(FIRST, step), t=traits)
    assert re.search(message, found)
    assert problems(recipe_of(FIRST, step), t=Traits(tasks=ALL)) == []
    assert problems(recipe_of(FIRST, step)) == [], "of which nothing is known, nothing is said"


@pytest.mark.parametrize(
    "step",
    [
        PretrainStep(name="x", teacher="t", student=TWO_LAYERS),
        DistillStep(name="x", teachers={"mood": "t", "tone": "first", "helper": "first"}, source="first"),
    ],
)
def test_what_stock_teachers_can_do(step: StepConfig):
    assert problems(recipe_of(FIRST, step), t=Traits(layout="stock")) == []


@pytest.mark.parametrize("key", [{"width": 0.5}, {"feed_forward": 0.5, "shape": "vanilla"}])
def test_layers_that_differ_are_told_of_alike(key: dict[str, Any]):
    """Whether a step cuts them or a folder has them so: it was said of folders when the steps before were trained."""
    cut, then = PruneStep(name="cut", heads=0.5), PruneStep(name="then", **key)
    place = "shape" if "shape" in key else "width"
    (found,) = problems(recipe_of(FIRST, cut, FinetuneStep(name="more"), then))
    assert found.startswith(f"steps.then.{place}: needs layers that are alike, but 'cut' cuts them unevenly before")
    saved = {"org/encoder": Traits(layout="stock", uneven="org/encoder")}
    (found,) = problems(recipe_of(FIRST, then), **saved)
    assert found.startswith(f"steps.then.{place}: needs layers that are alike, but those of 'org/encoder' are cut")


@pytest.mark.parametrize(
    ("begin", "branches", "message"),
    [
        ({"adapters": {}}, {}, "search.prune: prunes models without adapters, found those of 'begin'"),
        (
            {},
            {"side": ["mood"]},
            "search.prune: works on models whose tasks read one whole encoder, found branches",
        ),
    ],
)
def test_a_search_is_told_what_it_cannot_cut(begin: dict[str, Any], branches: dict[str, Any], message: str):
    """It cuts what it starts from when all steps of the recipe are trained."""
    steps = [{"kind": "finetune", "name": "begin", **begin}]
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**SECTIONS, "steps": steps, "branches": branches, "search": {}, "budget": {"size_mb": 1}})
    (found,) = caught.value.problems
    assert found.startswith(message)


# ---- laws, on recipes that were drawn ----


def drawn_recipe(seed: int) -> Recipe:
    """Steps of every kind in any order, right or wrong."""
    draw = random.Random(seed)
    names: list[str] = []
    steps: list[StepConfig] = []
    for number in range(8):
        name = f"s{number}"
        source = draw.choice([None, None, *names])
        teacher = draw.choice([*names, "org/large"])
        student = draw.choice([None, TWO_LAYERS, StudentConfig(path="org/small"), StudentConfig(config={"a": 1})])
        given = {"name": name, "source": source}
        taught = {"name": name, "source": source if student is None else None, "teacher": teacher, "student": student}
        recover = draw.choice([None, FinetuneStep(), DistillStep(teacher=teacher)])
        adapters = draw.choice([None, None, AdapterConfig()])
        steps.append(
            draw.choice(
                [
                    FinetuneStep(**given, drop_auxiliary=draw.random() < 0.3, adapters=adapters),
                    PretrainStep(**taught),
                    DistillStep(**taught, drop_auxiliary=draw.random() < 0.3),
                    PruneStep(**given, heads=draw.choice([0.0, 0.5]), layers=1, recover=recover),
                    TrimVocabularyStep(**given),
                    TrimWeightsStep(**given, sparsity=0.5, recover=recover),
                    QuantizeStep(**given, backend="onnxruntime"),
                    ExportStep(**given),
                ]
            )
        )
        names.append(name)
    return recipe_of(*steps, branches=draw.choice([{}, {"side": ["helper"]}, {"side": ["tone"]}]))


@pytest.mark.parametrize("seed", range(40))
def test_laws(seed: int):
    """A parent comes before and is in float, a model begins as its parent ends, and what is dropped stays so."""
    recipe = drawn_recipe(seed)
    lineage = lineage_of(recipe)
    kinds = {str(step.name): step.kind for step in recipe.steps}
    assert list(lineage) == list(kinds)
    for number, step in enumerate(recipe.steps):
        found, earlier = lineage[str(step.name)], list(kinds)[:number]
        assert found.parent is None or found.parent in earlier
        if found.parent is not None:
            assert step.source == found.parent or kinds[found.parent] in FLOAT_STEPS
            assert found.begins == lineage[found.parent].ends
            assert found.origin == found.parent
        else:
            assert not found.begins.adapted
            assert set(found.begins.tasks) in ({*ALL}, {*MAIN})
        assert {*MAIN} <= set(found.ends.tasks) <= set(found.begins.tasks)
        assert set(found.ends.branches) <= set(found.begins.branches)
        assert (found.ends.uneven is not None) >= (found.begins.uneven is not None)
        for teacher, traits in found.teachers.items():
            assert traits == (lineage[teacher].ends if teacher in earlier else None)
        # The steps before decide, whatever comes after.
        assert lineage_of(dataclasses.replace(recipe, steps=recipe.steps[: number + 1])) == {
            name: lineage[name] for name in [*earlier, str(step.name)]
        }


# ---- mistakes ----


def test_a_recipe_with_mistakes_has_a_lineage_too():
    """All mistakes are told at once, so that the checks run on recipes with some."""
    lineage = lineage_of(recipe_of(PruneStep(name="x", source="nobody"), DistillStep(name="y", student=TWO_LAYERS)))
    assert (lineage["x"].parent, lineage["x"].begins.tasks) == ("nobody", ALL)
    assert (lineage["y"].parent, lineage["y"].origin, lineage["y"].teachers) == (None, None, {})


def test_recipe_says_where_lineage_is_wrong():
    steps = [
        {"kind": "finetune", "name": "adapted", "adapters": {}},
        {"kind": "prune", "name": "cut", "heads": 0.5},
        {"kind": "prune", "name": "narrow", "width": 0.5},
        {"kind": "finetune", "name": "bare", "drop_auxiliary": True},
        {"kind": "distill", "name": "student", "from": "adapted", "teacher": "bare"},
    ]
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**SECTIONS, "steps": steps})
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "steps.cut",
        "steps.narrow.width",
        "steps.student",
        "steps.student.criteria",
    ]
