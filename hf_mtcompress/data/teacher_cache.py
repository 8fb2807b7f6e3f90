"""What a teacher said of rows, computed once and kept on disk as Arrow files.

FOLDER/DIGEST/
  shard-00003.arrow   the signals of some rows, whole or not there; written by whichever process took it
  shard-00003.lock    held by the process that works on it
  shard-00003.json    its digest, widths, seconds: a file that is not what was written is made again
  cache.json          when all are there: names, widths, rows, bytes, seconds

A signal is what a teacher says of one row: an array (width,), or (positions, width). Files are memory-mapped, so that a
cache may be larger than memory, and processes (or machines that share the folder) divide the shards among themselves. A
digest stands for everything the content depends on: another teacher, other rows or criteria get another folder.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast
from uuid import uuid4

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets
from tqdm.auto import tqdm

from hf_mtcompress.artifacts import write_text
from hf_mtcompress.digests import file_digest, values_digest
from hf_mtcompress.errors import ArtifactError, DataError
from hf_mtcompress.locks import share_work

logger = logging.getLogger(__name__)

Signals = dict[str, list[np.ndarray]]
"""By name of the signal: one array a row."""
Precision = Literal["float16", "float32"]
SHARD_ROWS = 256
"""Rows that are computed, and written, together."""
EXACT = "logits_"
"""Signals whose names begin so are small, and kept in float32 whatever the precision."""
_READ_TWICE = 16
"""Rows that are read twice, to find out whether they change."""
_SUMMARY = "cache.json"
_FORMAT = 2


@dataclass(frozen=True)
class CacheSummary:
    """What a finished cache holds.

    Attributes:
        widths: by name of the signal.
        positions: names of the signals with a vector for each position of the input.
        rows: how many.
        bytes: of all files.
        seconds: that the teacher needed, over all processes.
        precision: of the numbers; answers are in float32.
    """

    widths: dict[str, int]
    positions: tuple[str, ...]
    rows: int
    bytes: int
    seconds: float
    precision: Precision


class CachedSignals:
    """The signals of a data set's rows, read from disk when asked for."""

    def __init__(self, table: Dataset, summary: CacheSummary) -> None:
        self.summary = summary
        # Datasets' own arrays are in float32 whatever the file holds: twice a conversion of every number.
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def rows(self, indices: Sequence[int]) -> Signals:
        """Arrays of some rows, in that order, in the precision they are kept in; not to be written to."""
        found = cast(pa.Table, self._table[list(indices)])
        signals = {}
        for name, width in self.summary.widths.items():
            column = cast(pa.ListArray, found.column(name).combine_chunks())
            ends = np.cumsum(column.value_lengths().to_numpy())
            rows = np.split(column.flatten().to_numpy(), ends[:-1])
            shape = (-1, width) if name in self.summary.positions else (width,)
            signals[name] = [values.reshape(shape) for values in rows]
        return signals


def digest_of(parts: Mapping[str, Any]) -> str:
    """Digest of plain values, for the name of a cache."""
    return values_digest({"format": _FORMAT, **parts})[:24]


def input_digest(dataset: Dataset, columns: Sequence[str]) -> str:
    """Digest of the content of some columns, whatever the files they came from.

    Raises:
        DataError: a row is not the same when it is read again, as after a random augmentation.
    """
    looked_at = range(0, len(dataset), max(1, len(dataset) // _READ_TWICE))
    once, again = ([_bytes_of(dataset[row][column]) for row in looked_at for column in columns] for _ in range(2))
    if once != again:
        raise DataError(
            "expected rows that are the same whenever they are read, found some that change (a random augmentation?); "
            "what a teacher said of them cannot be kept: leave the cache out, or augment the rows once, with a seed, "
            "and save them"
        )
    digest = hashlib.sha256(f"{len(dataset)} {list(columns)}".encode())
    for batch in dataset.iter(256):
        for column in columns:
            for value in batch[column]:  # type: ignore[index]  # a batch is a dict of columns
                digest.update(_bytes_of(value))
    return digest.hexdigest()


def _bytes_of(value: Any) -> bytes:
    array = np.asarray(value)
    return array.tobytes() if array.dtype != object else repr(value).encode()


def fill_cache(
    folder: Path,
    digest: str,
    rows: int,
    compute: Callable[[Sequence[int]], Signals],
    *,
    precision: Precision = "float16",
    part: tuple[int, int] = (0, 1),
    description: str = "Asking the teacher",
) -> tuple[int, int]:
    """Ask the teacher about what is missing; processes that do so at the same time share the work.

    Args:
        folder: of all caches; made when it is not there.
        digest: of everything that the signals depend on.
        rows: how many there are.
        compute: asks the teacher about some rows.
        precision: of the numbers on disk, answers apart.
        part: (number, of): only this part of the shards, counted from 0, for machines that do not share a folder; their
            files are put into one folder afterwards.
        description: of the progress bar.

    Returns:
        How many shards are there, and how many there must be.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    place = folder / digest
    files = _shards(place, rows)
    numbers = [number for number in range(part[0], len(files), part[1]) if not _is_whole(files[number])]
    if damaged := [files[number].name for number in numbers if files[number].exists()]:
        logger.warning("%s in %s: not what the teacher said, asked again", ", ".join(damaged[:4]), place)
    if numbers:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"expected a folder that can be written for what the teacher says, found that {folder} cannot "
                f"({error.strerror}); choose another teacher_cache"
            ) from error
        with tqdm(total=len(numbers), desc=description, unit="shard") as bar:

            def work(number: int) -> None:
                if not _is_whole(files[number]):
                    chosen = range(number * SHARD_ROWS, min((number + 1) * SHARD_ROWS, rows))
                    _write_shard(files[number], chosen, compute, precision)
                bar.update()

            share_work(work, numbers, [files[number].with_suffix(".lock") for number in numbers])
    return sum(file.exists() for file in files), len(files)


def open_cache(folder: Path, digest: str, rows: int, precision: Precision = "float16") -> CachedSignals:
    """What `fill_cache` wrote.

    Raises:
        ArtifactError: some of it is missing or damaged.
    """
    place = folder / digest
    files = _shards(place, rows)
    missing = [file.name for file in files if not _is_whole(file)]
    if missing:
        raise ArtifactError(
            f"expected {len(files)} files of what the teacher says in {place}, found none of {missing[:4]}; ask for "
            "the other parts, and put all files there"
        )
    summary = _summarize(place, files, rows, precision)
    return CachedSignals(concatenate_datasets([Dataset.from_file(str(file)) for file in files]), summary)


def _shards(place: Path, rows: int) -> list[Path]:
    return [place / f"shard-{number:05d}.arrow" for number in range(math.ceil(rows / SHARD_ROWS))]


def _is_whole(file: Path) -> bool:
    """Whether a file is there and holds what was written."""
    try:
        facts = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        return file.exists() and facts["digest"] == _facts_digest(file, facts)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _facts_digest(file: Path, facts: Mapping[str, Any]) -> str:
    return values_digest([file_digest(file), facts["shapes"], facts["seconds"]])


def _write_shard(file: Path, rows: Sequence[int], compute: Callable[[Sequence[int]], Signals], precision: str) -> None:
    begin = time.monotonic()
    signals = compute(rows)
    kept = {name: "float32" if name.startswith(EXACT) else precision for name in signals}
    features = Features({name: List(Value(kept[name])) for name in signals})
    shapes = {
        name: {"width": int(arrays[0].shape[-1]), "positions": arrays[0].ndim == 2} for name, arrays in signals.items()
    }
    columns = {
        name: [_fitting(array, kept[name], name).reshape(-1) for array in arrays] for name, arrays in signals.items()
    }
    part = file.with_suffix(f".{uuid4().hex}.part")
    try:
        _write_arrow(Dataset.from_dict(columns, features=features), part)
        facts = {"shapes": shapes, "seconds": time.monotonic() - begin}
        write_text(file.with_suffix(".json"), json.dumps({**facts, "digest": _facts_digest(part, facts)}))
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ArtifactError(
            f"expected room for what the teacher says in {file.parent}, found that it cannot be written "
            f"({error.strerror}); free some space or choose another teacher_cache"
        ) from error


def _fitting(array: np.ndarray, precision: str, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        found = array.astype(precision)
    if np.isinf(found).any() and not np.isinf(array).any():
        raise DataError(
            f"expected values of '{name}' that fit {precision}, found one of {np.nanmax(np.abs(array)):.3g}; say "
            "cache_precision: float32"
        )
    return found


def _write_arrow(dataset: Dataset, file: Path) -> None:
    table = dataset.data.table
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _summarize(place: Path, files: Sequence[Path], rows: int, precision: Precision) -> CacheSummary:
    facts = [json.loads(file.with_suffix(".json").read_text(encoding="utf-8")) for file in files]
    shapes = facts[0]["shapes"]
    summary = CacheSummary(
        widths={name: shape["width"] for name, shape in shapes.items()},
        positions=tuple(name for name, shape in shapes.items() if shape["positions"]),
        rows=rows,
        bytes=sum(file.stat().st_size for file in files),
        seconds=math.fsum(fact["seconds"] for fact in facts),
        precision=precision,
    )
    write_text(place / _SUMMARY, json.dumps(asdict(summary), indent=2))
    return summary
