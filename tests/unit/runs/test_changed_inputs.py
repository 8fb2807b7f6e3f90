"""A run that is repeated makes again what depends on something that changed, and nothing else; whatever the clock says.

Every case here was once "done already, skipped", with the scores of another encoder, of other rows, of damaged weights.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hf_mtcompress import records
from hf_mtcompress.artifacts import STEP_RECORD
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.digests import file_digests
from hf_mtcompress.errors import ArtifactError, PublishingError
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import RunRecord, StepRecord
from hf_mtcompress.runs.commands import push
from hf_mtcompress.runs.fingerprint import changes_of, step_inputs
from hf_mtcompress.runs.results import load_record
from hf_mtcompress.runs.run import do_step, prepare_output, run
from hf_mtcompress.steps.quantizing import float_graph
from hf_mtcompress.steps.run_context import RunContext, recipe_reader
from hf_mtcompress.steps.scoring import read_step
from tests.tiny import tiny_encoder, tiny_tokenizer
from tests.tiny_recipe import write_tiny_recipe

STEPS: list[dict[str, Any]] = [
    {"kind": "finetune", "name": "teacher", "max_steps": 3},
    {"kind": "prune", "name": "pruned", "from": "teacher", "heads": 0.5, "importance": "magnitude"},
]
PRETRAIN: list[dict[str, Any]] = [
    {
        "kind": "pretrain",
        "name": "general",
        "teacher": "large",
        "student": {"layers": 2},
        "criteria": ["hidden"],
        "max_steps": 2,
    }
]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def do_steps(recipe_path: Path, output: Path, overrides: Sequence[str] = ()) -> dict[str, StepRecord]:
    """The steps of a run without what is measured after them."""
    recipe = load_recipe(recipe_path, overrides)
    context = RunContext(recipe, output, load_sources(recipe.tasks, recipe.seed), recipe_reader(recipe))
    prepare_output(output)
    done: dict[str, StepRecord] = {}
    for step in recipe.steps:
        done[str(step.name)] = do_step(step, done, context)
    return done


def scores(steps: dict[str, StepRecord], role: str = "validation") -> dict[str, Any]:
    return {
        name: {task: score.metrics for task, score in step.artefacts[0].scores[role].tasks.items()}
        for name, step in steps.items()
    }


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was told of the steps, and nothing of it twice."""
    found = [message for message in caplog.messages if "made again" in message or "skipped" in message]
    caplog.clear()
    return found


def replace(path: Path, content: bytes, old_time: bool = True) -> None:
    """Write other content over a file, and put its time back."""
    before = path.stat()
    assert path.read_bytes() != content
    path.write_bytes(content)
    if old_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flipped(path: Path) -> bytes:
    """The content of a file with one bit of its last byte changed."""
    content = path.read_bytes()
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, RunRecord]:
    """Recipe, output folder and record of a whole run; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_tiny_recipe(folder, steps=STEPS)
    return path, folder / "out", run(load_recipe(path), folder / "out")


@pytest.fixture
def copied(finished: tuple[Path, Path, RunRecord], tmp_path: Path) -> tuple[Path, Path]:
    """Recipe, and a copy of the run with other times and inodes."""
    shutil.copytree(finished[1], tmp_path / "out", copy_function=shutil.copyfile)
    return finished[0], tmp_path / "out"


SKIPPED = ["teacher: done already, skipped", "pruned: done already, skipped"]


def test_a_copied_run_is_done(copied: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """Another place, other times, other inodes: nothing is made again, and what was measured stays."""
    before = load_record(copied[1])
    record = run(load_recipe(copied[0]), copied[1])
    assert said(caplog) == SKIPPED
    assert record.created == before.created
    assert record.benchmark == before.benchmark


def test_a_project_that_moved_is_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Encoder, teacher and data lie elsewhere and are the same."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    path = write_tiny_recipe(here, steps=[*STEPS, *PRETRAIN])
    write_large(here / "large")
    do_steps(path, here / "out")
    shutil.copytree(here, there, copy_function=shutil.copyfile)
    shutil.rmtree(here)
    said(caplog)
    do_steps(there / path.name, there / "out")
    assert said(caplog) == [*SKIPPED, "general: done already, skipped"]


def write_large(folder: Path, seed: int = 7) -> None:
    tiny_encoder("bert", seed=seed, **SHAPE).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("old_time", [False, True])
def test_other_encoder_weights_of_the_same_shape(
    old_time: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Name and size are the same; the scores must be those of a run that never saw the first weights."""
    path = write_tiny_recipe(tmp_path, steps=STEPS)
    before = do_steps(path, tmp_path / "out")
    tiny_encoder("bert", seed=9, **SHAPE).save_pretrained(tmp_path / "other")
    weights = tmp_path / "encoder" / "model.safetensors"
    replace(weights, (tmp_path / "other" / "model.safetensors").read_bytes(), old_time)
    said(caplog)
    again = do_steps(path, tmp_path / "out")
    assert said(caplog) == [
        "teacher: made again, its encoder changed",
        "pruned: made again, its parent and encoder changed",
    ]
    assert scores(again) == scores(do_steps(path, tmp_path / "fresh")) != scores(before)


@pytest.mark.parametrize("through", ["folder", "files"])
def test_an_encoder_given_by_links(through: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A link to a folder, and a folder of links, as the Hub's cache is one: what they lead to counts."""
    path = write_tiny_recipe(tmp_path, steps=STEPS[:1])
    if through == "folder":
        (tmp_path / "link").symlink_to(tmp_path / "encoder")
    else:
        (tmp_path / "link").mkdir()
        for file in (tmp_path / "encoder").iterdir():
            (tmp_path / "link" / file.name).symlink_to(file)
    do_steps(path, tmp_path / "out")
    said(caplog)
    do_steps(path, tmp_path / "out", [f"encoder.path={tmp_path / 'link'}"])
    assert said(caplog) == SKIPPED[:1]
    replace(tmp_path / "encoder" / "tokenizer_config.json", b"{}   ")
    do_steps(path, tmp_path / "out", [f"encoder.path={tmp_path / 'link'}"])
    assert said(caplog) == ["teacher: made again, its encoder changed"]


def test_code_beside_the_encoder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What `trust_remote_code` runs is a part of the model."""
    path = write_tiny_recipe(tmp_path, steps=STEPS[:1])
    code = tmp_path / "encoder" / "modeling_own.py"
    code.write_text("SCALE = 1\n")
    do_steps(path, tmp_path / "out")
    said(caplog)
    replace(code, b"SCALE = 2\n")
    do_steps(path, tmp_path / "out")
    assert said(caplog) == ["teacher: made again, its encoder changed"]


def test_a_teacher_that_was_trained_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights and vocabulary of a folder that teaches; what is written for readers teaches nothing."""
    path = write_tiny_recipe(tmp_path, steps=[*STEPS, *PRETRAIN])
    write_large(tmp_path / "large")
    before = do_steps(path, tmp_path / "out")
    (tmp_path / "large" / "README.md").write_text("words")
    said(caplog)
    do_steps(path, tmp_path / "out")
    assert said(caplog) == [*SKIPPED, "general: done already, skipped"]
    write_large(tmp_path / "other", seed=8)
    replace(tmp_path / "large/model.safetensors", (tmp_path / "other/model.safetensors").read_bytes())
    again = do_steps(path, tmp_path / "out")
    assert said(caplog) == [*SKIPPED, "general: made again, its teachers changed"]
    assert scores(again)["general"] != scores(before)["general"]


def test_a_label_in_a_data_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`datasets` goes by the time of the file, and served the rows that it had read before."""
    path = write_tiny_recipe(tmp_path, steps=STEPS[:1])
    before = do_steps(path, tmp_path / "out")
    file = tmp_path / "validation.jsonl"
    rows = file.read_bytes()
    changed = rows.replace(b'"label": "good"', b'"label": "bad" ')
    assert len(changed) == len(rows)
    replace(file, changed)
    said(caplog)
    again = do_steps(path, tmp_path / "out")
    assert said(caplog) == ["teacher: made again, its data changed"]
    assert scores(again) == scores(do_steps(path, tmp_path / "fresh")) != scores(before)


def test_why_is_said(copied: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    do_steps(*copied, ["steps.pruned.heads=0.25"])
    assert said(caplog) == [SKIPPED[0], "pruned: made again, its settings changed"]
    do_steps(*copied, ["steps.pruned.heads=0.25", "seed=6", "training.batch_size=4"])
    assert said(caplog) == [
        "teacher: made again, its seed and training changed",
        "pruned: made again, its parent, seed and training changed",
    ]


# ------------------------------------------------------------------------------------------------------ finished steps


@pytest.mark.parametrize(
    ("name", "damage", "wrong"),
    [
        ("model.safetensors", flipped, "is not what was saved"),
        ("model.safetensors", lambda path: path.read_bytes()[:-100], "is not what was saved"),
        ("config.json", lambda path: path.read_bytes().replace(b"0", b"1"), "is not what was saved"),
        ("tokenizer.json", None, "is missing"),
        ("probes.safetensors", flipped, "is not what was saved"),
    ],
)
def test_a_damaged_step_is_made_again(
    copied: tuple[Path, Path],
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], bytes] | None,
    wrong: str,
) -> None:
    """And what was made of it stays where the files come out as they were."""
    path, output = copied
    whole = file_digests(output / "teacher")
    file = output / "teacher" / name
    if damage is None:
        file.unlink()
    else:
        replace(file, damage(file))
    steps = do_steps(path, output)
    assert said(caplog) == [f"teacher: made again, {name} {wrong}", SKIPPED[1]]
    again = file_digests(output / "teacher")
    assert {key: value for key, value in again.items() if key != STEP_RECORD} == steps["teacher"].files
    assert again[name] == whole[name]


def test_a_damaged_run_ends_as_it_was(
    finished: tuple[Path, Path, RunRecord], copied: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Through to the record and its card."""
    weights = copied[1] / "pruned" / "model.safetensors"
    replace(weights, flipped(weights))
    record = run(load_recipe(copied[0]), copied[1])
    assert said(caplog) == [SKIPPED[0], "pruned: made again, model.safetensors is not what was saved"]
    for role in ("validation", "test"):
        found, wanted = ({step.name: step for step in item.steps} for item in (record, finished[2]))
        assert scores(found, role) == scores(wanted, role)
    assert all((step.artefacts[0].reload or {})["passed"] for step in record.steps)


def test_other_files_are_measured_again(
    finished: tuple[Path, Path, RunRecord], copied: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A step may come out otherwise with the same settings, as on another processor: old scores are not its own."""
    path, output = copied
    kept = output / "pruned"
    shutil.rmtree(kept)
    other = do_steps(path, output, ["steps.pruned.heads=0.25"])["pruned"]
    original = finished[2].steps[1]
    record = read_step(kept / STEP_RECORD)
    assert record is not None
    record.fingerprint, record.inputs = original.fingerprint, original.inputs
    (kept / STEP_RECORD).write_text(records.to_json(record))
    said(caplog)
    found = run(load_recipe(path), output).steps[1]
    assert said(caplog) == SKIPPED
    assert found.files == other.files != original.files
    assert scores({"": found}, "test") != scores({"": original}, "test")


def test_a_step_of_other_files_has_other_children(copied: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """If only settings counted, a model would stand beside a parent that it was not made of."""
    path, output = copied
    record = read_step(output / "teacher" / STEP_RECORD)
    assert record is not None
    weights = output / "teacher" / "model.safetensors"
    replace(weights, flipped(weights))
    record.files = {name: digest for name, digest in file_digests(weights.parent).items() if name != STEP_RECORD}
    (output / "teacher" / STEP_RECORD).write_text(records.to_json(record))
    do_steps(path, output)
    assert said(caplog) == [SKIPPED[0], "pruned: made again, its parent changed"]


def test_a_float_graph_is_of_the_model_that_lies_there(copied: tuple[Path, Path]) -> None:
    """It serves the next run where this one is killed: not if it is damaged, or of other weights."""
    recipe = load_recipe(copied[0])
    context = RunContext(recipe, copied[1], load_sources(recipe.tasks, recipe.seed), recipe_reader(recipe))

    def graph() -> Path:
        return float_graph("pruned", context, context.load("pruned"), context.reader)

    place = graph()
    graph_file = place / "model.onnx"
    content, stamp = graph_file.read_bytes(), graph_file.stat().st_mtime_ns
    assert (graph(), graph_file.stat().st_mtime_ns) == (place, stamp)
    replace(graph_file, flipped(graph_file))
    assert graph() == place
    assert graph_file.read_bytes() == content
    record = read_step(copied[1] / "pruned" / STEP_RECORD)
    assert record is not None
    assert record.files is not None
    record.files["model.safetensors"] = "of other weights"
    (copied[1] / "pruned" / STEP_RECORD).write_text(records.to_json(record))
    assert graph() != place


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_record_of_a_step(copied: tuple[Path, Path], caplog: pytest.LogCaptureFixture, content: str) -> None:
    (copied[1] / "teacher" / STEP_RECORD).write_text(content)
    do_steps(*copied)
    assert said(caplog) == ["teacher: made again, step.json cannot be read", SKIPPED[1]]


@pytest.mark.parametrize("name", ["adapter_config.json", "model.safetensors.index.json", "additional/chat.jinja"])
def test_a_file_too_many_is_refused(copied: tuple[Path, Path], name: str) -> None:
    """It changes what is loaded; making the step again would delete what somebody put there."""
    path = copied[1] / "teacher" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match=rf"found {name} besides, .* move it elsewhere or delete it"):
        do_steps(*copied)
    assert path.exists()


def test_notes_in_a_step_are_left_alone(copied: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    for name in ("notes.txt", "README.md", ".DS_Store", "model.safetensors.lock"):
        (copied[1] / "teacher" / name).write_text("note")
    do_steps(*copied)
    assert said(caplog) == SKIPPED
    assert (copied[1] / "teacher" / "notes.txt").read_text() == "note"


def test_what_is_damaged_is_not_pushed(copied: tuple[Path, Path]) -> None:
    assert push(copied[1], None, dry_run=True)
    config = copied[1] / "pruned" / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(PublishingError, match=r"pruned/tokenizer_config.json is not what was saved; run the recipe"):
        push(copied[1], None, dry_run=True)


def test_records_without_digests_are_read(copied: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """Of an older version: its steps are made again, and that is said."""
    path = copied[1] / "record.json"
    content = json.loads(path.read_text())
    for step in content["steps"]:
        del step["inputs"], step["files"]
        step["fingerprint"] = "of another version"
        (copied[1] / step["name"] / STEP_RECORD).write_text(json.dumps(step))
    path.write_text(json.dumps(content))
    assert [step.files for step in load_record(copied[1]).steps] == [None, None]
    do_steps(*copied)
    assert said(caplog) == [
        "teacher: made again, its record is of another version",
        "pruned: made again, its record is of another version",
    ]


def test_a_page_beside_a_graph_is_no_change_of_the_step(tmp_path: Path):
    """It is written there unless told otherwise, and nothing is loaded from it."""
    step = tmp_path / "export"
    for name in ("onnx/model.onnx", "onnx-webpage/model/model.onnx", "onnx-webpage/page.json", "onnx/config.json"):
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_text(name)
    files = {"onnx/model.onnx": file_digests(step)["onnx/model.onnx"]}
    record = StepRecord(
        name="export", kind="export", source=None, fingerprint="", settings={}, seconds=0.0, artefacts=[], files=files
    )
    assert changes_of(step, record) == ["onnx/config.json is not of the step"]


def test_where_a_cache_lies_changes_nothing(tmp_path: Path):
    """A project that moves would train again."""
    made = {"kind": "finetune", "name": "teacher", "max_steps": 1}
    student = {"kind": "distill", "name": "student", "teacher": "teacher", "student": {"layers": 2}}
    inputs = []
    for place in ("here", "there"):
        cached = {**student, "teacher_cache": f"{place}/cache"}
        recipe = load_recipe(write_tiny_recipe(tmp_path, steps=[made, cached], budget=None))
        context = RunContext(recipe, tmp_path / "out", load_sources(recipe.tasks, recipe.seed), None)
        teacher = StepRecord(
            name="teacher", kind="finetune", source=None, fingerprint="", settings={}, seconds=0.0, artefacts=[]
        )
        inputs.append(step_inputs(recipe.steps[1], {"teacher": teacher}, context))
    assert inputs[0] == inputs[1]
