"""Laws of sources: every task gets its rows and its labels, shared rows are read once, all mistakes come together."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hf_mtcompress import ImageClassification, SequenceClassification, TokenClassification
from hf_mtcompress.data.load import content_fingerprint
from hf_mtcompress.data.preprocessing import encode_groups
from hf_mtcompress.data.readers import reader_of
from hf_mtcompress.data.sources import load_sources, task_of
from hf_mtcompress.errors import RecipeError
from hf_mtcompress.recipe import (
    DataConfig,
    ImageClassificationConfig,
    SequenceClassificationConfig,
    TaskConfig,
    TokenClassificationConfig,
    WeightSchedule,
)
from tests.tiny import TAG_LABELS, tiny_text_rows, tiny_token_rows, tiny_tokenizer

SPLITS = {"train": 24, "validation": 8, "test": 6}


def write(folder: Path, name: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> DataConfig:
    files = {}
    for split, lines in rows.items():
        files[split] = f"{name}-{split}.jsonl"
        (folder / files[split]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataConfig(path="json", data_dir=str(folder), data_files=files)


@pytest.fixture
def texts(tmp_path: Path) -> DataConfig:
    return write(tmp_path, "texts", {s: list(tiny_text_rows(n, seed=n)) for s, n in SPLITS.items()})


@pytest.fixture
def words(tmp_path: Path) -> DataConfig:
    return write(tmp_path, "words", {s: list(tiny_token_rows(n, seed=n)) for s, n in SPLITS.items()})


def mood(data: DataConfig | str, **settings: Any) -> SequenceClassificationConfig:
    return SequenceClassificationConfig(**{"data": data, "text": "text", "label": "label", **settings})


def strength(data: DataConfig | str, **settings: Any) -> SequenceClassificationConfig:
    return mood(data, **{"label": "intensity", "problem_type": "regression", **settings})


def tags(data: DataConfig | str, **settings: Any) -> TokenClassificationConfig:
    return TokenClassificationConfig(**{"data": data, "tokens": "tokens", "label": "tags", **settings})


def image_folder(folder: Path) -> DataConfig:
    for split in ("train", "test"):
        for place, name in enumerate(("zebra", "ant")):
            (folder / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (number, 90 * place, len(split))).save(folder / split / name / f"{number}.png")
    return DataConfig(path="imagefolder", data_dir=str(folder))


# ------------------------------------------------------------------------------------------------------------- laws


def test_tasks_that_name_a_source_share_its_rows(texts: DataConfig) -> None:
    """Rows that are read twice are encoded twice, and trained on in batches of their own."""
    sources = load_sources(
        {"mood": mood(texts), "strength": strength("mood"), "same": mood("strength", label="same")}, 0
    )
    for role, rows in sources.splits["mood"].items():
        assert sources.splits["strength"][role] is rows
        assert sources.splits["same"][role] is rows
    assert len(set(sources.fingerprints.values())) == 1
    assert sources.configs == dict.fromkeys(("mood", "strength", "same"), texts)


def test_a_source_can_be_named_before_it_is_declared(texts: DataConfig) -> None:
    sources = load_sources({"strength": strength("mood"), "mood": mood(texts)}, 0)
    assert list(sources.tasks) == ["strength", "mood"]
    assert sources.splits["strength"]["train"] is sources.splits["mood"]["train"]


def test_sources_of_their_own(texts: DataConfig, words: DataConfig) -> None:
    sources = load_sources({"mood": mood(texts), "tags": tags(words)}, 0)
    assert {name: set(rows.column_names) for name, rows in sources.role("train").items()} == {
        "mood": {"text", "label"},
        "tags": {"tokens", "tags"},
    }
    assert sources.fingerprints == {name: content_fingerprint(splits) for name, splits in sources.splits.items()}
    assert sources.fingerprints["mood"] != sources.fingerprints["tags"]
    assert {role: len(rows) for role, rows in sources.splits["tags"].items()} == SPLITS


def test_columns_that_no_task_names_are_not_looked_at(tmp_path: Path) -> None:
    """Called like a model's inputs or our labels, they would be taken for the texts and labels of the recipe."""
    data = {
        split: [
            {**dict(row), "input_ids": [1, 2], "pixel_values": 3, "labels_mood": 0, "words": "a"}
            for row in tiny_text_rows(n, seed=n)
        ]
        for split, n in SPLITS.items()
    }
    sources = load_sources({"mood": mood(write(tmp_path, "odd", data))}, 0)
    (group,) = encode_groups(sources.tasks, sources.role("train"), reader_of(tiny_tokenizer()), "train")
    texts, labels = [row["text"] for row in data["train"]], [row["label"] for row in data["train"]]
    assert list(group.dataset["input_ids"]) == tiny_tokenizer()(texts)["input_ids"]
    assert [sources.tasks["mood"].labels[place] for place in group.dataset["labels_mood"]] == labels


def test_an_input_column_may_have_any_name(tmp_path: Path) -> None:
    rows = {
        split: [{"input_ids": row["text"], "labels_mood": row["label"]} for row in tiny_text_rows(n, seed=n)]
        for split, n in SPLITS.items()
    }
    config = mood(write(tmp_path, "odd", rows), text="input_ids", label="labels_mood")
    sources = load_sources({"mood": config}, 0)
    (group,) = encode_groups(sources.tasks, sources.role("train"), reader_of(tiny_tokenizer()), "train")
    texts = [row["input_ids"] for row in rows["train"]]
    assert list(group.dataset["input_ids"]) == tiny_tokenizer()(texts)["input_ids"]


def test_a_role_that_a_source_lacks_is_left_out(texts: DataConfig, tmp_path: Path) -> None:
    """A task without test rows has no test score; rows of another role in their place would be one."""
    short = write(tmp_path, "short", {"train": list(tiny_text_rows(20))})
    sources = load_sources({"mood": mood(texts), "short": mood(short)}, 0)
    assert set(sources.role("test")) == {"mood"}
    assert {name: len(rows) for name, rows in sources.role("validation").items()} == {"mood": 8, "short": 2}


def test_local_rows_have_no_revision(texts: DataConfig) -> None:
    assert load_sources({"mood": mood(texts)}, 0).revision("mood") is None


# ----------------------------------------------------------------------------------------------------------- labels


def test_labels_are_sorted_where_nothing_is_said(texts: DataConfig, words: DataConfig) -> None:
    """Labels in the order of the rows would differ between runs over shuffled files."""
    sources = load_sources(
        {
            "mood": mood(texts),
            "tags": tags(words),
            "topics": mood("mood", label="topics", problem_type="multi_label_classification"),
            "strength": strength("mood"),
        },
        0,
    )
    assert {name: task.labels for name, task in sources.tasks.items()} == {
        "mood": ("bad", "good", "plain"),
        "tags": tuple(sorted(TAG_LABELS)),
        "topics": ("fox", "market", "river"),
        "strength": None,
    }
    assert sources.tasks["tags"].metric == "span_f1"


def test_labels_keep_the_order_that_was_given(texts: DataConfig) -> None:
    sources = load_sources({"mood": mood(texts, labels=("plain", "bad", "good", "other"))}, 0)
    assert sources.tasks["mood"].labels == ("plain", "bad", "good", "other")


def test_labels_of_a_class_feature(tmp_path: Path) -> None:
    """The numbers in such a column are places in the names of the feature."""
    data = image_folder(tmp_path / "animals")
    config = ImageClassificationConfig(data=data, label="label")
    sources = load_sources({"animal": config}, 0)
    assert sources.tasks["animal"].labels == ("ant", "zebra")
    (problem,) = refused({"animal": ImageClassificationConfig(data=data, label="label", labels=("zebra", "ant"))})
    assert (
        "task 'animal': expected the labels in the order of column 'label' (ant, zebra), found (zebra, ant)" in problem
    )


# ------------------------------------------------------------------------------------------------ configs and tasks


def test_every_setting_reaches_the_task() -> None:
    """A key of a recipe that is dropped on the way changes nothing and says nothing."""
    shared: dict[str, Any] = {
        "label": "label",
        "labels": ("a", "b"),
        "role": "auxiliary",
        "head": "mlp",
        "pooling": "max",
        "class_weights": (1.0, 3.0),
        "label_smoothing": 0.25,
    }
    text = task_of("mood", mood("x", text_pair="pair", metric="mcc", weight=2.5, **shared))
    assert text == SequenceClassification("mood", text="text", text_pair="pair", metric="mcc", weight=2.5, **shared)
    schedule = WeightSchedule(source=0.5, to=0.0)
    word = task_of("tags", tags("x", metric="token_accuracy", weight=schedule, **shared))
    assert word == TokenClassification(
        "tags", tokens="tokens", metric="token_accuracy", weight=0.5, final_weight=0.0, **shared
    )
    image = task_of("colour", ImageClassificationConfig(data="x", image="picture", metric="macro_f1", **shared))
    assert image == ImageClassification("colour", image="picture", metric="macro_f1", **shared)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_the_problem_type_reaches_the_task(problem: Any) -> None:
    assert task_of("mood", mood("x", problem_type=problem)).problem == problem
    assert task_of("mood", ImageClassificationConfig(data="x", label="y", problem_type=problem)).problem == problem


# -------------------------------------------------------------------------------------------------------- bad input


def refused(configs: Mapping[str, TaskConfig]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_sources(configs, 0)
    return caught.value.problems


def test_all_mistakes_come_together(texts: DataConfig, words: DataConfig) -> None:
    """One mistake a run means as many runs as mistakes."""
    missing = DataConfig(path="json", data_dir=texts.data_dir, data_files={"train": "nowhere.jsonl"})
    problems = refused(
        {
            "mood": mood(texts, text="txt"),
            "strength": strength("mood", label="intensty"),
            "words": tags(words, labels=("O", "B-animal")),
            "gone": mood(missing),
            "follower": strength("gone"),
            "fine": strength("mood"),
        }
    )
    assert [problem.split(":")[0].split(",")[0] for problem in problems] == [
        "task 'gone'",
        "task 'mood'",
        "task 'strength'",
        "task 'words'",
    ]
    assert "nowhere.jsonl" in problems[0]
    assert "expected column 'txt' in the train rows" in problems[1]
    assert "did you mean 'text'" in problems[1]
    assert "did you mean 'intensity'" in problems[2]
    assert "expected one of 2 labels (O, B-animal)" in problems[3]


def test_a_column_that_only_one_split_lacks(tmp_path: Path) -> None:
    """Found before the training, not at its end."""
    rows = {split: list(tiny_text_rows(12, seed=seed)) for seed, split in enumerate(SPLITS)}
    data = write(tmp_path, "rows", rows)
    (tmp_path / "rows-test.jsonl").write_text('{"text": "the fox", "mood": "good"}\n')
    (problem,) = refused({"mood": mood(data)})
    assert "task 'mood': expected files that can be read as 'json' and have the same columns" in problem


@pytest.mark.parametrize(
    ("configs", "circle"),
    [
        ({"mood": mood("mood")}, "mood"),
        ({"mood": mood("strength"), "strength": strength("mood")}, "mood -> strength"),
    ],
)
def test_names_that_end_nowhere(configs: dict[str, TaskConfig], circle: str) -> None:
    """Followed without a look back they would never end."""
    (problem,) = refused(configs)
    assert problem == f"tasks.mood.data: expected rows in the end, found a circle {circle}"


def test_one_label_is_no_task(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "label": "a"} for number in range(12)]
    (problem,) = refused({"mood": mood(write(tmp_path, "flat", {"train": rows, "validation": rows[:6]}))})
    assert "expected at least 2 different labels in column 'label', found a" in problem


def test_a_span_metric_of_labels_without_spans(tmp_path: Path) -> None:
    rows = [{"tokens": ["the", "fox"], "tags": ["article", "noun"]}] * 12
    data = write(tmp_path, "parts", {"train": rows, "validation": rows[:6]})
    (problem,) = refused({"tags": tags(data, metric="span_f1")})
    assert "task 'tags': expected a primary metric among ['token_accuracy'], found 'span_f1'" in problem
