"""Differences of scores over seeds: pure arithmetic, no torch.

Two ways to train are compared seed by seed, so that what a seed does to both falls out. The interval is Student's t
over the differences: with n seeds, mean ± t(n - 1) · s / √n, s being the standard deviation with n - 1 below. It covers
what seeds change (heads at the start, order of the rows, dropout). It does not cover which rows happened to be in the
test split, and scores alone cannot tell that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtrit

CONFIDENCE = 0.95

Verdict = Literal["helped", "hurt by the others", "no difference shown", "one seed: no interval"]


@dataclass(frozen=True)
class PairedDifference:
    """Mean of score - reference over seeds, and its interval; `low` and `high` are None with one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def paired_difference(
    scores: Sequence[float], reference: Sequence[float], confidence: float = CONFIDENCE
) -> PairedDifference:
    """The mean difference of two ways to train, with a t interval over seeds.

    Args:
        scores: one for each seed, finite.
        reference: those of the other way, in the same order of seeds.
        confidence: of the interval, between 0 and 1.

    Raises:
        ValueError: there is no seed, the lengths differ, a score is not finite, or the confidence is not in (0, 1).
    """
    if len(scores) != len(reference) or not scores:
        raise ValueError(
            f"expected one score and one reference for each of at least one seed, found {len(scores)} scores and "
            f"{len(reference)} references"
        )
    if not all(math.isfinite(value) for value in (*scores, *reference)):
        raise ValueError(f"expected finite scores, found {list(scores)} and {list(reference)}; leave such seeds out")
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, found {confidence}")
    differences = [score - other for score, other in zip(scores, reference, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count == 1:
        return PairedDifference(mean, None, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in differences) / (count - 1)
    margin = float(stdtrit(count - 1, (1 + confidence) / 2)) * math.sqrt(variance / count)
    return PairedDifference(mean, mean - margin, mean + margin, count)


def verdict(difference: PairedDifference) -> Verdict:
    """What an interval allows to say of higher-is-better scores; an interval that touches 0 allows nothing."""
    if difference.low is None or difference.high is None:
        return "one seed: no interval"
    if difference.low > 0:
        return "helped"
    if difference.high < 0:
        return "hurt by the others"
    return "no difference shown"
