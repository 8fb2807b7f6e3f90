"""The step quantize of a recipe: every kind of ONNX graph, and the gate that judges what was saved."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_mtcompress.artifacts import CARD, WORK
from hf_mtcompress.cli import main
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.errors import QualityError
from hf_mtcompress.evaluation.compare import check_gate
from hf_mtcompress.formats.onnx.mixed_bits import BitChoice
from hf_mtcompress.publishing.lint import lint_card
from hf_mtcompress.publishing.report import report_rows, report_table
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import Comparison, StepRecord
from hf_mtcompress.runs.commands import push
from hf_mtcompress.runs.fingerprint import step_inputs
from hf_mtcompress.runs.results import load_record
from hf_mtcompress.runs.run import run
from hf_mtcompress.steps.mixed_bits import smallest_that_keeps
from hf_mtcompress.steps.run_context import RunContext
from tests.tiny_recipe import write_tiny_recipe

TEACHER = {"kind": "finetune", "name": "teacher", "epochs": 6}
FORMS: dict[str, dict[str, Any]] = {
    "half": {"bits": 16},
    "int4": {"bits": 4, "block_size": 32, "embedding_bits": 8},
    "tables": {"bits": 8, "block_size": 32, "embedding_bits": 4},
    "static": {"bits": 8, "calibration": {"method": "percentile", "rows": 12}, "float_layers": [1]},
    "sized": {"bits": "mixed", "block_size": 32, "mixed": {"size_mb": 0.13, "rows": 12}},
    "kept": {"bits": "mixed", "block_size": 32, "mixed": {"choices": [4, 8], "rows": 12}, "retention": 0.8},
    "trained": {
        "bits": 4,
        "block_size": 32,
        "recover": {"kind": "distill", "teacher": "teacher", "criteria": ["logits"], "epochs": 2},
    },
    "vino": {"bits": 8, "backend": "openvino", "calibration": {"rows": 12}},
    "torch": {"bits": 8, "backend": "torchao"},
}


def quantized(name: str, **options: Any) -> dict[str, Any]:
    return {"kind": "quantize", "name": name, "from": "teacher", "backend": "onnxruntime"} | options


def test_a_gate_that_nothing_is_known_of_is_shut():
    """None compared with a limit would raise, or, taken for 1, let everything pass."""
    comparison = Comparison(
        step="a",
        folder="a",
        split="validation",
        retention=0.96,
        retention_above_chance=None,
        worst_task_retention=None,
        worst_task=None,
        tasks={},
    )
    limits = check_gate(comparison, 0.96, 0.5)
    assert limits["retention"] == {"limit": 0.96, "found": 0.96, "met": True}
    assert limits["worst_task_retention"] == {"limit": 0.5, "found": None, "met": False}
    assert check_gate(comparison, None, None) == {}


def test_sizes_are_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Who plans for a device reads the estimate first."""
    steps = [TEACHER, *(quantized(name, **options) for name, options in FORMS.items()), quantized("int8", bits=8)]
    path = write_tiny_recipe(tmp_path, steps=steps)
    assert main(["plan", str(path), "--json"]) == 0
    planned = {step["step"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    parameters = planned["teacher"]["parameters"]
    assert planned["half"]["estimated_mb"] == pytest.approx(parameters * 2 / 1e6, abs=0.06)
    assert planned["int8"]["estimated_mb"] == pytest.approx(parameters / 1e6, abs=0.06)
    assert planned["int4"]["estimated_mb"] <= planned["tables"]["estimated_mb"] <= planned["int8"]["estimated_mb"]
    assert planned["sized"]["estimated_mb"] == pytest.approx(0.13, abs=0.06)
    assert planned["trained"]["optimizer_steps"] > 0
    assert "optimizer_steps" not in planned["int4"]


@pytest.mark.parametrize(
    ("options", "change", "same"),
    [
        ({"bits": 8, "retention": 0.9}, {"retention": 0.8}, True),
        ({"bits": 8, "retention": 0.9}, {"keep": True}, True),
        ({"bits": "mixed", "retention": 0.9}, {"retention": 0.8}, False),
        ({"bits": "mixed", "retention": 0.9}, {"keep": True}, True),
        ({"bits": "mixed", "retention": 0.9, "mixed": {"size_mb": 1}}, {"retention": 0.8}, True),
        ({"bits": "mixed", "mixed": {"size_mb": 1}}, {"mixed": {"size_mb": 2}}, False),
    ],
)
def test_limits_that_choose_and_limits_that_judge(
    tmp_path: Path, options: dict[str, Any], change: dict[str, Any], same: bool
):
    """What only judges must not make anything again, and what chooses must."""
    teacher = StepRecord(
        name="teacher", kind="finetune", source=None, fingerprint="a", settings={}, seconds=0.0, artefacts=[]
    )

    def fingerprint(step: dict[str, Any]) -> dict[str, str]:
        recipe = load_recipe(write_tiny_recipe(tmp_path, steps=[TEACHER, step], budget=None))
        context = RunContext(recipe, tmp_path / "out", load_sources(recipe.tasks, recipe.seed), None)
        return step_inputs(recipe.steps[1], {"teacher": teacher}, context)

    assert (fingerprint(quantized("q", **options)) == fingerprint(quantized("q", **options | change))) == same


def test_the_smallest_that_keeps_enough():
    """By halving, from either end; the last where none does."""
    choices = [BitChoice({"embeddings": place}, place, 1 / (place + 1)) for place in range(9)]
    asked: list[int] = []

    def keeps(limit: int) -> Callable[[BitChoice], bool]:
        def reaches(choice: BitChoice) -> bool:
            asked.append(choice.size_bytes)
            return choice.size_bytes >= limit

        return reaches

    assert [smallest_that_keeps(choices, keeps(limit)).size_bytes for limit in range(11)] == [*range(9), 8, 8]
    assert len(asked) <= 11 * 4
    assert smallest_that_keeps(choices[:1], keeps(5)) == choices[0]


@pytest.mark.slow
def test_every_graph_through_a_recipe(tmp_path: Path):
    """Saved, scored, reloaded to the bit, timed, and shown with what it is."""
    path = write_tiny_recipe(
        tmp_path,
        steps=[
            TEACHER,
            *(quantized(name, **options) for name, options in FORMS.items()),
            {
                "kind": "export",
                "name": "graphs",
                "from": "teacher",
                "formats": ["transformers_js", "openvino", "onnx"],
                "per_task": True,
            },
        ],
        budget=None,
    )
    output = tmp_path / "out"
    record = run(load_recipe(path), output)
    steps = {step.name: step for step in record.steps}
    assert {name: steps[name].artefacts[0].precision for name in FORMS if name != "kept"} == {
        "sized": "mixed, int4 and int8",
        "trained": "int4, blocks of 32, embeddings in int4, trained with it",
        "half": "float16 weights, computed in float32",
        "int4": "int4, blocks of 32, embeddings in int8",
        "tables": "int8, dynamic, per channel, embeddings in int4, blocks of 32",
        "static": "int8, static, percentile of 12 rows, layers 1 in float",
        "vino": "int8, static, NNCF on 12 rows",
        "torch": "int8 linear layers, dynamic, per token, float32 embeddings",
    }
    for name in FORMS:
        artefact = steps[name].artefacts[0]
        assert artefact.reload is not None
        assert artefact.reload["passed"], artefact.reload
        assert artefact.reload["max_difference"] == 0.0
        assert artefact.size is not None
        assert artefact.latency
        assert {"validation", "test"} <= set(artefact.scores)
        assert steps[name].quantization is not None
        assert steps[name].quantization["bits"] == FORMS[name]["bits"]
        assert (steps[name].quantization["gate"] is None) == (name != "kept")
    sized, kept = (steps[name].quantization or {} for name in ("sized", "kept"))
    size = steps["sized"].artefacts[0].size
    assert size is not None
    assert size.weights_bytes <= 130_000
    assert size.weights_bytes == pytest.approx(sized["estimated"]["size_mb"] * 1e6, abs=600)
    assert set(sized["parts"].values()) == {4, 8}
    assert [part["part"] for part in sized["sensitivity"]["parts"]] == list(sized["parts"])
    assert sized["divergence"]["mean"] > 0
    assert kept["gate"]["met"]
    assert steps["int4"].training is None
    training = steps["trained"].training
    assert training is not None
    # What the trainer scored, with numbers rounded, is what the saved graph scores.
    scored = {row["step"]: row["eval_average"] for row in training["log"] if "eval_average" in row}
    found = steps["trained"].artefacts[0].scores["validation"].average
    assert scored[training["best_step"] or training["steps"]] == pytest.approx(found, abs=1e-4)
    assert any(tried["met"] for tried in kept["tried"])
    pictures = [output / "assets" / f"sensitivity.{suffix}" for suffix in ("png", "csv")]
    assert all(path.is_file() for path in pictures)
    assert pictures[1].read_text().count("sized,") == 3 * len(sized["parts"])
    assert [artefact.folder for artefact in steps["graphs"].artefacts] == [
        "graphs/openvino",
        "graphs/onnx",
        "graphs/onnx_tasks/mood",
        "graphs/onnx_tasks/strength",
    ]
    for artefact in steps["graphs"].artefacts:
        assert artefact.reload is not None
        assert artefact.reload["passed"], artefact.reload
    for_js = (steps["graphs"].quantization or {})["transformers_js"]
    assert list(for_js) == ["mood", "strength"]
    for task, files in for_js.items():
        assert all((output / "graphs" / "transformers_js" / task / file).is_file() for file in files)
    # The float graph scores as the artefact that it was cut from does.
    whole = steps["graphs"].artefacts[1].scores["validation"].tasks["mood"].metrics
    (metric,) = set(for_js["mood"]["onnx/model.onnx"]) - {"bytes"}
    assert for_js["mood"]["onnx/model.onnx"][metric] == pytest.approx(whole[metric])
    half, teacher = steps["half"].artefacts[0], steps["teacher"].artefacts[0]
    assert half.scores["validation"].average == pytest.approx(teacher.scores["validation"].average, abs=1e-3)
    card = (output / CARD).read_text(encoding="utf-8")
    assert lint_card(card, output, record) == []
    assert "int4" in card
    assert "[bitsandbytes" not in card
    assert "torchao" in card
    assert "## Which parts need their bits" in card
    assert "(assets/sensitivity.png)" in card
    assert "| layer 1 feed-forward | 16,384 |" in card
    assert "in OpenVINO (step `graphs`" in card
    # What OpenVINO calls model.bin is no pickle, and may go up.
    lines = push(output, "me/tiny", dry_run=True)
    assert any(line.endswith("openvino/model.bin") for line in lines)
    # One export served all of them, and is gone.
    assert not any((output / WORK).iterdir())
    assert load_record(output) == record


@pytest.mark.slow
def test_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A step that keeps too little must leave nothing that looks done, and not do everything again when let through."""
    output = tmp_path / "out"

    def recipe(**limits: Any) -> Path:
        return write_tiny_recipe(
            tmp_path, steps=[TEACHER, quantized("int4", bits=4, block_size=32, **limits)], budget=None
        )

    path = recipe(retention=3.0)
    with pytest.raises(QualityError) as caught:
        run(load_recipe(path), output)
    message = str(caught.value)
    assert message.startswith("steps.int4: expected retention of at least 3, found ")
    assert "of 'teacher' on the validation split" in message
    assert all(word in message for word in ("mood", "strength", "float_layers", "bits: 8", "keep: true"))
    assert "part                  weights  int4 alone  int8 alone" in message
    assert re.search(
        r"bits: mixed finds the smallest graph that reaches this \('[a-z0-9 -]+' hurts most now\)", message
    )
    assert not (output / "int4").exists()
    waiting = list((output / WORK).glob("int4-*/quantized/model.onnx"))
    assert len(waiting) == 1
    made = waiting[0].stat().st_mtime_ns
    shutil.rmtree(output / WORK / "graphs")  # an export would have to put it back

    path = recipe(retention=3.0, keep=True)
    record = run(load_recipe(path), output)
    gate = (record.steps[-1].quantization or {})["gate"]
    assert gate["met"] is False
    assert gate["limits"]["retention"]["limit"] == 3.0
    assert len((record.steps[-1].quantization or {})["sensitivity"]["parts"]) == 8
    assert not (output / WORK / "graphs").exists()
    assert (output / "int4" / "model.onnx").is_file()
    assert not waiting[0].exists()
    assert (output / "int4" / "model.onnx").stat().st_mtime_ns == made  # a copy of what was waiting
    card = (output / CARD).read_text(encoding="utf-8")
    assert "It missed that and was kept on request." in card
    assert lint_card(card, output, record) == []
    assert "kept on request" in report_table(record)
    assert report_rows(record)[-1]["quantization"]["gate"] == gate

    # What is done is judged again when the limit changes, and not made again.
    step = (output / "int4" / "step.json").read_bytes()
    with pytest.raises(QualityError, match=r"at least 2\.5"):
        run(load_recipe(recipe(retention=2.5)), output)
    assert run(load_recipe(recipe(worst_task_retention=1e-6)), output).steps[-1].quantization["gate"]["met"]
    assert (output / "int4" / "step.json").read_bytes() == step
    capsys.readouterr()
