"""What happened: plain data that every stage returns and that the card, the report and the push read.

`record.json` is a `RunRecord`: everything that a card prints stands in it.
Numbers carry the split and the number of rows they were computed on; what was not measured is null, never a guess.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from hf_mtcompress.records.forms import FormName
from hf_mtcompress.records.timing import Calls, Surroundings, cost_of, doubtful_times

FORMAT_VERSION = 1

Record = TypeVar("Record")


@dataclass(kw_only=True)
class TaskRecord:
    """One task as the run saw it."""

    name: str
    kind: str
    problem_type: str
    metric: str
    role: str
    weight: float
    labels: list[str] | None
    rows: dict[str, int]
    """Labelled rows by role (train, validation, test)."""
    baseline: dict[str, float]
    """Score of the majority class or the mean predictor, by role (validation, test)."""
    dataset_id: str | None = None
    dataset_revision: str | None = None
    license: str | None = None


@dataclass(kw_only=True)
class TaskScore:
    """Scores of one task on one split."""

    rows: int
    metrics: dict[str, float]


@dataclass(kw_only=True)
class SplitScores:
    """Scores of all tasks on one split; `average` is the mean of the main tasks' primary metrics."""

    split: str
    average: float | None
    tasks: dict[str, TaskScore]


@dataclass(kw_only=True)
class SizeRecord:
    """Bytes on disk and parameter counts of an artefact."""

    weights_bytes: int
    """Weights and graph."""
    tokenizer_bytes: int
    embedding_bytes: int | None
    """The part of `weights_bytes` that is word embeddings, where it could be told."""
    parameters: int | None
    encoder_parameters: int | None
    embedding_parameters: int | None
    head_parameters: int | None


@dataclass(kw_only=True)
class LatencyRecord:
    """Milliseconds of a whole call for one batch size, measured in turns with the other artefacts."""

    batch_size: int
    tokens: int
    minimum_ms: float | None
    """None where it was not measured; so are the others then."""
    median_ms: float | None
    ratio_minimum: float | None
    """minimum / minimum of the reference in torch float32; None where either of them was not measured."""
    ratio_median: float | None
    repetitions: int
    not_measured: str | None = None
    """Why times or ratios are not given: what shows that the machine was busy; None where they are."""


@dataclass(kw_only=True)
class Artefact:
    """One saved form of a model: where it lies, what it scores, how big and how fast it is."""

    form: FormName
    folder: str
    """Relative to the run."""
    precision: str
    """What the weights are stored and computed in, such as float32 or int8."""
    size: SizeRecord | None = None
    scores: dict[str, SplitScores] = field(default_factory=dict)
    """By role: validation after the step, test at the end of the run."""
    latency: list[LatencyRecord] = field(default_factory=list)
    reload: dict[str, Any] | None = None
    """Result of loading the folder in a fresh process: {"passed", "max_difference", "tolerance", "how"}."""
    peak_memory_mb: float | None = None


@dataclass(kw_only=True)
class StepRecord:
    """One step of the recipe as it ran. `artefacts[0]` speaks for the step."""

    name: str
    kind: str
    source: str | None
    fingerprint: str
    settings: dict[str, Any]
    seconds: float
    artefacts: list[Artefact]
    origin: str | None = None
    """The step whose weights it began with, if one of this run: `source`, or the teacher that a student has layers of.
    Older records, which lack it, know of the source alone."""
    tasks: list[str] | None = None
    """Those that the model answers, since a step may drop auxiliary ones; None in older records: all."""
    structure: dict[str, Any] | None = None
    """Layers, heads per layer and feed-forward width per layer after the step."""
    training: dict[str, Any] | None = None
    """Steps, epochs, final losses; the log history as a list of rows."""
    interference: dict[str, Any] | None = None
    """How the tasks' gradients got along in training, as `losses.interference.interference_report` returns it."""
    vocabulary: dict[str, Any] | None = None
    """Tokens and size of the word embedding before and after, and how each split is read, where a step cut it."""
    pruning: dict[str, Any] | None = None
    """What a prune step removed and when, and the scores of the candidates that it chose from."""
    sparsity: dict[str, Any] | None = None
    """Weights that are 0 in each matrix and over all, and bytes stored dense and as saved, where a step trimmed."""
    quantization: dict[str, Any] | None = None
    """How a quantize step stored weights, and what its gate found."""
    inputs: dict[str, str] | None = None
    """Short digests of what the fingerprint is made of, by part, to say which one changed; None in older records."""
    files: dict[str, str] | None = None
    """SHA-256 of each file that was saved, by name relative to the step; None in older records, and where they were
    deleted on purpose."""


@dataclass(kw_only=True)
class Comparison:
    """A step's artefact against the reference, on the test split where there is one, else validation."""

    step: str
    folder: str
    split: str
    retention: float | None
    """Mean over main tasks of score / reference score."""
    retention_above_chance: float | None
    """The same with (score - baseline) / (reference score - baseline)."""
    worst_task_retention: float | None
    worst_task: str | None
    tasks: dict[str, dict[str, float | None]]
    """By task: score, reference, difference, retention, retention_above_chance."""
    undefined: dict[str, str] = field(default_factory=dict)
    """By task: why a retention could not be computed."""


@dataclass(kw_only=True)
class RunRecord:
    """A whole run."""

    format_version: int = FORMAT_VERSION
    name: str
    created: str
    seed: int
    environment: dict[str, Any]
    """Versions, processor, cores, threads, memory, operating system, load."""
    encoder: dict[str, Any]
    """path_or_id, hub_id, revision, max_length, model_type, license; `path_or_id` is a Hub id or the name of a folder,
    never a local path."""
    tasks: dict[str, TaskRecord]
    reference: str
    steps: list[StepRecord]
    comparisons: list[Comparison] = field(default_factory=list)
    benchmark: dict[str, Any] | None = None
    """Conditions of the latency figures: tokens, threads, what else ran, interleaving."""
    budget: dict[str, Any] | None = None
    """By limit: {"limit", "found", "met", "why"}; plus "artefact". `met` is None where that is not decided, and `why`
    then says why."""
    publish: dict[str, Any] | None = None


def to_json(record: Any) -> str:
    """The record as JSON text; numbers that are not finite become null."""
    return json.dumps(_finite(dataclasses.asdict(record)), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def artefact_from_dict(data: dict[str, Any]) -> Artefact:
    """Rebuild an `Artefact` from its JSON form.

    Raises:
        ValueError: a field is missing or unknown.
    """
    return _rebuild(
        Artefact,
        data,
        size=lambda size: _rebuild(SizeRecord, size) if size else None,
        scores=lambda scores: {role: _rebuild(SplitScores, split, tasks=_scores) for role, split in scores.items()},
        latency=lambda rows: [_rebuild(LatencyRecord, row) for row in rows],
    )


def step_from_dict(data: dict[str, Any]) -> StepRecord:
    """Rebuild a `StepRecord` from its JSON form.

    Raises:
        ValueError: a field is missing, unknown, or of another type, or a folder is not inside of the run.
    """
    step = _rebuild(StepRecord, data, artefacts=lambda rows: [artefact_from_dict(row) for row in rows])
    _check_places([step.name, *(artefact.folder for artefact in step.artefacts)])
    return _checked(step)


def run_from_dict(data: dict[str, Any]) -> RunRecord:
    """Rebuild a `RunRecord` from its JSON form.

    Raises:
        ValueError: the record was written by a newer version of the package, or a field is missing, unknown, or of
            another type, or a folder is not inside of the run.
    """
    found = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise ValueError(
            f"expected a record of format_version {FORMAT_VERSION} or older, found {found}; "
            "update hf_mtcompress to read it"
        )
    record = _rebuild(
        RunRecord,
        data,
        tasks=lambda tasks: {name: _rebuild(TaskRecord, task) for name, task in tasks.items()},
        steps=lambda steps: [step_from_dict(step) for step in steps],
        comparisons=lambda rows: [_rebuild(Comparison, row) for row in rows],
    )
    _check_places([comparison.folder for comparison in record.comparisons])
    _checked(record)
    if record.benchmark is not None and "other_processes" not in record.benchmark:
        _judge_times(record, record.benchmark)
    return record


def _checked(record: Record) -> Record:
    """The same, if its values are what its class says.

    Raises:
        ValueError: a value is of another type.
    """
    try:
        TypeAdapter(type(record)).validate_json(json.dumps(dataclasses.asdict(record)), strict=True)  # pyright: ignore[reportArgumentType, reportCallIssue] - every record is a dataclass
    except ValidationError as error:
        # Numbers that are not finite were written as null.
        wrong = [item for item in error.errors() if item["type"] != "float_type" or item["input"] is not None]
        if wrong:
            place = ".".join(str(part) for part in wrong[0]["loc"])
            found = f"{place}: {wrong[0]['msg']}"
            raise ValueError(f"expected the values of a {type(record).__name__}, found {found}") from error
    return record


def _check_places(names: list[Any]) -> None:
    """Folders of a run lie inside it: nothing is read or written elsewhere.

    Raises:
        ValueError: one does not.
    """
    for name in names:
        place = PurePath(str(name))
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"expected folders inside of the run, found '{name}'")


def _judge_times(record: RunRecord, benchmark: dict[str, Any]) -> None:
    """Take times that do not hold together out of a record that was written before they were judged."""
    artefacts = {artefact.folder: artefact for step in record.steps for artefact in step.artefacts}
    adapted = {artefact.folder for step in record.steps if step.settings.get("adapters") for artefact in step.artefacts}
    loads = [load for key in ("load_before", "load_after") if isinstance(load := benchmark.get(key), int | float)]
    cores, threads = benchmark.get("cores"), benchmark.get("threads")
    calls, costs = {}, {}
    for folder, artefact in artefacts.items():
        calls[folder] = {
            row.batch_size: Calls(minimum_ms=row.minimum_ms, median_ms=row.median_ms)
            for row in artefact.latency
            if row.minimum_ms is not None and row.median_ms is not None
        }
        size = artefact.size
        known = (size.encoder_parameters, size.embedding_parameters) if size and folder not in adapted else (None, None)
        costs[folder] = cost_of(artefact.form, artefact.precision, *known)
    sizes = {size for rows in calls.values() for size in rows}
    around = {}
    if isinstance(cores, int) and isinstance(threads, int):
        around = dict.fromkeys(sizes, Surroundings(cores=cores, threads=threads, load=min(loads, default=None)))
    found = doubtful_times(calls, costs, around)
    reference = next((step.artefacts[0].folder for step in record.steps if step.name == record.reference), None)
    for folder, artefact in artefacts.items():
        artefact.latency = without_doubtful(artefact.latency, found.get(folder, {}), found.get(reference or "", {}))


def without_doubtful(
    rows: list[LatencyRecord], own: Mapping[int, str], reference: Mapping[int, str]
) -> list[LatencyRecord]:
    """Rows of an artefact without the times that do not hold, and without ratios to times of the reference that do not.

    Args:
        rows: one for each batch size.
        own: by batch size, why a time of the artefact does not hold.
        reference: the same of the reference.
    """
    kept = []
    for row in rows:
        if row.batch_size in own:
            row = dataclasses.replace(
                row,
                minimum_ms=None,
                median_ms=None,
                ratio_minimum=None,
                ratio_median=None,
                not_measured=own[row.batch_size],
            )
        elif row.batch_size in reference:
            why = f"of the reference: {reference[row.batch_size]}"
            row = dataclasses.replace(row, ratio_minimum=None, ratio_median=None, not_measured=why)
        kept.append(row)
    return kept


def _scores(tasks: dict[str, Any]) -> dict[str, TaskScore]:
    return {name: _rebuild(TaskScore, score) for name, score in tasks.items()}


def _rebuild(cls: type[Record], data: dict[str, Any], **nested: Callable[[Any], Any]) -> Record:
    """An instance of a record class from its fields, those with records inside through a function each."""
    if not isinstance(data, dict):
        raise ValueError(f"expected the fields of a {cls.__name__}, found {type(data).__name__}")
    known = {
        entry.name: entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        for entry in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType] - every record is a dataclass
    }
    problems = [f"no '{name}'" for name, needed in known.items() if needed and name not in data]
    problems += [f"the unknown field '{name}'" for name in data if name not in known]
    if problems:
        raise ValueError(f"expected the fields of a {cls.__name__}, found {', '.join(problems)}")
    try:
        return cls(**{**data, **{name: build(data[name]) for name, build in nested.items() if name in data}})
    except (AttributeError, TypeError) as error:
        raise ValueError(f"expected the fields of a {cls.__name__}, found other values ({error})") from error
