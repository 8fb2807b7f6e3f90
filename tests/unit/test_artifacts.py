"""Laws of writing: a folder or file appears whole or not at all, and what was there stays until then."""

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from hf_mtcompress.artifacts import WORK, telling_of_full_disk, whole_folder, write_text
from hf_mtcompress.errors import ArtifactError, MTCompressError
from hf_mtcompress.locks import sole_use


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its text."""
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fill(folder: Path, word: str, names: tuple[str, ...] = ("config.json", "inner/weights")) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(word)


def fail_half_way(target: Path, error: BaseException) -> None:
    with whole_folder(target) as scratch:
        fill(scratch, "new")
        raise error


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "run" / "student"


@pytest.fixture
def existing(target: Path) -> Path:
    """A target that holds an older result, with one file more than the new one."""
    fill(target, "old", ("config.json", "inner/weights", "left"))
    return target


NEW = {"config.json": "new", "inner/weights": "new"}
OLD = {"config.json": "old", "inner/weights": "old", "left": "old"}


# ---------------------------------------------------------------------------------------------------- whole folders


def test_a_folder_appears_when_the_block_ends(target: Path) -> None:
    with whole_folder(target) as scratch:
        assert scratch.is_dir()
        fill(scratch, "new")
        assert not target.exists()
    assert contents(target) == NEW
    assert not scratch.exists()


def test_a_folder_in_use_is_refused_until_it_is_free(tmp_path: Path) -> None:
    """Two runs in one folder delete each other's checkpoints."""
    (tmp_path / WORK).mkdir()
    with sole_use(tmp_path), pytest.raises(ArtifactError, match="expected nobody else at work"), sole_use(tmp_path):
        pass
    with pytest.raises(ValueError, match="from inside"), sole_use(tmp_path):
        raise ValueError("from inside")
    with sole_use(tmp_path):
        pass


def test_a_folder_is_replaced_and_not_merged(existing: Path) -> None:
    """A file of the older model between those of the newer one would be loaded with it."""
    with whole_folder(existing) as scratch:
        fill(scratch, "new")
        assert contents(existing) == OLD
    assert contents(existing) == NEW
    assert contents(existing.parent) == {f"student/{name}": word for name, word in NEW.items()}


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_no_folder(target: Path, error: type[BaseException]) -> None:
    """Half a model looks like a finished step to the run that resumes."""
    with pytest.raises(error, match="stop"):
        fail_half_way(target, error("stop"))
    assert not target.exists()
    assert contents(target.parent) == {}


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_the_older_folder(existing: Path, error: type[BaseException]) -> None:
    with pytest.raises(error, match="stop"):
        fail_half_way(existing, error("stop"))
    assert contents(existing) == OLD
    assert contents(existing.parent) == {f"student/{name}": word for name, word in OLD.items()}


def test_a_folder_that_cannot_be_moved_leaves_the_older_one(existing: Path) -> None:
    """The older result is moved away first; it must come back when the newer one cannot take its place."""
    with pytest.raises(FileNotFoundError), whole_folder(existing) as scratch:
        shutil.rmtree(scratch)
    assert contents(existing) == OLD


def test_what_a_killed_run_left_is_thrown_away(existing: Path) -> None:
    work = existing.parent / WORK
    fill(work / "student.part", "half", ("config.json", "stale"))
    fill(work / "student.old", "older", ("config.json", "stale"))
    with whole_folder(existing) as scratch:
        assert contents(scratch) == {}
        fill(scratch, "new")
    assert contents(existing) == NEW
    assert contents(work) == {}


@pytest.mark.parametrize("there", [True, False], ids=["a folder", "nothing"])
def test_a_link_is_replaced_and_not_followed(there: bool, target: Path) -> None:
    """A step that was moved to a larger disk: what it was moved to is not ours to delete."""
    elsewhere = target.parent.parent / "elsewhere"
    target.parent.mkdir(parents=True, exist_ok=True)
    if there:
        fill(elsewhere, "mine")
    target.symlink_to(elsewhere)
    for _ in range(2):
        with whole_folder(target) as scratch:
            fill(scratch, "new")
    assert not target.is_symlink()
    assert contents(target) == NEW
    assert set(contents(elsewhere).values()) == ({"mine"} if there else set())


def test_folders_beside_each_other_do_not_meet(target: Path) -> None:
    other = target.with_name("teacher")
    with whole_folder(target) as one, whole_folder(other) as two:
        fill(one, "one")
        fill(two, "two")
    assert set(contents(target).values()) == {"one"}
    assert set(contents(other).values()) == {"two"}


def test_an_empty_block_makes_an_empty_folder(target: Path) -> None:
    with whole_folder(target):
        pass
    assert target.is_dir()
    assert contents(target) == {}


def test_a_place_that_takes_no_folder(tmp_path: Path) -> None:
    """The block must not run: training for hours before the place is tried would be lost."""
    (tmp_path / "file").write_text("mine")
    ran = False
    with (
        pytest.raises(ArtifactError, match=r"expected a writable folder for 'student', but .*refused it .*--output"),
        whole_folder(tmp_path / "file" / "student"),
    ):
        ran = True
    assert not ran
    assert contents(tmp_path) == {"file": "mine"}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="Permission denied"), whole_folder(tmp_path / "student"):
            pass
    finally:
        tmp_path.chmod(0o700)


# ------------------------------------------------------------------------------------------------------------ files


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    for text in ("one\n", "ein zweiter, länger als der erste\n", ""):
        write_text(tmp_path / "record.json", text)
        assert contents(tmp_path) == {"record.json": text}


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    """Nothing half-written may lie beside it either."""
    fill(tmp_path / "record.json", "folder", ("inside",))
    with pytest.raises(ArtifactError, match=r"expected to write 'record.json', but .*refused it \(Is a directory\)"):
        write_text(tmp_path / "record.json", "text")
    assert contents(tmp_path) == {"record.json/inside": "folder"}


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_a_file_without_a_folder(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match=r"expected to write 'record\.json'"):
        write_text(tmp_path / parent / "record.json", "text")
    assert contents(tmp_path) == {"file": "mine"}


def test_the_error_is_one_of_this_package_and_of_python() -> None:
    assert issubclass(ArtifactError, MTCompressError)
    assert issubclass(ArtifactError, OSError)


@pytest.mark.parametrize(
    "write",
    [
        lambda place: save_file({"a": torch.zeros(10**5)}, place / "a.safetensors"),
        lambda place: torch.save({"a": torch.zeros(10**5)}, place / "a.pt"),
        lambda place: (place / "a.txt").write_text("x" * 10**6),
        lambda place: np.save(place / "a.npy", np.zeros(10**6)),
        lambda place: Dataset.from_dict({"a": ["x" * 1000] * 1000}).save_to_disk(place / "rows"),
    ],
)
def test_a_full_disk_is_told_in_one_message(write: Any, tmp_path: Path) -> None:
    """Libraries say it each in its way, one of them without a word of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        with (
            pytest.raises(ArtifactError, match=r"expected room on the disk.*free some space and start the same"),
            telling_of_full_disk(tmp_path),
        ):
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="else"), telling_of_full_disk(tmp_path):
        raise RuntimeError("something else")
