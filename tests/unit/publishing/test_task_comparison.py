"""The table and the picture of a comparison say what the record says."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from hf_mtcompress.publishing.task_comparison import comparison_table, draw_differences
from hf_mtcompress.records import ArmModel, ArmRecord, ComparedTask, TaskComparisonRecord, TaskDifference


def make_record() -> TaskComparisonRecord:
    """Two tasks together in two seeds: one hurt, the other without a score."""
    model = ArmModel(
        tasks=["mood", "tone"],
        folder="together",
        epochs=1.5,
        optimizer_steps=1200,
        rows_seen=9600,
        task_rows_seen={"mood": 6400, "tone": 3200},
    )
    differences = [
        TaskDifference(
            arm="together",
            task=task,
            alone=None if difference is None else 0.75,
            together=None if difference is None else 0.75 + difference,
            difference=difference,
            low=None if difference is None else difference - 0.01,
            high=None if difference is None else difference + 0.01,
            seeds=2,
            verdict="no score" if difference is None else "hurt by the others",
        )
        for task, difference in (("mood", -0.025), ("tone", None), ("average", None))
    ]
    return TaskComparisonRecord(
        name="tiny",
        created="2026-01-01T00:00:00+00:00",
        seeds=[5, 6],
        confidence=0.95,
        environment={},
        encoder={},
        training={
            "epochs": 1.5,
            "max_steps": None,
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 5e-5,
        },
        tasks={
            "mood": ComparedTask(metric="accuracy", split="test", rows=2400),
            "tone": ComparedTask(metric="pearson", split="test", rows=12),
        },
        arms=[ArmRecord(name="together", settings=[], models=[model], scores={}, means={})],
        differences=differences,
    )


def test_table():
    """A sign or a column that slipped would turn help into harm."""
    assert comparison_table(make_record()).splitlines() == [
        "task     metric    n      arm       alone   in the arm  difference       95 % interval  verdict",
        "-------  --------  -----  --------  ------  ----------  ----------  ------------------  ------------------",
        "mood     accuracy  2,400  together  0.7500      0.7250     -0.0250  -0.0350 to -0.0150  hurt by the others",
        "tone     pearson      12  together       -           -           -                   -  no score",
        "average                   together       -           -           -                   -  no score",
        "",
        "Seeds 5, 6; test scores on the same n rows. Difference: in the arm - alone, paired by seed, with a t interval "
        "over seeds, each at 95 % by itself.",
        "It covers what seeds change, not which rows are in the split.",
        "Same budget for every model: 1.5 epochs over its own rows, a batch of 8 rows a step, learning rate 5e-05, "
        "weights of the last step.",
        "",
        "arm       tasks of a model  epochs  optimizer steps  rows seen  rows seen by task",
        "--------  ----------------  ------  ---------------  ---------  ----------------------",
        "together  mood+tone            1.5            1,200      9,600  mood 6,400, tone 3,200",
    ]


def test_one_seed_says_so():
    record = make_record()
    record.seeds = [5]
    text = comparison_table(record)
    assert "Seed 5; test scores on the same n rows. One seed: no interval; give more with --seeds." in text


def test_other_budgets():
    record = make_record()
    record.training |= {"max_steps": 1200, "gradient_accumulation_steps": 4}
    record.arms[0].settings = ["training.epochs=3"]
    record.tasks["tone"].split = "validation"
    text = comparison_table(record)
    assert "for every model whose arm says nothing else: the share of 1,200 steps that its rows have" in text
    assert "4 batches of 8 rows a step" in text
    assert "mood test, tone validation" in text
    assert text.endswith("Arm together: training.epochs=3.\n")


@pytest.mark.parametrize("seeds", [[5], [5, 6]])
def test_picture(tmp_path: Path, seeds: list[int]):
    """Missing scores and one seed do not stop it, at the end of hours."""
    record = make_record()
    record.seeds = seeds
    if len(seeds) == 1:
        record.differences[0].low = record.differences[0].high = None
    first = draw_differences(record, tmp_path / "a" / "compare.png")
    second = draw_differences(record, tmp_path / "b.png")
    assert first is not None
    assert second is not None
    assert first.read_bytes().startswith(b"\x89PNG")
    assert first.read_bytes() == second.read_bytes()


def test_no_difference_draws_nothing(tmp_path: Path):
    record = make_record()
    record.differences[0].difference = None
    assert draw_differences(record, tmp_path / "compare.png") is None
    assert list(tmp_path.iterdir()) == []


def test_no_two_arms_look_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nine arms were drawn with seven looks."""
    record = make_record()
    record.differences = [dataclasses.replace(record.differences[0], arm=f"arm-{number}") for number in range(16)]
    looks, scatter = [], Axes.scatter

    def watch(axes: Axes, *places: Any, color: str, marker: str, **options: Any) -> Any:
        looks.append((color, marker))
        return scatter(axes, *places, color=color, marker=marker, **options)

    monkeypatch.setattr(Axes, "scatter", watch)
    draw_differences(record, tmp_path / "compare.png")
    assert len(looks) == len(set(looks)) == 16
