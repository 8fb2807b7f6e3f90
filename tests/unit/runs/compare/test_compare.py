"""Tasks alone and together: one small comparison through the command line, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from hf_mtcompress.cli import main
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.runs.compare.arms import load_comparison
from hf_mtcompress.runs.compare.compare import compare_tasks
from hf_mtcompress.runs.compare.models import joined, models_of
from hf_mtcompress.runs.compare.statistics import paired_difference
from tests.tiny_recipe import write_tiny_recipe

FIRST_STEP = [{"kind": "finetune", "name": "teacher", "epochs": 1}]
ARMS = ["--arm", "product=fusion.kind=product", "--group", "pair=mood+strength/tone"]
MODELS = ["alone-mood", "alone-strength", "alone-tone", "mood+strength", "product", "together"]


def write_recipe(folder: Path, **sections: Any) -> Path:
    """Two tasks over 48 rows, a third over 16 rows of its own without a test split, and an auxiliary one."""
    path = write_tiny_recipe(folder, steps=FIRST_STEP, reference=None, **sections)
    for split, rows in {"train": 16, "validation": 8}.items():
        lines = (folder / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"tone-{split}.jsonl").write_text("".join(lines[:rows]))
    recipe = yaml.safe_load(path.read_text())
    mood = recipe["tasks"]["mood"]
    files = {"path": "json", "data_files": {split: f"tone-{split}.jsonl" for split in ("train", "validation")}}
    recipe["tasks"]["tone"] = {**mood, "data": files, "weight": 0.5}
    recipe["tasks"]["helper"] = {**mood, "data": "mood", "role": "auxiliary"}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """Recipe, output folder and `compare.json` of one comparison over two seeds."""
    folder = tmp_path_factory.mktemp("compare")
    recipe, output = write_recipe(folder), folder / "out"
    assert main(["compare-tasks", str(recipe), "--seeds", "2", "--output", str(output), *ARMS]) == 0
    return recipe, output, json.loads((output / "compare.json").read_text())


def arms_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for arm in record["arms"]}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["compare-tasks", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_every_arm_is_scored_on_the_same_rows(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    _, output, record = finished
    arms = arms_of(record)
    assert list(arms) == ["together", "alone:mood", "alone:strength", "alone:tone", "product", "pair"]
    assert record["seeds"] == [5, 6]
    assert record["tasks"]["mood"] == {"metric": "accuracy", "split": "test", "rows": 24}
    assert record["tasks"]["tone"] == {"metric": "accuracy", "split": "validation", "rows": 8}
    assert list(record["tasks"]) == ["mood", "strength", "tone"]
    assert all(len(scores) == 2 for arm in arms.values() for scores in arm["scores"].values())
    assert arms["product"]["settings"] == ["fusion.kind=product"]
    assert str(output.parent) not in (output / "compare.json").read_text()


def test_the_budget_of_each_model_is_stated(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    """48 rows are 6 batches of 8, tone's 16 are 2; tasks over the same rows see the same ones."""
    arms = arms_of(finished[2])
    steps = {name: [model["optimizer_steps"] for model in arm["models"]] for name, arm in arms.items()}
    assert steps == {
        "together": [8],
        "alone:mood": [6],
        "alone:strength": [6],
        "alone:tone": [2],
        "product": [8],
        "pair": [6, 2],
    }
    together = arms["together"]["models"][0]
    assert together["rows_seen"] == 64
    assert together["task_rows_seen"] == {"mood": 48, "strength": 48, "tone": 16, "helper": 48}
    assert arms["alone:tone"]["models"][0]["task_rows_seen"] == {"tone": 16}


def test_differences_are_those_of_the_scores(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    record = finished[2]
    arms = arms_of(record)
    alone = {task: arms[f"alone:{task}"]["scores"][task] for task in record["tasks"]}
    alone["average"] = [sum(values) / 3 for values in zip(*alone.values(), strict=True)]
    rows = {(row["arm"], row["task"]): row for row in record["differences"]}
    assert set(rows) == {(arm, task) for arm in ("together", "product", "pair") for task in alone}
    for (arm, task), row in rows.items():
        assert row["together"] == pytest.approx(sum(arms[arm]["scores"][task]) / 2)
        assert row["alone"] == pytest.approx(sum(alone[task]) / 2)
        if (arm, task) == ("pair", "tone"):
            continue
        expected = paired_difference(arms[arm]["scores"][task], alone[task])
        assert (row["difference"], row["low"], row["high"]) == pytest.approx(
            (expected.mean, expected.low, expected.high)
        )
    average = arms["together"]["scores"]["average"]
    assert average[0] == pytest.approx(sum(arms["together"]["scores"][task][0] for task in record["tasks"]) / 3)


def test_a_group_of_one_task_is_that_task_alone(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    """Trained twice, its difference of 0 would look like a result."""
    _, output, record = finished
    assert arms_of(record)["pair"]["scores"]["tone"] == arms_of(record)["alone:tone"]["scores"]["tone"]
    row = next(row for row in record["differences"] if (row["arm"], row["task"]) == ("pair", "tone"))
    assert row["verdict"] == "alone in this arm"
    assert row["difference"] is None
    assert sorted(path.name for path in output.iterdir() if path.is_dir() and path.name != ".work") == MODELS


def test_arms_differ(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    """A setting that did not arrive would show as no difference."""
    arms = arms_of(finished[2])
    assert arms["product"]["scores"]["strength"] != arms["together"]["scores"]["strength"]
    assert arms["pair"]["scores"]["strength"] != arms["together"]["scores"]["strength"]
    assert arms["pair"]["scores"]["strength"] != arms["alone:strength"]["scores"]["strength"]
    assert len(set(arms["together"]["scores"]["strength"])) == 2


def test_no_weights_remain(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    output = finished[1]
    assert sorted(path.name for path in (output / "together" / "seed-5").iterdir()) == ["step.json"]
    assert not list(output.rglob("*.safetensors"))
    assert (output / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_repeated_call_trains_only_what_is_new(
    finished: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    recipe, output, record = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("step.json")}
    capsys.readouterr()
    assert main(["compare-tasks", str(recipe), "--seeds", "2", "--output", str(output), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("step.json")} == before
    kept = [row for row in record["differences"] if row["arm"] == "together"]
    assert again["differences"] == kept

    words = ["compare-tasks", str(recipe), "--seeds", "1", "--output", str(output)]
    assert main([*words, "--arm", "slow=training.learning_rate=1.0e-5,mixing.strategy=uniform", "--keep-models"]) == 0
    printed = capsys.readouterr()
    after = {path: path.stat().st_mtime_ns for path in output.rglob("step.json")}
    assert {path.parent.relative_to(output).as_posix() for path in after if after[path] != before.get(path)} == {
        "slow/seed-5"
    }
    assert (output / "slow" / "seed-5" / "model.safetensors").exists()
    assert not (output / "together" / "seed-5" / "model.safetensors").exists()
    assert "together, seed 5 (1 of 5)" in caplog.text
    assert "one seed: no interval" in printed.out
    assert "Arm slow: training.learning_rate=1.0e-5, mixing.strategy=uniform." in printed.out
    lines = printed.out.splitlines()
    assert lines[0].split()[:4] == ["task", "metric", "n", "arm"]
    assert re.match(r"mood +accuracy +24 +together +\d\.\d{4} +\d\.\d{4} +[+-]\d\.\d{4} +- +one seed", lines[2])


def test_groups_with_other_settings_are_models_of_their_own(
    finished: tuple[Path, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task alone has no fusion of losses, so it is not trained again."""
    recipe, output, _ = finished
    shutil.copytree(output, tmp_path / "out")
    group = "best=mood+strength/tone,fusion.kind=product,tasks.strength.weight=0.5"
    words = ["compare-tasks", str(recipe), "--seeds", "1", "--output", str(tmp_path / "out"), "--group", group]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    arm = arms_of(json.loads(capsys.readouterr().out))["best"]
    assert arm["settings"] == ["fusion.kind=product", "tasks.strength.weight=0.5"]
    assert [model["folder"] for model in arm["models"]] == ["best.mood+strength", "alone-tone"]
    steps = [
        json.loads((tmp_path / "out" / folder / "seed-5" / "step.json").read_text())
        for folder in ("best.mood+strength", "mood+strength")
    ]
    assert steps[0]["fingerprint"] != steps[1]["fingerprint"]
    assert arm["scores"]["strength"] != arms_of(finished[2])["pair"]["scores"]["strength"][:1]


def test_steps_are_shared_by_rows(tmp_path: Path) -> None:
    """With max_steps, a task with a quarter of the rows would otherwise see them four times as often alone."""
    recipe = write_recipe(tmp_path)
    comparison = load_comparison(recipe, ["training.max_steps=4", "mixing.cap=32"], seeds=1)
    record = compare_tasks(comparison, tmp_path / "out")
    steps = {arm.name: arm.models[0].optimizer_steps for arm in record.arms}
    assert steps == {"together": 4, "alone:mood": 3, "alone:strength": 3, "alone:tone": 1}
    assert record.training["max_steps"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--arm", "product=fusion.knd=product"], "--arm product: .*did you mean 'kind'"),
        (["--arm", "product=fusion.kind=prodct"], "--arm product: .*prodct"),
        (["--arm", "product"], "expected --arm NAME=a.b.c=value"),
        (["--arm", "Product=seed=1"], "expected a name of lower-case letters"),
        (["--arm", "alone-mood=fusion.kind=product"], "that is not 'alone'"),
        (["--arm", "together=fusion.kind=product"], "there is an arm 'together' already"),
        (["--arm", "other=seed=1"], "arms are paired by seed"),
        (["--arm", "same=budget.size_mb=1"], "changes nothing"),
        (["--arm", "same=steps.teacher.epochs=1"], "changes nothing"),
        (["--arm", "a=tasks.mood.role=auxiliary"], "--arm a: expected the main task 'mood'"),
        (["--arm", "a=tasks.mood.metric=macro_f1"], "--arm a: expected the metric of task 'mood'"),
        (["--arm", "a=tasks.mood.label=text"], "--arm a: expected the label of task 'mood'"),
        (["--arm", "a=tasks.mood.data.max_rows=10"], "--arm a: expected the test rows of task 'mood'"),
        (["--group", "pair=moood+strength/tone"], "no task 'moood', did you mean 'mood'"),
        (["--group", "pair=mood+strength"], "expected every main task, found none of tone"),
        (["--group", "pair=mood+strength/tone+mood"], "expected task 'mood' in one group, found it 2 times"),
        (["--group", "pair=mood+strength+tone/helper"], "with a main one in each group, found helper"),
        (["--group", "pair=mood+strength/tone,tasks.helper.weight=0.5"], "--group pair: .* changes nothing in any of"),
        (
            ["--group", "pair=mood+tone/strength,fusion.combination=mean"],
            r"arm pair: expected tasks that meet in a step .* of mood \+ tone",
        ),
        (["--group", "pair=mood+strength/tone,fusion.knd=product"], "--group pair: .*did you mean 'kind'"),
        (["--group", "pair=mood+strength/tone,seed=1"], "--group pair: .*arms are paired by seed"),
        (["--group", "pair=mood+strength/tne,fusion.kind=product"], "--group pair: there is no task 'tne'"),
        (["steps.0={kind: distill, teacher: some/model, student: {path: encoder}}"], "expected a finetune step"),
        (["--encoders", "1"], "--encoders: expected from 2 up to the 3 main tasks, found 1"),
        (
            ["--encoders", "2", *(f"tasks.{name}.role=auxiliary" for name in ("mood", "strength", "tone"))],
            "expected a task of role main, found auxiliary ones only",
        ),
        (["--encoders", "4"], "--encoders: expected from 2 up to the 3 main tasks, found 4"),
        (["--encoders", "2", "--group", "grouped=mood+strength/tone"], "there is an arm 'grouped' already"),
        (["--encoders", "2"], "expected validation and test rows of task 'tone', found train, validation"),
        (["training.arguments={max_steps: 3}"], "expected it as training.max_steps"),
        (["fusion.knd=sum"], "did you mean 'kind'"),
    ],
)
def test_a_mistake_gets_one_clear_message_and_leaves_nothing(
    finished: tuple[Path, Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    output = tmp_path / "out"
    text = refused(capsys, str(finished[0]), "--output", str(output), *words)
    assert re.search(message, text), text
    assert not output.exists()


def test_a_group_may_have_a_helper_that_its_settings_add(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    helper = "{kind: sequence-classification, data: mood, text: text, label: label, role: auxiliary}"
    group = f"pair=mood+strength+extra/tone,tasks.extra={helper}"
    comparison = load_comparison(finished[0], groups=[group])
    models = models_of(comparison, load_sources(comparison.recipe.tasks, comparison.recipe.seed))
    assert [model.tasks for model in models["pair"]] == [["mood", "strength", "extra"], ["tone"]]


def test_folders_of_many_tasks_have_short_names_of_their_own() -> None:
    """A name of more than 255 characters stopped the command once all other arms were trained."""
    names = [f"sentiment_question_{number}" for number in range(15)]
    found = {joined(names), joined(names[:14]), joined([*names[:14], "other"])}
    assert len(found) == 3
    assert all(len(name) <= 140 and name.startswith("sentiment_question_0+sentiment") for name in found)
    assert joined(["mood", "tone"]) == "mood+tone"


def test_the_folder_of_a_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its recipe would be replaced."""
    recipe, output = write_recipe(tmp_path), tmp_path / "out"
    output.mkdir()
    (output / "record.json").write_text("{}")
    assert "expected a folder of its own" in refused(capsys, str(recipe), "--output", str(output))
    assert not (output / "recipe.yaml").exists()


def test_tasks_that_lose_by_sharing_get_another_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By validation scores, in the mean over seeds; the helper helps in both."""
    recipe, output = write_recipe(tmp_path), tmp_path / "out"
    whole = yaml.safe_load(recipe.read_text())
    whole["tasks"]["tone"]["data"]["data_files"]["test"] = "test.jsonl"
    recipe.write_text(yaml.safe_dump(whole, sort_keys=False))
    words = ["compare-tasks", str(recipe), "--seeds", "2", "--output", str(output)]
    assert main(words) == 0
    # By the second seed alone it would be strength.
    for seed, tone, strength in ((5, 0.2, 0.9), (6, 0.9, 0.8)):
        for folder, change in (("together", {"tone": tone, "mood": 0.9, "strength": strength}), ("alone", {})):
            for task in ("tone", "mood", "strength"):
                file = output / (folder if folder == "together" else f"alone-{task}") / f"seed-{seed}" / "step.json"
                step = json.loads(file.read_text())
                metrics = step["artefacts"][0]["scores"]["validation"]["tasks"][task]["metrics"]
                metrics["pearson" if task == "strength" else "accuracy"] = change.get(task, 0.9)
                file.write_text(json.dumps(step))
    capsys.readouterr()
    caplog.clear()
    assert main([*words, "--encoders", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    grouped = arms_of(record)["grouped"]
    assert [model["tasks"] for model in grouped["models"]] == [["mood", "strength", "helper"], ["tone", "helper"]]
    assert grouped["settings"] == []
    assert "what sharing cost on validation rows, in points: tone 35.0, strength 5.0, mood 0.0" in caplog.text
    assert "grouped: mood+strength+helper/tone+helper" in caplog.text
    assert {row["task"] for row in record["differences"] if row["arm"] == "grouped"} == {
        "mood",
        "strength",
        "tone",
        "average",
    }


def test_all_mistakes_of_the_arms_at_once(
    finished: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(capsys, str(finished[0]), "--arm", "a=fusion.knd=sum", "--group", "b=mood/tone", "--arm", "c")
    assert "3 problems" in text


def test_one_task_is_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_tiny_recipe(tmp_path, steps=FIRST_STEP)
    whole = yaml.safe_load(recipe.read_text())
    del whole["tasks"]["strength"]
    recipe.write_text(yaml.safe_dump(whole))
    assert "expected at least 2 tasks to compare, found 1" in refused(capsys, str(recipe))


def test_an_arm_with_adapters_trains_them(tmp_path: Path) -> None:
    """Of a step, training settings and adapters are taken over; without the latter the arm would be `together`."""
    recipe = write_tiny_recipe(tmp_path, steps=FIRST_STEP, reference=None)
    arm = ["--arm", "adapted=steps.teacher.adapters={rank: 2}"]
    assert main(["compare-tasks", str(recipe), "--seeds", "1", "--output", str(tmp_path / "out"), *arm]) == 0
    settings = {
        name: json.loads((tmp_path / "out" / name / "seed-5" / "step.json").read_text())["settings"]
        for name in ("together", "adapted")
    }
    assert settings["adapted"]["adapters"]["rank"] == 2
    assert not settings["together"].get("adapters")


def test_no_task_stops_early(tmp_path: Path) -> None:
    """An arm whose tasks stop has another budget than the one that is stated."""
    recipe = write_tiny_recipe(tmp_path, steps=FIRST_STEP, reference=None, mixing={"task_patience": 1})
    settings = ["training.learning_rate=1e-12", "training.epochs=4", "steps.teacher.epochs=4"]
    record = compare_tasks(load_comparison(recipe, settings, seeds=1), tmp_path / "out")
    assert {arm.models[0].epochs for arm in record.arms} == {4}
    assert {arm.models[0].optimizer_steps for arm in record.arms} == {record.arms[0].models[0].optimizer_steps}
    assert record.arms[0].models[0].rows_seen == 4 * 48


def test_an_arm_with_branches_counts_rows_once(tmp_path: Path) -> None:
    """Tasks over the same rows share batches, whichever layers they read."""
    recipe = write_tiny_recipe(tmp_path, steps=FIRST_STEP, reference=None)
    arm = ["--arm", "side=branches={side: [strength]},branch_layers=1,mixing.strategy=uniform"]
    assert main(["compare-tasks", str(recipe), "--seeds", "1", "--output", str(tmp_path / "out"), *arm]) == 0
    found = arms_of(json.loads((tmp_path / "out" / "compare.json").read_text()))
    for name in ("together", "side"):
        (model,) = found[name]["models"]
        assert model["rows_seen"] == 48
        assert model["task_rows_seen"] == {"mood": 48, "strength": 48}


@pytest.mark.parametrize("text", ["a=tasks.mood.labels=[bad, plain, good],fusion.kind=product"])
def test_commas_inside_a_value_stay(finished: tuple[Path, Path, dict[str, Any]], text: str) -> None:
    (arm,) = load_comparison(finished[0], arms=[text]).arms
    assert arm.settings == ("tasks.mood.labels=[bad, plain, good]", "fusion.kind=product")


def test_what_another_process_holds_is_waited_for(
    finished: tuple[Path, Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two processes with one command would otherwise train everything twice, into the same folders."""
    comparison = load_comparison(finished[0], seeds=1)
    output, taken = tmp_path / "out", threading.Event()
    lock = FileLock(output / ".work" / "together-seed-5.lock")

    def other_process() -> None:
        with lock:
            taken.set()
            wait_for(output / "alone-tone" / "seed-5" / "step.json")
            shutil.copytree(finished[1] / "together", output / "together")

    (output / ".work").mkdir(parents=True)
    thread = threading.Thread(target=other_process)
    thread.start()
    taken.wait()
    record = compare_tasks(comparison, output)
    thread.join()
    begun = [line for line in caplog.messages if "seed 5 (" in line]
    assert begun[-1] == "together, seed 5 (1 of 4)"
    assert "seed-5: done already, skipped" in caplog.text
    scores = arms_of(finished[2])["together"]["scores"]
    assert {task: values[0] for task, values in record.arms[0].scores.items()} == {
        task: values[0] for task, values in scores.items()
    }


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_numbers(
    finished: tuple[Path, Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed after its first checkpoint, an arm must end with the numbers of one that was left alone."""
    recipe, output = write_recipe(tmp_path), tmp_path / "out"
    words = ["compare-tasks", str(recipe), "--seeds", "1", "--output", str(output), "training.save_steps=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_mtcompress", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 240
        while not list((output / "alone-mood" / ".work").glob("seed-5-*/checkpoint-*/complete")):
            assert process.poll() is None, "the comparison ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert (output / "together" / "seed-5" / "step.json").exists()
    stamp = (output / "together" / "seed-5" / "step.json").stat().st_mtime_ns
    assert not (output / "compare.json").exists()
    caplog.set_level("INFO", "hf_mtcompress.steps.training")
    assert main([*words, "--json"]) == 0
    assert "going on from checkpoint-" in caplog.text
    record = json.loads(capsys.readouterr().out)
    assert (output / "together" / "seed-5" / "step.json").stat().st_mtime_ns == stamp
    expected = arms_of(finished[2])
    for name, arm in arms_of(record).items():
        assert {task: scores[0] for task, scores in arm["scores"].items()} == {
            task: scores[0] for task, scores in expected[name]["scores"].items()
        }
