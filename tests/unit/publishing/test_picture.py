"""The picture exists, its data lie beside it, and nothing missing makes it fail."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_mtcompress.publishing.picture import draw_comparison
from hf_mtcompress.records import RunRecord
from tests.unit.publishing.factory import make_record
from tests.unit.publishing.test_card import no_latency, no_scores, no_sizes, only_reference, slower, undefined_retention


def test_picture_and_data(tmp_path: Path):
    """A picture without its data cannot be checked, and a reader who sees none has nothing."""
    files = draw_comparison(make_record(), tmp_path / "assets" / "comparison.png")
    assert [path.name for path in files] == ["comparison.png", "comparison.csv"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert [row["step"] for row in rows] == ["teacher", "teacher-int8", "student", "pruned", "small"]
    assert rows[-1]["size_mb"] == "14.75"
    assert float(rows[-1]["latency_b1_ratio"]) == pytest.approx(0.1)
    assert rows[0]["retention"] == ""


@pytest.mark.parametrize("change", [no_latency, no_sizes, only_reference, slower, undefined_retention])
def test_picture_of_an_unusual_record(change: Callable[[RunRecord], None], tmp_path: Path):
    """The picture is drawn at the end of a run of hours."""
    record = make_record()
    change(record)
    assert len(draw_comparison(record, tmp_path / "comparison.png")) == 2


def test_nothing_scored_draws_nothing(tmp_path: Path):
    """An empty picture looks like a result."""
    record = make_record()
    no_scores(record)
    assert draw_comparison(record, tmp_path / "comparison.png") == []
    assert list(tmp_path.iterdir()) == []


def test_same_record_same_picture(tmp_path: Path):
    """A picture that differs each time is committed and pushed each time."""
    first = draw_comparison(make_record(), tmp_path / "a.png")[0].read_bytes()
    assert draw_comparison(make_record(), tmp_path / "b.png")[0].read_bytes() == first
