"""Whether something is what it was: SHA-256 of contents, the one way in which files are told apart.

Names, sizes and times say nothing of content: weights of the same shape have the same size, and a time can be put back,
copied along, or changed by a copy. So files are read. What was read once is known as long as the file keeps its size,
times and inode, as git knows it: nothing sets back the time at which an inode changed (ctime).
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from hf_mtcompress.artifacts import STEP_RECORD, WORK, write_text
from hf_mtcompress.errors import ArtifactError

_SETTLED = 2_000_000_000
"""Nanoseconds in which a file may change twice and have one time: the coarsest clock of a file system."""
_WORTH_KEEPING = 1 << 20
"""Bytes from which reading a file takes longer than looking its digest up."""
_PASSING = (".lock", ".part", ".incomplete", ".tmp", ".pyc")
"""Endings of files that come and go beside what is read."""
_NOTES = (".md", ".png", ".jpg", ".pdf", ".log")
"""Endings of files beside a model that are for readers."""
_NOTED = (STEP_RECORD, "LICENSE", "NOTICE")
_CONFIG = "config.json"

_Stamp = tuple[int, ...]
_known: dict[str, tuple[_Stamp, str]] = {}
"""By absolute path: what the file looked like when it was read, and its digest."""


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal digits.

    Raises:
        ArtifactError: the file cannot be read.
    """
    place = os.path.abspath(path)
    try:
        with open(place, "rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            if (known := _known.get(place)) is not None and known[0] == stamp:
                return known[1]
            begin = time.time_ns()
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = _stamp(os.fstat(file.fileno()))
    except OSError as error:
        raise ArtifactError(
            f"expected a file that can be read at {place}, found that it cannot ({error.strerror}); check its rights"
        ) from error
    _known.pop(place, None)
    # What changed a moment ago may have changed again while it was read. Windows has no time of an inode's change.
    if stamp == after and begin - max(stamp[1:3]) > _SETTLED and os.name != "nt":
        _known[place] = (stamp, digest)
    return digest


def file_digests(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Digests of all files in a folder and below it, by name relative to it, in order.

    Links count by what they lead to. Left out are hidden files (`.git`, `.cache`), what Python compiled, what is being
    written, and folders of runs.
    """
    return {name: file_digest(Path(folder, name)) for name in file_names(folder)}


def file_names(folder: str | os.PathLike[str]) -> list[str]:
    """The names that `file_digests` has; nothing is read."""
    return sorted(_files(Path(folder)))


def content_digest(place: str | os.PathLike[str]) -> str:
    """Digest of a file, or of a folder with a saved model: the same wherever it lies.

    Of a folder, all counts that a model may be loaded from. Texts for readers and the record of a step do not, nor do
    other models that lie inside, such as the checkpoints of its training.
    """
    if not os.path.isdir(place):
        return file_digest(place)
    names = [PurePosixPath(name) for name in file_names(place)]
    models = {name.parent for name in names if name.name == _CONFIG}
    others = models - {PurePosixPath()} if PurePosixPath() in models else set()
    read = [
        str(name)
        for name in names
        if name.suffix not in _NOTES and name.name not in _NOTED and others.isdisjoint(name.parents)
    ]
    return values_digest({name: file_digest(Path(place, name)) for name in read})


def values_digest(values: Any) -> str:
    """Digest of plain values; the order of keys does not count."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def recall(store: Path) -> None:
    """Take over what an earlier process knew of large files, as `keep` left it."""
    try:
        found = json.loads(store.read_text(encoding="utf-8"))
        if found["digest"] == values_digest(found["files"]):
            _known.update({place: (tuple(stamp), digest) for place, (stamp, digest) in found["files"].items()})
    except (OSError, ValueError, KeyError, TypeError):
        return  # the files are read again


def keep(store: Path) -> None:
    """Write down what is known of large files, for a later process."""
    files = {
        place: [stamp, digest]
        for place, (stamp, digest) in _known.items()
        if stamp[0] >= _WORTH_KEEPING and os.path.exists(place)
    }
    write_text(store, json.dumps({"digest": values_digest(files), "files": files}, indent=1))


def _stamp(found: os.stat_result) -> _Stamp:
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)


def _files(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if _is_content(Path(place, name))]
        for name in files:
            path = Path(place, name)
            if not name.startswith(".") and not name.endswith(_PASSING) and path.is_file():
                yield path.relative_to(folder).as_posix()


def _is_content(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name == "__pycache__" or (folder / WORK).is_dir():
        return False
    # A link may lead to a folder that it lies in.
    return not folder.is_symlink() or not folder.parent.resolve().is_relative_to(folder.resolve())
