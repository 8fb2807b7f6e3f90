"""Laws of digests: they follow the content and nothing else; what is known of a file is never of another content."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_mtcompress import digests
from hf_mtcompress.digests import content_digest, file_digest, file_digests, keep, recall, values_digest
from hf_mtcompress.errors import ArtifactError

ZEROS = hashlib.sha256(bytes(1 << 20)).hexdigest()


def overwrite(path: Path, content: bytes) -> None:
    """Other content of the same size with the old times, as far as anybody can put them back."""
    before = path.stat()
    path.write_bytes(content)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was read."""
    found: list[str] = []
    read = hashlib.file_digest

    def counted(file: object, *arguments: object) -> object:
        found.append(Path(file.name).name)  # type: ignore[attr-defined]  # an open file
        return read(file, *arguments)  # type: ignore[arg-type]  # as it is called

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model with files in a folder inside."""
    place = tmp_path / "model"
    for name, content in {"config.json": "{}", "model.safetensors": "weights", "shards/a.bin": "a"}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(content)
    return place


def test_a_file_has_the_digest_of_its_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert file_digest(path) == hashlib.sha256(b"content").hexdigest()
    with pytest.raises(ArtifactError, match=r"expected a file that can be read at .*nothing"):
        file_digest(tmp_path / "nothing")


def test_other_content_with_the_old_size_and_time_is_seen(tmp_path: Path) -> None:
    """Whether the file was known or had changed a moment before."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    seen = {file_digest(path)}
    overwrite(path, b"two")
    seen.add(file_digest(path))
    time.sleep(2.1)
    assert file_digest(path) in seen
    overwrite(path, b"six")
    seen.add(file_digest(path))
    other = tmp_path / "other"
    other.write_bytes(b"ten")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)
    assert len({*seen, file_digest(path)}) == 4


def test_a_file_that_rests_is_read_once(tmp_path: Path, reads: list[str]) -> None:
    """And one that has just changed every time: it could change again within one tick of the clock."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    file_digest(path)
    file_digest(path)
    assert reads == ["file", "file"]
    time.sleep(2.1)
    digest = file_digest(path)
    assert [file_digest(path), file_digest(path)] == [digest, digest]
    assert reads == ["file"] * 3


@pytest.mark.parametrize(
    ("damage", "known"),
    [
        (lambda text: text, True),
        (lambda text: text.replace(ZEROS, f"0{ZEROS[1:]}"), False),
        (lambda text: text[:-9], False),
        (lambda text: "[]", False),
    ],
)
def test_large_files_are_known_to_the_next_process(
    damage: Callable[[str], str], known: bool, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless what was written down is damaged: if that were believed, healthy models would be made again."""
    large, small, store = tmp_path / "large", tmp_path / "small", tmp_path / "digests.json"
    large.write_bytes(bytes(1 << 20))
    small.write_bytes(b"small")
    time.sleep(2.1)
    wanted = file_digest(large), file_digest(small)
    keep(store)
    store.write_text(damage(store.read_text()))
    reads.clear()
    monkeypatch.setattr(digests, "_known", {})
    recall(store)
    assert (file_digest(large), file_digest(small)) == wanted
    assert reads == (["small"] if known else ["large", "small"])
    overwrite(large, b"x" * (1 << 20))
    assert file_digest(large) != wanted[0]


def test_a_folder_is_its_content_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    """Copies, links to it, and links in it: the Hub's own folders are of links."""
    wanted = content_digest(folder)
    copied = tmp_path / "copied"
    (copied / "shards").mkdir(parents=True)
    for name in file_digests(folder):
        (copied / name).write_bytes((folder / name).read_bytes())
        os.utime(copied / name, (1, 1))
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("config.json", "model.safetensors", "shards"):
        (linked / name).symlink_to(folder / name)
    (tmp_path / "link").symlink_to(linked)
    assert {content_digest(copied), content_digest(linked), content_digest(tmp_path / "link")} == {wanted}
    overwrite(folder / "shards/a.bin", b"b")
    assert content_digest(linked) == content_digest(folder) != wanted
    assert content_digest(copied) == wanted


@pytest.mark.parametrize(
    ("name", "content", "same"),
    [
        ("model.safetensors", "Weights", False),
        ("modeling_own.py", "code", False),
        ("vocab.txt", "words", False),
        ("shards/b.bin", "b", False),
        ("README.md", "words for readers", True),
        ("step.json", "{}", True),
        (".git/HEAD", "ref", True),
        (".DS_Store", "", True),
        ("__pycache__/modeling_own.cpython-311.pyc", "", True),
        ("model.safetensors.lock", "", True),
        ("checkpoint-500/config.json", "{}", True),
        ("run/.work/run.lock", "", True),
    ],
)
def test_what_counts_in_a_folder(folder: Path, name: str, content: str, same: bool) -> None:
    """All that a model is loaded from; a run in the encoder's own folder must not change the encoder."""
    before = content_digest(folder)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    if name.endswith("config.json"):
        (path.parent / "model.safetensors").write_text("older")
    if name.startswith("run/"):
        (folder / "run" / "record.json").write_text("{}")
    assert (content_digest(folder) == before) == same


def test_files_that_change_places_are_other_files(folder: Path) -> None:
    before = content_digest(folder)
    os.rename(folder / "model.safetensors", folder / "x")
    os.rename(folder / "shards/a.bin", folder / "model.safetensors")
    os.rename(folder / "x", folder / "shards/a.bin")
    assert content_digest(folder) != before


def test_links_in_a_circle_end(folder: Path) -> None:
    before = file_digests(folder)
    (folder / "shards" / "up").symlink_to(folder)
    (folder / "gone").symlink_to(folder / "nowhere")
    assert file_digests(folder) == before


def test_values_do_not_depend_on_the_order_of_keys() -> None:
    assert values_digest({"a": 1, "b": (1, "x")}) == values_digest({"b": [1, "x"], "a": 1})
    assert values_digest({"a": 1}) != values_digest({"a": "1"})
