"""Differences over seeds: exact numbers, and what may be said of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_mtcompress.runs.compare.statistics import PairedDifference, paired_difference, verdict

REPOSITORY = Path(__file__).parents[4]


def test_three_seeds():
    """Differences 0.01, 0.02, 0.03: mean 0.02, s = 0.01, t(2) = 4.302653 at 95 %."""
    found = paired_difference([0.81, 0.72, 0.93], [0.80, 0.70, 0.90])
    margin = 4.302652729911275 * 0.01 / 3**0.5
    assert found.mean == pytest.approx(0.02, abs=1e-12)
    assert found.low == pytest.approx(0.02 - margin, abs=1e-12)
    assert found.high == pytest.approx(0.02 + margin, abs=1e-12)
    assert found.seeds == 3
    assert verdict(found) == "no difference shown"


def test_two_seeds_at_another_confidence():
    """t(1) at 90 % is 6.313752; differences -1 and -3 have s = 2 ** 0.5."""
    found = paired_difference([0.0, 0.0], [1.0, 3.0], confidence=0.9)
    assert (found.low, found.high) == pytest.approx((-2 - 6.313751514675043, -2 + 6.313751514675043))


def test_seeds_are_paired():
    """Unpaired, the spread over seeds (0.1 to 0.9) would hide a difference that every seed shows."""
    scores, reference = [0.1, 0.5, 0.9, 0.3], [0.12, 0.521, 0.919, 0.32]
    assert verdict(paired_difference(scores, reference)) == "hurt by the others"
    assert verdict(paired_difference(reference, scores)) == "helped"
    assert verdict(paired_difference(scores, reference[::-1])) == "no difference shown"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.001, 0.1, "helped"),
        (-0.1, -0.001, "hurt by the others"),
        (0.0, 0.1, "no difference shown"),
        (-0.1, 0.0, "no difference shown"),
        (0.0, 0.0, "no difference shown"),
        (None, None, "one seed: no interval"),
    ],
)
def test_only_an_interval_without_0_is_a_difference(low: float | None, high: float | None, expected: str):
    mean = 0.0 if low is None or high is None else (low + high) / 2
    assert verdict(PairedDifference(mean, low, high, 3)) == expected


def test_one_seed_has_no_interval():
    found = paired_difference([0.5], [0.25])
    assert found == PairedDifference(0.25, None, None, 1)


@pytest.mark.parametrize(
    ("scores", "reference", "confidence"),
    [([], [], 0.95), ([0.1], [0.1, 0.2], 0.95), ([float("nan")], [0.1], 0.95), ([0.1], [0.1], 1.0)],
)
def test_bad_input(scores: list[float], reference: list[float], confidence: float):
    with pytest.raises(ValueError, match="expected"):
        paired_difference(scores, reference, confidence)


def test_no_torch_is_needed():
    program = """
import sys, types
package = types.ModuleType("hf_mtcompress")
package.__path__ = ["hf_mtcompress"]
sys.modules.update(hf_mtcompress=package, torch=None, transformers=None)
import hf_mtcompress.runs.compare.statistics
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
