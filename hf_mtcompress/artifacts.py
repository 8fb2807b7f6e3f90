"""The file names of an output folder, each written down once.

runs/NAME/
  recipe.yaml     the resolved recipe            README.md   the model card
  record.json     everything measured            assets/     pictures of the card
  STEP/           what a step saved, with step.json (its part of the record) inside
  .work/          checkpoints and half-made folders of a run that is under way

runs/NAME-compare/
  recipe.yaml     the resolved recipe            compare.json, compare.png   the differences
  MODEL/SEED/     step.json of one training, with the model if it was kept; MODEL/.work/ as above
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from hf_mtcompress.errors import ArtifactError, MTCompressError, first_line

RECIPE = "recipe.yaml"
RECORD = "record.json"
CARD = "README.md"
CARD_ASIDE = "README.new.md"
"""A new card beside one that somebody worked on."""
ASSETS = "assets"
STEP_RECORD = "step.json"
WORK = ".work"
DIGESTS = "digests.json"
"""In the folder of half-done things: what is known of large files, so that they are not read again."""
GRAPHS = "graphs"
"""Folder of half-done things with float graphs that several steps may quantize."""
COMPARISON = "compare.json"
COMPARISON_PICTURE = "compare.png"

TRANSFORMERS_JS = "transformers_js"
"""Folder of an export step that holds one folder per task for transformers.js."""
WEBPAGE = "webpage"
"""Folder of a run with the page that `hf-mtcompress webpage` writes."""
ONNX_TASKS = "onnx_tasks"
"""Folder of an export step that holds one ONNX folder per task."""


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `target` when the block ends, and vanishes when it fails.

    An existing `target` is replaced, so a reader sees the old folder or the new one, never a mixture.

    Raises:
        ArtifactError: the parent folder cannot be written.
    """
    scratch = target.parent / WORK / f"{target.name}.part"
    try:
        if scratch.exists():
            shutil.rmtree(scratch)
        scratch.mkdir(parents=True)
    except OSError as error:
        raise ArtifactError(
            f"expected a writable folder for '{target.name}', but {target.parent} refused it ({error.strerror}); "
            "choose another place with --output or free some space"
        ) from error
    try:
        yield scratch
        if os.path.lexists(target):
            old = target.parent / WORK / f"{target.name}.old"
            _remove(old)
            os.replace(target, old)
            try:
                os.replace(scratch, target)
            except BaseException:
                os.replace(old, target)
                raise
            _remove(old)
        else:
            os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def save_processor(processor: Any, folder: str | os.PathLike[str]) -> None:
    """Write a tokenizer or image processor such that the files tell nothing of what it read before.

    A fast tokenizer notes how it cut and padded last: a run that was interrupted would leave other files.
    """
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    processor.save_pretrained(folder)


@contextmanager
def telling_of_full_disk(folder: Path) -> Iterator[None]:
    """Turn what libraries say when nothing more can be written to `folder` into one message.

    Raises:
        ArtifactError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MTCompressError) or not _is_full(error):
            raise
        raise ArtifactError(
            f"expected room on the disk of {folder} (or of the folder for temporary files), found none left "
            f"({first_line(error)}); free some space and start the same command again, which goes on from here"
        ) from error


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        # Libraries in Rust and C++ have the words alone; torch and NumPy just find fewer bytes than they wrote.
        if any(
            words in str(error)
            for words in ("No space left", "File too large", "inline_container", "iostream error", "requested and ")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _remove(folder: Path) -> None:
    """A folder, if it is there; of a link to one, the link alone."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def write_text(target: Path, text: str) -> None:
    """Write `text` to `target` whole or not at all."""
    # Several processes may write the same file, on machines that share a folder too.
    part = target.with_name(f"{target.name}.{uuid4().hex}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise ArtifactError(
            f"expected to write '{target.name}', but {target.parent} refused it ({error.strerror}); "
            "choose another place with --output or free some space"
        ) from error
