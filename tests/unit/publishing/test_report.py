"""Rows for machines, tables for people: the same numbers as in the record."""

import json

import pytest

from hf_mtcompress.publishing.card import render_card
from hf_mtcompress.publishing.report import align, lineage, markdown, report_rows, report_table
from tests.unit.publishing.factory import make_record

PROMISED = {
    "step",
    "kind",
    "average",
    "retention",
    "worst_task_retention",
    "parameters",
    "size_mb",
    "latency_b1_ratio",
    "latency_b32_ratio",
    "split",
    "artefacts",
}


def test_rows_hold_what_is_promised():
    """Scripts read these keys; a missing one breaks them, a wrong unit does not."""
    rows = report_rows(make_record())
    assert [row["step"] for row in rows] == ["teacher", "teacher-int8", "student", "student-export", "pruned", "small"]
    assert all(set(row) >= PROMISED for row in rows)
    last = rows[-1]
    assert last["kind"] == "quantize"
    assert last["split"] == "test"
    assert last["average"] == pytest.approx((0.96 + 0.7325 + 0.88) / 3)
    assert last["retention"] == pytest.approx((0.96 / 0.975 + 0.7325 / 0.75 + 0.88 / 0.925) / 3)
    assert last["worst_task_retention"] == pytest.approx(0.88 / 0.925)
    assert last["size_mb"] == 14.75
    assert last["latency_b1_ratio"] == pytest.approx(0.1)
    assert last["latency_b1_ratio_median"] == pytest.approx(0.1125)
    assert last["latency_b32_ratio"] == pytest.approx(50 / 480)
    assert last["parameters"] is None
    assert last["delivered"]
    assert rows[4]["parameters"] == 14_625_000
    assert json.loads(json.dumps(rows)) == rows


def test_rows_of_a_run_that_measured_nothing():
    """A report is also asked for in the middle of a run."""
    record = make_record()
    record.comparisons = []
    for step in record.steps:
        step.artefacts = []
    rows = report_rows(record)
    assert all(set(row) >= PROMISED for row in rows)
    assert all(row[key] is None for row in rows for key in PROMISED - {"step", "kind", "artefacts"})
    assert "No step has saved anything yet." in report_table(record)


def test_batch_sizes_that_were_not_timed_are_null():
    """A ratio at another batch size under this name would be a lie."""
    record = make_record()
    for step in record.steps:
        for artefact in step.artefacts:
            artefact.latency = [row for row in artefact.latency if row.batch_size == 32]
    row = report_rows(record)[-1]
    assert row["latency_b1_ratio"] is None
    assert row["latency_b32_ratio"] == pytest.approx(50 / 480)


def test_table_has_a_line_for_each_artefact():
    """What is missing in the table is not missed."""
    lines = report_table(make_record()).splitlines()
    assert lines[0].split()[-3:] == ["intent", "mood", "slots"]
    assert [line.split()[0] for line in lines[2:8]] == [row["step"] for row in report_rows(make_record())]
    assert lines[7].split()[-3:] == ["0.960", "0.733", "0.880"]
    assert "retention missed (limit 0.98, found 0.9709)" in report_table(make_record())


def test_tree_shows_where_a_student_came_from():
    """A student cut from its teacher has no source of its own, and would stand beside it as if made from nothing."""
    assert lineage(make_record()) == (
        "teacher (finetune)\n"
        "├─ teacher-int8 (quantize)\n"
        "└─ student (distill)\n"
        "   ├─ student-export (export)\n"
        "   └─ pruned (prune)\n"
        "      └─ small (quantize)   <- this model"
    )


def test_tables():
    """Columns of figures are read from the right."""
    assert align([["a", "n"], ["x", "1.5"], ["yy", "12.5"]]) == "a   n\n--  ----\nx    1.5\nyy  12.5"
    assert markdown([["a", "n"], ["x", "1.5"]]) == "| a | n |\n| --- | ---: |\n| x | 1.5 |"


def test_schedules_and_candidates_are_told():
    """How a size was reached is part of the result; a plain cut needs no sentence."""
    record = make_record()
    pruned = next(step for step in record.steps if step.name == "pruned")
    pruned.pruning = {"schedule": "one_shot", "rounds": [{"parameters_after": 14_625_000}]}
    assert "Step pruned" not in report_table(record)
    assert next(row for row in report_rows(record) if row["step"] == "pruned")["pruning"] == pruned.pruning
    tried = [{"average": 0.5}, {"average": 0.625}, {"average": None}]
    pruned.pruning = {**pruned.pruning, "candidates": [tried]}
    line = "Step pruned is the best of 3 random candidates (validation average 0.625, the worst 0.500)."
    assert line in report_table(record)
    pruned.pruning = {
        "schedule": "iterative",
        "rounds": [{"parameters_after": 18_000_000}, {"parameters_after": 14_625_000}],
    }
    assert "Step pruned was cut in 2 rounds, to 18.0 M, 14.6 M parameters." in report_table(record)
    gradual = {"first_step": 10, "last_step": 70, "changes": [{}] * 20, "complete": False}
    pruned.pruning = {"schedule": "gradual", "rounds": [], "gradual": gradual}
    line = "from step 10 to step 70 in 20 parts, and stopped before all was removed."
    assert f"Step pruned was pruned while it was trained, {line}" in report_table(record)
    text = render_card(record)
    assert line in text
