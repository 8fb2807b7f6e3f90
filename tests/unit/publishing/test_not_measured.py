"""What could not be measured, or cannot be said, stands in words wherever a number would."""

import dataclasses
import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from hf_mtcompress.publishing.card import render_card
from hf_mtcompress.publishing.facts import budget_of, headline_figures
from hf_mtcompress.publishing.lint import lint_card
from hf_mtcompress.publishing.picture import draw_comparison
from hf_mtcompress.publishing.report import report_rows, report_table
from hf_mtcompress.records import RunRecord, run_from_dict, to_json
from hf_mtcompress.records.run import without_doubtful
from tests.unit.publishing.factory import make_record

BUSY = "not measured: the machine was busy"
WHY = "other processes used 1.9 of 2 cores beside 2 timed threads"


def busy(sizes: tuple[int, ...] = (1, 32)) -> RunRecord:
    """Nothing was timed at these batch sizes."""
    record = make_record()
    for step in record.steps:
        for artefact in step.artefacts:
            artefact.latency = without_doubtful(artefact.latency, dict.fromkeys(sizes, WHY), dict.fromkeys(sizes, WHY))
    assert record.benchmark is not None
    del record.benchmark["suspicious"]
    record.benchmark |= {"other_processes": {"1": 1.9, "32": 1.9}, "not_measured": [f"teacher, batch 1: {WHY}"]}
    record.budget = {
        "artefact": "small",
        "latency_b1_ratio": {"limit": 0.2, "found": None, "met": None, "why": BUSY},
    }
    return record


def at_chance() -> RunRecord:
    """Two of three tasks are below their majority class in the reference; of the third everything is kept."""
    record = make_record()
    for comparison in record.comparisons:
        for name in ("mood", "slots"):
            comparison.undefined[name] = "the reference (0.4) is not above the baseline (0.45)"
            comparison.tasks[name] |= {"retention": None, "retention_above_chance": None}
        comparison.retention = comparison.worst_task_retention = 1.0
        comparison.worst_task = "intent"
    record.budget = {
        "artefact": "small",
        "retention": {"limit": 0.9, "found": 1.0, "met": True},
        "worst_task_retention": {"limit": 0.9, "found": 1.0, "met": True},
    }
    return record


def test_no_speed_is_claimed_of_a_busy_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Headline, table, picture and budget each said "981.3 times as fast", and one line among the limits doubted it."""
    record = busy()
    card = render_card(record, None, None)
    summary = card.split("## At a glance")[0]
    assert f"Its speed at batch size 1 and 32 was {BUSY}." in summary
    assert "times as fast at" not in summary
    assert f"| time per call, batch size 1 (minimum) | {BUSY} | {BUSY} |" in card
    row = next(line for line in card.splitlines() if line.startswith("| **`small`** | onnx") and "14.8 MB" in line)
    assert row.count(BUSY) == 6
    assert "at 10.0 %" not in card
    assert f"| latency b1 ratio | 0.2 | not measured | not decided ({BUSY}) |" in card
    assert f"Times that are not given: {BUSY} (teacher, batch 1: {WHY}" in card
    assert "not measured |" in card
    assert lint_card(card, None, record) == []
    table = report_table(record)
    assert table.splitlines()[2].count("busy") == 2
    assert f"busy: {BUSY} (teacher, batch 1: {WHY}; " in table
    assert f"latency_b1_ratio not decided (limit 0.2, {BUSY})" in table
    last = report_rows(record)[-1]
    assert (last["latency_b1_ratio"], last["minimum_ms_b32"]) == (None, None)
    assert last["not_measured"] == {"1": WHY, "32": WHY}
    assert headline_figures(record, record.steps[-1].artefacts[0])["time at batch 1"] == BUSY
    labels: list[str] = []
    monkeypatch.setattr(Axes, "set_xlabel", lambda _, label: labels.append(label))
    assert len(draw_comparison(record, tmp_path / "comparison.png")) == 2
    assert labels[0] == f"size in MB (log scale)\ntime {BUSY}"
    record.steps[0].artefacts[0].latency = make_record().steps[0].artefacts[0].latency
    draw_comparison(record, tmp_path / "comparison.png")
    assert f"\ntime {BUSY} (teacher-int8, student, " in labels[2]
    record = busy()
    assert "14.75," in (tmp_path / "comparison.csv").read_text()
    assert run_from_dict(json.loads(to_json(record))) == record


def test_what_holds_is_still_given():
    """Only batches of 32 were disturbed."""
    record = busy((32,))
    card = render_card(record, None, None)
    assert "it runs 10.0 times as fast at batch size 1 (minimum of the timed calls). Its speed" in card
    assert f"Its speed at batch size 32 was {BUSY}." in card
    assert report_rows(record)[-1]["latency_b1_ratio"] == pytest.approx(0.1)
    assert headline_figures(record, record.steps[-1].artefacts[0])["time at batch 1"] == "10.0 %"


def test_a_ratio_needs_both_times():
    """A student's own time may hold where that of the reference does not."""
    rows = make_record().steps[-1].artefacts[0].latency
    found = without_doubtful(rows, {}, {1: "odd"})
    assert (found[0].minimum_ms, found[0].ratio_minimum, found[0].not_measured) == (2.0, None, "of the reference: odd")
    assert found[1] == rows[1]


@pytest.mark.parametrize("cause", ["load", "batches"])
def test_an_older_record_is_judged_when_it_is_read(cause: str):
    """A card that is rendered again from it must not repeat what nobody would claim today."""
    data = json.loads(to_json(make_record()))
    teacher = data["steps"][0]["artefacts"][0]
    if cause == "load":
        data["benchmark"] |= {"cores": 2, "load_before": 23.1, "load_after": 22.8}
    else:
        teacher["latency"][0]["minimum_ms"] = teacher["latency"][0]["median_ms"] = 1962.6
        for step in data["steps"]:
            for artefact in step["artefacts"]:
                for row in artefact["latency"][:1]:
                    row["ratio_minimum"] = row["minimum_ms"] / 1962.6
    for step in data["steps"]:
        for artefact in step["artefacts"]:
            for row in artefact["latency"]:
                del row["not_measured"]
    record = run_from_dict(data)
    small = record.steps[-1].artefacts[0].latency
    assert [row.ratio_minimum is None for row in small] == ([True, True] if cause == "load" else [True, False])
    assert "times as fast at batch size 1" not in render_card(record)
    assert run_from_dict(json.loads(to_json(record))) == record
    quiet = json.loads(to_json(make_record()))
    quiet["benchmark"] |= {"cores": 2, "load_before": 1.75, "load_after": 2.2}
    assert run_from_dict(quiet).steps == make_record().steps


def test_tasks_at_chance_are_named_beside_every_mean():
    """ "Kept 100 %" and "retention met", while two of three tasks were never learnt."""
    record = at_chance()
    card = render_card(record, None, None)
    summary = card.split("## At a glance")[0]
    assert "It keeps 100.0 % of the reference's test scores" in summary
    assert "(worst task: `intent`, 100.0 %), without `mood` and `slots`." in summary
    assert "What it keeps of `mood` and `slots` is undefined: the reference is not above chance there." in summary
    assert "| scores kept, mean of tasks, without `mood` and `slots` (undefined) |" in card
    assert "Mean over the main tasks, without `mood` and `slots` (undefined): 100.0 % kept" in card
    assert "| kept, without `mood` and `slots` (undefined) |" in card
    why = "undefined for mood, the reference (0.4) is not above the baseline (0.45); slots, the reference"
    assert f"| retention | 0.9 | 1 | not decided ({why}" in card
    assert lint_card(card, None, record) == []
    table = report_table(record)
    assert "Kept leaves mood out, where it is undefined: the reference (0.4) is not above the baseline (0.45)." in table
    assert f"worst_task_retention not decided (limit 0.9, found 1, {why}" in table
    assert set(report_rows(record)[-1]["undefined"]) == {"mood", "slots"}
    headline = headline_figures(record, record.steps[-1].artefacts[0])
    assert headline["kept of teacher"] == "100.0 %, without mood, slots (undefined)"


def test_auxiliary_tasks_are_in_no_mean_anyway():
    record = at_chance()
    for name in ("mood", "slots"):
        record.tasks[name].role = "auxiliary"
    assert budget_of(record)["retention"]["met"] is True
    assert "without" not in render_card(record).split("## At a glance")[0]


def test_a_beaten_reference_is_said_to_be_undertrained():
    """ "Keeps 121.5 %" reads like praise of the student."""
    record = make_record()
    small = record.steps[-1].artefacts[0]
    comparison = record.comparisons[-1]
    small.scores["test"].tasks["intent"].metrics["accuracy"] = comparison.tasks["intent"]["score"] = 0.758
    for other in record.comparisons:
        other.tasks["intent"]["reference"] = 0.609
        if other is not comparison:
            other.tasks["intent"]["score"] = 0.61
    words = "beaten on `intent` (0.758 of `small` against 0.609), so it is probably undertrained."
    assert words in render_card(record)
    assert (
        "'teacher' is beaten on intent (0.758 of 'small' against 0.609): it is probably undertrained."
        in report_table(record)
    )
    assert "beaten" not in render_card(make_record())
    assert "beaten" not in report_table(make_record())


def test_dynamic_ranges_are_told():
    """600 sentences, batch 1 against 32: 10 labels differ, and no page said so."""
    record = make_record()
    words = "In `small` the ranges of rounded activations are those of a whole call"
    assert words in render_card(record)
    artefact = record.steps[-1].artefacts[0]
    record.steps[-1].artefacts[0] = dataclasses.replace(artefact, precision="int8, static, percentile of 256 rows")
    assert words not in render_card(record)


def test_a_gate_names_what_it_could_not_hold():
    """A gate over one task of three is passed easily."""
    record = make_record()
    limits = {"retention": {"limit": 0.9, "found": 1.0, "met": True}}
    gate = {"reference": "pruned", "split": "validation", "limits": limits, "met": True, "tasks": {}}
    record.steps[-1].quantization = {"gate": gate}
    words = "Step small kept of pruned on the validation split: on average 100.0 %"
    assert words in report_table(record)
    gate["undefined"] = {"mood": "the reference (-0.1) is not above zero"}
    words = words.replace(":", ", without mood, where nothing can be said to be kept:")
    assert words in report_table(record)
    assert words in render_card(record)
