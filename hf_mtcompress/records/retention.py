"""What a comparison with a reference cannot say: tasks without anything to keep, and references that are beaten."""

from collections.abc import Mapping

from hf_mtcompress.records.run import Comparison, TaskRecord

_BETTER = 0.05
"""A reference that is beaten by more than this share of its score is said to be beaten."""
_STANDARD_ERRORS = 2.0


def left_out(tasks: Mapping[str, TaskRecord], undefined: Mapping[str, str]) -> dict[str, str]:
    """The main tasks that are in no mean and no minimum of a comparison, with the reason."""
    return {name: why for name, why in undefined.items() if name in tasks and tasks[name].role == "main"}


def why_left_out(tasks: Mapping[str, TaskRecord], undefined: Mapping[str, str]) -> str | None:
    """The same as words; None where no task is left out."""
    reasons = [f"{name}, {why}" for name, why in left_out(tasks, undefined).items()]
    return f"undefined for {'; '.join(reasons)}" if reasons else None


def surpassed(tasks: Mapping[str, TaskRecord], comparison: Comparison, rows: Mapping[str, int]) -> list[str]:
    """Tasks in which an artefact beats its reference by more than chance: the reference is probably undertrained.

    Args:
        tasks: the tasks of the run.
        comparison: of the artefact with the reference.
        rows: that each task was scored on.

    Returns:
        Main tasks in which it is better by more than 5 % and by more than two standard errors of a share.
    """
    found = []
    for name, row in comparison.tasks.items():
        score, target = row["score"], row["reference"]
        if score is None or target is None or name not in tasks or tasks[name].role != "main":
            continue
        share = min(max(target, 0.0), 1.0)
        chance = _STANDARD_ERRORS * (share * (1 - share) / max(rows.get(name, 0), 1)) ** 0.5
        if score - target > max(_BETTER * abs(target), chance):
            found.append(name)
    return found
