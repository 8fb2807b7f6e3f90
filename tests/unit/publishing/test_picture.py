"""The picture exists, its data lie beside it, and nothing missing makes it fail."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_mtcompress.publishing.picture import draw_comparison, draw_interference
from hf_mtcompress.records import RunRecord
from tests.unit.publishing.factory import make_record
from tests.unit.publishing.test_card import (
    interference_of_many,
    many_tasks,
    no_interference,
    no_latency,
    no_scores,
    no_sizes,
    only_reference,
    slower,
    tasks_that_never_met,
    undefined_retention,
)


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


def test_interference_and_its_data(tmp_path: Path):
    """A heat map cannot be read to two decimals: the numbers lie beside it."""
    record = make_record()
    files = draw_interference(record, tmp_path / "assets" / "interference.png")
    assert [path.name for path in files] == ["interference.png", "interference.csv"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert len(rows) == 6
    assert rows[0] == {
        "step": "teacher",
        "task": "intent",
        "other": "mood",
        "cosine": "-0.3",
        "conflict": "0.75",
        "affinity": "-0.012",
        "norm": "2.0",
        "norm_of_other": "50.0",
    }
    assert draw_interference(record, tmp_path / "again.png")[0].read_bytes() == files[0].read_bytes()


@pytest.mark.parametrize("change", [tasks_that_never_met, many_tasks])
def test_interference_of_an_unusual_record(change: Callable[[RunRecord], None], tmp_path: Path):
    """Tasks that never met have no cosine; a picture of many tasks is drawn without numbers in its cells."""
    record = make_record()
    change(record)
    assert len(draw_interference(record, tmp_path / "interference.png")) == 2


def test_interference_of_several_steps(tmp_path: Path):
    """Finetuning and distilling each log theirs; panels that are left over stay empty."""
    record = make_record()
    for step, tasks in zip(record.steps, (2, 3, 12, 5), strict=False):
        step.interference = interference_of_many(tasks)
    files = draw_interference(record, tmp_path / "interference.png")
    assert len(files[1].read_text().splitlines()) == 1 + 2 + 6 + 132 + 20


def test_no_interference_draws_nothing(tmp_path: Path):
    record = make_record()
    no_interference(record)
    assert draw_interference(record, tmp_path / "interference.png") == []
    assert list(tmp_path.iterdir()) == []
