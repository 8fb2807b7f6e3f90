"""Schedules and candidates of prune steps: what they leave, and that a killed run goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hf_mtcompress.steps.pruning as pruning_steps
from hf_mtcompress.artifacts import CARD
from hf_mtcompress.cli import main
from hf_mtcompress.compression.schedule import GradualPruning
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.errors import RecipeError
from hf_mtcompress.publishing.lint import lint_card
from hf_mtcompress.recipe import PruneStep
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import StepRecord
from hf_mtcompress.runs.fingerprint import chosen_settings
from hf_mtcompress.runs.results import load_record
from hf_mtcompress.runs.run import do_step, prepare_output
from hf_mtcompress.steps.run_context import RunContext, recipe_reader
from tests.tiny_recipe import write_tiny_recipe

TEACHER = {"kind": "finetune", "name": "teacher", "epochs": 1}
RECOVER = {"kind": "distill", "teacher": "teacher", "epochs": 2, "criteria": ["logits"], "save_steps": 3}
PRUNED = {"kind": "prune", "name": "pruned", "heads": 0.5, "feed_forward": 0.5, "multiple_of": 16, "rows": 16}


class Killed(BaseException):
    """As if the process had been killed."""


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, StepRecord]]:
    """A folder with encoder and rows, and a run in which the teacher is done."""
    folder = tmp_path_factory.mktemp("recipe")
    recipe = write_tiny_recipe(folder, steps=[TEACHER, PRUNED])
    context = context_of(recipe, folder / "run")
    done = {"teacher": do_step(context.recipe.steps[0], {}, context)}
    return folder, folder / "run", done


def context_of(recipe: Path, output: Path) -> RunContext:
    loaded = load_recipe(recipe)
    prepare_output(output)
    return RunContext(loaded, output, load_sources(loaded.tasks, loaded.seed), recipe_reader(loaded))


def prune_as(taught: tuple[Path, Path, dict[str, StepRecord]], name: str, **settings: Any) -> tuple[StepRecord, Path]:
    """Do a prune step with other settings beside the teacher that is there."""
    folder, output, done = taught
    step = {**PRUNED, "recover": RECOVER, **settings, "name": name}
    recipe = write_tiny_recipe(
        folder, steps=[TEACHER, {key: value for key, value in step.items() if value is not None}]
    )
    context = context_of(recipe, output)
    record = do_step(context.recipe.steps[1], dict(done), context)
    return record, output / name


def layers_of(record: StepRecord) -> list[dict[str, int]]:
    assert record.structure is not None
    return record.structure["main"]["layers"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_one_round_is_one_shot(taught: tuple[Path, Path, dict[str, StepRecord]]) -> None:
    """A schedule that is none must not change a result."""
    once, folder = prune_as(taught, "once")
    round_, other = prune_as(taught, "one-round", schedule={"kind": "iterative", "rounds": 1})
    assert_equal(folder, other)
    assert once.training is not None
    assert round_.training is not None
    assert once.training["steps"] == round_.training["steps"] == 12


def test_rounds_and_a_kill_in_each(
    taught: tuple[Path, Path, dict[str, StepRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half is gone after the first round, all after the second; what was done is not done again."""
    schedule = {"kind": "iterative", "rounds": 2}
    record, folder = prune_as(taught, "rounds", schedule=schedule, layers=1)
    layers = layers_of(record)
    # The last layer counted goes with the second round: of the two that are left, half of 8 heads and 256 neurons.
    assert (len(layers), sum(layer["heads"] for layer in layers)) == (2, 4)
    assert sum(layer["feed_forward"] for layer in layers) == 128
    assert record.training is not None
    assert record.training["steps"] == 12
    assert {row["round"] for row in record.training["log"]} == {1, 2}
    assert record.pruning is not None
    assert [len(each["removed_layers"]) for each in record.pruning["rounds"]] == [0, 1]
    first = record.pruning["rounds"][0]["after"]["layers"]
    assert sum(layer["heads"] for layer in first) == 9
    assert sum(layer["feed_forward"] for layer in first) == 288
    calls: list[str] = []
    for name in ("prune", "recover"):
        real = getattr(pruning_steps, name)

        def killed(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            # Each piece of work is killed when it is first begun, and done when it is begun again.
            if calls.count(name) % 2:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(pruning_steps, name, killed)
    for _ in range(4):
        with pytest.raises(Killed):
            prune_as(taught, "killed", schedule=schedule, layers=1)
    prune_as(taught, "killed", schedule=schedule, layers=1)
    assert calls == ["prune", "prune", "recover", "recover"] * 2
    assert_equal(folder, folder.parent / "killed")


def test_rounds_without_recovery_and_with_a_budget(taught: tuple[Path, Path, dict[str, StepRecord]]) -> None:
    """Compute is counted against the model before the first round, however much went since."""
    settings: dict[str, Any] = {"heads": None, "feed_forward": None, "compute": 0.5, "recover": None}
    once, _ = prune_as(taught, "budget", **settings)
    record, _ = prune_as(taught, "budget-rounds", schedule={"kind": "iterative", "rounds": 3}, **settings)
    assert once.pruning is not None
    assert record.pruning is not None
    rounds = record.pruning["rounds"]
    whole = once.pruning["rounds"][0]["multiply_adds_before"]
    assert [each["multiply_adds_before"] for each in rounds] == [whole] * 3
    left = [each["multiply_adds_after"] / whole for each in rounds]
    for part, limit in zip(left, (5 / 6, 4 / 6, 0.5), strict=True):
        assert limit - 0.09 < part <= limit


@pytest.mark.parametrize("budget", ["fractions", pytest.param("compute", marks=pytest.mark.slow)])
def test_gradual_and_a_kill_on_the_way(
    taught: tuple[Path, Path, dict[str, StepRecord]], monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    """The same weights as without the kill, and the sizes that were asked for."""
    settings: dict[str, Any] = {"schedule": {"kind": "gradual", "end": 0.5, "every": 1}}
    if budget == "compute":
        settings |= {"heads": None, "feed_forward": None, "compute": 0.4}
    else:
        settings |= {"layers": 1}
    record, folder = prune_as(taught, f"gradual-{budget}", **settings)
    layers = layers_of(record)
    if budget == "fractions":
        assert (len(layers), sum(layer["heads"] for layer in layers)) == (2, 4)
        assert sum(layer["feed_forward"] for layer in layers) == 128
    assert record.pruning is not None
    gradual = record.pruning["gradual"]
    # 12 steps: begun after step 1, done after step 6.
    assert [change["step"] for change in gradual["changes"]] == [2, 3, 4, 5, 6]
    assert gradual["complete"]
    assert gradual["masked_difference"] < 1e-5
    real = GradualPruning._change

    def killed(self: GradualPruning, step: int) -> None:
        if step == 5:
            raise Killed
        real(self, step)

    monkeypatch.setattr(GradualPruning, "_change", killed)
    with pytest.raises(Killed):
        prune_as(taught, f"killed-{budget}", **settings)
    monkeypatch.setattr(GradualPruning, "_change", real)
    prune_as(taught, f"killed-{budget}", **settings)
    assert_equal(folder, folder.parent / f"killed-{budget}")


def test_the_best_of_random_candidates(
    taught: tuple[Path, Path, dict[str, StepRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scores are kept, the best is taken, and a kill does not score anything twice."""
    settings: dict[str, Any] = {"importance": "random", "recover": None}
    plain, _ = prune_as(taught, "random", **settings)
    record, folder = prune_as(taught, "candidates", candidates=4, **settings)
    assert record.pruning is not None
    (tried,) = record.pruning["candidates"]
    scores = [one["average"] for one in tried]
    assert len({one["seed"] for one in tried}) == 4
    assert all(one["rows"] == 16 for one in tried)
    # The first one is the plain random cut; scored on all rows there are, the best one scores as the artefact does.
    assert scores[0] == pytest.approx(plain.artefacts[0].scores["validation"].average, abs=1e-6)
    assert max(scores) == pytest.approx(record.artefacts[0].scores["validation"].average, abs=1e-6)
    assert len(set(scores)) > 1
    real, seeds = pruning_steps.prune, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        seeds.append(kwargs["seed"])
        if len(seeds) == 3:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(pruning_steps, "prune", killed)
    with pytest.raises(Killed):
        prune_as(taught, "killed-candidates", candidates=4, **settings)
    again, _ = prune_as(taught, "killed-candidates", candidates=4, **settings)
    best = tried[scores.index(max(scores))]["seed"]
    assert seeds == [*(one["seed"] for one in tried[:3]), *(one["seed"] for one in tried[2:]), best]
    assert again.pruning is not None
    assert again.pruning["candidates"] == [tried]
    assert_equal(folder, folder.parent / "killed-candidates")


def test_what_the_layers_cannot_give_is_said_in_the_words_of_the_recipe(
    taught: tuple[Path, Path, dict[str, StepRecord]],
) -> None:
    settings: dict[str, Any] = {"heads": None, "feed_forward": None, "compute": 0.95}
    with pytest.raises(RecipeError, match=r"steps.much.compute: expected at most 0\."):
        prune_as(taught, "much", schedule={"kind": "gradual"}, **settings)


def test_the_plan_counts_the_training_of_all_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        {**PRUNED, "name": "once", "recover": RECOVER},
        {**PRUNED, "name": "rounds", "recover": RECOVER, "schedule": {"kind": "iterative", "rounds": 3}},
        {
            **PRUNED,
            "name": "counted",
            "recover": {**RECOVER, "epochs": None, "max_steps": 7},
            "schedule": {"kind": "iterative", "rounds": 3},
        },
        {**PRUNED, "name": "gradual", "recover": RECOVER, "schedule": {"kind": "gradual"}},
        {**PRUNED, "name": "alone"},
    ]
    recipe = write_tiny_recipe(tmp_path, steps=[TEACHER, *steps])
    assert main(["plan", str(recipe), "--json"]) == 0
    plan = {step["step"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    counts = {name: step.get("optimizer_steps") for name, step in plan.items()}
    assert counts == {"teacher": 6, "once": 12, "rounds": 12, "counted": 7, "gradual": 12, "alone": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "gradual"}, r"\.schedule: expected a section, found 'gradual'"),
        ({"schedule": {"kind": "cubic"}}, r"\.schedule.kind: unknown kind 'cubic'"),
        ({"schedule": {"kind": "gradual"}, "recover": None}, "prunes during the recovery; expected recover beside it"),
        ({"schedule": {"kind": "gradual", "begin": 0.5, "end": 0.5}}, "schedule.end: expected a fraction above begin"),
        ({"schedule": {"kind": "gradual"}, "importance": "fisher"}, "expected first_order or magnitude with schedule"),
        ({"schedule": {"kind": "gradual"}, "repair": True}, r"\.repair: with schedule: gradual the training"),
        ({"schedule": {"kind": "gradual"}, "combine": "max"}, r"\.combine: with schedule: gradual the loss"),
        (
            {"schedule": {"kind": "gradual"}, "layers": 1, "heads": 0.0, "feed_forward": 0.0},
            "expected heads, feed_forward or compute above 0",
        ),
        (
            {"schedule": {"kind": "gradual"}, "layers": 1, "heads": 0.0, "feed_forward": 0.0, "compute": 0.5},
            "whole layers go before the recovery",
        ),
        ({"candidates": 20}, "candidates: tries random cuts; expected importance: random beside it, found importance"),
        ({"schedule": {"kind": "iterative", "rounds": 0}}, "rounds: expected a whole number of at least 1, found 0"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    recipe = write_tiny_recipe(tmp_path, steps=[TEACHER, {**PRUNED, "recover": RECOVER, **settings}])
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe)


def test_recipes_without_a_schedule_keep_their_fingerprints() -> None:
    """Otherwise a run of an earlier version starts again from here."""
    assert chosen_settings(PruneStep(heads=0.5)) == {"heads": 0.5}


@pytest.mark.slow
def test_all_schedules_from_recipe_to_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each reloads in a fresh process to the bit, and the card tells how it came to its size."""
    steps = [
        {**PRUNED, "name": "rounds", "from": "teacher", "schedule": {"kind": "iterative", "rounds": 2}},
        {**PRUNED, "name": "gradual", "from": "teacher", "schedule": {"kind": "gradual"}, "recover": RECOVER},
        {**PRUNED, "name": "drawn", "from": "teacher", "importance": "random", "candidates": 3},
        {"kind": "quantize", "name": "int8", "from": "gradual", "backend": "onnxruntime"},
    ]
    recipe = write_tiny_recipe(tmp_path, steps=[TEACHER, *steps])
    output = tmp_path / "out"
    assert main(["run", str(recipe), "--output", str(output)]) == 0
    record = load_record(output)
    for step in record.steps[:-1]:
        reload = step.artefacts[0].reload
        assert reload is not None
        assert reload["passed"]
        assert reload["max_difference"] == 0.0
    card = (output / CARD).read_text()
    assert lint_card(card, output, record) == []
    for line in ("Step rounds was cut in 2 rounds", "Step gradual was pruned while", "best of 3 random candidates"):
        assert line in card
    capsys.readouterr()
    assert main(["report", str(output)]) == 0
    assert "Step drawn is the best of 3 random candidates" in capsys.readouterr().out
