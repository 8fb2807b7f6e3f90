"""What saved models are that a recipe names, and that it is told before training what it cannot do with them."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.errors import RecipeError
from hf_mtcompress.recipe import DistillStep, Recipe
from hf_mtcompress.recipe.lineage import Traits
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import StepRecord
from hf_mtcompress.runs import commands
from hf_mtcompress.runs.run import do_step, prepare_output, run
from hf_mtcompress.steps.run_context import RunContext, recipe_reader
from hf_mtcompress.steps.saved_models import lineage_with_saved_models, traits_of
from tests.tiny_recipe import write_tiny_recipe

FIRST = {"kind": "finetune", "name": "first", "max_steps": 1}
STEPS: list[dict[str, Any]] = [
    FIRST,
    {"kind": "prune", "name": "cut", "heads": 0.25, "importance": "magnitude"},
    {"kind": "distill", "name": "student", "teacher": "cut", "student": {"layers": 2}, "criteria": ["logits"]},
    {"kind": "distill", "name": "fresh", "teacher": "cut", "student": {"config": {"num_hidden_layers": 1}}},
    {"kind": "pretrain", "name": "general", "teacher": "first", "student": {"path": "encoder"}},
    {"kind": "trim_vocabulary", "name": "words", "from": "first"},
    {"kind": "trim_weights", "name": "trimmed", "from": "first", "sparsity": 0.5},
    {"kind": "finetune", "name": "adapted", "from": "first", "adapters": {"rank": 2}},
    {"kind": "finetune", "name": "longer"},
    {"kind": "finetune", "name": "bare", "from": "first", "drop_auxiliary": True},
    {"kind": "quantize", "name": "int8", "from": "first", "backend": "bitsandbytes"},
    {"kind": "export", "name": "plain", "from": "first", "formats": ["vanilla", "onnx"]},
    {"kind": "export", "name": "uneven", "from": "cut", "formats": ["vanilla"]},
]
TRAINING = {"batch_size": 8, "max_steps": 1, "keep": "last", "arguments": {"disable_tqdm": True}}
AUXILIARY = "tasks.strength.role=auxiliary"


def recipe_in(folder: Path, *steps: dict[str, Any], **sections: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    sections = {"training": TRAINING, "reference": "first", **sections}
    return load_recipe(write_tiny_recipe(folder, steps=list(steps), **sections))


def do_steps(folder: Path, *overrides: str) -> None:
    """The steps of a recipe, without what is measured after them."""
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    context = RunContext(recipe, folder / "run", load_sources(recipe.tasks, recipe.seed), recipe_reader(recipe))
    prepare_output(folder / "run")
    done: dict[str, StepRecord] = {}
    for step in recipe.steps:
        done[str(step.name)] = do_step(step, done, context)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every kind of step."""
    folder = tmp_path_factory.mktemp("saved")
    write_tiny_recipe(folder, steps=STEPS, training=TRAINING, reference="first")
    do_steps(folder, AUXILIARY)
    return folder


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("branched")
    sections: dict[str, Any] = {"branches": {"side": ["strength"]}, "branch_layers": 1}
    write_tiny_recipe(folder, steps=[FIRST], training=TRAINING, reference="first", **sections)
    do_steps(folder)
    return folder


# ---- the plan, the run and what it saves agree ----


def test_plan_run_and_folders_agree(saved: Path):
    """What is said of a step before it is done holds for its folder, so that both are refused alike."""
    recipe = load_recipe(saved / "recipe.yaml", [AUXILIARY])
    lineage = lineage_with_saved_models(recipe)
    planned = {step["step"]: step for step in commands.plan(recipe)["steps"]}
    assert list(planned) == list(lineage) == [step["name"] for step in STEPS]
    for name, found in lineage.items():
        record = json.loads((saved / "run" / name / "step.json").read_text())
        assert record["source"] == found.parent == planned[name]["from"]
        assert record["origin"] == (found.origin if found.origin in lineage else None)
        assert tuple(record["tasks"]) == found.ends.tasks
        if record["kind"] in ("quantize", "export"):
            continue
        folder = str(saved / "run" / name)
        traits = traits_of(folder, "here", DistillStep(teacher=folder))
        uneven = None if found.ends.uneven is None else folder
        assert traits == dataclasses.replace(found.ends, uneven=uneven)
        assert len(record["structure"]["main"]["layers"]) == planned[name]["layers"]


def test_folders_with_branches(branched: Path):
    recipe = load_recipe(branched / "recipe.yaml")
    folder = str(branched / "run" / "first")
    found = lineage_with_saved_models(recipe)["first"].ends
    assert found.branches == {"side": 1}
    assert traits_of(folder, "here", DistillStep(teacher=folder)) == found


def test_what_a_folder_of_another_form_is(saved: Path):
    places = {
        "int8": saved / "run/int8",
        "plain": saved / "run/plain/vanilla/mood",
        "uneven": saved / "run/uneven/vanilla/mood",
        "onnx": saved / "run/plain/onnx",
    }
    found = {name: traits_of(str(place), "here", DistillStep(teacher="x")) for name, place in places.items()}
    assert found == {
        "int8": Traits(tasks=("mood", "strength"), few_bits=True),
        "plain": Traits(layout="stock"),
        "uneven": Traits(layout="stock", uneven=str(places["uneven"])),
        "onnx": Traits(layout="graph", tasks=("mood", "strength")),
    }


def test_the_plan_counts_what_is_there(saved: Path, tmp_path: Path):
    """An encoder that is cut already, and a teacher that is no step, were counted as the whole encoder."""
    uneven, cut = saved / "run/uneven/vanilla/mood", saved / "run/cut"
    student = {"kind": "distill", "name": "student", "teacher": str(cut), "student": {"layers": 2}}
    whole = commands.plan(recipe_in(tmp_path, FIRST))["steps"][0]["parameters"]
    steps = commands.plan(recipe_in(tmp_path, FIRST, student, encoder={"path": str(uneven)}))["steps"]
    assert steps[0]["parameters"] < whole
    assert steps[1]["layers"] == 2
    steps = commands.plan(recipe_in(tmp_path, FIRST, student))["steps"]
    assert steps[0]["parameters"] == whole
    assert steps[1]["parameters"] < whole * 2 / 3


# ---- what is refused ----


def refusals(recipe: Recipe, output: Path) -> list[str]:
    """The mistakes that plan, validate and run tell of, and nothing is trained before."""
    found = []
    for ask in (commands.plan, commands.validate, lambda recipe: run(recipe, output)):
        with pytest.raises(RecipeError) as caught:
            ask(recipe)
        found.append(caught.value.problems)
    assert found[0] == found[1] == found[2]
    assert not output.exists()
    return found[0]


def distilled(**section: Any) -> dict[str, Any]:
    return {"kind": "distill", "name": "x", "criteria": ["logits"], **section}


LAYERS = {"student": {"layers": 1}}


@pytest.mark.parametrize(
    ("place", "step", "message"),
    [
        ("adapted", distilled(**LAYERS), "steps.x.student.layers: takes layers of models without adapters, found"),
        ("adapted", distilled(criteria=["hidden"]), "steps.x.criteria: expected [logits] with adapters, found hidden"),
        ("int8", distilled(**LAYERS), "steps.x.student.layers: expected a teacher in float to take layers of"),
        ("bare", distilled(), "steps.x.teacher: expected a teacher with the task 'strength', found mood in"),
        ("plain/vanilla/mood", distilled(), "steps.x.teacher: expected a multi-task teacher for the tasks mood, stren"),
        ("plain/vanilla", distilled(), "steps.x.teacher: expected a step of this recipe, or the folder or Hub id of a"),
        ("plain/onnx", distilled(criteria=["hidden"]), "steps.x.criteria: expected a teacher in torch for hidden"),
        ("plain/onnx", distilled(**LAYERS), "steps.x.student: expected a multi-task teacher to make a student of, fo"),
        ("nowhere", distilled(), "steps.x.teacher: expected a step of this recipe, or the folder or Hub id of a saved"),
        ("first", distilled(teacher="first", student={"path": "."}), "steps.x.student.path: expected a local folder"),
        (
            "adapted",
            {"kind": "prune", "name": "x", "heads": 0.25, "recover": {"kind": "distill", "teacher": "."}},
            "steps.x.recover.criteria: expected [logits] with adapters, found hidden",
        ),
    ],
)
def test_saved_teachers_and_students(saved: Path, tmp_path: Path, place: str, step: dict[str, Any], message: str):
    """Each of these was trained up to, and failed then."""
    folder = str(saved / "run" / place)
    wanted = copy.deepcopy(step)
    if "student" in step and "path" in step["student"]:
        wanted["student"]["path"] = folder
    elif "recover" in step:
        wanted["recover"]["teacher"] = folder
    else:
        wanted["teacher"] = folder
    (found,) = refusals(recipe_in(tmp_path, FIRST, wanted), tmp_path / "out")
    assert found.startswith(message)


def test_a_saved_teacher_with_branches(branched: Path, tmp_path: Path):
    step = distilled(teacher=str(branched / "run/first"), **LAYERS)
    (found,) = refusals(recipe_in(tmp_path, FIRST, step), tmp_path / "out")
    assert found.startswith("steps.x: works on models whose tasks read one whole encoder, found branches side in '")


@pytest.mark.parametrize("key", [{"width": 0.5}, {"feed_forward": 0.5, "shape": "vanilla"}])
def test_an_encoder_that_is_cut_already(saved: Path, tmp_path: Path, key: dict[str, Any]):
    recipe = recipe_in(
        tmp_path, FIRST, {"kind": "prune", "name": "x", **key}, encoder={"path": str(saved / "run/uneven/vanilla/mood")}
    )
    (found,) = refusals(recipe, tmp_path / "out")
    assert found.startswith(f"steps.x.{'width' if 'width' in key else 'shape'}: needs layers that are alike, but those")


def test_an_encoder_with_tasks(saved: Path, tmp_path: Path):
    """It died in the first forward pass, of inputs that were missing."""
    (found,) = refusals(recipe_in(tmp_path, FIRST, encoder={"path": str(saved / "run/first")}), tmp_path / "out")
    assert found.startswith("encoder.path: expected a local folder or a Hub id of a pretrained encoder, found '")
    assert "a multi-task model with the tasks mood, strength; export it" in found


def test_all_that_is_wrong_is_said_at_once(saved: Path, tmp_path: Path):
    steps = [distilled(teacher=str(saved / place), name=f"x{number}") for number, place in enumerate(["a", "b"])]
    found = refusals(recipe_in(tmp_path, FIRST, *steps), tmp_path / "out")
    assert [problem.split(":")[0] for problem in found] == ["steps.x0.teacher", "steps.x1.teacher"]
