"""Auxiliary tasks that a step drops: what is saved, what later steps have, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from hf_mtcompress.artifacts import CARD
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.errors import RecipeError, UnsupportedEncoderError
from hf_mtcompress.publishing.picture import draw_comparison
from hf_mtcompress.recipe import FusionConfig, Recipe, restricted
from hf_mtcompress.recipe.lineage import lineage_of
from hf_mtcompress.recipe.load import load_recipe, parse_recipe
from hf_mtcompress.runs.fingerprint import chosen_settings
from hf_mtcompress.runs.grouping import group_tasks_of
from hf_mtcompress.runs.plan import describe_plan
from hf_mtcompress.runs.run import run
from tests.tiny_recipe import write_tiny_recipe

TEXT = {"kind": "sequence-classification", "data": {"path": "org/rows"}, "text": "text", "label": "label"}
RECIPE: dict[str, Any] = {
    "name": "helped",
    "encoder": {"path": "org/encoder"},
    "tasks": {"mood": TEXT, "helper": {**TEXT, "data": "mood", "role": "auxiliary"}},
    "steps": [{"kind": "finetune", "name": "teacher", "drop_auxiliary": True}],
}


def main_alone(recipe: Recipe) -> set[str]:
    """Steps that begin with the main tasks alone."""
    main = tuple(name for name, task in recipe.tasks.items() if task.role == "main")
    return {name for name, lineage in lineage_of(recipe).items() if lineage.begins.tasks == main}


def recipe_of(*steps: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return copy.deepcopy({**RECIPE, **sections, "steps": list(steps) or RECIPE["steps"]})


# ---- from recipe to card ----


def test_a_dropped_task_helps_and_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its branch goes with it, so that what follows compresses one whole encoder; nothing after it knows the task."""
    steps = [
        {"kind": "finetune", "name": "both", "epochs": 1},
        {"kind": "finetune", "name": "teacher", "epochs": 1, "drop_auxiliary": True},
        {"kind": "prune", "name": "pruned", "heads": 0.5, "importance": "magnitude", "recover": {"kind": "finetune"}},
        {"kind": "quantize", "name": "int8", "backend": "onnxruntime", "bits": 8, "retention": 0.01, "keep": True},
    ]
    path = write_tiny_recipe(
        tmp_path,
        steps=steps,
        branches={"side": ["strength"]},
        branch_layers=1,
        reference="both",
        # The tasks share rows, so their weights add up.
        mixing={"strategy": "weights", "weights": {"mood": 1, "strength": 1}},
        training={"batch_size": 8, "epochs": 1, "learning_rate": 2.0e-3, "arguments": {"disable_tqdm": True}},
    )
    changed = ["tasks.strength.role=auxiliary"]
    recipe = load_recipe(path, changed)
    assert main_alone(recipe) == {"pruned", "int8"}
    record = run(recipe, tmp_path / "out")
    assert [step.tasks for step in record.steps] == [["mood", "strength"], ["mood"], ["mood"], ["mood"]]
    saved = {
        name: json.loads((tmp_path / "out" / name / "config.json").read_text())
        for name in ("both", "teacher", "pruned")
    }
    assert {name: [task["name"] for task in config["tasks"]] for name, config in saved.items()} == {
        "both": ["mood", "strength"],
        **{name: ["mood"] for name in ("teacher", "pruned")},
    }
    assert list(saved["both"]["branches"]) == ["side"]
    assert saved["teacher"]["branches"] == {}
    artefacts = {artefact.folder: artefact for step in record.steps for artefact in step.artefacts}
    assert [name for name, artefact in artefacts.items() if not (artefact.reload or {}).get("passed")] == []
    assert {name: list(artefact.scores["test"].tasks) for name, artefact in artefacts.items()} == {
        "both": ["mood", "strength"],
        **{name: ["mood"] for name in ("teacher", "pruned", "int8")},
    }
    assert all(artefact.scores["test"].average is not None for artefact in artefacts.values())

    card = (tmp_path / "out" / CARD).read_text()
    assert "with one task head (`mood`)" in card
    assert "Helped in the training and are not answered by this model: `strength`." in card
    assert "| auxiliary, dropped |" in card
    assert "`strength`: what is kept is undefined" not in card
    assert "Not scored" not in card
    assert sum(line.endswith("| dropped |") for line in card.splitlines()) == 3
    # The picture has bars of what the model answers, and none of height 0 for what it does not.
    texts = []
    monkeypatch.setattr(Axes, "set_yticks", lambda axes, places, labels=(), **kwargs: texts.append(list(labels)))
    draw_comparison(record, tmp_path / "picture.png")
    assert [name.splitlines()[0] for name in texts[-1]] == ["mood"]

    # Tasks are grouped by a step that has them all, which here do not share a whole encoder.
    with pytest.raises(UnsupportedEncoderError, match=r"found the branches \['side'\]"):
        group_tasks_of(tmp_path / "out")

    # A second call finds everything done, the gate held again with the tasks that are there.
    assert [step.seconds for step in run(load_recipe(path, changed), tmp_path / "out").steps] == [
        step.seconds for step in record.steps
    ]


def test_the_plan_counts_rows_of_the_tasks_that_are_left(tmp_path: Path) -> None:
    steps = [
        {"kind": "finetune", "name": "teacher", "epochs": 1, "drop_auxiliary": True},
        {"kind": "finetune", "name": "longer", "epochs": 1},
    ]
    path = write_tiny_recipe(tmp_path, steps=steps, reference="teacher")
    # Rows of its own: 48 and 24 in batches of 8.
    files = {role: str(tmp_path / name) for role, name in (("train", "test.jsonl"), ("validation", "validation.jsonl"))}
    data = json.dumps({"path": "json", "data_files": files})
    recipe = load_recipe(path, ["tasks.strength.role=auxiliary", f"tasks.strength.data={data}"])
    plan = describe_plan(recipe, load_sources(recipe.tasks, recipe.seed))
    assert [step["optimizer_steps"] for step in plan["steps"]] == [9, 6]


# ---- who knows the task ----


@pytest.mark.parametrize(
    ("steps", "bare"),
    [
        ([{"kind": "finetune", "name": "b"}], {"b"}),
        ([{"kind": "distill", "name": "b", "teacher": "a", "student": {"layers": 1}}], {"b"}),
        ([{"kind": "distill", "name": "b", "teacher": "org/large", "student": {"layers": 1}}], set()),
        (
            [
                {"kind": "distill", "name": "b", "teacher": "a", "student": {"layers": 1}},
                {"kind": "export", "name": "c", "from": "b"},
            ],
            {"b", "c"},
        ),
    ],
)
def test_steps_without_auxiliary_tasks(steps: list[dict[str, Any]], bare: set[str]) -> None:
    recipe = parse_recipe(recipe_of({"kind": "finetune", "name": "a", "drop_auxiliary": True}, *steps))
    assert main_alone(recipe) == bare


def test_a_step_from_before_still_has_them() -> None:
    recipe = parse_recipe(
        recipe_of(
            {"kind": "finetune", "name": "a"},
            {"kind": "finetune", "name": "b", "drop_auxiliary": True},
            {"kind": "finetune", "name": "c", "from": "a"},
            {"kind": "distill", "name": "d", "teachers": {"helper": "a", "mood": "b"}, "student": {"layers": 1}},
        )
    )
    assert main_alone(recipe) == set()


def test_a_recipe_about_some_tasks() -> None:
    recipe = parse_recipe(
        recipe_of(
            branches={"side": ["helper"]},
            mixing={"strategy": "weights", "weights": {"mood": 0, "helper": 1}},
        )
    )
    found = restricted(recipe, ["mood"])
    assert found.branches == {}
    assert (found.mixing.strategy, found.mixing.weights) == ("proportional", None)
    assert restricted(recipe, ["mood", "helper"]) == recipe


def test_one_task_that_is_left_is_fused_with_nothing() -> None:
    """Settings that need several tasks would stop the step after the one that dropped them."""
    fusion = {"combination": "upgrad", "measure_every": 5, "normalize": "none"}
    recipe = parse_recipe(recipe_of(fusion=fusion, mixing={"batches": "mixed"}))
    assert restricted(recipe, ["mood"]).fusion == FusionConfig(normalize="none")
    assert restricted(recipe, ["mood", "helper"]).fusion == recipe.fusion


def test_finished_recoveries_stay_finished() -> None:
    """The key is no part of a recovery, so it is no part of the digest that says what is done."""
    step = parse_recipe(
        recipe_of({"kind": "finetune"}, {"kind": "prune", "heads": 0.5, "recover": {"kind": "finetune"}})
    )
    assert "drop_auxiliary" not in str(chosen_settings(step.steps[1]))
    assert chosen_settings(parse_recipe(recipe_of()).steps[0])["drop_auxiliary"] is True


# ---- what is refused ----


@pytest.mark.parametrize("role", ["main", "auxiliary"])
def test_there_is_nothing_to_drop_or_to_keep(role: str) -> None:
    recipe = recipe_of()
    for task in recipe["tasks"].values():
        task["role"] = role
    missing = {"main": "auxiliary", "auxiliary": "main"}[role]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe)
    assert f"steps.teacher.drop_auxiliary: expected tasks of role main and auxiliary, found none of role {missing}" in (
        str(caught.value)
    )


def test_nothing_is_dropped_twice() -> None:
    second = {"kind": "finetune", "name": "again", "drop_auxiliary": True}
    with pytest.raises(RecipeError, match=r"steps.again.drop_auxiliary: expected auxiliary tasks to drop, but a step"):
        parse_recipe(recipe_of(*RECIPE["steps"], second))


@pytest.mark.parametrize(
    "step",
    [
        {"kind": "distill", "name": "x", "from": "both", "teacher": "main"},
        {"kind": "prune", "name": "x", "from": "both", "heads": 0.5, "recover": {"kind": "distill", "teacher": "main"}},
        {"kind": "distill", "name": "x", "teachers": [{"path": "both"}, {"path": "main"}], "student": {"layers": 1}},
        {"kind": "distill", "name": "x", "teachers": {"mood": "both", "helper": "main"}, "student": {"layers": 1}},
        {"kind": "distill", "name": "x", "teachers": {"mood": "main", "helper": "both"}, "student": {"layers": 1}},
    ],
    ids=["trained on", "recovery", "averaged", "asked about it", "whose layers it has"],
)
def test_teachers_that_dropped_what_they_are_asked(step: dict[str, Any]) -> None:
    first = ({"kind": "finetune", "name": "both"}, {"kind": "finetune", "name": "main", "drop_auxiliary": True})
    with pytest.raises(
        RecipeError, match=r"steps\.x(\.recover)?: expected teachers that answer the auxiliary tasks of the model, fou"
    ):
        parse_recipe(recipe_of(*first, step))


def test_a_teacher_for_a_task_that_is_none_is_left_to_its_own_message() -> None:
    first = ({"kind": "finetune", "name": "both"}, {"kind": "finetune", "name": "main", "drop_auxiliary": True})
    teachers = {"mood": "main", "helper": "both", "helpr": "both"}
    parse_recipe(recipe_of(*first, {"kind": "distill", "name": "x", "from": "both", "teachers": teachers}))


def test_adapters_after_a_branch_was_dropped() -> None:
    adapted = {"kind": "finetune", "name": "adapted", "adapters": {}}
    parse_recipe(recipe_of(*RECIPE["steps"], adapted, branches={"side": ["helper"]}))
    kept = {"kind": "finetune", "name": "teacher"}
    with pytest.raises(RecipeError, match=r"steps\.adapted.adapters: need tasks that read one whole encoder"):
        parse_recipe(recipe_of(kept, adapted, branches={"side": ["helper"]}))


def test_a_recovery_drops_nothing() -> None:
    prune = {"kind": "prune", "heads": 0.5, "recover": {"kind": "finetune", "drop_auxiliary": True}}
    with pytest.raises(RecipeError, match=r"recover.drop_auxiliary: recovery trains the cut model itself"):
        parse_recipe(recipe_of({"kind": "finetune"}, prune))


@pytest.mark.parametrize(
    ("drop", "branches"), [(False, {"side": ["helper"]}), (True, {"side": ["mood"]})], ids=["kept", "main"]
)
def test_branches_that_are_left_stand_in_the_way_of_pruning(drop: bool, branches: dict[str, list[str]]) -> None:
    steps = ({"kind": "finetune", "drop_auxiliary": drop}, {"kind": "prune", "heads": 0.5})
    with pytest.raises(RecipeError, match="works on models whose tasks read one whole encoder, found branches side"):
        parse_recipe(recipe_of(*steps, branches=branches))
