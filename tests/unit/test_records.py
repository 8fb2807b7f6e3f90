"""Laws of the record: what was written is read back, and what cannot be read says why."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from hf_mtcompress.records import (
    FORMAT_VERSION,
    Artefact,
    Comparison,
    RunRecord,
    StepRecord,
    TaskRecord,
    artefact_from_dict,
    run_from_dict,
    step_from_dict,
    to_json,
)
from tests.unit.publishing.factory import make_record


def minimal() -> RunRecord:
    """A run of which nothing was measured."""
    return RunRecord(name="x", created="now", seed=0, environment={}, encoder={}, tasks={}, reference="", steps=[])


def plain(record: Any) -> dict[str, Any]:
    return json.loads(to_json(record))


# ------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("make", [make_record, minimal])
def test_a_record_is_read_as_it_was_written(make: Callable[[], RunRecord]) -> None:
    """A field that comes back as a dict, or not at all, is missing from the card that is rendered again."""
    record = make()
    again = run_from_dict(plain(record))
    assert again == record
    assert to_json(again) == to_json(record)


def test_every_step_and_artefact_is_read_as_it_was_written() -> None:
    """A step that is not read is done again: hours of training for a typo."""
    for step in make_record().steps:
        assert step_from_dict(plain(step)) == step
        for artefact in step.artefacts:
            assert artefact_from_dict(plain(artefact)) == artefact


def test_reading_changes_nothing_in_what_is_read() -> None:
    data = plain(make_record())
    before = json.dumps(data)
    run_from_dict(data)
    assert json.dumps(data) == before


def test_fields_with_a_default_may_be_missing() -> None:
    """Records that were written before a field was added are read for ever."""
    data = plain(minimal())
    for name in ("comparisons", "benchmark", "budget", "publish"):
        del data[name]
    assert run_from_dict(data) == minimal()
    assert artefact_from_dict({"form": "torch", "folder": "a", "precision": "float32"}) == Artefact(
        form="torch", folder="a", precision="float32"
    )


# ---------------------------------------------------------------------------------------------------- exact numbers


def test_numbers_that_are_not_finite_become_null() -> None:
    """`NaN` is not JSON: browsers and other readers refuse the whole file."""
    record = minimal()
    record.environment = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (float("-inf"), 2)}, "e": "NaN"}
    found = plain(record)["environment"]
    assert found == {"a": None, "b": [None, 1.5], "c": {"d": [None, 2]}, "e": "NaN"}


def test_numbers_keep_every_digit() -> None:
    record = minimal()
    record.environment = {"x": 0.1 + 0.2, "y": 1e-300, "z": 2**70, "w": 5e-05}
    assert run_from_dict(plain(record)).environment == record.environment


def test_the_text_is_one_line_a_value_and_ends_with_a_line() -> None:
    text = to_json(minimal())
    assert text.startswith('{\n  "format_version": 1,\n')
    assert text.endswith("}\n")


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, None, "1", 1.0])
def test_another_format(version: Any) -> None:
    """A newer record that is half understood would give a card with half of the truth."""
    data = {**plain(minimal()), "format_version": version}
    with pytest.raises(
        ValueError, match=rf"^expected a record of format_version 1 or older, found {version}; update hf_mtcompress"
    ):
        run_from_dict(data)


def test_a_newer_format_is_refused_before_its_fields_are_read() -> None:
    with pytest.raises(ValueError, match="found 2; update hf_mtcompress to read it"):
        run_from_dict({"format_version": 2, "chapters": []})


@pytest.mark.parametrize("data", [[], "record", None])
def test_no_record_at_all(data: Any) -> None:
    with pytest.raises(ValueError, match="expected a record of format_version 1 or older, found None"):
        run_from_dict(data)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(RunRecord) if f.default is f.default_factory][:8])
def test_a_missing_field_of_a_run(name: str) -> None:
    data = plain(minimal())
    del data[name]
    with pytest.raises(ValueError, match=f"^expected the fields of a RunRecord, found no '{name}'$"):
        run_from_dict(data)


@pytest.mark.parametrize(
    ("place", "cls"),
    [
        (lambda data: data, RunRecord),
        (lambda data: data["tasks"]["mood"], TaskRecord),
        (lambda data: data["steps"][0], StepRecord),
        (lambda data: data["comparisons"][0], Comparison),
        (lambda data: data["steps"][0]["artefacts"][0], Artefact),
    ],
)
def test_an_unknown_field_is_named_with_its_record(place: Callable[[Any], dict[str, Any]], cls: type) -> None:
    data = plain(make_record())
    place(data)["colour"] = "red"
    with pytest.raises(
        ValueError, match=f"^expected the fields of a {cls.__name__}, found the unknown field 'colour'$"
    ):
        run_from_dict(data)


@pytest.mark.parametrize(
    ("place", "key", "cls"),
    [
        (lambda artefact: artefact["size"], "parameters", "SizeRecord"),
        (lambda artefact: artefact["latency"][0], "tokens", "LatencyRecord"),
        (lambda artefact: artefact["scores"]["test"], "tasks", "SplitScores"),
        (lambda artefact: artefact["scores"]["test"]["tasks"]["mood"], "rows", "TaskScore"),
        (lambda artefact: artefact, "form", "Artefact"),
    ],
)
def test_a_missing_field_is_named_with_its_record(place: Callable[[Any], Any], key: str, cls: str) -> None:
    """`'tasks'` alone, as a KeyError says it, could be anywhere."""
    data = plain(make_record())
    del place(data["steps"][0]["artefacts"][0])[key]
    with pytest.raises(ValueError, match=f"^expected the fields of a {cls}, found no '{key}'$"):
        run_from_dict(data)


def test_all_wrong_fields_are_named() -> None:
    data = {**plain(minimal()), "colour": 1, "shape": 2}
    del data["seed"]
    with pytest.raises(ValueError, match="found no 'seed', the unknown field 'colour', the unknown field 'shape'"):
        run_from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data["steps"][0].update(seconds="ten"),
            r"values of a StepRecord, found seconds: Input should be a valid number",
        ),
        (lambda data: data.update(seed="a"), r"seed: Input should be a valid integer"),
        (lambda data: data.update(tasks=[1]), r"found other values"),
        (lambda data: data["steps"][0]["artefacts"].append(3), r"expected the fields of a Artefact, found int"),
        (lambda data: data["steps"][0].update(name="../../x"), r"folders inside of the run, found '../../x'"),
        (
            lambda data: data["steps"][0]["artefacts"][0].update(folder="/etc"),
            r"folders inside of the run, found ./etc",
        ),
        (lambda data: data["comparisons"][0].update(folder="a/../../b"), r"folders inside of the run, found"),
    ],
)
def test_values_of_another_type_and_places_outside(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    """A card that is rendered from such a record ends in the middle; a step elsewhere would be read, or pushed."""
    data = plain(make_record())
    change(data)
    with pytest.raises(ValueError, match=message):
        run_from_dict(data)


def test_numbers_that_were_not_finite_are_read_back() -> None:
    """They were written as null, in places that hold numbers otherwise."""
    record = make_record()
    scored = next(artefact for step in record.steps for artefact in step.artefacts if artefact.scores)
    scores = next(iter(scored.scores.values()))
    next(iter(scores.tasks.values())).metrics["loss"] = float("nan")
    assert to_json(run_from_dict(plain(record))) == to_json(record)
