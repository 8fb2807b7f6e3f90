"""Whether times hold together: one rule on numbers alone, for what was just measured and for older records.

Other work on a machine makes a call slower, never faster. So of two times that cannot both be true the longer one is
wrong, and the smallest of many calls is right as soon as one of them was left in peace.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hf_mtcompress.records.forms import FORMS, FormName

BUSY = "the machine was busy"
"""Why a time is not given, in the words that stand in its place."""

SPARE_CORES = 0.25
"""Other processes may use so many of the cores that the timed threads need."""
_LOAD = 2.0
"""Where the system does not tell what other processes use: processes that may want to run, for each core."""
_HALVES = 1.25
"""The smallest times of the first and of the second half of the turns may differ by this factor."""
_MEDIAN = 3.0
"""A median may be so many times the minimum."""
_LEEWAY = 1.5
"""For what is known of the cost of a call: rows and parameters. Caches and fixed costs make it more or less."""
_LARGER_BATCH = 1.25
"""More rows never take less time than fewer; so much is left for chance."""
_KERNELS = 20.0
"""Two runtimes or numbers of bits differ by less than this on the same model."""
_FIXED_COST_MS = 10.0
"""Shorter calls may be mostly the fixed cost of a runtime, which differs more."""


@dataclass(frozen=True, kw_only=True)
class Calls:
    """The timed calls of one artefact with batches of one size.

    Attributes:
        minimum_ms: of all calls.
        median_ms: of all calls.
        halves_ms: the minimum of the first and of the second half of the turns; None where there are too few turns.
    """

    minimum_ms: float
    median_ms: float
    halves_ms: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a call of an artefact costs, as far as that is known.

    Attributes:
        kernels: artefacts of the same name run the same kernels; None for those that nothing is like.
        parameters: that a call multiplies with: those of the encoder without embeddings; None where unknown.
    """

    kernels: str | None
    parameters: int | None


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What ran on the machine beside the timed calls.

    Attributes:
        cores: that the timed processes may use.
        threads: of each timed process.
        others: cores that other processes used of these, on average; None where the system does not tell.
        load: processes that wanted to run, before the first call; counts where `others` is None.
    """

    cores: int
    threads: int
    others: float | None = None
    load: float | None = None

    def busy(self) -> str | None:
        """Why nothing can be timed in them; None where it can."""
        if self.others is not None:
            if self.others > max(self.cores - self.threads, 0) + SPARE_CORES:
                timed = "a timed thread" if self.threads == 1 else f"{self.threads} timed threads"
                return f"other processes used {self.others:.1f} of {self.cores} cores beside {timed}"
        elif self.load is not None and self.load > _LOAD * self.cores:
            return f"{self.load:.1f} processes wanted to run on {self.cores} cores"
        return None


def cost_of(form: FormName, precision: str, encoder_parameters: int | None, embedding_parameters: int | None) -> Cost:
    """What a call of a saved form costs."""
    few_bits = FORMS[form].in_few_bits
    kernels = None if few_bits else f"{form} {precision}" if FORMS[form].graph else form
    if encoder_parameters is None:
        return Cost(kernels=kernels, parameters=None)
    return Cost(kernels=kernels, parameters=encoder_parameters - (embedding_parameters or 0))


def doubtful_times(
    calls: Mapping[str, Mapping[int, Calls]], costs: Mapping[str, Cost], around: Mapping[int, Surroundings]
) -> dict[str, dict[int, str]]:
    """Times that cannot be relied on: the one rule by which a speed is claimed or is said to be not measured.

    Args:
        calls: by artefact and batch size.
        costs: by artefact.
        around: by batch size.

    Returns:
        By artefact and batch size why; those that hold are left out. A time does not hold where

        - other processes used cores that the timed threads needed,
        - its minimum was not found again in the other half of the turns, or the median is far above it,
        - a batch took longer than a larger one, or far longer for each row than a smaller one,
        - a model was slower than a larger one that runs the same kernels, or far slower than its parameters explain,
        - it is tens of times that of the same model in other kernels.
    """
    found: dict[str, dict[int, str]] = {}

    def doubt(label: str, size: int, why: str | None) -> None:
        if why is not None:
            found.setdefault(label, {}).setdefault(size, why)

    for label, rows in calls.items():
        for size, row in rows.items():
            doubt(label, size, around[size].busy() if size in around else None)
            doubt(label, size, _unsteady(row))
        sizes = sorted(rows)
        for position, fewer in enumerate(sizes):
            for more in sizes[position + 1 :]:
                short, long = rows[fewer].minimum_ms, rows[more].minimum_ms
                if short > _LARGER_BATCH * long:
                    doubt(label, fewer, f"{short:.1f} ms, and {long:.1f} ms for a batch of {more}")
                if long > _LEEWAY * short * more / fewer:
                    doubt(label, more, f"{long:.1f} ms, and {short:.1f} ms for a batch of {fewer}")
    for slow, rows in calls.items():
        for fast, others in calls.items():
            for size in rows.keys() & others.keys():
                times = rows[size].minimum_ms, others[size].minimum_ms
                if slow != fast and _too_slow(times, costs[slow], costs[fast]):
                    doubt(
                        slow,
                        size,
                        f"{times[0]:.1f} ms, and {times[1]:.1f} ms for {fast}: more than their sizes explain",
                    )
    return found


def _unsteady(row: Calls) -> str | None:
    if row.halves_ms is not None and max(row.halves_ms) > _HALVES * min(row.halves_ms):
        first, second = row.halves_ms
        return f"the smallest time was {first:.1f} ms in the first half of the turns and {second:.1f} ms in the second"
    if row.median_ms > _MEDIAN * row.minimum_ms:
        return f"the median ({row.median_ms:.1f} ms) is more than three times the minimum ({row.minimum_ms:.1f} ms)"
    return None


def _too_slow(times: tuple[float, float], slow: Cost, fast: Cost) -> bool:
    """Whether the first of two times of a batch cannot be true beside the second."""
    if slow.parameters is None or fast.parameters is None or not slow.parameters or not fast.parameters:
        return False
    # A larger model may take longer by as many times as it is larger, a smaller one no longer at all.
    larger = max(slow.parameters / fast.parameters, 1.0)
    if slow.kernels is not None and slow.kernels == fast.kernels:
        return times[0] > _LEEWAY * larger * times[1]
    return times[0] > _FIXED_COST_MS and times[0] > _KERNELS * larger * times[1]
