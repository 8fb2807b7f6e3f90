"""The quickstart's data: right columns, groups kept together, the same draw every time, nothing half-written."""

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes/quickstart/prepare.py"
SIZES = {"train": 24, "validation": 8, "test": 12}


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_prepare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def sdist(prepare: ModuleType, tweets: bytes | None = None) -> bytes:
    """A source distribution as the real one: tweets and films stand alone, products and editorials come in groups."""
    files = {}
    for source, name in prepare.FILES.items():
        grouped = source in ("product_review", "editorial")
        lines = [
            f"{number // 4}_{number % 4}\t{number / 10 - 1}\t{source} {number}" if grouped
            else f"{number}\t{number / 10 - 1}\t{source} {number}"
            for number in range(24)
        ]  # fmt: skip
        files[f"hutto_ICWSM_2014/{name}"] = "\r\n".join(lines).encode()
    if tweets is not None:
        files[f"hutto_ICWSM_2014/{prepare.FILES['tweet']}"] = tweets
    return tar({"vaderSentiment-3.3.2/../../escape.txt": b"x", f"vaderSentiment-3.3.2/{prepare.ARCHIVE}": tar(files)})


@pytest.fixture
def ready(prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for `main` with the small source distribution in the cache, under its own hash."""
    content = sdist(prepare)
    monkeypatch.setattr(prepare, "SHA256", prepare.hashlib.sha256(content).hexdigest())
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / prepare.SDIST).write_bytes(content)
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    return [*sizes, "--out", str(tmp_path / "out" / "data"), "--cache", str(tmp_path / "cache")]


def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in SIZES}


def test_sentences_are_read(prepare: ModuleType) -> None:
    """A wrong column or a lost entity would train on broken text without any error."""
    tweets = "1\t2.5\tGood &amp; cheap  — &lt;3\r\n2\t-0.1\tHm\x85ok\r\n\r\n3\t-3\t \r\n".encode()
    found = [item for item in prepare.read_sentences(sdist(prepare, tweets)) if item.source == "tweet"]
    assert [(item.text, item.intensity, item.group) for item in found] == [
        ("Good & cheap — <3", 2.5, "tweet/1"),
        ("Hm ok", -0.1, "tweet/2"),
    ]
    assert found[0].row() == {
        "text": "Good & cheap — <3",
        "intensity": 2.5,
        "polarity": "positive",
        "source": "tweet",
    }


def test_polarity_follows_the_authors_thresholds(prepare: ModuleType) -> None:
    """+-0.05 on a scale to 1 is +-0.2 on a scale to 4, the bounds belonging to the poles."""
    found = [prepare.polarity(value) for value in (-4, -0.2, -0.19, 0, 0.19, 0.2, 4)]
    assert found == ["negative", "negative", "neutral", "neutral", "neutral", "positive", "positive"]


@pytest.mark.parametrize("line", ["1\t0.5", "1\tgood\ttext", "1\t0.5\ta\tb"])
def test_other_lines_are_refused(prepare: ModuleType, line: str) -> None:
    """Skipped lines would shrink the data silently."""
    with pytest.raises(prepare.PrepareError, match=r"in line 2 of a\.txt"):
        prepare.parse(f"1\t0.5\tfine\n{line}\n", "tweet", "a.txt")


def test_missing_file_is_named(prepare: ModuleType) -> None:
    """Another release with other contents must not end as a KeyError."""
    with pytest.raises(prepare.PrepareError, match=r"hutto_ICWSM_2014\.tar\.gz"):
        prepare.read_sentences(tar({"x/y.txt": b""}))


def test_splits_keep_groups_and_texts_apart(prepare: ModuleType) -> None:
    """Sentences of one review in train and test would flatter every score."""
    sentences = prepare.read_sentences(sdist(prepare))
    copies = [prepare.Sentence(item.text.upper(), 1.0, "editorial", "editorial/99") for item in sentences[:10]]
    splits = prepare.split([*sentences, *copies], SIZES, seed=1)
    assert {name: len(items) for name, items in splits.items()} == SIZES
    groups = [{item.group for item in items} for items in splits.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))
    texts = [item.text.casefold() for items in splits.values() for item in items]
    assert len(texts) == len(set(texts))
    for name, items in splits.items():
        assert set(Counter(item.source for item in items).values()) == {SIZES[name] // 4}


def test_draw_depends_on_the_seed_alone(prepare: ModuleType) -> None:
    """Two machines must test on the same rows; the test rows must not change with the size of train."""
    sentences = prepare.read_sentences(sdist(prepare))
    first = prepare.split(sentences, SIZES, seed=1)
    assert prepare.split(sentences, SIZES, seed=1) == first
    assert prepare.split(sentences, SIZES, seed=2)["test"] != first["test"]
    assert prepare.split(sentences, {**SIZES, "train": 8}, seed=1)["test"] == first["test"]


def test_small_sources_give_what_they_have(prepare: ModuleType) -> None:
    """Equal shares that a source cannot fill must not leave the split short."""
    assert prepare._shares({"a": 2, "b": 100, "c": 100}, 12) == {"a": 2, "b": 5, "c": 5}
    assert prepare._shares({"a": 1, "b": 1}, 12) == {"a": 1, "b": 1}
    assert sum(prepare._shares({"a": 50, "b": 50, "c": 50}, 100).values()) == 100
    sentences = prepare.read_sentences(sdist(prepare))
    with pytest.raises(prepare.PrepareError, match=r"expected 500 sentences for train, found \d+ left of 96"):
        prepare.split(sentences, {**SIZES, "train": 500}, seed=1)


def test_second_call_does_nothing(prepare: ModuleType, ready: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Data that are written anew would make a finished run start from the beginning."""
    folder = Path(ready[-3])
    assert prepare.main(ready) == 0
    assert "Wrote" in capsys.readouterr().out
    assert {name: len(items) for name, items in rows(folder).items()} == SIZES
    written = (folder / "train.jsonl").stat().st_mtime_ns
    assert prepare.main(ready) == 0
    printed = capsys.readouterr().out
    assert "Nothing to do" in printed
    assert "tweet 6" in printed
    assert (folder / "train.jsonl").stat().st_mtime_ns == written
    assert prepare.main([*ready, "--seed", "5"]) == 0
    assert "Wrote" in capsys.readouterr().out


def test_failure_leaves_what_was_there(
    prepare: ModuleType, ready: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of new and half of old data would be trained on without a word."""
    folder = Path(ready[-3])
    assert prepare.main(ready) == 0
    before = rows(folder)

    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.json, "dumps", full)
    assert prepare.main([*ready, "--seed", "5"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert rows(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_wrong_file_is_refused(prepare: ModuleType) -> None:
    """A file that an index swapped must not be read."""
    with pytest.raises(prepare.PrepareError, match=r"expected .* with SHA-256 5d7c06e0.*, found 2d711642"):
        prepare.check_hash(b"x")


def test_no_index_is_one_message(tmp_path: Path) -> None:
    """Without a network the script must say so, with exit code 2 and no folder left."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "data"), "--cache", str(tmp_path / "cache")],
        env={"PATH": "", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PIP_CACHE_DIR": str(tmp_path / "pip")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "prepare: expected pip to fetch vaderSentiment==3.3.2, but it failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("size", ["0", "-1"])
def test_sizes_are_checked(prepare: ModuleType, ready: list[str], size: str) -> None:
    """An empty split would only be noticed by the trainer."""
    assert prepare.main([*ready, "--test", size]) == 2
