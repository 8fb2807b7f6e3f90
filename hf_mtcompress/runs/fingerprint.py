"""What the result of a step depends on, as digests: a step is done when these and its files are as its record says."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from hf_mtcompress import records
from hf_mtcompress.artifacts import STEP_RECORD, WEBPAGE
from hf_mtcompress.data.load import content_fingerprint, load_unlabelled
from hf_mtcompress.data.readers import lies_in_files
from hf_mtcompress.digests import content_digest, file_digest, file_names, values_digest
from hf_mtcompress.recipe import (
    PretrainStep,
    QuantizeStep,
    StepConfig,
    TrimVocabularyStep,
)
from hf_mtcompress.recipe.sections import plain_settings
from hf_mtcompress.records import StepRecord
from hf_mtcompress.steps.run_context import RunContext, modalities
from hf_mtcompress.steps.scoring import result_digest

_KEEP = ("keep",)
_LIMITS_OF_A_GATE = ("retention", "worst_task_retention", *_KEEP)
"""Keys of a quantize step that judge what it made, and do not change it."""
_LOADED = (".json", ".jinja", ".safetensors", ".bin", ".onnx", ".xml", ".model", "vocab.txt", "merges.txt")
"""Endings of files that change what is loaded by being there."""


def step_inputs(step: StepConfig, done: dict[str, StepRecord], context: RunContext) -> dict[str, str]:
    """Digest of everything that a step's result depends on, by part: its settings, its encoder, its data and so on.

    Files count by their content, wherever they lie.
    """
    recipe, lineage = context.recipe, context.lineage[str(step.name)]
    # Mixed bits without a size are chosen by these limits.
    judged = isinstance(step, QuantizeStep) and (step.bits != "mixed" or (step.mixed and step.mixed.size_mb))
    limits = _LIMITS_OF_A_GATE if judged else _KEEP if isinstance(step, QuantizeStep) else ()
    settings = {key: value for key, value in chosen_settings(step).items() if key not in (*limits, "data", "corpus")}
    encoder = chosen_settings(recipe.encoder)
    teachers, student = list(lineage.teachers), getattr(step, "student", None)
    for part in (settings, settings.get("recover") or {}):
        if part.get("teacher_cache"):
            part["teacher_cache"] = True  # wherever it lies
    places = [recipe.encoder.path, *(place for place in teachers if place not in done)]
    places += [student.path] if student is not None and student.path else []
    saved = {place: content_digest(place) for place in places if Path(place).is_dir()}
    # Which of them stands where is a setting.
    names = {place: f"folder {number}" for number, place in enumerate(saved)}
    parts = {
        "format": records.FORMAT_VERSION,
        "settings": {"kind": step.kind, **_renamed(settings, names)},
        "parent": result_digest(done[lineage.parent]) if lineage.parent is not None else None,
        "teachers": [result_digest(done[name]) if name in done else saved.get(name, name) for name in teachers],
        "student": saved.get(student.path) if student is not None else None,
        "encoder": [_renamed(encoder, names), saved.get(recipe.encoder.path)],
        "tasks": {name: {"kind": task.kind, **chosen_settings(task)} for name, task in context.sources.tasks.items()},
        "data": [context.sources.fingerprints, _own_rows(step, context)],
        "seed": recipe.seed,
        "mixing": chosen_settings(recipe.mixing),
        "fusion": chosen_settings(recipe.fusion),
        "training": chosen_settings(recipe.training),
        "branches": [recipe.branches, recipe.branch_layers] if recipe.branches else None,
    }
    return {name: values_digest(value) for name, value in parts.items()}


def short(inputs: Mapping[str, str]) -> dict[str, str]:
    """Digests of the parts as a record keeps them."""
    return {name: digest[:12] for name, digest in inputs.items()}


def chosen_settings(section: Any) -> dict[str, Any]:
    """What differs from its default: a key that a later version adds does not undo what is done."""
    chosen = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        default = item.default_factory() if callable(item.default_factory) else item.default
        if value != default:
            chosen[item.name] = plain_settings(value)
            if item.name == "recover":
                # Not a key of a recovery, and later than some that are done.
                chosen[item.name].pop("drop_auxiliary", None)
    return chosen


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Settings with another name for each local folder."""
    match value:
        case str():
            return names.get(value, value)
        case Mapping():
            return {key: _renamed(item, names) for key, item in value.items()}
        case list() | tuple():
            return [_renamed(item, names) for item in value]
        case _:
            return value


def _own_rows(step: StepConfig, context: RunContext) -> str | None:
    """Digest of the rows that a step reads beside those of the tasks."""
    match step:
        case PretrainStep(data=data) if data is not None:
            key = "data"
        case TrimVocabularyStep(corpus=data) if data is not None:
            key = "corpus"
        case _:
            return None
    pictures = [step.column] if lies_in_files(modalities(context.recipe)) else []
    what = f"steps.{step.name}.{key}"
    rows = load_unlabelled(data, [step.column], Path.cwd(), context.recipe.seed, what, pictures)
    return content_fingerprint({"train": rows})


# ------------------------------------------------------------------------------------------------- what a step left


def why_again(folder: Path, found: StepRecord | None, inputs: Mapping[str, str]) -> str | None:
    """Why what lies in a step's folder is not its result, in words; None where it is."""
    if found is None:
        return f"{STEP_RECORD} cannot be read"
    if found.fingerprint != values_digest(inputs):
        parts = [name for name, digest in short(inputs).items() if (found.inputs or {}).get(name) != digest]
        if not found.inputs or not parts:
            return "its record is of another version"
        return f"its {' and '.join(filter(None, [', '.join(parts[:-1]), parts[-1]]))} changed"
    problems = damaged_files(folder, found)
    return ", ".join(problems) or None


def damaged_files(folder: Path, record: StepRecord) -> list[str]:
    """What is wrong with the files that a step saved, one line for each."""
    problems = []
    for name, digest in (record.files or {}).items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif file_digest(folder / name) != digest:
            problems.append(f"{name} is not what was saved")
    return problems


def foreign_files(folder: Path, record: StepRecord) -> list[str]:
    """Files in a step's folder that it did not save, and that change what is loaded from it."""
    if record.files is None:
        return []
    return [
        name
        for name in file_names(folder)
        if name not in record.files
        and name != STEP_RECORD
        and name.endswith(_LOADED)
        # A page is written beside the graph that it shows.
        and not any(part.endswith(WEBPAGE) for part in PurePosixPath(name).parts[:-1])
    ]


def changes_of(folder: Path, record: StepRecord) -> list[str]:
    """How what lies in a step's folder differs from what it saved, one line for each file."""
    return [*damaged_files(folder, record), *(f"{name} is not of the step" for name in foreign_files(folder, record))]
