"""Retention and budget, on numbers small enough to check by hand."""

import dataclasses

import pytest

from hf_mtcompress.evaluation.compare import average, check_budget, compare, primary_scores
from hf_mtcompress.recipe import BudgetConfig
from hf_mtcompress.records import Artefact, Comparison, LatencyRecord, SizeRecord, SplitScores, TaskRecord, TaskScore
from hf_mtcompress.records.retention import surpassed


def task(name: str, baseline: float | None, role: str = "main", metric: str = "accuracy") -> TaskRecord:
    return TaskRecord(
        name=name,
        kind="sequence-classification",
        problem_type="single_label_classification",
        metric=metric,
        role=role,
        weight=1.0,
        labels=["a", "b"],
        rows={},
        baseline={} if baseline is None else {"test": baseline, "validation": baseline},
    )


def artefact(split: str = "test", **scores: float) -> Artefact:
    tasks = {name: TaskScore(rows=10, metrics={"accuracy": score, "mcc": 0.0}) for name, score in scores.items()}
    return Artefact(
        form="torch",
        folder="student",
        precision="float32",
        scores={split: SplitScores(split=split, average=None, tasks=tasks)},
    )


TASKS = {"mood": task("mood", 0.5), "topic": task("topic", 0.2), "extra": task("extra", 0.1, role="auxiliary")}


def test_retention_is_a_mean_of_ratios_of_main_tasks():
    """A ratio of means, or auxiliary tasks in the mean, would give another number."""
    result = compare(
        TASKS, artefact(mood=0.9, topic=0.5, extra=0.5), artefact(mood=0.8, topic=0.4, extra=0.1), step="student"
    )
    assert result.retention == pytest.approx((0.8 / 0.9 + 0.4 / 0.5) / 2)
    assert result.retention_above_chance == pytest.approx((0.3 / 0.4 + 0.2 / 0.3) / 2)
    assert result.worst_task == "topic"
    assert result.worst_task_retention == pytest.approx(0.8)
    assert result.tasks["extra"]["retention"] == pytest.approx(0.2)
    assert result.tasks["mood"]["difference"] == pytest.approx(-0.1)
    assert result.undefined == {}
    assert (result.step, result.folder, result.split) == ("student", "student", "test")


def test_the_reference_against_itself_is_one():
    """Rounding or a wrong baseline would make the reference lose against itself."""
    same = artefact(mood=0.7, topic=0.3, extra=0.4)
    result = compare(TASKS, same, same, step="teacher")
    assert result.retention == result.retention_above_chance == result.worst_task_retention == 1.0


def test_a_better_student_is_not_capped():
    """Capping at one would hide that one task gained what another lost."""
    result = compare(
        TASKS, artefact(mood=0.8, topic=0.4, extra=0.4), artefact(mood=0.9, topic=0.4, extra=0.4), step="s"
    )
    assert result.retention == pytest.approx((0.9 / 0.8 + 1.0) / 2)


@pytest.mark.parametrize("target", [0.5, 0.4])
def test_a_reference_at_chance_is_undefined(target: float):
    """A student that guesses as its teacher does would count as 100 % kept."""
    result = compare(TASKS, artefact(mood=target, topic=0.5), artefact(mood=0.5, topic=0.25), step="s")
    assert result.tasks["mood"]["retention"] is None
    assert result.tasks["mood"]["retention_above_chance"] is None
    assert "not above the baseline (0.5)" in result.undefined["mood"]
    assert result.retention == pytest.approx(0.5)
    assert result.worst_task == "topic"


def test_without_a_baseline_only_the_plain_ratio_exists():
    """An unknown baseline must not be taken for zero; a correlation below zero has no ratio."""
    tasks = {"mood": task("mood", None)}
    result = compare(tasks, artefact(mood=0.8), artefact(mood=0.4), step="s")
    assert (result.retention, result.retention_above_chance) == (0.5, None)
    result = compare(tasks, artefact(mood=-0.1), artefact(mood=-0.2), step="s")
    assert result.retention is None
    assert "not above zero" in result.undefined["mood"]


def test_nothing_in_common_is_undefined_everywhere():
    """A missing score would otherwise crash or count as zero."""
    result = compare(TASKS, artefact(mood=0.9), artefact(topic=0.5), step="s")
    assert (result.retention, result.worst_task_retention, result.worst_task) == (None, None, None)
    assert "the reference has no score" in result.undefined["topic"]
    assert "no score on the test split" in result.undefined["mood"]


def test_validation_is_used_only_without_test():
    """Mixing the splits of the two sides would compare different rows."""
    both = artefact(mood=0.9, topic=0.9)
    both.scores["validation"] = artefact("validation", mood=0.8, topic=0.8).scores["validation"]
    result = compare(TASKS, both, artefact("validation", mood=0.8, topic=0.4), step="s")
    assert result.split == "validation"
    assert result.tasks["mood"]["reference"] == 0.8


def test_average_needs_every_main_task():
    """A mean over the tasks that happen to be there would rise when a weak one is missing."""
    assert average(TASKS, {"mood": 0.5, "topic": 0.7, "extra": 0.0}) == pytest.approx(0.6)
    assert average(TASKS, {"mood": 0.5}) is None
    assert primary_scores(TASKS, artefact(mood=0.5).scores["test"]) == {"mood": 0.5}


def test_budget_limits_are_inclusive_and_the_unmeasured_is_not_decided():
    """A limit that was never measured must neither pass nor fail."""
    found = artefact(mood=0.9)
    found.size = SizeRecord(
        weights_bytes=15_000_000,
        tokenizer_bytes=10**9,
        embedding_bytes=None,
        parameters=None,
        encoder_parameters=None,
        embedding_parameters=None,
        head_parameters=None,
    )
    found.latency = [
        LatencyRecord(
            batch_size=1,
            tokens=64,
            minimum_ms=1.0,
            median_ms=9.0,
            ratio_minimum=0.2,
            ratio_median=0.9,
            repetitions=3,
        )
    ]
    kept = Comparison(
        step="s",
        folder="student",
        split="test",
        retention=0.96,
        retention_above_chance=None,
        worst_task_retention=None,
        worst_task=None,
        tasks={},
    )
    budget = BudgetConfig(
        size_mb=15.0, latency_b1_ratio=0.2, latency_b32_ratio=0.5, retention=0.97, worst_task_retention=0.9
    )
    assert check_budget(budget, TASKS, found, kept) == {
        "artefact": "student",
        "latency_b1_ratio": {"limit": 0.2, "found": 0.2, "met": True, "why": None},
        "latency_b32_ratio": {"limit": 0.5, "found": None, "met": None, "why": "not measured"},
        "size_mb": {"limit": 15.0, "found": 15.0, "met": True, "why": None},
        "retention": {"limit": 0.97, "found": 0.96, "met": False, "why": None},
        "worst_task_retention": {"limit": 0.9, "found": None, "met": None, "why": "not measured"},
    }
    found.latency[0] = dataclasses.replace(found.latency[0], ratio_minimum=None, not_measured="odd")
    row = check_budget(budget, TASKS, found, kept)["latency_b1_ratio"]
    assert row == {"limit": 0.2, "found": None, "met": None, "why": "not measured: the machine was busy"}
    assert check_budget(BudgetConfig(), TASKS, found, None) == {"artefact": "student"}


def test_a_budget_is_not_met_while_a_task_is_left_out():
    """With two of three tasks at chance in the reference, "retention 100 %, met" says nothing about them."""
    budget = BudgetConfig(retention=0.9, worst_task_retention=0.9)
    student = artefact(mood=0.5, topic=0.4, extra=0.1)
    comparison = compare(TASKS, artefact(mood=0.5, topic=0.4, extra=0.05), student, step="s")
    assert (comparison.retention, comparison.worst_task_retention) == (1.0, 1.0)
    for name, row in check_budget(budget, TASKS, student, comparison).items():
        if name != "artefact":
            assert row["met"] is None
            assert row["why"] == "undefined for mood, the reference (0.5) is not above the baseline (0.5)"
    # What misses the limit in any case is missed.
    poor = artefact(mood=0.5, topic=0.2)
    limits = check_budget(budget, TASKS, poor, compare(TASKS, artefact(mood=0.5, topic=0.4), poor, step="s"))
    assert (limits["retention"]["met"], limits["worst_task_retention"]["met"]) == (False, False)


def test_a_beaten_reference_is_found():
    """ "Keeps 121.5 %" is a teacher that has not learnt its task, and not a student that did well."""
    reference = artefact(mood=0.6, topic=0.8, extra=0.1)

    def beaten(rows: int, **scores: float) -> list[str]:
        comparison = compare(TASKS, reference, artefact(**scores), step="s")
        return surpassed(TASKS, comparison, dict.fromkeys(TASKS, rows))

    assert beaten(2000, mood=0.75, topic=0.81, extra=0.9) == ["mood"]  # extra is auxiliary
    assert beaten(2000, mood=0.62, topic=0.82) == []
    assert beaten(20, mood=0.75, topic=0.81) == []  # chance
    at_chance = compare(TASKS, artefact(mood=0.5, topic=0.4), artefact(mood=0.7, topic=0.4), step="s")
    assert surpassed(TASKS, at_chance, {"mood": 1000}) == ["mood"]
