"""A whole tiny run, from the recipe to the card, and what happens when it is repeated or killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_mtcompress.artifacts import CARD, RECORD
from hf_mtcompress.cli import main
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.errors import DataError
from hf_mtcompress.evaluation.benchmark import BenchmarkResult
from hf_mtcompress.losses.interference import GradientLog, interference_report
from hf_mtcompress.publishing.hub import repository_contents
from hf_mtcompress.publishing.lint import lint_card
from hf_mtcompress.publishing.report import report_rows
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import RunRecord
from hf_mtcompress.runs.fingerprint import step_inputs
from hf_mtcompress.runs.grouping import group_tasks_of
from hf_mtcompress.runs.plan import describe_plan, plan_text
from hf_mtcompress.runs.results import load_record
from hf_mtcompress.runs.run import run
from hf_mtcompress.steps.run_context import RunContext
from tests.tiny_recipe import write_tiny_recipe

STEPS = ("teacher", "student", "plain", "pruned", "small", "int8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, RunRecord]:
    """Recipe, output folder and record of one run."""
    folder = tmp_path_factory.mktemp("recipe")
    recipe = write_tiny_recipe(folder)
    output = folder / "run"
    return recipe, output, run(load_recipe(recipe), output)


def scores(record: RunRecord) -> dict[str, Any]:
    """Everything a run measured that does not depend on the clock."""
    return {
        artefact.folder: {
            role: {name: score.metrics for name, score in split.tasks.items()}
            for role, split in artefact.scores.items()
        }
        for step in record.steps
        for artefact in step.artefacts
    }


def test_every_step_is_measured_on_what_it_saved(finished: tuple[Path, Path, RunRecord]) -> None:
    _, output, record = finished
    assert tuple(step.name for step in record.steps) == STEPS
    folders = [artefact.folder for step in record.steps for artefact in step.artefacts]
    assert folders == ["teacher", "student", "plain/vanilla", "plain/onnx", "pruned", "small", "int8"]
    for step in record.steps:
        for artefact in step.artefacts:
            assert artefact.scores["validation"].tasks["mood"].rows == 16
            assert artefact.scores["test"].tasks["strength"].rows == 24
            assert artefact.size is not None
            assert artefact.size.weights_bytes > 0
            assert [row.batch_size for row in artefact.latency] == [1, 4]
            assert (output / artefact.folder).is_dir()
    assert {comparison.folder for comparison in record.comparisons} == set(folders)


def test_the_code_of_a_pushed_card_runs(
    finished: tuple[Path, Path, RunRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A reader copies it as it stands. The repository is a folder of its name here, which is what the code asks for."""
    _, output, record = finished
    repository = tmp_path / "someone" / "tiny"
    for path, content in repository_contents(output, record, "someone/tiny").items():
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path / name))
    card = (repository / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 3
    capsys.readouterr()
    for snippet in snippets:
        exec(snippet, {})
    printed = capsys.readouterr().out
    assert printed.count("'mood'") == 2
    assert printed.count("'label'") >= 1


def test_a_pushed_card_is_not_one_of_transformers(finished: tuple[Path, Path, RunRecord]) -> None:
    """Of those the Hub prints `pipeline("text-classification", model=...)`, which fails on several tasks."""
    metadata = ModelCard((finished[1] / CARD).read_text(encoding="utf-8")).data
    assert metadata.library_name == "hf_mtcompress"
    assert metadata.pipeline_tag == "text-classification"


def test_every_artefact_reloads_in_a_fresh_process(finished: tuple[Path, Path, RunRecord]) -> None:
    """The first promise; torch forms answer bit for bit."""
    for step in finished[2].steps:
        for artefact in step.artefacts:
            assert artefact.reload is not None, artefact.folder
            assert artefact.reload["passed"], (artefact.folder, artefact.reload)
            if artefact.form in ("torch", "bitsandbytes", "vanilla"):
                assert artefact.reload["max_difference"] == 0.0, artefact.folder


def test_tasks_are_grouped_by_a_step_that_has_them_all(finished: tuple[Path, Path, RunRecord]) -> None:
    """The last one of finetune and distill: a student here; asked again, the answer is the same."""
    grouping = group_tasks_of(finished[1], encoders=2)
    assert sorted(name for group in grouping.groups for name in group) == ["mood", "strength"]
    assert group_tasks_of(finished[1], encoders=2) == grouping


def test_tasks_are_grouped_by_the_step_with_most_looks(finished: tuple[Path, Path, RunRecord], tmp_path: Path) -> None:
    """And of its tasks by those that its model answers: a helper that was dropped is not grouped."""
    log = GradientLog(["helper", "mood", "strength"])
    looks: dict[str, Any] = {}
    for name, cosine in (("teacher", -0.5), ("student", 0.5)):
        for _ in range(1 if name == "student" else 3):
            log.add(0, log.tasks, [[1.0, cosine, 1.0], [cosine, 1.0, cosine], [1.0, cosine, 1.0]])
        looks[name] = interference_report(log, rows="validation")
        log = GradientLog(log.tasks)
    content = json.loads((finished[1] / "record.json").read_text())
    for step in content["steps"]:
        step["interference"] = looks.get(step["name"])
    (tmp_path / "record.json").write_text(json.dumps(content))
    grouping = group_tasks_of(tmp_path, encoders=2)
    assert grouping.groups == (("mood",), ("strength",))
    assert (grouping.looks, grouping.matrix[0][1]) == (3, -0.5)
    assert group_tasks_of(tmp_path, encoders=1).groups == (("mood", "strength"),)

    for step in content["steps"]:
        if step["interference"] is not None:
            step["interference"]["norms"]["strength"] = None
    (tmp_path / "record.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"'teacher': expected validation rows .* found none of strength in 3 looks"):
        group_tasks_of(tmp_path, encoders=2)


def test_steps_compress(finished: tuple[Path, Path, RunRecord]) -> None:
    parameters = {step.name: step.artefacts[0].size.parameters for step in finished[2].steps if step.artefacts[0].size}
    assert parameters["pruned"] < parameters["student"] < parameters["teacher"]  # type: ignore[operator]  # never None
    sizes = {step.name: step.artefacts[0].size.weights_bytes for step in finished[2].steps if step.artefacts[0].size}
    assert sizes["int8"] < sizes["pruned"] < sizes["teacher"]


def test_the_card_says_only_what_was_measured(finished: tuple[Path, Path, RunRecord]) -> None:
    _, output, record = finished
    text = (output / CARD).read_text()
    assert lint_card(text, output, record) == []
    assert str(output.parent) not in text
    assert str(output.parent) not in (output / RECORD).read_text()


def test_the_report_has_one_object_for_each_step(finished: tuple[Path, Path, RunRecord]) -> None:
    keys = {"step", "kind", "average", "retention", "worst_task_retention", "parameters", "size_mb"}
    rows = report_rows(finished[2])
    assert [row["step"] for row in rows] == list(STEPS)
    assert all(keys <= row.keys() for row in rows)
    teacher = finished[2].steps[0].artefacts[0].scores["test"]
    assert rows[0]["average"] == teacher.average


def test_the_budget_is_checked(finished: tuple[Path, Path, RunRecord]) -> None:
    budget = finished[2].budget
    assert budget is not None
    assert budget["latency_b1_ratio"]["met"]
    assert not budget["size_mb"]["met"]


def test_a_repeated_run_skips_what_is_done(finished: tuple[Path, Path, RunRecord]) -> None:
    recipe, output, record = finished
    before = {name: (output / name / "step.json").stat().st_mtime_ns for name in STEPS}
    again = run(load_recipe(recipe), output)
    assert {name: (output / name / "step.json").stat().st_mtime_ns for name in STEPS} == before
    assert scores(again) == scores(record)
    assert scores(load_record(output)) == scores(record)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["teacher", "student", "plain", "pruned", "int8"])
def test_a_killed_run_goes_on_to_the_same_scores(
    finished: tuple[Path, Path, RunRecord], tmp_path: Path, victim: str
) -> None:
    """Killed in the middle of each kind of step, the run must end with the numbers of one that was left alone."""
    _, _, record = finished
    recipe = write_tiny_recipe(tmp_path)
    output = tmp_path / "run"
    command = [sys.executable, "-m", "hf_mtcompress", "run", str(recipe), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not any((output / ".work").glob(f"{victim}-*/*")) and not (output / ".work" / f"{victim}.part").exists():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (output / RECORD).exists()
    assert scores(run(load_recipe(recipe), output)) == scores(record)


def test_a_changed_step_is_done_again_and_others_are_not(finished: tuple[Path, Path, RunRecord]) -> None:
    recipe, output, _ = finished
    before = {name: (output / name / "step.json").stat().st_mtime_ns for name in STEPS}
    run(load_recipe(recipe, ["steps.pruned.heads=0.5"]), output)
    after = {name: (output / name / "step.json").stat().st_mtime_ns for name in STEPS}
    assert {name for name in STEPS if before[name] != after[name]} == {"pruned", "small", "int8"}
    assert json.loads((output / RECORD).read_text())["steps"][3]["settings"]["heads"] == 0.5


def test_what_the_reference_has_not_learnt_is_said_right_after_its_step(
    finished: tuple[Path, Path, RunRecord], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Hours later the card would say that all of it was kept."""
    recipe, output, record = finished
    shutil.copytree(output, tmp_path / "run")
    place = tmp_path / "run" / "teacher" / "step.json"
    step = json.loads(place.read_text())
    step["artefacts"][0]["scores"]["validation"]["tasks"]["mood"]["metrics"]["accuracy"] = 0.01
    place.write_text(json.dumps(step))
    other = tmp_path / "run" / "student" / "step.json"
    step = json.loads(other.read_text())
    step["artefacts"][0]["scores"]["validation"]["tasks"]["mood"]["metrics"]["accuracy"] = 0.9
    other.write_text(json.dumps(step))
    caplog.clear()
    run(load_recipe(recipe), tmp_path / "run")
    lines = [entry.getMessage() for entry in caplog.records]
    chance = record.tasks["mood"].baseline["validation"]
    teacher = next(index for index, line in enumerate(lines) if line.startswith("teacher: done already"))
    assert lines[teacher + 1] == (
        f"mood: the reference (0.01) is not above the baseline ({chance:.4g}) on validation rows, so what is kept of "
        "mood will be undefined; train it longer, or look at its labels"
    )
    beaten = "student beats the reference teacher on mood (0.900 against 0.010), so the reference is probably"
    beaten += " undertrained"
    assert lines[teacher + 2 :].count(beaten) == 1


def test_plan_tells_which_bits_depend_on_the_batch(tmp_path: Path) -> None:
    """Where a form is chosen, not after it was published."""
    eight = {"kind": "quantize", "from": "teacher", "backend": "onnxruntime", "bits": 8}
    steps = [
        {"kind": "finetune", "name": "teacher"},
        {**eight, "name": "dynamic"},
        {**eight, "name": "static", "calibration": {"rows": 8}},
        {**eight, "name": "four", "bits": 4},
        {**eight, "name": "openvino", "backend": "openvino"},
    ]
    recipe = load_recipe(write_tiny_recipe(tmp_path, steps=steps))
    plan = describe_plan(recipe, load_sources(recipe.tasks, recipe.seed))
    assert [step["step"] for step in plan["steps"] if "note" in step] == ["dynamic"]
    text = plan_text(plan, tmp_path)
    assert text.count("answers can change with the other rows of a call") == 1


def test_what_was_not_measured_is_timed_again(
    finished: tuple[Path, Path, RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on a busy machine would otherwise stay without times for ever."""
    recipe, output, _ = finished
    numbers = ("minimum_ms", "median_ms", "ratio_minimum", "ratio_median")
    content = json.loads((output / RECORD).read_text())
    rows = [row for step in content["steps"] for artefact in step["artefacts"] for row in artefact["latency"]]
    shutil.copytree(output, tmp_path / "run")
    rows[0] |= {**dict.fromkeys(numbers), "not_measured": "odd"}
    (tmp_path / "run" / RECORD).write_text(json.dumps(content))
    timed: list[list[str]] = []

    def benchmark(folders: dict[str, Path], **_: Any) -> BenchmarkResult:
        timed.append(list(folders))
        return BenchmarkResult(latency={}, peak_memory_mb={}, conditions={}, minimum_ms={}, busy=None)

    monkeypatch.setattr("hf_mtcompress.runs.measure.benchmark", benchmark)
    run(load_recipe(recipe), tmp_path / "run")
    assert len(timed) == 1


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("tasks.mood.text=label", False),
        ("tasks.mood.weight={from: 1, to: 0}", False),
        ("fusion.kind=product", False),
        ("steps.teacher.epochs=9", False),
        ("steps.teacher.keep=last", False),
        ("benchmark.repetitions=3", True),
        ("fusion.scope=features", True),
        ("steps=[{kind: finetune, name: teacher, adapters: {}}]", False),
        ("steps=[{kind: finetune, name: teacher}]", True),
    ],
)
def test_a_fingerprint_is_of_what_a_step_depends_on(tmp_path: Path, override: str, same: bool) -> None:
    """Another column or weight is another training; a default that is written out is not."""
    path = write_tiny_recipe(tmp_path)

    def inputs(*overrides: str) -> dict[str, str]:
        recipe = load_recipe(path, overrides)
        context = RunContext(recipe, tmp_path / "out", load_sources(recipe.tasks, recipe.seed), None)
        return step_inputs(recipe.steps[0], {}, context)

    assert (inputs(override) == inputs()) == same


def test_a_training_in_mixed_precision_is_held_against_the_saved_weights(tmp_path: Path) -> None:
    """A model goes on to answer in half precision after such a training; its folder does not."""
    recover = {"kind": "distill", "teacher": "teacher", "max_steps": 2}
    steps = [
        {"kind": "finetune", "name": "teacher", "max_steps": 2},
        {"kind": "prune", "name": "pruned", "heads": 0.5, "importance": "magnitude", "recover": recover},
    ]
    path = write_tiny_recipe(tmp_path, steps=steps)
    record = run(load_recipe(path, ["training.bf16=true"]), tmp_path / "out")
    found = {artefact.folder: artefact.reload for step in record.steps for artefact in step.artefacts}
    assert {name: reload and reload["passed"] for name, reload in found.items()} == {"teacher": True, "pruned": True}
    assert [reload and reload["max_difference"] for reload in found.values()] == [0.0, 0.0]


def test_splits_without_a_label_of_a_task_do_not_stop_a_run(tmp_path: Path) -> None:
    """Labels of test rows are often hidden; a run of hours would end without a record."""
    path = write_tiny_recipe(
        tmp_path,
        steps=[
            {"kind": "finetune", "name": "teacher", "epochs": 1},
            {"kind": "prune", "name": "pruned", "heads": 0.5, "importance": "magnitude"},
        ],
        reference="teacher",
    )
    for split in ("validation", "test"):
        file = tmp_path / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row | {"intensity": None}) + "\n" for row in rows))
    record = run(load_recipe(path), tmp_path / "out")
    assert set(record.tasks["mood"].baseline) == {"validation", "test"}
    assert record.tasks["strength"].baseline == {}
    assert record.tasks["strength"].rows == {"train": 48, "validation": 0, "test": 0}
    for step in record.steps:
        for scores in step.artefacts[0].scores.values():
            assert list(scores.tasks) == ["mood"]
            assert scores.average is None
    text = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    assert lint_card(text, tmp_path / "out", record) == []


@pytest.mark.slow
def test_a_branch_runs_from_recipe_to_int8(tmp_path: Path) -> None:
    """One task reads a branch of its own: trained, exported as plain folders and as a graph, all reload."""
    steps = [
        {"kind": "finetune", "name": "teacher", "epochs": 1},
        {"kind": "export", "name": "plain", "formats": ["vanilla"]},
        {"kind": "quantize", "name": "int8", "backend": "onnxruntime", "bits": 8},
    ]
    path = write_tiny_recipe(tmp_path, steps=steps, branches={"side": ["strength"]}, branch_layers=1)
    record = run(load_recipe(path), tmp_path / "out")
    assert [artefact.reload and artefact.reload["passed"] for step in record.steps for artefact in step.artefacts] == [
        True
    ] * 3
    saved = json.loads((tmp_path / "out" / "teacher" / "config.json").read_text())
    assert saved["branches"] == {"side": {"encoder": "main", "layers": 1}}
    assert [task["encoder"] for task in saved["tasks"]] == ["main", "side"]


@pytest.mark.slow
def test_adapters_run_from_recipe_to_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A frozen encoder with an adapter for each task: trained on, exported, quantized in two ways; all reload."""
    steps = [
        {"kind": "finetune", "name": "shared", "epochs": 1},
        {"kind": "finetune", "name": "adapted", "epochs": 1, "adapters": {"rank": 4, "targets": "all"}},
        {"kind": "finetune", "name": "longer", "epochs": 1},
        {"kind": "export", "name": "plain", "formats": ["vanilla", "onnx"]},
        {"kind": "quantize", "name": "small", "backend": "bitsandbytes", "bits": 8},
        {"kind": "quantize", "name": "int8", "backend": "onnxruntime", "bits": 8},
    ]
    path = write_tiny_recipe(tmp_path, steps=steps, reference="shared")
    assert main(["run", str(path), "--output", str(tmp_path / "out")]) == 0
    record = load_record(tmp_path / "out")
    artefacts = {artefact.folder: artefact for step in record.steps for artefact in step.artefacts}
    assert len(artefacts) == 7
    assert [name for name, artefact in artefacts.items() if not (artefact.reload or {}).get("passed")] == []
    saved = {
        name: json.loads((tmp_path / "out" / name / "config.json").read_text())["adapters"]
        for name in ("shared", "adapted", "longer", "small")
    }
    assert saved["shared"] == {}
    assert list(saved["adapted"]) == ["mood", "strength"]
    assert saved["longer"] == saved["small"] == saved["adapted"]
    encoders = [
        {
            key: value
            for key, value in load_file(tmp_path / "out" / name / "model.safetensors").items()
            if key.startswith("encoders.")
        }
        for name in ("shared", "adapted", "longer")
    ]
    for encoder in encoders[1:]:
        assert all(torch.equal(value, encoders[0][key]) for key, value in encoder.items())
    sizes = {name: artefact.size.weights_bytes for name, artefact in artefacts.items() if artefact.size}
    assert sizes["int8"] < 0.6 * sizes["plain/onnx"] < 0.7 * sizes["longer"]
