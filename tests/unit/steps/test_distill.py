"""Distill and pretrain steps of a recipe, with teachers, students and rows of every kind; tiny, in seconds."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from hf_mtcompress.cli import main
from hf_mtcompress.data import teacher_cache
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.errors import RecipeError, UnsupportedEncoderError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.runs.commands import plan
from hf_mtcompress.runs.run import do_step, prepare_output
from hf_mtcompress.steps.run_context import RunContext, recipe_reader
from hf_mtcompress.tasks import SequenceClassification
from tests.tiny import FEELING_LABELS, tiny_bpe_tokenizer, tiny_encoder, tiny_text_rows, tiny_tokenizer
from tests.tiny_recipe import write_tiny_recipe

TEACHER = {"kind": "finetune", "name": "teacher", "epochs": 2}
SHORT = {"max_steps": 3}


def run_steps(folder: Path, steps: list[dict[str, Any]], *overrides: str) -> tuple[Path, dict[str, Any]]:
    """Do the steps of a tiny recipe, without measuring; its folder and their records."""
    path = folder / "recipe.yaml"
    recipe = load_recipe(path if path.exists() else write_tiny_recipe(folder, steps=steps, reference=None), overrides)
    output = folder / "run"
    context = RunContext(recipe, output, load_sources(recipe.tasks, recipe.seed), recipe_reader(recipe))
    prepare_output(output)
    done: dict[str, Any] = {}
    for step in recipe.steps:
        done[str(step.name)] = do_step(step, done, context)
    return output, done


def test_pretraining_then_distilling_with_a_cache(tmp_path: Path) -> None:
    """The mission's two phases: the encoder first, without labels, then the tasks."""
    steps = [
        TEACHER,
        {
            "kind": "pretrain",
            "name": "general",
            "teacher": "teacher",
            "student": {"layers": 2},
            "criteria": [{"kind": "relations", "relation_heads": 4}, "embedding"],
            "teacher_cache": True,
            "arguments": {"logging_steps": 1},
            **SHORT,
        },
        {
            "kind": "distill",
            "name": "student",
            "from": "general",
            "teacher": "teacher",
            "criteria": [
                "logits",
                {"kind": "hidden", "measure": "cosine", "layers": [0, 2], "weight": {"from": 1, "to": 0}},
            ],
            "label_weight": {"from": 0.0, "to": 1.0},
            "teacher_cache": True,
            **SHORT,
        },
    ]
    output, done = run_steps(tmp_path, steps)
    for name in ("general", "student"):
        assert done[name].training["teacher_cache"]["rows"] == 48
        assert done[name].training["steps"] == 3
    assert {"loss_relations", "loss_embedding"} <= done["general"].training["log"][-1].keys()
    assert MultiTaskModel.from_pretrained(output / "student").encoder.config.num_hidden_layers == 2
    # A second run finds everything done; a changed criterion is another step.
    again = run_steps(tmp_path, steps)[1]
    assert {name: step.fingerprint for name, step in again.items()} == {
        name: step.fingerprint for name, step in done.items()
    }
    changed = run_steps(tmp_path, steps, "steps.student.criteria=[logits]")[1]
    assert changed["student"].fingerprint != done["student"].fingerprint
    assert changed["general"].fingerprint == done["general"].fingerprint


def test_gradients_are_looked_at_where_there_are_labels(tmp_path: Path) -> None:
    """On validation rows, beside a teacher; a pretrain step has no tasks to compare."""
    steps = [
        TEACHER,
        {"kind": "pretrain", "name": "general", "teacher": "teacher", "student": {"layers": 2}, **SHORT},
        {"kind": "distill", "name": "student", "from": "general", "teacher": "teacher", **SHORT},
    ]
    looks = ["fusion.measure_every=1", "fusion.measure_on=validation"]
    done = run_steps(tmp_path, steps, *looks)[1]
    reports = {name: step.interference for name, step in done.items()}
    assert reports["general"] is None
    assert reports["student"]["rows"] == "validation"
    assert reports["student"]["steps"] == 3
    assert reports["student"]["cosine"][0][1] is not None


@pytest.mark.parametrize("column", ["text", "sentence"])
def test_pretraining_on_texts_of_its_own(tmp_path: Path, column: str) -> None:
    """A pretrained encoder teaches, which has none of the tasks; other texts are another step."""
    path = write_tiny_recipe(tmp_path, steps=[TEACHER], reference=None)
    more = (
        tiny_text_rows(16, seed=9)
        .select_columns(["text"])
        .rename_column("text", "words")
        .rename_column("words", column)
    )
    lines = "".join(json.dumps(row) + "\n" for row in more)
    (tmp_path / "more.jsonl").write_text(lines)
    step = {
        "kind": "pretrain",
        "name": "general",
        "teacher": str(tmp_path / "encoder"),
        "student": {"layers": 2},
        "criteria": [{"kind": "relations", "relation_heads": 4}],
        "data": {"path": "json", "data_files": "more.jsonl"},
        "column": column,
        **SHORT,
    }
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**recipe, "steps": [step]}))
    output, done = run_steps(tmp_path, [])
    assert MultiTaskModel.from_pretrained(output / "general").encoder.config.num_hidden_layers == 2
    assert done["general"].training["mixing"] == {"mood": 2}
    (tmp_path / "more.jsonl").write_text(lines + lines)
    assert run_steps(tmp_path, [])[1]["general"].fingerprint != done["general"].fingerprint


def test_one_teacher_for_each_task_and_several_for_all(tmp_path: Path) -> None:
    steps = [
        TEACHER,
        {**TEACHER, "name": "other", "from": "teacher", "max_steps": 2},
        {
            "kind": "distill",
            "name": "born-again",
            "teachers": {"mood": "teacher", "strength": "other"},
            "student": {"layers": 2, "choose": "leave_one_out"},
            "criteria": ["logits"],
            **SHORT,
        },
        {
            "kind": "distill",
            "name": "averaged",
            "teachers": [{"path": "teacher", "weight": 2}, {"path": "other"}],
            "student": {"layers": 1, "choose": "redundancy", "heads": 0.5, "feed_forward": 0.5},
            "criteria": ["logits"],
            **SHORT,
        },
        {
            "kind": "distill",
            "name": "fresh",
            "teacher": "teacher",
            "student": {"config": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}},
            **SHORT,
        },
    ]
    output, done = run_steps(tmp_path, steps)
    assert done["born-again"].fingerprint != done["averaged"].fingerprint
    averaged = MultiTaskModel.from_pretrained(output / "averaged").encoder
    assert averaged.config.num_hidden_layers == 1
    fresh = MultiTaskModel.from_pretrained(output / "fresh").encoder
    assert (fresh.config.hidden_size, fresh.config.num_hidden_layers) == (32, 2)


def saved_teacher(
    folder: Path,
    family: str = "bert",
    labels: Sequence[str] = FEELING_LABELS,
    encoder: PreTrainedModel | None = None,
) -> MultiTaskModel:
    """A teacher of nobody's run, with the tasks of the tiny recipe and one more."""
    tasks = [
        SequenceClassification("mood", labels=list(labels)),
        SequenceClassification("strength", problem_type="regression"),
        SequenceClassification("other", labels=["a", "b"]),
    ]
    teacher = MultiTaskModel.from_encoder(encoder or tiny_encoder(family), tasks, max_length=32)
    with torch.no_grad():
        for parameter in teacher.heads.parameters():
            parameter.add_(0.1)  # a regression's bias of 0 says that nobody trained it
    if family == "modernbert":
        # With norms before its parts, a layer whose output projections are zero hands on what it gets.
        silent = find_anatomy(teacher.encoder).layers[1]
        with torch.no_grad():
            for part in (silent.attention.output, silent.feed_forward.output):
                part.weight.zero_()
    teacher.save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    return teacher


def copying(teacher: Path, student: dict[str, Any], kind: str = "distill") -> dict[str, Any]:
    """A step whose student stays what it is made of."""
    step = {"kind": kind, "name": "student", "teacher": str(teacher), "student": student, "max_steps": 1}
    # The teacher has learnt nothing.
    return {**step, "learning_rate": 1e-12, "arguments": {"probe_rows": 0}}


def test_a_layer_whose_absence_costs_nothing_is_left_out(tmp_path: Path) -> None:
    """The others cost much: the labels are the teacher's own answers."""
    teacher = saved_teacher(tmp_path / "teacher", "modernbert").eval()
    step = copying(tmp_path / "teacher", {"layers": 2, "choose": "leave_one_out"})
    write_tiny_recipe(tmp_path, steps=[step], reference=None)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    with torch.no_grad():
        inputs = tiny_tokenizer("modernbert")([row["text"] for row in rows], padding=True, return_tensors="pt")
        answers = teacher(**inputs)
    for row, mood, strength in zip(rows, answers.logits_mood.argmax(-1), answers.logits_strength, strict=True):
        row.update(label=FEELING_LABELS[int(mood)], intensity=float(strength))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, _ = run_steps(tmp_path, [])
    layers = find_anatomy(MultiTaskModel.from_pretrained(output / "student").encoder).layers
    assert all(float(layer.feed_forward.output.weight.detach().abs().max()) > 1e-3 for layer in layers)


@pytest.mark.parametrize("kind", ["distill", "pretrain"])
def test_a_student_of_a_saved_teacher_starts_with_its_answers(tmp_path: Path, kind: str) -> None:
    """A saved model does not say which columns its tasks read, and may know tasks that this run has not."""
    teacher = saved_teacher(tmp_path / "teacher").eval()
    output, _ = run_steps(tmp_path, [copying(tmp_path / "teacher", {"layers": 3}, kind)])
    student = MultiTaskModel.from_pretrained(output / "student").eval()
    assert list(student.tasks) == ["mood", "strength"]
    inputs = tiny_tokenizer()(["the happy fox sleeps"], return_tensors="pt")
    with torch.no_grad():
        own, theirs = student(**inputs), teacher(**inputs)
    for name in student.tasks:
        torch.testing.assert_close(own[f"logits_{name}"], theirs[f"logits_{name}"], atol=1e-5, rtol=0)


def test_heads_with_labels_in_another_order_are_not_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Swapped in silence, they would teach the student to answer the opposite."""
    saved_teacher(tmp_path / "teacher", labels=FEELING_LABELS[::-1])
    output, _ = run_steps(tmp_path, [copying(tmp_path / "teacher", {"layers": 2})])
    assert "new heads for mood, since the teacher has none" in caplog.text
    assert MultiTaskModel.from_pretrained(output / "student").tasks["mood"].labels == FEELING_LABELS
    path = tmp_path / "recipe.yaml"
    step = copying(tmp_path / "teacher", {"layers": 2, "choose": "leave_one_out"})
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "steps": [step]}))
    with pytest.raises(RecipeError, match="found none for mood; use redundancy"):
        run_steps(tmp_path, [])


@pytest.mark.parametrize("place", ["mixing", "arguments"])
def test_what_follows_scores_gets_them_when_the_last_weights_are_kept(tmp_path: Path, place: str) -> None:
    step = {**TEACHER, "keep": "last", "epochs": 3, "learning_rate": 1e-12, "head_learning_rate": 1e-12}
    recipe: dict[str, Any] = {"mixing": {"task_patience": 1}}
    if place == "arguments":
        step, recipe = {**step, "arguments": {"task_patience": 1}}, {}
    write_tiny_recipe(tmp_path, steps=[step], reference=None, **recipe)
    assert run_steps(tmp_path, [])[1]["teacher"].training["epochs"] == 2


@pytest.mark.parametrize("mixing", [{"task_patience": 1}, {"strategy": "score_gap"}])
def test_pretraining_has_no_scores_to_follow(tmp_path: Path, mixing: dict[str, Any]) -> None:
    """What follows scores is for the steps that have labels."""
    saved_teacher(tmp_path / "teacher")
    step = {**copying(tmp_path / "teacher", {"layers": 2}, "pretrain"), "criteria": ["relations"]}
    write_tiny_recipe(tmp_path, steps=[step], reference=None, mixing=mixing)
    assert run_steps(tmp_path, [])[1]["student"].training["steps"] == 1


@pytest.mark.parametrize("student", [{"layers": 3}, {"path": "roberta"}])
def test_steps_after_a_student_read_as_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: dict[str, Any]
) -> None:
    """A student of another checkpoint has that one's tokenizer; the recipe's would make other numbers of the words."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_bpe_tokenizer()
    encoder = tiny_encoder("roberta", vocab_size=len(tokenizer))
    encoder.save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    saved_teacher(tmp_path / "teacher", encoder=encoder)
    tokenizer.save_pretrained(tmp_path / "teacher")
    nothing = {"max_steps": 1, "learning_rate": 1e-12, "head_learning_rate": 1e-12}
    if "path" in student:
        student = {"path": str(tmp_path / "roberta")}
    _, done = run_steps(
        tmp_path,
        [
            {**copying(tmp_path / "teacher", student), **nothing, "criteria": ["logits"]},
            {"kind": "finetune", "name": "more", "from": "student", **nothing},
        ],
    )
    for name in ("student", "more"):
        assert AutoTokenizer.from_pretrained(tmp_path / "run" / name).get_vocab() == tokenizer.get_vocab()
    before, after = (done[name].artefacts[0].scores["validation"] for name in ("student", "more"))
    assert after.average == pytest.approx(before.average, abs=1e-4)


def test_trust_in_the_encoders_code_is_not_trust_in_a_students(tmp_path: Path) -> None:
    """`encoder.trust_remote_code` was said of one checkpoint; another one's code would run unasked."""
    saved_teacher(tmp_path / "teacher")
    theirs = tmp_path / "theirs"
    tiny_encoder("bert").save_pretrained(theirs)
    tiny_tokenizer().save_pretrained(theirs)
    config = json.loads((theirs / "config.json").read_text())
    config.update(model_type="strange", auto_map={"AutoConfig": "code.Strange", "AutoModel": "code.Strange"})
    (theirs / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (theirs / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Strange: pass\n")
    with pytest.raises(RecipeError, match="contains custom code"):
        run_steps(tmp_path, [copying(tmp_path / "teacher", {"path": str(theirs)})], "encoder.trust_remote_code=true")
    assert not ran.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_a_plan_runs_the_code_of_the_pinned_encoder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    """Trust was given to one commit of one checkpoint."""
    asked: list[tuple[str, Any, Any]] = []
    real = AutoConfig.from_pretrained

    def noted(path: str, **options: Any) -> Any:
        asked.append((Path(path).name, options.pop("trust_remote_code", None), options.pop("revision", None)))
        return real(path, **options)

    monkeypatch.setattr("hf_mtcompress.runs.plan.AutoConfig.from_pretrained", noted)
    steps = [
        TEACHER,
        {"kind": "distill", "name": "other", "teacher": "teacher", "student": {"path": str(tmp_path / "encoder")}},
        {"kind": "distill", "name": "own", "teacher": "teacher", "student": {"config": {"num_hidden_layers": 1}}},
    ]
    path = write_tiny_recipe(tmp_path, steps=steps, reference=None)
    plan(load_recipe(path, ["encoder.revision=abc", f"encoder.trust_remote_code={str(trusted).lower()}"]))
    assert set(asked) == {("encoder", trusted, "abc"), ("encoder", False, None)}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"teacher": "nosuch/a/b"}, "steps.student.teacher: expected a step of this recipe, or the folder or Hub id"),
        ({"teacher": "nosuch/a/b"}, "found 'nosuch/a/b', which is no folder; check the path"),
        ({"teachers": {"mood": "a/b/c"}, "teacher": None}, "steps.student.teachers: expected a step of this recipe"),
        ({"teacher": "./holder"}, "holder without a config.json; take one of those in it: teacher"),
        ({"teacher": "./encoder"}, "expected a model with a head, found a BertModel in"),
        ({"student": {"layers": 4, "choose": "redundancy"}}, "expected at most the teacher's 3 layers, found 4"),
        ({"student": {"config": {"hidden_size": 30}}}, "expected a shape that a bert encoder can have"),
        (
            {"kind": "pretrain", "teacher": "./encoder", "student": {"layers": 2, "choose": "leave_one_out"}},
            "found none for mood, strength; use redundancy",
        ),
    ],
)
def test_what_cannot_be_done_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    saved_teacher(tmp_path / "holder" / "teacher")
    with pytest.raises((RecipeError, UnsupportedEncoderError), match=re.escape(message)):
        run_steps(tmp_path, [{**copying(Path("holder/teacher"), {"layers": 2}), **step}])


def test_a_stock_teacher_with_its_own_tokenizer_and_rows_without_labels(tmp_path: Path) -> None:
    """The teacher of another family reads the texts for itself, and labels the rows that have no label."""
    path = write_tiny_recipe(tmp_path, steps=[TEACHER], reference=None)
    recipe = yaml.safe_load(path.read_text())
    more = tiny_text_rows(16, seed=9).select_columns(["text"])
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    recipe["tasks"]["mood"]["unlabelled"] = {"path": "json", "data_files": "more.jsonl"}
    recipe["steps"] = [
        TEACHER,
        {"kind": "export", "name": "plain", "formats": ["vanilla", "onnx"]},
        {
            "kind": "distill",
            "name": "student",
            "teachers": {
                "mood": str(tmp_path / "run" / "plain" / "vanilla" / "mood"),
                "strength": str(tmp_path / "run" / "plain" / "onnx"),
            },
            "student": {"path": str(tmp_path / "encoder")},
            "criteria": ["logits"],
            "teacher_cache": str(tmp_path / "cache"),
            "arguments": {"probe_rows": 0},  # nobody learns much in so few steps
            **SHORT,
        },
    ]
    path.write_text(yaml.safe_dump(recipe))
    _, done = run_steps(tmp_path, recipe["steps"])
    assert done["student"].training["teacher_cache"]["rows"] == 48 + 16
    assert len(list((tmp_path / "cache").glob("*/cache.json"))) == 1


def test_a_teacher_can_be_asked_by_parts_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines without a common folder ask a part each; the step then finds all answers."""
    monkeypatch.setattr(teacher_cache, "SHARD_ROWS", 20)
    student = {"kind": "distill", "name": "student", "teacher": "teacher", "student": {"layers": 2}, **SHORT}
    path = write_tiny_recipe(tmp_path, steps=[TEACHER, {**student, "teacher_cache": "cache"}], reference=None)
    words = ["ask-teacher", str(path), "--output", str(tmp_path / "run"), "--step", "student"]
    assert main(words) == 2
    assert "expected the step 'teacher' to be done before" in capsys.readouterr().err
    run_steps(tmp_path, [], "steps=[{kind: finetune, name: teacher, epochs: 2}]")
    capsys.readouterr()
    assert main([*words, "--part", "1/2"]) == 0
    assert capsys.readouterr().out == "2 of 3 files of answers are there\n"
    assert main([*words, "--part", "2/2"]) == 0
    assert capsys.readouterr().out == "3 of 3 files of answers are there\n"
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*/*.arrow")}
    run_steps(tmp_path, [])
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*/*.arrow")} == files
    for wrong, message in (("0/2", "such as 2/4"), ("x", "such as 2/4")):
        assert main([*words, "--part", wrong]) == 2
        assert message in capsys.readouterr().err
    assert main([*words[:-1], "studnt"]) == 2
    assert "did you mean 'student'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"criteria": ["logit"]}, "unknown word 'logit', did you mean 'logits'"),
        ({"criteria": ["logits", "logits"]}, "none twice"),
        ({"criteria": [{"kind": "hidden", "measur": "mse"}]}, "did you mean 'measure'"),
        ({"criteria": [{"kind": "logits", "temperature": 0}]}, "expected a number above 0, found 0"),
        ({"teachers": {"mood": "teacher"}}, "expected 'teacher' or 'teachers', found both"),
        ({"teacher": None}, "expected 'teacher' or 'teachers', found neither"),
        (
            {"teacher": None, "teachers": [{"path": "teacher", "weight": 0}, {"path": "teacher"}]},
            "teachers[0].weight: expected more than 0, found 0",
        ),
        ({"teacher": "techer"}, "no step makes 'techer', did you mean 'teacher'"),
        ({"student": {"layers": 2, "path": "encoder"}}, "found layers and path"),
        ({"student": {"path": "encoder", "heads": 0.5}}, "they say what of the teacher is taken"),
        ({"student": {"layers": [0, 2], "choose": "first"}}, "expected a number of layers to choose"),
        ({"label_weight": {"from": 0, "to": 2}}, "expected a share between 0 and 1, found 2"),
        ({"hidden_weight": 1.0}, "hidden_weight"),
        ({"kind": "pretrain", "criteria": ["logits"]}, "unknown word 'logits'"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: dict[str, Any], message: str
) -> None:
    whole = {"kind": "distill", "name": "student", "teacher": "teacher", "student": {"layers": 2}, **step}
    path = write_tiny_recipe(tmp_path, steps=[TEACHER, whole], reference=None)
    assert main(["validate", str(path)]) == 2
    assert message in capsys.readouterr().err
