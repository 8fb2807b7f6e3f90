"""Laws of reading data: roles are kept apart, draws repeat, labels have one order, mistakes end in one message."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image as PILImage

from hf_mtcompress.data.load import (
    CARVED_MAXIMUM,
    check_columns,
    check_labels,
    content_fingerprint,
    dataset_revision,
    infer_labels,
    load_splits,
    load_unlabelled,
)
from hf_mtcompress.errors import DataError
from hf_mtcompress.recipe import DataConfig, Role
from hf_mtcompress.tasks import SequenceClassification, TokenClassification

TEXT = "sequence-classification"
Splits = dict[Role, Dataset]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def numbered(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"row {number}", "label": number % 3} for number in range(first, first + count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of 40, 5 and 7 rows below `rows/`."""
    write_lines(tmp_path / "rows/train.jsonl", numbered(40))
    write_lines(tmp_path / "rows/dev.jsonl", numbered(5, first=100))
    write_lines(tmp_path / "rows/test.jsonl", numbered(7, first=200))
    return tmp_path


def config(**changes: Any) -> DataConfig:
    files = {"train": "train.jsonl", "dev": "dev.jsonl", "test": "test.jsonl"}
    return DataConfig(**{"path": "json", "data_dir": "rows", "data_files": files, **changes})


def texts(splits: Splits, role: Role) -> list[str]:
    return list(splits[role]["text"])


def rows(role: Role = "train", **columns: Any) -> Splits:
    return {role: Dataset.from_dict(columns)}


# --------------------------------------------------------------------------------------------------- splits and roles


def test_roles_by_common_names(folder: Path) -> None:
    """A dev split that is not recognised would be replaced by a part of train, without a word."""
    splits = load_splits(config(), folder, 0, "data")
    assert {role: len(split) for role, split in splits.items()} == {"train": 40, "validation": 5, "test": 7}
    assert texts(splits, "validation")[0] == "row 100"


def test_validation_is_carved_from_train(folder: Path) -> None:
    """Rows that are in train and in validation make early stopping blind."""
    only_train = config(data_files="train.jsonl")
    first, again, other = (load_splits(only_train, folder, seed, "data") for seed in (1, 1, 2))
    train, validation = texts(first, "train"), texts(first, "validation")
    assert set(first) == {"train", "validation"}
    assert (len(train), len(validation)) == (36, 4)
    assert sorted(train + validation) == sorted(row["text"] for row in numbered(40))
    assert texts(again, "validation") == validation
    assert texts(other, "validation") != validation
    assert train == sorted(train, key=lambda text: int(text.split()[1]))


def test_carved_part_is_capped(tmp_path: Path) -> None:
    """A tenth of a large train split would make every evaluation as long as an epoch."""
    write_lines(tmp_path / "rows/train.jsonl", numbered(10 * CARVED_MAXIMUM + 50))
    splits = load_splits(config(data_files="train.jsonl"), tmp_path, 0, "data")
    assert (len(splits["train"]), len(splits["validation"])) == (9 * CARVED_MAXIMUM + 50, CARVED_MAXIMUM)


def test_max_rows_draws_with_the_seed(folder: Path) -> None:
    """The first rows of a sorted file are one class only; a draw that differs by run cannot be repeated."""
    first, again, other = (
        texts(load_splits(config(max_rows={"train": 10}), folder, seed, "data"), "train") for seed in (1, 1, 2)
    )
    assert len(first) == 10
    assert first == again != other
    assert first != [row["text"] for row in numbered(10)]
    assert first == sorted(first, key=lambda text: int(text.split()[1]))
    capped = load_splits(config(max_rows=6), folder, 1, "data")
    assert {role: len(split) for role, split in capped.items()} == {"train": 6, "validation": 5, "test": 6}


def test_max_rows_does_not_move_rows_between_roles(folder: Path) -> None:
    """Rows left out of train by the cap must not turn up in a carved validation split of another run."""
    whole = load_splits(config(data_files="train.jsonl"), folder, 3, "data")
    capped = load_splits(config(data_files="train.jsonl", max_rows=8), folder, 3, "data")
    assert set(texts(capped, "train")) <= set(texts(whole, "train"))
    assert set(texts(capped, "validation")) <= set(texts(whole, "validation"))


def test_splits_can_be_named_and_sliced(folder: Path) -> None:
    """A mapping that is ignored would train on the wrong split."""
    splits = load_splits(config(splits={"train": "train[:50%]", "validation": "train[50%:]"}), folder, 0, "data")
    assert texts(splits, "train")[-1] == "row 19"
    assert texts(splits, "validation")[0] == "row 20"
    assert len(splits["test"]) == 7


def test_a_split_plays_one_part_only(folder: Path) -> None:
    """With test taken from dev, validating on dev as well would choose checkpoints on the test rows."""
    splits = load_splits(config(splits={"test": "dev"}), folder, 0, "data")
    assert not set(texts(splits, "validation")) & set(texts(splits, "test"))


@pytest.mark.parametrize(
    ("splits", "common"),
    [
        ({"train": "train", "validation": "train"}, "40 rows both in 'train' for train and in 'train' for validation"),
        ({"train": "train[:90%]", "validation": "train[50%:]"}, r"16 rows both in 'train\[:90%\]' for train"),
        ({"train": "train[10:]+dev", "test": "dev[4:5]"}, r"1 rows both in 'train\[10:\]\+dev' for train"),
    ],
)
def test_rows_that_play_two_roles_are_seen(folder: Path, splits: dict[Role, str], common: str) -> None:
    """A score on rows that were trained on says nothing."""
    with pytest.raises(DataError, match=f"expected splits without common rows, found {common}"):
        load_splits(config(splits=splits), folder, 0, "data")


@pytest.mark.parametrize("files", [("train.jsonl", "train.jsonl"), ("train.jsonl", "copy.jsonl")])
def test_one_file_in_two_roles_is_seen(folder: Path, files: tuple[str, str]) -> None:
    """Under another name, too."""
    shutil.copy(folder / "rows/train.jsonl", folder / "rows/copy.jsonl")
    with pytest.raises(DataError, match=f"the same content in '{files[0]}' of train and '{files[1]}' of validation"):
        load_splits(config(data_files={"train": files[0], "validation": ["dev.jsonl", files[1]]}), folder, 0, "data")


@pytest.mark.parametrize(("first", "other"), [("01", "1"), ("007", "7")])
def test_labels_that_a_table_would_merge_are_refused(tmp_path: Path, first: str, other: str) -> None:
    """Read as numbers they are one label, without a word."""
    (tmp_path / "train.csv").write_text(f"text,label\na,{first}\nb,{other}\nc,9\nd,9\n")
    table = DataConfig(path="csv", data_files="train.csv")
    with pytest.raises(DataError, match=rf"labels that stay apart, found '{re.escape(first)}' and '{other}' in column"):
        load_splits(table, tmp_path, 0, "data", ["label"])
    assert load_splits(table, tmp_path, 0, "data")["train"].num_rows == 3


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"index_col": 0}, ("1", "2")),
        ({"index_col": "id"}, ("1", "2")),
        ({"sep": ";", "thousands": ","}, ("1,000", "2,000")),
        ({"sep": ";", "decimal": ","}, ("0,5", "1,5")),
        ({}, ("7", "7.0")),
        ({}, ("7", " 7")),
    ],
)
def test_tables_with_options_of_their_own_are_read(
    tmp_path: Path, options: dict[str, Any], labels: tuple[str, str]
) -> None:
    sep = options.get("sep", ",")
    lines = [["id", "text", "label"], *([str(n), f"row {n}", labels[n % 2]] for n in range(6))]
    (tmp_path / "train.csv").write_text("".join(sep.join(line) + "\n" for line in lines))
    table = DataConfig(path="csv", data_files="train.csv", builder_arguments=options)
    assert load_splits(table, tmp_path, 0, "data", ["label"])["train"].num_rows == 5


def test_disjoint_rows_of_one_file_and_empty_files_are_no_overlap(folder: Path) -> None:
    twice = config(
        data_files={"train": "train.jsonl", "test": "train.jsonl"},
        splits={"train": "train[:80%]", "test": "test[80%:]"},
    )
    splits = load_splits(twice, folder, 0, "data")
    assert not set(texts(splits, "train")) & set(texts(splits, "test"))
    for name in ("a", "b"):
        (folder / "rows" / f"{name}.csv").write_text(f"text,label\n{name},1\n{name},2\n")
        (folder / "rows" / f"empty-{name}.csv").write_text("text,label\n")
    shards = config(path="csv", data_files={"train": ["a.csv", "empty-a.csv"], "test": ["b.csv", "empty-b.csv"]})
    assert load_splits(shards, folder, 0, "data")["test"].num_rows == 2


def test_a_field_without_a_name_is_refused(tmp_path: Path) -> None:
    """pandas takes the first field for an index then, and every column holds the one after it."""
    (tmp_path / "train.csv").write_text("text,label\nfirst,second,pos\nuno,dos,neg\n")
    with pytest.raises(
        DataError, match=r"as many fields in a row as column names, \['text', 'label'\], found one more"
    ):
        load_splits(DataConfig(path="csv", data_files="train.csv"), tmp_path, 0, "data")


@pytest.mark.parametrize(
    "pair", [("Yes", "yes"), (" x", "x"), ("01", "1"), ("\uff21", "a"), ("two  words", "two words")]
)
def test_labels_that_look_alike_are_refused(pair: tuple[str, str]) -> None:
    """A slip of the pen would be a class of its own."""
    found = rows(label=[*pair, "other"])
    with pytest.raises(DataError, match="expected labels that differ by more than capitals, spaces and leading zeros"):
        infer_labels(found, "label", TEXT, "single_label_classification", "data")


@pytest.mark.parametrize("value", [{"a": "b"}, 5.0, ["the", None], [1, 2], [["the"]]])
def test_texts_that_are_none_are_refused(value: Any) -> None:
    """A tokenizer reads the keys of a record, and fails on numbers in the midst of a run."""
    with pytest.raises(
        DataError, match=r"data: column 'text', row 0 of the train split: expected a text or a list of w"
    ):
        check_columns({"train": Dataset.from_dict({"text": [value, value]})}, ["text"], "data", texts=True)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": "tset"}, "expected the split 'tset' for test, found train, dev, test; did you mean 'test'"),
        ({"train": "everything"}, "found train, dev, test; correct it under data.splits"),
        ({"train": "train[oops]"}, r"found 'train\[oops\]'"),
        ({"train": "train[:0]"}, r"found 'train\[:0\]' \(.*no data"),
        ({"validation": "train[:4]"}, "found train in use for validation only"),
    ],
)
def test_wrong_splits_are_named(folder: Path, splits: dict[Role, str], message: str) -> None:
    """A misspelled split must not fall back to another one."""
    with pytest.raises(DataError, match=message):
        load_splits(config(splits=splits), folder, 0, "data")


def test_no_train_split(folder: Path) -> None:
    """Training on the only split there is would leave nothing to test on."""
    with pytest.raises(DataError, match="expected a split named train, found test"):
        load_splits(config(data_files={"test": "test.jsonl"}), folder, 0, "data")


def test_too_few_rows_to_carve(tmp_path: Path) -> None:
    """One row cannot be in both splits."""
    write_lines(tmp_path / "rows/train.jsonl", numbered(1))
    with pytest.raises(DataError, match="at least 2 training rows"):
        load_splits(config(data_files="train.jsonl"), tmp_path, 0, "data")


# ----------------------------------------------------------------------------------------------------- kinds of files


def test_csv_keeps_words_that_pandas_takes_for_missing(tmp_path: Path) -> None:
    """The label 'None' or the text 'null' read as a missing value would make rows unlabelled, silently."""
    (tmp_path / "train.tsv").write_text('text\tlabel\nnull\tNone\na "quoted\tNA\nc\t\n', encoding="utf-8")
    tab_separated = DataConfig(
        path="csv",
        data_files="train.tsv",
        splits={"train": "train[:2]", "validation": "train[2:]"},
        builder_arguments={"delimiter": "\t", "quoting": 3},
    )
    splits = load_splits(tab_separated, tmp_path, 0, "data")
    assert splits["train"].to_dict() == {"text": ["null", 'a "quoted'], "label": ["None", "NA"]}
    assert splits["validation"].to_dict() == {"text": ["c"], "label": [None]}
    assert infer_labels(splits, "label", TEXT, None) == ("NA", "None")


def test_image_folder_with_more_columns(tmp_path: Path) -> None:
    """Labels come from the folder names; metadata.jsonl brings the columns of further tasks on the same images."""
    for split in ("train", "test"):
        for name in ("cat", "ship"):
            for number in range(3):
                path = tmp_path / "plain" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                PILImage.new("RGB", (8, 8), (number, len(split), 0)).save(path)
        shutil.copytree(tmp_path / "plain" / split, tmp_path / "more" / split)
        kinds = {"cat": "animal", "ship": "vehicle"}
        more = [
            {"file_name": f"{name}/{number}.png", "class": name, "kind": kind}
            for name, kind in kinds.items()
            for number in range(3)
        ]
        write_lines(tmp_path / "more" / split / "metadata.jsonl", more)
    plain = load_splits(DataConfig(path="imagefolder", data_dir="plain"), tmp_path, 0, "data")
    assert infer_labels(plain, "label", "image-classification", None) == ("cat", "ship")
    assert plain["test"][0]["image"].size == (8, 8)
    both = load_splits(DataConfig(path="imagefolder", data_dir="more"), tmp_path, 0, "data")
    assert infer_labels(both, "kind", "image-classification", None) == ("animal", "vehicle")
    check_columns(both, ["image"], "data")
    assert content_fingerprint(plain) != content_fingerprint(both)


def test_folder_as_path(folder: Path) -> None:
    """`path: rows` is a folder beside the recipe, not a dataset of the Hub."""
    splits = load_splits(DataConfig(path="rows"), folder, 0, "data")
    assert {role: len(split) for role, split in splits.items()} == {"train": 40, "validation": 5, "test": 7}
    chosen = DataConfig(path="rows", data_files={"train": "test.jsonl", "validation": "dev.jsonl"})
    assert texts(load_splits(chosen, folder, 0, "data"), "train")[0] == "row 200"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data_files": {"train": "tran.jsonl"}},
            "split 'train' at .*tran.jsonl, found none; did you mean 'train.jsonl'",
        ),
        ({"data_files": {"train": "*.parquet"}}, "expected a file for split 'train' at .*, found none"),
        ({"data_dir": "row"}, "expected a folder at .*row, found none; did you mean 'rows'"),
        ({"data_dir": "row", "data_files": None}, "expected a folder at .*row, found none; did you mean 'rows'"),
        ({"data_dir": None, "data_files": None}, "expected data_files or data_dir"),
        ({"builder_arguments": {"feild": "x"}}, "found 'feild'; did you mean 'field'"),
        ({"builder_arguments": {"zzz": "x"}}, "found 'zzz'; it takes .*field"),
        ({"path": "jsn"}, "found 'jsn'.*did you mean 'json'"),
        ({"path": "someone/no-such-dataset", "data_dir": None, "data_files": None}, "found 'someone/no-such-dataset'"),
        ({"path": "./nowhere"}, "expected a folder at .*nowhere, found none"),
        ({"path": "rows/train.jsonl"}, r"found the file 'rows/train.jsonl'; write the builder there \(such as json\)"),
        ({"max_rows": 0}, "expected max_rows of at least 1, found 0"),
    ],
)
def test_mistakes_in_the_source(folder: Path, changes: dict[str, Any], message: str) -> None:
    """Each mistake in a recipe's data section is one message with what to do, not a traceback of a library."""
    with pytest.raises(DataError, match=message) as caught:
        load_splits(config(**changes), folder, 0, "task 'mood'")
    assert str(caught.value).startswith("task 'mood': expected")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", "", "found the empty file"),
        ("train.jsonl", "\n", "expected rows in every file|found a problem|found none"),
        ("train.jsonl", '{"text": "a"}\n{"text":\n', "found a problem: .*JSON"),
        ("train.csv", "text,label\n", "expected rows in the train split 'train', found none"),
        ("train.csv", 'text,label\n"a,b\n', "found a problem"),
    ],
)
def test_mistakes_in_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    """A file without rows must not end as a StopIteration, which a generator would swallow."""
    (tmp_path / name).write_text(content)
    builder = "csv" if name.endswith("csv") else "json"
    with pytest.raises(DataError, match=message):
        load_splits(DataConfig(path=builder, data_files=name), tmp_path, 0, "data")


# ---------------------------------------------------------------------------------------------------- changed content


def _packed(content: bytes, kind: str) -> bytes:
    """An archive with one file of JSON lines; of the same size for contents of one length."""
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w") as archive:
            archive.writestr("train.jsonl", content)
    else:
        with tarfile.open(fileobj=sink, mode="w") as archive:
            member = tarfile.TarInfo("train.jsonl")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return sink.getvalue()


def _parquet(text: str) -> bytes:
    sink = io.BytesIO()
    Dataset.from_dict({"text": [text] * 2}).to_parquet(sink)
    return sink.getvalue()


LINES = '{"text": "%s"}\n{"text": "b"}\n'
CHANGED: dict[str, tuple[dict[str, Any], str, Callable[[str], bytes]]] = {
    "json": ({"path": "json", "data_files": "train.jsonl"}, "train.jsonl", lambda text: (LINES % text).encode()),
    "csv": ({"path": "csv", "data_files": "*.csv"}, "train.csv", lambda text: f"text\n{text}\nb\n".encode()),
    "text": ({"path": "text", "data_dir": "."}, "train.txt", lambda text: f"{text}\nb\n".encode()),
    "parquet": ({"path": "parquet", "data_files": "train.parquet"}, "train.parquet", _parquet),
    "folder": ({"path": "."}, "train.jsonl", lambda text: (LINES % text).encode()),
    "tar": (
        {"path": "json", "data_files": "train.tar"},
        "train.tar",
        lambda text: _packed((LINES % text).encode(), "tar"),
    ),
    "zip": (
        {"path": "json", "data_files": "train.zip"},
        "train.zip",
        lambda text: _packed((LINES % text).encode(), "zip"),
    ),
    "in zip": (
        {"path": "json", "data_files": "zip://train.jsonl::train.zip"},
        "train.zip",
        lambda text: _packed((LINES % text).encode(), "zip"),
    ),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_other_content_with_the_old_time_is_read(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` tells files apart by time, and what it unpacked by path: old rows would be trained on, and scored."""
    settings, name, content = CHANGED[kind]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # else addresses of files in archives are refused
    path, found, places = tmp_path / name, [], []
    path.write_bytes(content("x"))
    before = path.stat()
    for text in ("x", "y", "x"):
        path.write_bytes(content(text))
        assert path.stat().st_size == before.st_size
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        rows = load_unlabelled(DataConfig(**settings), ["text"], tmp_path, 0, "data")
        found.append(rows[0]["text"])
        places.append(rows.cache_files[0]["filename"])
    assert found == ["x", "y", "x"]
    assert places[0] == places[2] != places[1]  # what was read once is read from the cache


def test_a_folder_that_describes_itself_is_read_so(tmp_path: Path) -> None:
    """Its card says which files are data and what the numbers in them mean."""
    write_lines(tmp_path / "own.jsonl", numbered(3))
    write_lines(tmp_path / "other.jsonl", numbered(5))
    features = "[{name: text, dtype: string}, {name: label, dtype: {class_label: {names: {'0': a, '1': b, '2': c}}}}]"
    configs = "[{config_name: default, data_files: own.jsonl}]"
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\ndataset_info: {{features: {features}}}\n---\n")
    found = load_unlabelled(DataConfig(path="."), ["text", "label"], tmp_path, 0, "data")
    assert (found.num_rows, found.features["label"]) == (3, ClassLabel(names=["a", "b", "c"]))


def test_other_pixels_with_the_old_time_are_read(tmp_path: Path) -> None:
    """Their rows are the same, paths, and so was what had been computed of them."""
    for name in ("train/red/0.png", "train/blue/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        PILImage.new("RGB", (4, 4), "red").save(tmp_path / name)
    path, settings = tmp_path / "train/red/0.png", DataConfig(path="imagefolder", data_dir=".")
    before, means = path.stat(), []
    for colour in ("red", "blue"):
        PILImage.new("RGB", (4, 4), colour).save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        rows = load_unlabelled(settings, ["image"], tmp_path, 0, "data")
        seen = rows.map(lambda row: {"mean": np.asarray(row["image"]).mean(axis=(0, 1))}, remove_columns=["image"])
        means.append({tuple(row["mean"]) for row in seen})
    assert means == [{(255, 0, 0)}, {(255, 0, 0), (0, 0, 255)}]


# -------------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_is_the_same_elsewhere(folder: Path, tmp_path: Path) -> None:
    """If place or process mattered, a repeated run would train everything again."""
    here = content_fingerprint(load_splits(config(), folder, 0, "data"))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder / "rows", elsewhere / "rows", copy_function=shutil.copyfile)
    program = (
        "import sys; from pathlib import Path; from hf_mtcompress.recipe import DataConfig\n"
        "from hf_mtcompress.data.load import content_fingerprint, load_splits\n"
        f"config = {config()!r}\n"
        "print(content_fingerprint(load_splits(config, Path(sys.argv[1]), 0, 'data')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(elsewhere)],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [here]


def test_fingerprint_sees_every_change() -> None:
    """A change that it overlooks would leave the results of the old data in place."""

    def base(**changes: Any) -> Splits:
        return rows(**{"text": ["a", "b"], "label": [0, 1], **changes})

    label = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    swapped = Features({"text": Value("string"), "label": ClassLabel(names=["y", "x"])})
    variants: list[Splits] = [
        base(),
        base(text=["a", "c"]),
        base(label=[1, 0]),
        base(label=[0, None]),
        {"validation": base()["train"]},
        {"train": base()["train"], "test": base()["train"]},
        {"train": base()["train"].select([1, 0])},
        {"train": base()["train"].rename_column("text", "body")},
        {"train": base()["train"].cast(label)},
        {"train": base()["train"].cast(swapped)},
    ]
    assert len({content_fingerprint(variant) for variant in variants}) == len(variants)


def test_fingerprint_ignores_how_rows_are_stored() -> None:
    """Rows behind an index, in several chunks or in one table are the same rows."""
    plain = Dataset.from_dict({"text": [f"t{number}" for number in range(2500)]})
    picked = Dataset.from_dict({"text": ["x", *plain["text"]]}).select(range(1, 2501))
    assert content_fingerprint({"train": plain}) == content_fingerprint({"train": picked})
    assert content_fingerprint({"train": plain}) == content_fingerprint({"train": picked.flatten_indices()})


def test_revision_of_hub_data() -> None:
    """The card names the commit that the rows came from."""
    splits = rows(text=["a"])
    assert dataset_revision(splits) is None
    commit = "0123456789abcdef0123456789abcdef01234567"
    splits["train"].info.download_checksums = {f"hf://datasets/me/rows@{commit}/train.parquet": {}}
    assert dataset_revision(splits) == commit


# ------------------------------------------------------------------------------------------------- columns and labels


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["b", "a", None, "b"], ("a", "b")),
        ([10, 2, -100, 1], ("1", "2", "10")),
        ([1.0, 0.0, None], ("0", "1")),
        ([True, False, True], ("False", "True")),
    ],
)
def test_labels_are_sorted_values(values: list[Any], labels: tuple[str, ...]) -> None:
    """Another order on another machine would swap the outputs of a saved head; '10' sorts before '2' as a word."""
    assert infer_labels(rows(label=values), "label", TEXT, None) == labels


def test_labels_come_from_all_splits() -> None:
    """A label that only occurs in the test split would be an index outside of the head."""
    splits: Splits = {**rows(label=["a", "b"]), **rows("test", label=["c", "a"])}
    assert infer_labels(splits, "label", TEXT, None) == ("a", "b", "c")


def test_labels_of_a_class_feature_keep_their_order() -> None:
    """The order of the feature is what published results and other checkpoints use."""
    feature = ClassLabel(names=["neutral", "bad", "absent"])
    single = Dataset.from_dict({"label": [1, 0]}, features=Features({"label": feature}))
    listed = Dataset.from_dict({"label": [[1], [0, 1]]}, features=Features({"label": List(feature)}))
    assert infer_labels({"train": single}, "label", TEXT, None) == ("neutral", "bad", "absent")
    assert infer_labels({"train": listed}, "label", "token-classification", None) == ("neutral", "bad", "absent")


def test_labels_in_lists() -> None:
    """Whole lists taken as labels would make a class of every sentence."""
    assert infer_labels(rows(tags=[["O", "B-x"], None, ["I-x"]]), "tags", "token-classification", None) == (
        "B-x",
        "I-x",
        "O",
    )
    assert infer_labels(rows(topics=[["b"], [], ["a", "b"]]), "topics", TEXT, "multi_label_classification") == (
        "a",
        "b",
    )
    assert infer_labels(rows(score=[1.5, None]), "score", TEXT, "regression") is None


@pytest.mark.parametrize(
    ("values", "kind", "problem", "message"),
    [
        ([0, -1], TEXT, None, r"found -1 in row 1 of the train split; if the split has no labels"),
        ([0.5, 1.0], TEXT, None, "the number 0.5 in row 0.*regression"),
        ([["a"], ["b"]], TEXT, None, "expected one label in each row"),
        (["a", "b"], "token-classification", None, "expected a list of labels"),
        (["a", "a"], TEXT, None, "at least 2 different labels in column 'label', found a"),
        ([None, None], TEXT, None, "found none"),
        ([[0, 1, 0], [0, 0, 1]], TEXT, "multi_label_classification", "vectors of zeros and ones; give the names"),
        ([{"x": 1}, {"x": 2}], TEXT, None, "expected names or numbers as labels"),
    ],
)
def test_columns_without_labels(values: list[Any], kind: str, problem: str | None, message: str) -> None:
    """The unlabelled test split of a benchmark holds -1, which would otherwise become a class of its own."""
    with pytest.raises(DataError, match=message):
        infer_labels(rows(label=values), "label", kind, problem, "task 'mood'")


def test_missing_column_names_the_near_one() -> None:
    """The most common mistake of all must not end as a KeyError from deep inside."""
    splits = rows(text=["a"], label=["x"])
    expected = r"task 'mood': expected a column 'txt' in the train split, found text, label; did you mean 'text'"
    with pytest.raises(DataError, match=expected):
        check_columns(splits, ["txt"], "task 'mood'")
    with pytest.raises(DataError, match=r"expected a column 'mood'.*name one of them"):
        infer_labels(splits, "mood", TEXT, None)


def test_empty_inputs_are_found() -> None:
    """A tokenizer fails on None with a message that names neither file nor row."""
    check_columns(rows(text=["a", ""]), ["text"], "data")
    with pytest.raises(DataError, match="column 'text', found nothing in row 1 of the train split"):
        check_columns(rows(text=["a", None]), ["text"], "data")


def single(**changes: Any) -> SequenceClassification:
    return SequenceClassification("mood", **{"text": "text", "label": "label", "labels": ["angry", "calm"], **changes})


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        (single, ["calm", None, "clam"], r"task 'mood', row 2 of the train split: .*found 'clam'; did you mean 'calm'"),
        (single, [0, 1, -100, 2], "row 3 of the train split: .*found 2"),
        (single, [0, -1], "found -1"),
        (lambda: single(problem_type="multi_label_classification"), [["calm"], ["calm", "sad"]], "row 1.*found 'sad'"),
        (
            lambda: single(problem_type="regression", labels=None),
            [1.0, float("inf")],
            "expected a number.*found inf in row 1",
        ),
        (
            lambda: single(problem_type="regression", labels=None),
            ["1.0", "much"],
            "expected a number.*found 'much' in row 1",
        ),
        (
            lambda: TokenClassification("mood", tokens="text", label="label", labels=["O", "B-x"]),
            [["O"], None, ["O", "B-y"]],
            "row 2.*found 'B-y'; did you mean 'B-x'",
        ),
    ],
)
def test_labels_outside_the_list(task: Callable[[], Any], values: list[Any], message: str) -> None:
    """Found after an hour of training, or counted as another class, such a label costs the run."""
    with pytest.raises(DataError, match=message):
        check_labels(rows(label=values), task(), "task 'mood'")


def test_labels_inside_the_list() -> None:
    """Names, indices, unlabelled rows, lists and vectors are all fine."""
    check_labels(rows(label=["calm", None, "angry"]), single(), "data")
    check_labels(rows(label=[0, 1, -100]), single(), "data")
    multi = single(problem_type="multi_label_classification")
    check_labels(rows(label=[["calm"], [], ["calm", "angry"]]), multi, "data")
    check_labels(rows(label=[[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), multi, "data")
    check_labels(rows(label=[1.5, None, -3.0]), single(problem_type="regression", labels=None), "data")
