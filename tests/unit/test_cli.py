"""The command line: what it prints, and how it answers mistakes."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_mtcompress.cli import main
from hf_mtcompress.runs.results import load_record
from hf_mtcompress.runs.run import run as _run  # noqa: F401  # imported before capture, since its import may warn
from tests.tiny_recipe import write_tiny_recipe

FIRST_STEP = [{"kind": "finetune", "name": "teacher", "epochs": 1}]


def change(path: Path, **sections: Any) -> Path:
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**recipe, **sections}, sort_keys=False))
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command that a user's mistake ended."""
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path, steps=FIRST_STEP)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.teacher.epoch=1", "did you mean 'epochs'"),
        ("tasks.strength.label=intensty", "expected column 'intensty'.*did you mean 'intensity'"),
        ("tasks.mood.labels=[bad, good]", "expected one of 2 labels .*found 'plain'"),
        ("tasks.Mood={kind: sequence-classification, data: mood, text: text, label: label}", "tasks.Mood"),
        ("tasks.average={kind: sequence-classification, data: mood, text: text, label: label}", "reserved name"),
        ("tasks.mood.data.data_files.test=nope.jsonl", "expected a file .*nope.jsonl.* found none"),
        ("tasks.mood.data.data_files.test=empty.jsonl", "test"),
        ("encoder.path=/nowhere/at-all", "expected a local folder or a Hub id"),
        ("steps.1={kind: distill, teacher: teechr, student: {layers: 1}}", "steps.1"),
        ("reference=techer", "did you mean 'teacher'"),
        ("branches={side: [strenght]}", "there is no task 'strenght', did you mean 'strength'"),
        ("branches={main: [strength]}", "other than 'main'"),
        ("steps.teacher.adapters={rank: 0}", "expected a whole number of at least 1"),
        ("steps.teacher.adapters={alpha: 0}", "expected a number above 0"),
        ("steps.teacher.adapters={dropout: 1.0}", "a fraction of at least 0 and below 1"),
        ("steps.teacher.adapters={target: all}", "unknown key, did you mean 'targets'"),
        ("steps.teacher.adapters={targets: query}", "expected one of attention, feed_forward, all"),
        ("tasks.mood.layer=0", "expected a whole number of at least 1"),
        ("mixing={strategy: weights, weights: {moood: 1}}", "there is no such task, did you mean 'mood'"),
        ("fusion={kind: product, rate: 0.1}", "used by uncertainty and famo only, found kind: product"),
    ],
)
def test_a_mistake_gets_one_clear_message_and_leaves_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    output = tmp_path / "out"
    text = refused(capsys, "run", str(recipe), "--output", str(output), override)
    assert re.search(message, text, re.DOTALL), text
    assert not output.exists()


def test_a_teacher_that_no_step_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [*FIRST_STEP, {"kind": "distill", "name": "student", "teacher": "teechr", "student": {"layers": 1}}]
    recipe = write_tiny_recipe(tmp_path, steps=steps)
    text = refused(capsys, "run", str(recipe), "--output", str(tmp_path / "out"))
    assert "no step makes 'teechr', did you mean 'teacher'?" in text


def test_all_mistakes_at_once(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "validate", str(recipe), "seeed=1", "steps.teacher.epoch=1", "tasks.mood.metric=acuracy")
    assert "3 problems" in text
    assert all(word in text for word in ("seeed", "epoch", "acuracy"))


def test_an_output_that_cannot_be_written(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found after hours of training, this would lose them."""
    (tmp_path / "file").write_text("")
    text = refused(capsys, "run", str(recipe), "--output", str(tmp_path / "file" / "out"))
    assert "expected a folder that can be written" in text


def test_a_loss_that_is_no_number(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    text = refused(
        capsys, "run", str(recipe), "--output", str(output), "training.learning_rate=1.0e+30", "steps.teacher.epochs=3"
    )
    assert "expected a finite loss at step" in text
    assert not (output / "teacher").exists()


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected the folder of a run" in refused(capsys, "report", str(tmp_path))


@pytest.mark.parametrize(
    "option", [("--tokens", "-5"), ("--batch-sizes", "0"), ("--threads", "-3"), ("--repetitions", "0")]
)
def test_numbers_out_of_range_are_refused(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "somewhere", *option])
    assert f"expected a whole number from 1 to 1000000000, found '{option[1]}'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["report", "card", "push", "webpage", "group-tasks", "bench"])
@pytest.mark.parametrize("kind", ["file", "nothing", "empty folder"])
def test_a_folder_of_a_run_that_is_none(
    verb: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    match kind:
        case "file":
            place.write_text("x")
        case "empty folder":
            place.mkdir()
    assert main([verb, str(place)]) == 2
    assert capsys.readouterr().err.startswith(f"hf-mtcompress {verb}: expected ")


def test_an_option_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", "run", "--jsn"])
    assert stop.value.code == 2
    assert "--jsn" in capsys.readouterr().err


BUSY = "not measured: the machine was busy"


def test_a_run_whose_tasks_cannot_be_grouped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected the folder of a run" in refused(capsys, "group-tasks", str(tmp_path))


def test_bench_says_what_it_could_not_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of a machine under load looked like any others."""
    row = {"batch_size": 1, "minimum_ms": 2.0, "median_ms": 2.5, "ratio_minimum": 0.1}
    empty = {"batch_size": 32, "minimum_ms": None, "median_ms": None, "ratio_minimum": None}
    result = {"latency": {"student": [row, empty]}, "conditions": {"not_measured": ["student, batch 32: odd"]}}
    seen: list[float] = []
    monkeypatch.setattr("hf_mtcompress.runs.commands.bench", lambda _, config: seen.append(config.wait) or result)
    assert main(["bench", "student", "--wait", "5"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["student", "1", "2.00", "2.50", "0.100"],
        ["student", "32", *BUSY.split()],
        [*BUSY.split()[:-1], "busy:", "student,", "batch", "32:", "odd"],
    ]
    assert seen == [5.0]


def test_the_verbs_on_one_small_run(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data on stdout alone, so that it can be piped."""
    change(recipe, fusion={"measure_every": 2})
    output = tmp_path / "out"
    assert main(["validate", str(recipe)]) == 0
    assert main(["plan", str(recipe), "--json"]) == 0
    lines = capsys.readouterr().out
    assert json.loads(lines.split("\n", 1)[1])["groups"] == [["mood", "strength"]]

    assert main(["run", str(recipe), "--output", str(output)]) == 0
    assert "teacher" in capsys.readouterr().out

    assert main(["report", str(output), "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == ["teacher"]

    assert main(["evaluate", str(output / "teacher"), str(recipe), "--split", "test"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["mood"]["rows"] == 24

    bench = ["bench", str(output / "teacher"), "--tokens", "8", "--batch-sizes", "1", "--repetitions", "2", "--json"]
    assert main(bench) == 0
    assert len(json.loads(capsys.readouterr().out)["latency"]) == 1

    assert main(["card", str(output)]) == 0
    assert capsys.readouterr().out.strip().endswith("README.md")

    assert main(["group-tasks", str(output), "--encoders", "2", "--json"]) == 0
    grouping = json.loads(capsys.readouterr().out)
    assert sorted(name for group in grouping["groups"] for name in group) == ["mood", "strength"]
    assert main(["group-tasks", str(output), "--rows", "8"]) == 0
    text = capsys.readouterr().out
    assert "from one look, which is mostly chance: train the first 500 steps with fusion.measure_every=25" in text
    assert "to see what it brings: hf-mtcompress compare-tasks RECIPE --group by-gradients=" in text
    assert re.search(r"of pairs that (agree|pull apart) most:\n  mood \+ strength: [+-]0\.\d{3}", text)
    assert main(["group-tasks", str(output), "--parameters", "10"]) == 2
    assert "expected room for at least one encoder" in capsys.readouterr().err
    assert main(["group-tasks", str(output), "--parameters", "10", "--encoders", "2"]) == 2
    assert "expected --encoders or --parameters, found both" in capsys.readouterr().err
    assert "How the tasks get along" in (output / "README.md").read_text(encoding="utf-8")
    assert (output / "assets" / "interference.png").exists()

    assert main(["push", str(output), "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "model.safetensors" in listed
    assert "nothing was sent to someone/tiny" in listed
    assert "probes" not in listed
    shown = output / ".work" / "push" / "README.md"
    assert f"the card, as readers would see it: {shown}" in listed
    assert 'AutoModel.from_pretrained("someone/tiny")' in shown.read_text(encoding="utf-8")
    (output / "README.new.md").write_text("another card", encoding="utf-8")
    assert main(["push", str(output), "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert f"not pushed: {output / 'README.new.md'}, a newer card" in listed
    assert "  README.new.md" not in listed


def test_looks_of_a_run_group_its_tasks(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean over looks in training, without a look at the model, which has gone here."""
    change(recipe, fusion={"measure_every": 2, "measure_on": "validation"})
    output = tmp_path / "out"
    assert main(["run", str(recipe), "--output", str(output)]) == 0
    report = load_record(output).steps[0].interference
    assert report is not None
    assert report["steps"] >= 3
    assert "gradients of the trained layers of the encoder on validation rows" in (output / "README.md").read_text(
        "utf-8"
    )
    (output / "teacher" / "model.safetensors").unlink()
    capsys.readouterr()
    assert main(["group-tasks", str(output), "--json"]) == 0
    grouping = json.loads(capsys.readouterr().out)
    assert grouping["looks"] == report["steps"]
    assert grouping["matrix"][0][1] == report["cosine"][0][1] != 0
    assert grouping["helpers"] == []
    record = json.loads((output / "record.json").read_text())
    record["tasks"]["strength"]["role"] = "auxiliary"
    (output / "record.json").write_text(json.dumps(record))
    assert main(["group-tasks", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "in each: strength (auxiliary)" in printed
    assert "--group by-gradients=mood+strength\n" in printed
    assert f"from {report['steps']} looks at gradients on validation rows" in printed


def test_a_missing_extra_is_said_before_anything_is_trained(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a run of hours ends at its last step."""
    found = importlib.util.find_spec
    hidden = ("torchjd", "bitsandbytes", "torchao")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else found(name, *rest))
    few = [{"kind": "quantize", "backend": backend, "bits": 8} for backend in ("bitsandbytes", "torchao")]
    change(recipe, steps=[*FIRST_STEP, *few])
    message = refused(capsys, "validate", str(recipe), "fusion.combination=upgrad", "mixing.batches=mixed")
    assert 'pip install "hf_mtcompress[surgery]"' in message
    assert 'pip install "hf_mtcompress[bitsandbytes]"' in message
    assert 'pip install "hf_mtcompress[torchao]"' in message
