"""Several processes in one folder: one at a time, or each its share of the work."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from hf_mtcompress.artifacts import WORK
from hf_mtcompress.errors import ArtifactError

Item = TypeVar("Item")
Result = TypeVar("Result")
_LOOK_AGAIN = 1.0
"""Seconds until a process that has nothing left to take looks whether the others are done."""


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Let nobody else run in a folder with a `.work` inside of the block; a killed process leaves nothing locked.

    Raises:
        ArtifactError: another process is at it.
    """
    lock = FileLock(folder / WORK / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ArtifactError(
            f"expected nobody else at work in {folder}, found another process; wait for it, or choose another folder "
            "with --output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def share_work(work: Callable[[Item], Result], items: Sequence[Item], locks: Sequence[Path]) -> list[Result]:
    """Results of all items, divided among the processes that call this at the same time with the same locks.

    Args:
        work: makes an item, or finds that it was made already; called once for every item in every process, never for
            the same item in two processes at once.
        items: in the order of preference.
        locks: a file for each item, in a folder that is there. A process that dies lets go of its lock.
    """
    results: dict[int, Result] = {}
    while len(results) < len(items):
        taken = False
        for number in (number for number in range(len(items)) if number not in results):
            try:
                with FileLock(locks[number], timeout=0):
                    results[number] = work(items[number])
                    taken = True
            except Timeout:
                continue
        if not taken:
            time.sleep(_LOOK_AGAIN)
    return [results[number] for number in range(len(items))]
