"""Prune steps of a recipe, from the command line."""

import json
from pathlib import Path

import pytest

from hf_mtcompress.cli import main
from hf_mtcompress.recipe import PruneStep
from hf_mtcompress.runs.fingerprint import chosen_settings
from tests.tiny_recipe import write_tiny_recipe

TEACHER = {"kind": "finetune", "name": "teacher", "epochs": 1}
PRUNED = {
    "kind": "prune",
    "name": "pruned",
    "compute": 0.5,
    "importance": "fisher",
    "combine": "max_min",
    "rearrange": True,
    "repair": True,
    "multiple_of": 16,
    "rows": 32,
}


def test_half_of_the_compute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned, pruned, repaired, saved, loaded in a fresh process, scored."""
    recipe = write_tiny_recipe(tmp_path, steps=[TEACHER, PRUNED])
    output = tmp_path / "out"
    assert main(["plan", str(recipe), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["steps"]
    assert plan[1]["parameters"] < plan[0]["parameters"]
    assert main(["run", str(recipe), "--output", str(output)]) == 0
    record = json.loads((output / "record.json").read_text())
    step = record["steps"][1]
    assert {key: step["settings"][key] for key in PRUNED if key in step["settings"]}.items() <= PRUNED.items()
    layers = step["structure"]["main"]["layers"]
    # Of 3 layers with 4 heads of 16 and 128 neurons; a head costs more than its weights, by its attention.
    cost = sum(layer["heads"] * 4 * 64 * 16 + layer["feed_forward"] * 2 * 64 for layer in layers)
    assert 0.35 < cost / (3 * (4 * 64 * 64 + 2 * 64 * 128)) < 0.52
    assert all(layer["heads"] and layer["feed_forward"] % 16 == 0 for layer in layers)
    # A second call has nothing to do.
    before = (output / "pruned" / "model.safetensors").stat().st_mtime_ns
    assert main(["run", str(recipe), "--output", str(output)]) == 0
    assert (output / "pruned" / "model.safetensors").stat().st_mtime_ns == before
    # The teacher is done; what its layers cannot give is said in the words of the recipe.
    capsys.readouterr()
    assert main(["run", str(recipe), "--output", str(output), "steps.pruned.compute=0.95"]) == 2
    assert "steps.pruned.compute: expected at most 0." in capsys.readouterr().err


def test_narrower_hidden_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A smaller model of the same family: planned, trained again, exported for plain transformers, cut further."""
    recover = {"kind": "distill", "teacher": "teacher", "criteria": ["logits", "hidden"], "epochs": 1}
    steps = [
        TEACHER,
        {"kind": "prune", "name": "narrow", "width": 0.5, "rows": 16, "recover": recover},
        {"kind": "prune", "name": "pruned", "heads": 0.5, "feed_forward": 0.5, "rows": 16},
        {"kind": "export", "name": "plain", "from": "narrow"},
    ]
    recipe = write_tiny_recipe(tmp_path, steps=steps, budget=None)
    output = tmp_path / "out"
    assert main(["plan", str(recipe), "--json"]) == 0
    plan = {step["step"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    assert main(["run", str(recipe), "--output", str(output)]) == 0
    record = {step["name"]: step for step in json.loads((output / "record.json").read_text())["steps"]}
    (cut,) = record["narrow"]["pruning"]["rounds"]
    assert (cut["width_before"], cut["width_after"]) == (64, 32)
    assert [layer["heads"] for layer in record["narrow"]["structure"]["main"]["layers"]] == [2, 2, 2]
    assert record["narrow"]["training"]["steps"] > 0
    assert plan["narrow"]["parameters"] == pytest.approx(cut["parameters_after"], rel=0.1)
    assert [layer["heads"] for layer in record["pruned"]["structure"]["main"]["layers"]] != [2, 2, 2]
    for step in record.values():
        for artefact in step["artefacts"]:
            assert artefact["reload"]["passed"], artefact["reload"]
    config = json.loads(next((output / "plain").rglob("config.json")).read_text())
    assert (config["hidden_size"], config["num_attention_heads"]) == (32, 2)
    assert "quantization_config" not in config


def test_recipes_that_do_not_use_new_keys_keep_their_fingerprints() -> None:
    """Otherwise a run of an earlier version starts again from here."""
    assert chosen_settings(PruneStep(heads=0.5, rows=16)) == {"heads": 0.5, "rows": 16}
