"""The step trim_weights of a recipe, planned, run, killed, shown, and what later steps make of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_mtcompress.artifacts import CARD
from hf_mtcompress.cli import main
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.model.matrices import encoder_matrices
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.publishing.lint import lint_card
from hf_mtcompress.publishing.report import report_rows, report_table
from hf_mtcompress.recipe import TrimWeightsStep
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import StepRecord
from hf_mtcompress.runs.fingerprint import chosen_settings
from hf_mtcompress.runs.results import load_record
from hf_mtcompress.runs.run import do_step, prepare_output
from hf_mtcompress.steps import trimming
from hf_mtcompress.steps.run_context import RunContext, recipe_reader
from tests.tiny_recipe import write_tiny_recipe

TEACHER = {"kind": "finetune", "name": "teacher", "max_steps": 2}
TRIMMED = {
    "kind": "trim_weights",
    "name": "trimmed",
    "sparsity": 0.75,
    "recover": {"kind": "distill", "teacher": "teacher", "max_steps": 6, "save_steps": 3, "l1_penalty": 0.5},
}


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    matrices = encoder_matrices(MultiTaskModel.from_pretrained(folder))
    return {name: matrix.detach() == 0 for name, matrix in matrices.items()}


def context_of(path: Path, output: str) -> RunContext:
    recipe = load_recipe(path)
    context = RunContext(recipe, path.parent / output, load_sources(recipe.tasks, recipe.seed), recipe_reader(recipe))
    prepare_output(context.output)
    return context


def steps_done(context: RunContext) -> dict[str, StepRecord]:
    """Do the steps of a recipe, without measuring."""
    done: dict[str, StepRecord] = {}
    for step in context.recipe.steps:
        done[str(step.name)] = do_step(step, done, context)
    return done


def test_a_killed_recovery_goes_on_with_the_same_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """L1 brings more weights to 0 in training; a mask made of a checkpoint would keep those too.

    Planned size and stored size agree, and zeros are stored as nothing.
    """
    path = write_tiny_recipe(tmp_path, steps=[TEACHER, TRIMMED])
    whole = context_of(path, "whole")
    record = steps_done(whole)["trimmed"]
    killed = context_of(path, "killed")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trimming, "save_trained", lambda *args: stop() if args[3] else None)
        with pytest.raises(KeyboardInterrupt):
            steps_done(killed)
    (last,) = killed.output.glob(".work/trimmed-*/checkpoint-6")
    shutil.rmtree(last)
    again = steps_done(killed)["trimmed"]
    files = [load_file(context.output / "trimmed" / "model.safetensors") for context in (whole, killed)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
    found = record.sparsity
    assert found is not None
    assert again.sparsity is not None
    assert {**found, "seconds": 0} == {**again.sparsity, "seconds": 0}
    count = sum(int(mask.sum()) for mask in zeros(whole.output / "trimmed").values())
    assert found["zeros_after"] == round(0.75 * found["weights"]) <= found["zeros_saved"] == count
    size = record.artefacts[0].size
    assert size is not None
    assert size.weights_bytes == found["stored_bytes"] < 0.55 * found["dense_bytes"]
    capsys.readouterr()
    assert main(["plan", str(path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["steps"][1]
    assert planned["optimizer_steps"] == 6
    assert planned["estimated_mb"] == pytest.approx(found["stored_bytes"] / 1e6, abs=0.06)


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path) -> None:
    """Folders reload in fresh processes, exports are plain and dense, later steps keep zeros or let them grow back."""
    steps = [
        TEACHER,
        TRIMMED,
        {"kind": "trim_weights", "name": "pairs", "from": "trimmed", "pattern": "2:4", "storage": "dense"},
        {"kind": "quantize", "name": "small", "from": "trimmed", "backend": "bitsandbytes", "bits": 8},
        {"kind": "export", "name": "plain", "from": "trimmed", "formats": ["vanilla"]},
        {"kind": "prune", "name": "pruned", "from": "trimmed", "heads": 0.25, "rows": 16},
        {"kind": "trim_weights", "name": "both", "from": "pruned", "sparsity": 0.9, "scope": "layer"},
        {"kind": "finetune", "name": "grown", "from": "trimmed", "max_steps": 2},
    ]
    path, output = write_tiny_recipe(tmp_path, steps=steps), tmp_path / "out"
    assert main(["run", str(path), "--output", str(output)]) == 0
    record = load_record(output)
    by_name = {step.name: step for step in record.steps}
    for step in record.steps:
        for artefact in step.artefacts:
            assert artefact.reload is not None
            assert artefact.reload["passed"], (artefact.folder, artefact.reload)
    plain = by_name["plain"].artefacts[0]
    assert plain.reload is not None
    assert "without hf_mtcompress" in plain.reload["how"]
    masks = {name: zeros(output / name) for name in ("trimmed", "pairs", "both", "grown")}
    for name, mask in masks["trimmed"].items():
        assert bool(masks["pairs"][name][mask].all())
        assert bool((masks["pairs"][name].view(-1, 4).sum(1) >= 2).all())
        assert not bool(masks["grown"][name][mask].all())
    both, pairs = by_name["both"].sparsity, by_name["pairs"].sparsity
    assert both is not None
    assert pairs is not None
    assert all(part["zeros"] >= round(0.9 * part["weights"]) for part in both["matrices"].values())
    assert pairs["stored_bytes"] == pairs["dense_bytes"]
    assert (pairs["pattern"], pairs["scope"], pairs["threshold"]) == ("2:4", None, None)
    card = (output / CARD).read_text()
    assert lint_card(card, output, record) == []
    for line in (
        "Step pairs trimmed in the pattern 2:4: ",
        "The weights of the whole model are stored dense",
        "Step both trimmed: ",
        "Stored without zeros, the weights of the whole model take ",
    ):
        assert line in card
        assert line in report_table(record)
    assert report_rows(record)[1]["sparsity"] == by_name["trimmed"].sparsity


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"sparsity": None}, "(trim_weights): expected one of sparsity, threshold and pattern, found none of them"),
        ({"threshold": 0.1}, "(trim_weights): expected one of sparsity, threshold and pattern, found sparsity and thr"),
        ({"sparsity": 0.0}, "(trim_weights).sparsity: trims nothing; expected a fraction above 0"),
        ({"sparsity": 1.0}, "sparsity: expected a fraction of at least 0 and below 1, found 1.0"),
        ({"sparsity": None, "threshold": 0}, "threshold: expected a number above 0, found 0"),
        ({"sparsity": None, "pattern": "4:2"}, "pattern: expected N:M in quotes, of every M weights N stay"),
        ({"sparsity": None, "pattern": "2:4", "scope": "layer"}, "scope: a pattern holds in every group of every row"),
        ({"scope": "row"}, "scope: expected one of global, layer, found 'row'"),
        ({"recover": {"kind": "finetune", "name": "own"}}, "recover.name: recovery belongs to its step"),
        ({"recover": {"kind": "finetune", "l1_penalty": -1}}, "l1_penalty: expected a number of at least 0, found -1"),
        ({"recover": {"kind": "distill", "teacher": "nobody"}}, "recover.teacher: no step makes 'nobody'"),
        ({"from": "nobody"}, "from: no step makes 'nobody'"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: dict[str, Any], message: str
) -> None:
    trimmed = {key: value for key, value in {**TRIMMED, **step}.items() if value is not None}
    path = write_tiny_recipe(tmp_path, steps=[TEACHER, trimmed], reference=None)
    assert main(["plan", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "1 problem" in error


def test_what_only_the_model_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that a pattern does not fill are named in the words of the recipe; so are steps in the wrong place."""
    odd = {"kind": "trim_weights", "name": "odd", "pattern": "2:5"}
    path = write_tiny_recipe(tmp_path, steps=[TEACHER, odd], reference=None)
    assert main(["run", str(path), "--output", str(tmp_path / "out")]) == 2
    assert "steps.odd: pattern 2:5: expected rows of a multiple of 5 weights, found 64" in capsys.readouterr().err
    path = write_tiny_recipe(tmp_path, steps=[odd], reference=None)
    assert main(["plan", str(path)]) == 2
    assert "expected a finetune or distill step before it" in capsys.readouterr().err
    adapted = {**TEACHER, "adapters": {}}
    path = write_tiny_recipe(tmp_path, steps=[adapted, {**TRIMMED, "recover": None}], reference=None)
    assert main(["plan", str(path)]) == 2
    assert "trims models without adapters, found those of 'teacher'; trim before them" in capsys.readouterr().err


def test_defaults_leave_no_trace_in_fingerprints() -> None:
    assert chosen_settings(TrimWeightsStep(sparsity=0.5)) == {"sparsity": 0.5}
