"""What the result of a step depends on, as one digest: a step whose digest is that of a finished one is skipped."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from hf_mtcompress import records
from hf_mtcompress.data.load import content_fingerprint, load_unlabelled
from hf_mtcompress.recipe import (
    PretrainStep,
    QuantizeStep,
    StepConfig,
    TrimVocabularyStep,
    teachers_of,
)
from hf_mtcompress.recipe.sections import plain_settings
from hf_mtcompress.records import StepRecord
from hf_mtcompress.steps.rows import texts_to_keep
from hf_mtcompress.steps.run_context import RunContext


def step_fingerprint(step: StepConfig, source: str | None, done: dict[str, StepRecord], context: RunContext) -> str:
    """Digest of everything a step's result depends on: its settings, its inputs, the data and the encoder."""
    recipe = context.recipe
    # Mixed bits without a size are chosen by these limits.
    judged = isinstance(step, QuantizeStep) and (step.bits != "mixed" or (step.mixed and step.mixed.size_mb))
    limits = _LIMITS_OF_A_GATE if judged else _KEEP if isinstance(step, QuantizeStep) else ()
    parts = {
        "format": records.FORMAT_VERSION,
        "step": {
            "kind": step.kind,
            **{key: value for key, value in chosen_settings(step).items() if key not in limits},
        },
        "source": done[source].fingerprint if source is not None else None,
        "teachers": [done[name].fingerprint if name in done else _saved(name) for name in teachers_of(step)],
        **_other_inputs(step, context),
        "seed": recipe.seed,
        "encoder": chosen_settings(recipe.encoder),
        "encoder_files": _folder_digest(Path(recipe.encoder.path)),
        "tasks": {name: {"kind": task.kind, **chosen_settings(task)} for name, task in context.sources.tasks.items()},
        "data": context.sources.fingerprints,
        "mixing": chosen_settings(recipe.mixing),
        "fusion": chosen_settings(recipe.fusion),
        "training": chosen_settings(recipe.training),
        **({"branches": [recipe.branches, recipe.branch_layers]} if recipe.branches else {}),
        **({"corpus": _corpus_digest(step, context)} if isinstance(step, TrimVocabularyStep) and step.corpus else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


_KEEP = ("keep",)

_LIMITS_OF_A_GATE = ("retention", "worst_task_retention", *_KEEP)
"""Keys of a quantize step that judge what it made, and do not change it."""

_MODEL_FILES = (".safetensors", ".json", ".onnx", ".xml", ".bin")


def _saved(place: str) -> Any:
    """A saved model by its content where it lies here, else by its name."""
    folder = Path(place)
    if not folder.is_dir():
        return place
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in _MODEL_FILES):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _other_inputs(step: StepConfig, context: RunContext) -> dict[str, Any]:
    """What a step reads beside its source, its teachers and the tasks' rows."""
    student = getattr(step, "student", None)
    parts: dict[str, Any] = {}
    if student is not None and student.path is not None and Path(student.path).is_dir():
        parts["student_files"] = _saved(student.path)
    if isinstance(step, PretrainStep) and step.data is not None:
        rows = load_unlabelled(step.data, [step.column], Path.cwd(), context.recipe.seed, f"steps.{step.name}.data")
        parts["own_data"] = content_fingerprint({"train": rows})
    return parts


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


def _corpus_digest(step: TrimVocabularyStep, context: RunContext) -> str:
    """Digest of the texts whose tokens a step keeps, where they are not the tasks' own."""
    return hashlib.sha256(repr(texts_to_keep(step, context)).encode("utf-8", "surrogatepass")).hexdigest()


def _folder_digest(folder: Path) -> str | None:
    """Digest of names and sizes of a local encoder's files; None for a Hub id."""
    if not folder.is_dir():
        return None
    files = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()
