"""A search: the family, its front, the choice, and what is delivered."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hf_mtcompress.artifacts import CARD, WORK
from hf_mtcompress.cli import main
from hf_mtcompress.compression.latency import BlockTimes, LatencyTable
from hf_mtcompress.errors import RecipeError
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.publishing.family import draw_family, family_csv, family_table
from hf_mtcompress.recipe import BudgetConfig, DistillStep, PruneStep, SearchConfig
from hf_mtcompress.recipe.load import dump_recipe, load_recipe, parse_recipe
from hf_mtcompress.records import Candidate, SearchRecord
from hf_mtcompress.runs import search as search_module
from hf_mtcompress.runs.results import load_record
from hf_mtcompress.runs.search import choose, mark_front, shares_for
from tests.tiny_recipe import write_tiny_recipe

TEACHER = {"kind": "finetune", "name": "teacher", "max_steps": 4}
BUSY = "not measured: the machine was busy"
SEARCH = {
    "timing": {"batch_sizes": [1, 4], "tokens": 8, "threads": 1, "repetitions": 2, "wait": 0},
    "shares": [0.8, 0.6],
    "vocabulary": {"minimum_count": 8},
    "prune": {
        "importance": "fisher",
        "rows": 16,
        "multiple_of": 16,
        "recover": {"kind": "distill", "teacher": "teacher", "max_steps": 2},
    },
}


def candidate(name: str, size: float | None, time: float | None, kept: float | None, missed: float = 0.0) -> Candidate:
    return Candidate(
        steps=[name],
        folder=name,
        form="onnx int8",
        share=None,
        size_mb=size,
        ratios={"1": time},
        measured_ms={"1": 1.0},
        predicted_ms={"1": 1.1},
        average=0.8,
        retention=kept,
        worst_task_retention=kept,
        limits={"size_mb": {"limit": 1.0, "found": size, "met": missed == 0}},
        missed=missed if math.isfinite(missed) else None,
    )


def test_front_holds_what_no_other_beats() -> None:
    family = [
        candidate("whole", 10, 1.0, 1.0),
        candidate("half", 5, 0.5, 0.99),
        candidate("worse", 6, 0.6, 0.98),
        candidate("small", 2, 0.2, 0.9),
        candidate("unknown", None, 0.1, 0.9),
        candidate("twin", 5, 0.5, 0.99),
    ]
    mark_front(family)
    assert [item.folder for item in family if item.on_front] == ["whole", "half", "small", "unknown", "twin"]


def test_smallest_within_the_budget_else_the_nearest() -> None:
    within = [candidate("whole", 10, 1.0, 1.0), candidate("half", 5, 0.5, 0.99), candidate("small", 2, 0.2, 0.9, 0.05)]
    assert choose(within).folder == "half"
    outside = [
        candidate("a", 10, 1.0, 1.0, 0.5),
        candidate("b", 2, 0.2, 0.9, 0.1),
        candidate("c", 1, 0.1, None, math.inf),
    ]
    assert choose(outside).folder == "b"


def not_timed(name: str, size: float, kept: float | None, missed: float = 0.0) -> Candidate:
    """The machine was busy; `kept` None: the reference is at chance in every task."""
    found = candidate(name, size, None, kept, missed)
    found.limits = {"latency_b1_ratio": {"limit": 0.5, "found": None, "met": None, "why": BUSY}}
    found.not_measured = {"1": "other processes used 1.9 of 2 cores"}
    return found


def test_what_was_not_timed_is_not_decided() -> None:
    """Without times the uncut model was delivered as what "comes nearest to the budget, which none meets"."""
    family = [not_timed("whole", 10, 1.0), not_timed("half", 5, 0.99), not_timed("small", 2, 0.9, 0.05)]
    family[0].undefined = {"topic": "the reference (0.2) is not above the baseline (0.2)"}
    assert choose(family).folder == "half"
    assert choose([*family, candidate("timed", 7, 0.4, 0.98)]).folder == "timed"
    assert choose([not_timed("a", 1, None, math.inf), *family]).folder == "half"
    text = family_table(search_record(family, "half", None))
    assert "half is the smallest that may meet the budget, which is not decided." in text
    assert text.splitlines()[3].split()[:4] == ["*", "half", "5.0", "busy"]
    assert "not decided: latency_b1_ratio (not measured: the machine was busy)" in text
    assert "busy: not measured: the machine was busy (whole, batch 1: other processes used 1.9 of 2 cores; " in text
    assert "Kept leaves topic out, where it is undefined: the reference (0.2) is not above the baseline (0.2)." in text


def search_record(family: list[Candidate], chosen: str, met: bool | None) -> SearchRecord:
    return SearchRecord(
        name="tiny",
        created="2026-01-01T00:00:00+00:00",
        environment={},
        reference="teacher",
        runtime="onnx_int8",
        budget={"size_mb": 1.0, "latency_b1_ratio": 0.4, "retention": 0.95},
        candidates=family,
        chosen=chosen,
        met=met,
        conditions={},
    )


def table(reference: float) -> LatencyTable:
    times = BlockTimes(
        rest=1.0,
        layer=0.0,
        heads={0: 0.0, 4: 1.0},
        feed_forward={0: 0.0, 8: 1.0},
        largest_error=0.0,
        reference=reference,
    )
    return LatencyTable(runtime="onnx_int8", tokens=8, threads=1, batches={1: times, 32: times}, environment={})


def test_stages_end_below_the_tightest_limit_on_time() -> None:
    """Whole: 1 + 4 * 2 = 9 ms; 0.1 of 45 ms are 4.5 ms, half of it; the last stage aims at 0.92 of that."""
    shape = [(4, 8)] * 4
    found = shares_for(BudgetConfig(latency_b1_ratio=0.1, latency_b32_ratio=0.9), table(45.0), shape, 3)
    assert found == pytest.approx([0.46 ** (1 / 3), 0.46 ** (2 / 3), 0.46])
    # What is not in the layers cannot be cut: 1 of 9 ms stays in any case.
    assert shares_for(BudgetConfig(latency_b1_ratio=0.001), table(45.0), shape, 1) == pytest.approx([1.1 / 9])
    assert shares_for(BudgetConfig(latency_b1_ratio=5.0), table(45.0), shape, 2)[-1] == pytest.approx(0.9)
    without = shares_for(BudgetConfig(size_mb=8), table(45.0), shape, 4)
    assert without[-1] == pytest.approx(0.15)
    assert without == sorted(without, reverse=True)


def test_table_csv_and_picture(tmp_path: Path) -> None:
    family = [
        candidate("whole", 10.0, 1.0, 1.0),
        candidate("half", 5.0, 0.5, 0.99, 0.2),
        candidate("odd", None, None, None),
    ]
    mark_front(family)
    record = search_record(family, "half", False)
    text = family_table(record)
    assert "*  half" in text
    assert "misses size_mb (5 > 1)" in text
    assert "half comes nearest to the budget, which none meets" in text
    rows = list(csv.DictReader(family_csv(record).splitlines()))
    assert [row["chosen"] for row in rows] == ["False", "True", "False"]
    assert rows[1]["latency_ratio_b1"] == "0.5"
    assert rows[2]["size_mb"] == ""
    picture = draw_family(record, tmp_path / "assets" / "front.png")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    record.candidates = family[2:]
    assert draw_family(record, tmp_path / "none.png") is None


def test_section_is_read_and_written(tmp_path: Path) -> None:
    path = write_tiny_recipe(tmp_path, steps=[TEACHER], search=SEARCH, budget={"size_mb": 1})
    recipe = load_recipe(path)
    assert isinstance(recipe.search, SearchConfig)
    assert recipe.search.timing.batch_sizes == (1, 4)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"budget": None}, "budget: expected at least one limit for the search to stay within"),
        ({"budget": {}}, "budget: expected at least one limit for the search to stay within"),
        ({"search": {"from": "nobody"}}, "search.from: "),
        ({"search": {"members": ["nobody"]}}, "search.members.0: "),
        (
            {"steps": [TEACHER, {"kind": "quantize", "name": "teacher-int8", "backend": "onnxruntime"}]},
            "'teacher-int8' is a name that the search gives",
        ),
        ({"search": {"members": ["teacher"]}}, "search.members.0: 'teacher' is in the family already"),
        ({"search": {"shares": [0.5, 0.8]}}, "search.shares: expected at least one share and each below the last"),
        ({"search": {"shares": [1.0]}}, "search.shares.0: expected a share above 0 and below 1, found 1"),
        ({"search": {"prune": {"heads": 0.5}}}, "search.prune.heads: is chosen by the search itself"),
        ({"search": {"prune": {"name": "x"}}}, "search.prune.name: is chosen by the search itself"),
        ({"search": {"vocabulary": {"from": "teacher"}}}, "search.vocabulary.from: is chosen by the search itself"),
        (
            {"search": {"prune": {"schedule": {"kind": "gradual"}}}},
            "search.prune.schedule: latency chooses all at once",
        ),
        ({"search": {"prune": {"rearrange": True}}}, "search.prune.rearrange: needs the derivatives"),
        ({"search": {"timing": {"batch_sizes": []}}}, "search.timing.batch_sizes: expected at least one number"),
        ({"steps": [TEACHER, {**TEACHER, "name": "cut-500"}]}, "'cut-500' is a name that the search gives"),
        (
            {"steps": [TEACHER, {**TEACHER, "name": "later"}], "reference": "later", "search": {"from": "teacher"}},
            "search.from: expected the reference 'later' or a step after it",
        ),
        ({"search": {"points": 0}}, "search.points: expected a whole number of at least 1, found 0"),
    ],
)
def test_what_a_search_cannot_be(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    path = write_tiny_recipe(tmp_path, **{"steps": [TEACHER], "search": {}, "budget": {"size_mb": 1}, **sections})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)


def test_only_what_leads_to_the_delivered_one_is_recorded(tmp_path: Path) -> None:
    """Test rows of other members would be looked at for nothing."""
    steps = [
        TEACHER,
        {"kind": "finetune", "name": "tutor", "from": "teacher", "max_steps": 1},
        {"kind": "prune", "name": "half", "from": "teacher", "heads": 0.5},
        {"kind": "distill", "name": "student", "teacher": "tutor", "student": {"layers": 1}, "max_steps": 1},
        {"kind": "finetune", "name": "further", "max_steps": 1},
    ]
    recipe = load_recipe(write_tiny_recipe(tmp_path, steps=steps, reference="teacher"))

    def names(origin: str, *path: Any) -> list[str | None]:
        return [step.name for step in search_module._leading_to(recipe, origin, path)]

    assert names("teacher") == ["teacher"]
    assert names("half") == ["teacher", "half"]
    assert names("further") == ["teacher", "tutor", "student", "further"]
    taught = PruneStep(latency=0.5, recover=DistillStep(teacher="half"))
    assert names("teacher", taught) == ["teacher", "half"]


def test_search_needs_its_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_recipe(tmp_path, steps=[TEACHER])
    assert main(["search", str(path), "--output", str(tmp_path / "run")]) == 2
    assert "search: expected the section that says what is searched for, found none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"latency": 0.5, "heads": 0.2}, "latency: chooses heads and neurons"),
        ({"latency": 0.5, "compute": 0.2}, "latency: chooses by the clock what compute chooses by counting"),
        ({"heads": 0.5, "timing": {"tokens": 8}}, "timing: is what latency is measured on"),
        ({"latency": 0.5, "timing": {"batch_sizes": []}}, "timing.batch_sizes: expected at least one number"),
        ({"latency": 1.0}, "latency: expected a fraction of at least 0 and below 1"),
        ({"latency": 0.5, "schedule": {"kind": "iterative"}}, "schedule: latency chooses all at once"),
    ],
)
def test_what_pruning_by_the_clock_cannot_be(tmp_path: Path, step: dict[str, Any], message: str) -> None:
    path = write_tiny_recipe(tmp_path, steps=[TEACHER, {"kind": "prune", **step}])
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    parse_recipe({**_loaded(path), "steps": [TEACHER, {"kind": "prune", "latency": 0.5}]}, tmp_path)


def _loaded(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text())


@pytest.mark.slow
def test_search_of_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything real: block times, cuts, recovery, int8 graphs, times, the choice and the run that delivers it."""
    budget = {"size_mb": 100.0, "latency_b1_ratio": 100.0}
    student = {"kind": "distill", "name": "student", "teacher": "teacher", "student": {"layers": 1}, "max_steps": 2}
    settings = {**SEARCH, "members": ["student"]}
    path = write_tiny_recipe(tmp_path, steps=[TEACHER, student], search=settings, budget=budget)
    output = tmp_path / "run"
    assert main(["search", str(path), "--output", str(output)]) == 0
    assert "meets the budget" in capsys.readouterr().out
    found = json.loads((output / "search.json").read_text())
    folders = [item["folder"] for item in found["candidates"]]
    stages = ("vocabulary-student", "vocabulary", "cut-800", "cut-600")
    assert folders == [f"{stage}-{form}" for stage in stages for form in ("int8", "int8-4")]
    assert found["met"]
    sizes = {item["folder"]: item["size_mb"] for item in found["candidates"]}
    assert found["chosen"] == min(sizes, key=lambda folder: sizes[folder])
    assert [item["predicted_ms"] for item in found["candidates"][:2]] == [{}, {}]
    predicted = [item["predicted_ms"]["1"] for item in found["candidates"][2:]]
    assert predicted[2] <= 0.8 * predicted[0] + 1e-6
    assert predicted[4] <= 0.6 * predicted[0] + 1e-6
    # The same model, once with smaller tables.
    assert all(predicted[place] == predicted[place + 1] for place in (0, 2, 4))
    # A member of one layer is the smallest; its record is of the steps that lead to it, and of no others.
    assert found["chosen"] == "vocabulary-student-int8-4"
    assert all(sizes[f"{stage}-int8-4"] < sizes[f"{stage}-int8"] for stage in stages)
    assert found["chosen"].endswith("int8-4")
    # One table for all, although the vocabulary and the layers of the later sources are smaller.
    assert len(list((output / WORK).glob("latency-*.json"))) == 1
    # Every member reads with the vocabulary that its embedding was cut to.
    tokens = {
        folder: len(AutoTokenizer.from_pretrained(output / folder)) for folder in ("teacher", "cut-800", *folders)
    }
    assert len({count for folder, count in tokens.items() if folder not in ("teacher", "student")}) == 1
    assert tokens["cut-800"] < tokens["teacher"]
    assert MultiTaskModel.from_pretrained(output / "cut-800").encoder.config.vocab_size == tokens["cut-800"]
    record = load_record(output)
    assert record.steps[-1].artefacts[0].folder == found["chosen"]
    assert [step.name for step in record.steps] == ["teacher", "student", "vocabulary-student", found["chosen"]]
    assert record.steps[-1].artefacts[0].scores["test"].tasks["mood"].rows == 24
    assert record.budget is not None
    assert record.budget["artefact"] == found["chosen"]
    assert found["chosen"] in (output / CARD).read_text()
    for name in ("front.png", "front.csv"):
        assert (output / "assets" / name).is_file()
    # Again: nothing is trained twice, and the same is delivered.
    before = {folder: (output / folder / "step.json").stat().st_mtime_ns for folder in folders}
    assert main(["search", str(path), "--output", str(output)]) == 0
    assert {folder: (output / folder / "step.json").stat().st_mtime_ns for folder in folders} == before
