"""Recipes: what is accepted, what is refused and in which words, and that nothing changes on the way out and in."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from hf_mtcompress.errors import RecipeError
from hf_mtcompress.recipe import (
    DataConfig,
    DistillStep,
    FinetuneStep,
    PruneStep,
    Recipe,
    SequenceClassificationConfig,
)
from hf_mtcompress.recipe.load import dump_recipe, json_schema, load_recipe, parse_recipe
from hf_mtcompress.recipe.text import read_yaml

RECIPE = """
name: nlu-compact
seed: 13
encoder: {path: org/encoder, max_length: 64, hub_id: org/encoder}
tasks:
  intent:
    kind: sequence-classification
    data:
      path: json
      data_dir: data/snips
      data_files: {train: train.jsonl, validation: [a.jsonl, b.jsonl]}
      splits: {test: "validation[:10%]"}
      max_rows: {train: 100}
      field: rows
    text: tokens
    label: intent
    metric: accuracy
    labels: [yes, no]
  slots: {kind: token-classification, data: intent, tokens: tokens, label: slots, metric: span_f1, weight: 0.5}
mixing: {strategy: temperature, temperature: 2.5}
fusion: {normalize: none}
training: {learning_rate: 3e-5, arguments: {lr_scheduler_kwargs: {num_cycles: 2}}}
steps:
  - {kind: finetune, name: teacher, epochs: 3}
  - {kind: distill, name: student, teacher: teacher, student: {layers: 3}, criteria: [logits], epochs: 6}
  - {kind: export, formats: [vanilla]}
  - {kind: prune, name: pruned, from: student, heads: 0.3, recover: {kind: distill, teacher: teacher, epochs: 2}}
  - {kind: quantize, from: pruned, backend: onnxruntime}
  - {kind: quantize, from: pruned, backend: bitsandbytes, bits: 4}
reference: teacher
budget: {size_mb: 16}
benchmark: {batch_sizes: [1, 8]}
publish: {repo_id: me/nlu-compact, language: [en]}
"""

TASK = {"kind": "sequence-classification", "data": {"path": "org/rows"}, "text": "text", "label": "label"}
IMAGES = {"kind": "image-classification", "data": {"path": "org/pictures"}, "image": "image", "label": "label"}


def raw() -> dict[str, Any]:
    return copy.deepcopy(read_yaml(RECIPE))


def problems(recipe: Any, *overrides: str, base_dir: Path | str = ".") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe, base_dir, overrides)
    return caught.value.problems


def small(**sections: Any) -> dict[str, Any]:
    """A recipe with one task and one step, and whatever a test adds."""
    return {
        "name": "small",
        "encoder": {"path": "org/encoder"},
        "tasks": {"mood": copy.deepcopy(TASK)},
        "steps": [{"kind": "finetune"}],
        **sections,
    }


def with_task(**changes: Any) -> dict[str, Any]:
    recipe = small()
    recipe["tasks"]["mood"].update(changes)
    return recipe


def with_steps(*steps: dict[str, Any]) -> dict[str, Any]:
    return small(steps=[{"kind": "finetune", "name": "teacher"}, *steps])


# ---- what comes out ----


def test_every_section_becomes_its_class(tmp_path: Path):
    recipe = parse_recipe(raw(), tmp_path)
    intent = recipe.tasks["intent"]
    assert isinstance(intent, SequenceClassificationConfig)
    assert intent.labels == ("yes", "no"), "YAML 1.1 would read these labels as booleans"
    assert intent.data == DataConfig(
        path="json",
        data_dir=str(tmp_path / "data/snips"),
        data_files={"train": "train.jsonl", "validation": ("a.jsonl", "b.jsonl")},
        splits={"test": "validation[:10%]"},
        max_rows={"train": 100},
        builder_arguments={"field": "rows"},
    )
    assert recipe.tasks["slots"].data == "intent"
    assert recipe.training.learning_rate == 3e-5
    assert recipe.training.arguments == {"lr_scheduler_kwargs": {"num_cycles": 2}}
    assert [step.name for step in recipe.steps] == [
        "teacher",
        "student",
        "export",
        "pruned",
        "quantize",
        "quantize_2",
    ]
    pruned = recipe.steps[3]
    assert isinstance(pruned, PruneStep)
    assert pruned.source == "student"
    assert pruned.recover == DistillStep(teacher="teacher", epochs=2.0)
    assert recipe.steps[0] == FinetuneStep(name="teacher", epochs=3.0)


def test_config_classes_stay_plain_dataclasses():
    """Were they pydantic's, everything that reads a recipe would depend on it."""
    assert type(Recipe).__module__ == "builtins"
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_recipe(small()).name = "other"  # pyright: ignore[reportAttributeAccessIssue] -- that is the point


def test_dumped_recipe_reads_back_the_same(tmp_path: Path):
    """A saved recipe that reads back differently would not be the one the model was made with."""
    recipe = parse_recipe(raw(), tmp_path)
    text = dump_recipe(recipe)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "elsewhere/recipe.yaml") == recipe
    assert parse_recipe(read_yaml(text), "/") == recipe
    assert dump_recipe(parse_recipe(read_yaml(text))) == text


def test_dump_spells_keys_as_the_user_does(tmp_path: Path):
    data = read_yaml(dump_recipe(parse_recipe(raw(), tmp_path)))
    assert data["steps"][3] == {
        "kind": "prune",
        "name": "pruned",
        "from": "student",
        "heads": 0.3,
        "recover": {"kind": "distill", "epochs": 2.0, "teacher": "teacher"},
    }
    assert data["format_version"] == 1
    assert "mixing" in data
    assert "format_version" in data
    assert "budget" in data
    assert data["steps"][4] == {"kind": "quantize", "name": "quantize", "from": "pruned", "backend": "onnxruntime"}


@pytest.mark.parametrize("word", ["yes", "null", "1e5", "3", "0x1f", "2020-01-01", "12:30", "a: b", "- x", "~", ""])
def test_words_survive_a_dump(word: str):
    """A label `1e5` or `no` that came back as a number or a boolean would match no row."""
    recipe = parse_recipe(with_task(labels=["other", word]))
    assert parse_recipe(read_yaml(dump_recipe(recipe))) == recipe


def test_portable_dump_holds_no_local_path(tmp_path: Path):
    """The recipe is uploaded with the model."""
    recipe = raw()
    recipe["encoder"] = {"path": str(tmp_path / "models/tiny")}
    recipe["steps"][1].update(teacher=str(tmp_path / "big"))
    recipe["steps"][0]["arguments"] = {"logging_dir": str(tmp_path / "logs")}
    recipe["tasks"]["intent"]["data"]["data_files"]["test"] = str(tmp_path / "test.jsonl")
    parsed = parse_recipe(recipe, tmp_path)
    assert str(tmp_path) in dump_recipe(parsed)
    text = dump_recipe(parsed, portable=True)
    assert str(tmp_path) not in text
    data = read_yaml(text)
    assert data["encoder"]["path"] == "tiny"
    assert data["tasks"]["intent"]["data"]["data_dir"] == "snips"
    assert data["tasks"]["intent"]["data"]["data_files"]["test"] == "test.jsonl"
    assert data["steps"][1]["teacher"] == "big"
    named = parse_recipe(recipe, tmp_path, ["encoder.hub_id=org/tiny"])
    assert read_yaml(dump_recipe(named, portable=True))["encoder"]["path"] == "org/tiny"


def test_a_key_without_value_counts_as_left_out():
    recipe = parse_recipe(small(budget=None, mixing=None, training={"epochs": None}))
    assert recipe == parse_recipe(small())


def test_automatic_names_step_aside_for_given_ones():
    recipe = parse_recipe(small(steps=[{"kind": "finetune"}, {"kind": "finetune", "name": "finetune"}]))
    assert [step.name for step in recipe.steps] == ["finetune_2", "finetune"]


# ---- overrides ----


def test_overrides_reach_every_depth(tmp_path: Path):
    recipe = parse_recipe(
        raw(),
        tmp_path,
        [
            "seed=7",
            "steps.0.epochs=0.5",
            "steps.student.student.layers=[0, 2]",
            "steps.pruned.recover=null",
            "tasks.intent.labels.1=maybe",
            "benchmark.threads=2",
            "training.learning_rate=1e-4",
            "steps.teacher.arguments.optim=sgd",
        ],
    )
    assert recipe.seed == 7
    assert recipe.steps[0] == FinetuneStep(name="teacher", epochs=0.5, arguments={"optim": "sgd"})
    student, pruned = recipe.steps[1], recipe.steps[3]
    assert isinstance(student, DistillStep)
    assert student.student is not None
    assert student.student.layers == (0, 2)
    assert isinstance(pruned, PruneStep)
    assert pruned.recover is None
    assert recipe.tasks["intent"].labels == ("yes", "maybe")
    assert recipe.benchmark.threads == 2
    assert recipe.training.learning_rate == 1e-4


def test_overrides_reach_steps_by_their_automatic_name():
    recipe = parse_recipe(small(), overrides=["steps.finetune.epochs=2"])
    assert recipe.steps[0] == FinetuneStep(name="finetune", epochs=2.0)


def test_overrides_do_not_change_the_mapping_given():
    recipe = small()
    parse_recipe(recipe, overrides=["encoder.path=other/encoder"])
    assert recipe == small()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': expected section.key=value, such as encoder.max_length=64"),
        (".seed=1", "override '.seed=1': expected section.key=value"),
        ("steps.techer.epochs=1", "steps: no step named 'techer', did you mean 'teacher'?"),
        ("steps.9.epochs=1", "steps: expected an index below 6, found 9"),
        ("name.first=x", "'name' is 'nlu-compact', not a section with keys"),
        ("seed=[1", "the value is not YAML"),
        ("encodr.path=x", "encodr: unknown key, did you mean 'encoder'?"),
    ],
)
def test_bad_overrides(override: str, message: str):
    assert any(message in problem for problem in problems(raw(), override))


# ---- paths ----


def test_paths_start_at_the_recipe_and_overrides_at_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Mixed up, a run would read other rows than the ones that were named."""
    (tmp_path / "recipes/encoder").mkdir(parents=True)
    (tmp_path / "here/encoder").mkdir(parents=True)
    (tmp_path / "here/rows.json").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    recipe = raw()
    recipe["encoder"]["path"] = "encoder"
    file = tmp_path / "recipes/recipe.yaml"
    file.write_text(dump_text(recipe))

    def intent(recipe: Recipe) -> DataConfig:
        data = recipe.tasks["intent"].data
        assert isinstance(data, DataConfig)
        return data

    own = load_recipe("../recipes/recipe.yaml")
    assert own.encoder.path == str(tmp_path / "recipes/encoder")
    assert intent(own).data_dir == str(tmp_path / "recipes/data/snips")
    assert intent(own).path == "json"
    given = load_recipe(file, ["encoder.path=encoder", "tasks.intent.data.data_dir=data"])
    assert given.encoder.path == str(tmp_path / "here/encoder")
    assert intent(given).data_dir == str(tmp_path / "here/data")
    whole = load_recipe(file, ["tasks.intent.data={path: json, data_files: {train: rows.json, test: 'https://x.y/z'}}"])
    assert intent(whole).data_files == {"train": str(tmp_path / "here/rows.json"), "test": "https://x.y/z"}
    existing = load_recipe(file, ["tasks.intent.data.data_files.train=rows.json"])
    assert intent(existing).data_files == {
        "train": str(tmp_path / "here/rows.json"),
        "validation": ("a.jsonl", "b.jsonl"),
    }


def dump_text(recipe: Any) -> str:
    from hf_mtcompress.recipe.text import write_yaml

    return write_yaml(recipe)


def test_names_of_the_hub_stay_as_they_are(tmp_path: Path):
    recipe = small()
    assert parse_recipe(recipe, tmp_path).encoder.path == "org/encoder"
    (tmp_path / "org/encoder").mkdir(parents=True)
    assert parse_recipe(recipe, tmp_path).encoder.path == str(tmp_path / "org/encoder"), "a folder that exists wins"
    recipe["encoder"]["path"] = "./missing"
    assert parse_recipe(recipe, tmp_path).encoder.path == str(tmp_path / "missing")
    recipe["encoder"]["path"] = "/missing"
    assert parse_recipe(recipe, tmp_path).encoder.path == "/missing"


def test_parts_of_a_hub_data_set_are_not_local_paths(tmp_path: Path):
    """`data_dir` of a Hub data set names a folder inside its repository."""
    recipe = with_task(data={"path": "org/rows", "data_dir": "english", "data_files": "part.json"})
    data = parse_recipe(recipe, tmp_path).tasks["mood"].data
    assert data == DataConfig(path="org/rows", data_dir="english", data_files="part.json")


def test_teacher_may_be_a_saved_model(tmp_path: Path):
    (tmp_path / "saved").mkdir()
    step = {"kind": "distill", "teacher": "saved", "student": {"path": "saved"}}
    distill = parse_recipe(with_steps(step), tmp_path).steps[1]
    assert isinstance(distill, DistillStep)
    assert distill.teacher == str(tmp_path / "saved")
    assert distill.student is not None
    assert distill.student.path == str(tmp_path / "saved")
    hub = parse_recipe(with_steps({**step, "teacher": "org/saved"})).steps[1]
    assert isinstance(hub, DistillStep)
    assert hub.teacher == "org/saved"


# ---- other spellings ----


def test_one_encoder_in_the_plural_spelling():
    recipe = small()
    recipe["encoders"] = {"main": recipe.pop("encoder")}
    assert parse_recipe(recipe) == parse_recipe(small())
    overridden = parse_recipe(recipe, overrides=["encoder.max_length=8"])
    assert overridden.encoder.max_length == 8
    assert parse_recipe(recipe, overrides=["encoders.main.max_length=8"]) == overridden


def test_several_encoders_are_refused_in_words():
    recipe = small()
    recipe["encoders"] = {"text": recipe.pop("encoder"), "image": {"path": "org/other"}}
    assert problems(recipe) == ["encoders: expected one encoder, found 2 (text, image); keep one of them"]


def test_builder_arguments_that_look_misspelt():
    """`delimter` may be a builder's business, `data_dri` is not; the explicit section takes both."""
    assert problems(with_task(data={"path": "csv", "data_dri": "x"}))[0].startswith(
        "tasks.mood.data.data_dri: unknown key, did you mean 'data_dir'?"
    )
    for data in ({"sep": ";", "names": ["a"]}, {"builder_arguments": {"sep": ";", "names": ["a"]}}):
        built = parse_recipe(with_task(data={"path": "csv", **data})).tasks["mood"].data
        assert isinstance(built, DataConfig)
        assert built.builder_arguments == {"sep": ";", "names": ["a"]}


# ---- what is refused ----


def test_all_mistakes_at_once(tmp_path: Path):
    """One at a time, a user would run the command once for each."""
    recipe = raw()
    recipe["sed"] = 1
    del recipe["encoder"]["path"]
    recipe["tasks"]["intent"]["kind"] = "sequence-clasification"
    recipe["tasks"]["Average"] = recipe["tasks"].pop("slots")
    recipe["mixing"]["temperature"] = 0
    recipe["steps"][1]["teachr"] = recipe["steps"][1].pop("teacher")
    recipe["steps"][3]["heads"] = 1.5
    recipe["steps"][4]["from"] = "nobody"
    recipe["reference"] = "quantize"
    found = problems(recipe, "steps.0.epochs=many")
    expected = [
        "sed: unknown key, did you mean 'seed'?",
        "encoder.path: is required: expected text",
        "tasks.intent.kind: unknown kind 'sequence-clasification', did you mean 'sequence-classification'?",
        "tasks.Average: expected a task name of lower-case letters",
        "mixing.temperature: expected a number above 0, found 0.0",
        "steps.1 (distill).teachr: unknown key, did you mean 'teacher'?",
        "steps.3 (prune).heads: expected a fraction of at least 0 and below 1, found 1.5",
        "steps.4 (quantize).from: no step makes 'nobody'",
        "steps.0 (finetune).epochs: expected a number, found 'many'",
        "reference: a quantize step is a leaf, nothing can start from 'quantize'",
    ]
    for line in expected:
        assert any(problem.startswith(line) for problem in found), line
    assert len(found) == len(expected)


def test_message_names_the_file_and_counts(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("name: x\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(caught.value).splitlines() == [
        f"3 problems in {file}:",
        "  - encoder: is required: expected a section",
        "  - tasks: is required: expected a section by name",
        "  - steps: is required: expected a list of sections",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [x", "not valid YAML: line 1, column 9"),
        ("name: x\nseed: 1\nname: y", "line 3, column 1: the key 'name' is written twice in one section"),
        ("- a\n- b", "expected a mapping with the sections name, encoder, tasks and steps, found ['a', 'b']"),
        ("", "expected a mapping with the sections name, encoder, tasks and steps, found nothing"),
        ("just words", "expected a mapping with the sections name, encoder, tasks and steps, found 'just words'"),
    ],
)
def test_text_that_is_no_recipe(tmp_path: Path, text: str, message: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(RecipeError, match="there is no file"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="found the folder"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(tmp_path / "binary.yaml")


def test_newer_format_is_refused_alone():
    """What else looks wrong in it may be right in the newer format."""
    found = problems(small(format_version=2, unheard_of=1))
    assert len(found) == 1
    assert "the recipe needs a version of hf_mtcompress that reads format 2" in found[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nobody"}, "tasks.mood.data: expected a section or the name of another task, found 'nobody'"),
        ({"data": "mood"}, "tasks.mood.data: expected a section or the name of another task, found itself"),
        ({"data": 3}, "tasks.mood.data: expected a section or text, found 3"),
        ({"data": {"path": "json", "splits": {"tset": "x"}}}, "tasks.mood.data.splits: expected one of train, "),
        ({"data": {"path": "json", "max_rows": {"train": 0}}}, "tasks.mood.data.max_rows.train: expected a whole"),
        ({"data": {"path": "json", "data_files": 3}}, "tasks.mood.data.data_files: expected text or a list of texts"),
        ({"labels": ["a"]}, "tasks.mood.labels: expected at least 2 labels, found 1"),
        ({"labels": ["a", "b", "a"]}, "tasks.mood.labels: expected different labels, found 'a' twice"),
        ({"labels": ["a", 1]}, "tasks.mood.labels.1: expected text, found 1; put it in quotes"),
        ({"labels": "a"}, "tasks.mood.labels: expected a list of texts, found 'a'"),
        ({"metric": "acuracy"}, "has no primary metric 'acuracy', did you mean 'accuracy'?"),
        ({"metric": "span_f1"}, "tasks.mood.metric: a single label classification task has no primary metric"),
        ({"problem_type": "regression", "labels": ["a", "b"]}, "tasks.mood.labels: a regression has no labels"),
        ({"problem_type": "regression", "label_smoothing": 0.1}, "tasks.mood.label_smoothing: a regression task has"),
        ({"problem_type": "regresion"}, "found 'regresion'; did you mean 'regression'?"),
        ({"pooling": "mean"}, "tasks.mood.pooling: a stock head has its own pooling"),
        ({"class_weights": [1, 2, 3], "labels": ["a", "b"]}, "expected one weight for each of the 2 labels, found 3"),
        ({"class_weights": [1, -2]}, "tasks.mood.class_weights.1: expected a number above 0, found -2.0"),
        ({"weight": -1}, "tasks.mood.weight: expected a number of at least 0, found -1.0"),
        ({"weight": True}, "tasks.mood.weight: expected a number or a section, found true"),
        ({"weight": float("nan")}, "tasks.mood.weight: expected a number of at least 0, found nan"),
        ({"label_smoothing": 1}, "tasks.mood.label_smoothing: expected a fraction of at least 0 and below 1"),
        ({"text": None}, "tasks.mood.text: is required: expected text"),
        ({"tokens": "x"}, "tasks.mood.tokens: unknown key"),
    ],
)
def test_bad_tasks(changes: dict[str, Any], message: str):
    found = problems(with_task(**changes))
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize("name", ["average", "loss", "keys", "items", "Mood", "2nd", "my-task", "my task", ""])
def test_bad_task_names(name: str):
    """Such a name would collide with a metric key or a method of a module, far from the recipe."""
    recipe = small()
    recipe["tasks"] = {name: recipe["tasks"]["mood"]}
    (found,) = problems(recipe)
    assert found.startswith(f"tasks.{name}: ")
    assert "rename the task" in found


@pytest.mark.parametrize(
    ("fusion", "key"),
    [
        ({"combination": "upgrad"}, "combination"),
        ({"measure_every": 5}, "measure_every"),
        ({"kind": "gradient_norm"}, "kind"),
    ],
)
@pytest.mark.parametrize("layer", [None, 1])
def test_gradients_are_not_compared_across_branches(fusion: dict[str, Any], key: str, layer: int | None):
    recipe = small() | {"fusion": fusion}
    if layer is None:
        recipe["branches"] = {"side": ["mood"]}
    else:
        recipe["tasks"]["mood"]["layer"] = layer
    (found,) = [text for text in problems(recipe) if text.startswith("fusion")]
    assert found.startswith(f"fusion.{key}: compares the tasks' gradients where all of them read the encoder, found ")
    assert found.endswith("compare them in a recipe without these")


def test_where_to_look_needs_when():
    (found,) = problems(small() | {"fusion": {"measure_on": "validation"}})
    assert found.startswith("fusion.measure_on: says where to look, found no measure_every")


def test_rows_are_not_shared_in_a_chain():
    recipe = small()
    mood = recipe["tasks"]["mood"]
    recipe["tasks"] |= {"second": {**mood, "data": "mood"}, "third": {**mood, "data": "second"}}
    (found,) = problems(recipe)
    assert found.startswith("tasks.third.data: expected a task with data of its own")
    assert found.endswith("say data: mood")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"kind": "prun"}, "steps.1.kind: unknown kind 'prun', did you mean 'prune'?"),
        ({}, "steps.1.kind: is required"),
        ("prune", "steps.1: expected a section with kind: finetune | pretrain | distill"),
        ({"kind": "finetune", "name": "teacher"}, "steps.1 (finetune).name: 'teacher' is taken by steps.0"),
        ({"kind": "finetune", "name": "assets"}, "steps.1 (finetune).name: 'assets' is a reserved name"),
        ({"kind": "finetune", "name": "My step"}, "steps.1 (finetune).name: expected lower-case letters"),
        ({"kind": "finetune", "source": "teacher"}, "steps.1 (finetune).source: unknown key, did you mean 'from'?"),
        ({"kind": "finetune", "from": "techer"}, "steps.1 (finetune).from: no step makes 'techer', did you mean"),
        ({"kind": "finetune", "from": "finetune"}, "steps.1 (finetune).from: 'finetune' comes later"),
        ({"kind": "finetune", "learning_rate": 0}, "learning_rate: expected a number above 0, found 0.0"),
        ({"kind": "finetune", "batch_size": 1.5}, "batch_size: expected a whole number, found 1.5"),
        ({"kind": "finetune", "keep": "bst"}, "keep: expected one of best, last, found 'bst'; did you mean 'best'?"),
        (
            {"kind": "distill", "teacher": "nobody", "student": {"layers": 2}},
            "steps.1 (distill).teacher: no step makes 'nobody', expected one of teacher (a saved model is named by",
        ),
        (
            {"kind": "distill", "teacher": "teacher", "student": {"layers": 2}, "from": "teacher"},
            "steps.1 (distill): expected 'from' or 'student', found both",
        ),
        ({"kind": "distill", "teacher": "teacher"}, "'teacher' would be both teacher and student"),
        ({"kind": "distill", "teacher": "teacher", "student": {}}, "or config (of fresh weights), found none"),
        (
            {"kind": "distill", "teacher": "teacher", "student": {"layers": 2, "path": "x/y"}},
            "or config (of fresh weights), found layers and path",
        ),
        ({"kind": "distill", "teacher": "teacher", "student": {"layers": 0}}, "student.layers: expected at least 1"),
        ({"kind": "distill", "teacher": "teacher", "student": {"layers": [1, 1]}}, "expected different layers"),
        (
            {"kind": "distill", "teacher": "teacher", "student": {"layrs": 1}},
            "student.layrs: unknown key, did you mean",
        ),
        (
            {"kind": "distill", "teacher": "teacher", "student": {"layers": 2}, "criteria": []},
            "steps.1 (distill).criteria: expected at least one word and none twice",
        ),
        (
            {"kind": "distill", "teacher": "teacher", "student": {"layers": 2}, "criteria": ["logit"]},
            "steps.1 (distill).criteria.0: unknown word 'logit', did you mean 'logits'?",
        ),
        (
            {"kind": "distill", "teacher": "teacher", "student": {"layers": 2}, "temperature": 2},
            "temperature: unknown key",
        ),
        (
            {"kind": "prune"},
            "steps.1 (prune): removes nothing; expected heads, feed_forward, layers, width, compute or latency above 0",
        ),
        (
            {"kind": "prune", "feed_forward": 1},
            "feed_forward: expected a fraction of at least 0 and below 1, found 1.0",
        ),
        (
            {"kind": "prune", "heads": 0.5, "recover": {"kind": "finetune", "from": "teacher"}},
            "steps.1 (prune).recover.from: recovery belongs to its step",
        ),
        (
            {"kind": "prune", "heads": 0.5, "recover": {"kind": "distill", "teacher": "nobody"}},
            "steps.1 (prune).recover.teacher: no step makes 'nobody'",
        ),
        ({"kind": "prune", "heads": 0.5, "recover": {"epochs": 1}}, "steps.1 (prune).recover.kind: is required"),
        (
            {"kind": "quantize", "backend": "onnxruntime", "embeddings": True},
            "embeddings: is for backend",
        ),
        ({"kind": "quantize", "backend": "bitsandbytes", "quant_type": "fp4"}, "quant_type: is about 4 bits"),
        ({"kind": "prune", "width": 1.5}, "width: expected a fraction of at least 0 and below 1, found 1.5"),
        (
            {"kind": "prune", "width": 0.5, "layers": 1, "importance": "fisher"},
            "width: stands alone in its step, found layers, importance too; write two prune steps",
        ),
        ({"kind": "prune", "compute": 1}, "compute: expected a fraction of at least 0 and below 1, found 1.0"),
        ({"kind": "prune", "compute": 0.5, "heads": 0.5}, "compute: chooses heads and neurons"),
        ({"kind": "prune", "heads": 0.5, "length": 8}, "length: is what compute is counted at"),
        ({"kind": "prune", "compute": 0.5, "length": 0}, "length: expected a whole number of at least 1, found 0"),
        ({"kind": "prune", "heads": 0.5, "rearrange": True}, "rearrange: needs the derivatives of importance: fisher"),
        (
            {"kind": "prune", "heads": 0.5, "combine": "max", "importance": "random"},
            "combine: is about importance that is measured for each task, found importance: random",
        ),
        ({"kind": "prune", "heads": 0.5, "combine": "maxmin"}, "found 'maxmin'; did you mean 'max_min'?"),
        (
            {"kind": "prune", "heads": 0.5, "shape": "vanilla"},
            "heads: plain transformers knows no width of heads; remove the key, or shape",
        ),
        ({"kind": "prune", "heads": 0.5, "importance": "fischer"}, "found 'fischer'; did you mean 'fisher'?"),
        ({"kind": "prune", "heads": 0.5, "repair": "all"}, "repair: expected true or false, found 'all'"),
        ({"kind": "quantize"}, "steps.1 (quantize).backend: is required: expected one of bitsandbytes, torchao, onnx"),
        ({"kind": "quantize", "backend": "onnxruntime", "bits": 5}, "bits: expected one of 16, 8, 4, mixed, found 5"),
        ({"kind": "quantize", "backend": "onnxruntime", "bits": 3}, "bits: expected one of 16, 8, 4, mixed, found 3"),
        ({"kind": "quantize", "backend": "bitsandbytes", "bits": 16}, "bits: backend bitsandbytes has 8 and 4 bits"),
        ({"kind": "quantize", "backend": "torchao", "bits": 4}, "bits: backend torchao has 8 bits; others need"),
        ({"kind": "quantize", "backend": "torchao", "embeddings": True}, "embeddings: is for backend: bitsandbytes"),
        (
            {"kind": "quantize", "backend": "openvino", "bits": "mixed"},
            "bits: backend openvino has 8 bits; others",
        ),
        (
            {"kind": "quantize", "backend": "onnxruntime", "bits": "mixed"},
            "expected something to choose the bits by: 'mixed: {size_mb: ...}', 'retention' or",
        ),
        (
            {"kind": "quantize", "backend": "openvino", "recover": {"kind": "finetune"}},
            "recover: expected backend onnxruntime with bits 8 or 4 beside it, found openvino with 8; remove the key",
        ),
        (
            {"kind": "quantize", "backend": "onnxruntime", "recover": {"kind": "finetune"}, "calibration": {"rows": 3}},
            "calibration: training rounds as dynamic 8 bits do; remove this key, or 'recover'",
        ),
        (
            {"kind": "quantize", "backend": "onnxruntime", "recover": {"kind": "finetune", "name": "a"}},
            "recover.name: recovery belongs to its step; remove the key",
        ),
        (
            {"kind": "quantize", "backend": "onnxruntime", "mixed": {"size_mb": 1}},
            "mixed: expected backend onnxruntime with bits mixed beside it, found onnxruntime with 8; remove the key",
        ),
        (
            {"kind": "quantize", "backend": "onnxruntime", "bits": "mixed", "mixed": {"size_mb": 1, "choices": [4, 5]}},
            "mixed.choices.1: expected one of 4, 8, 16, 32, found 5",
        ),
        (
            {"kind": "quantize", "backend": "onnxruntime", "bits": "mixed", "mixed": {"size_mb": 1, "choices": [4, 4]}},
            "mixed.choices: expected at least one number of bits, each once, found [4, 4]",
        ),
        (
            {"kind": "quantize", "backend": "onnxruntime", "bits": "mixed", "mixed": {"size_mb": 0}},
            "mixed.size_mb: expected a number above 0, found 0",
        ),
        (
            {"kind": "quantize", "backend": "onnxruntime", "bits": 8, "block_size": 32},
            "block_size: expected backend onnxruntime with bits 4 or mixed beside it, found onnxruntime with 8",
        ),
        (
            {"kind": "quantize", "backend": "onnxruntime", "bits": 4, "block_size": 48},
            "block_size: expected 16, 32, 64, 128 or 256, found 48",
        ),
        (
            {"kind": "quantize", "backend": "bitsandbytes", "float_layers": [0]},
            "float_layers: expected backend onnxruntime with bits 8 or 4 beside it, found bitsandbytes with 8",
        ),
        (
            {"kind": "quantize", "backend": "onnxruntime", "bits": 4, "calibration": {"rows": 8}},
            "calibration: expected backend onnxruntime with bits 8 beside it, found onnxruntime with 4",
        ),
        (
            {
                "kind": "quantize",
                "backend": "onnxruntime",
                "calibration": {"method": "minmax", "percentile": 99.0},
            },
            "calibration.percentile: belongs to method: percentile",
        ),
        ({"kind": "quantize", "backend": "openvino", "bits": 4}, "bits: backend openvino has 8 bits"),
        (
            {"kind": "quantize", "backend": "openvino", "calibration": {"method": "minmax"}},
            "calibration: expected 'rows' alone with backend openvino",
        ),
        ({"kind": "quantize", "backend": "openvino", "quant_type": "fp4"}, "quant_type: is for backend: bitsandbytes"),
        ({"kind": "export", "per_task": True}, "per_task: expected onnx among the formats beside it"),
        ({"kind": "export", "formats": ["transformers_js"]}, "formats: expected onnx beside transformers_js"),
        (
            {"kind": "quantize", "backend": "onnxruntime", "keep": True},
            "keep: expected 'retention' or 'worst_task_retention' beside it",
        ),
        ({"kind": "export", "formats": ["onnx", "onnx"]}, "formats: expected at least one word and none twice"),
    ],
)
def test_bad_steps(step: Any, message: str):
    found = problems(with_steps(step))
    assert len(found) == 1
    assert message in found[0]


def test_hidden_states_are_cut_before_layers_differ():
    """Otherwise it is said after the trainings before it."""
    cut = {"kind": "prune", "name": "cut", "heads": 0.5}
    (found,) = problems(with_steps(cut, {"kind": "finetune", "name": "more"}, {"kind": "prune", "width": 0.5}))
    assert "width: needs layers that are alike, but 'cut' cuts them unevenly before; put this step before" in found
    narrow = {"kind": "prune", "name": "narrow", "width": 0.5}
    alike = {"kind": "prune", "name": "alike", "shape": "vanilla", "layers": 1}
    parse_recipe(with_steps(alike, narrow, cut), ".")


def test_quantized_and_exported_steps_are_leaves():
    recipe = with_steps({"kind": "export", "name": "folders"}, {"kind": "finetune", "from": "folders"})
    (found,) = problems(recipe)
    assert found.startswith("steps.2 (finetune).from: a export step is a leaf") or "leaf" in found
    recipe = with_steps(
        {"kind": "quantize", "name": "small", "backend": "onnxruntime"},
        {"kind": "distill", "teacher": "small", "student": {"layers": 1}},
    )
    (found,) = problems(recipe)
    assert "leaf" in found


@pytest.mark.parametrize("step", [{"kind": "prune", "heads": 0.5}, {"kind": "export"}])
def test_first_step_must_train(step: dict[str, Any]):
    (found,) = problems(small(steps=[step]))
    assert "expected a finetune or distill step before it" in found


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"name": "a/b"}, "name: expected letters, digits"),
        ({"tasks": {}}, "tasks: expected a section with at least one task by name"),
        ({"steps": []}, "steps: expected a list of at least one step"),
        ({"steps": {"kind": "finetune"}}, "steps: expected a list of at least one step, found a section with kind"),
        ({"mixing": "uniform"}, "mixing: expected a section, found 'uniform'"),
        ({"budget": {"size": 3}}, "budget.size: unknown key, did you mean 'size_mb'?"),
        ({"benchmark": {"batch_sizes": [1, 0]}}, "benchmark.batch_sizes.1: expected a whole number of at least 1"),
        ({"benchmark": {"batch_sizes": []}}, "benchmark.batch_sizes: expected at least one size"),
        ({"publish": {"repo_id": "a/b/c"}}, "publish.repo_id: expected owner/name, found 'a/b/c'"),
        ({"reference": "nobody"}, "reference: no step makes 'nobody', expected one of finetune"),
        ({"format_version": "new"}, "format_version: expected a whole number, found 'new'"),
        ({"tasks": {"mood": {**TASK, "role": "auxiliary"}}}, "tasks: expected a task of role main, found auxiliary"),
        ({"tasks": {"mood": {**TASK, "weight": 0}}}, "tasks: expected a weight above 0, found 0 for all tasks"),
        ({"tasks": {"mood": {**TASK, "weight": {"from": 0, "to": 0}}}}, "expected a weight above 0, found 0 for all"),
        (
            {"tasks": {"mood": TASK, "scene": IMAGES}},
            "tasks: expected tasks that all read images or all read texts, found images in scene and texts in mood",
        ),
        ({"encoders": {"main": {"path": "x/y"}}}, "encoders: expected 'encoder' or 'encoders', found both"),
    ],
)
def test_bad_sections(sections: dict[str, Any], message: str):
    found = problems(small(**sections))
    assert len(found) == 1
    assert message in found[0]


# ---- schema ----


def test_schema_knows_the_keys_as_they_are_written():
    """An editor that suggests `source` would lead straight to an error."""
    schema = json_schema()
    assert set(schema["properties"]) == {field.name for field in dataclasses.fields(Recipe)}
    step = schema["$defs"]["FinetuneStep"]
    assert "from" in step["properties"]
    assert "source" not in step["properties"]
    assert not step["additionalProperties"]
    assert schema["$defs"]["DataConfig"]["additionalProperties"]
