"""Questions that card, report and picture all ask of a record; pure, and no number is made here."""

import re
from typing import Any

from hf_mtcompress.errors import PublishingError
from hf_mtcompress.publishing.figures import NOT_TIMED
from hf_mtcompress.records import (
    Artefact,
    Comparison,
    FormName,
    LatencyRecord,
    RunRecord,
    SplitScores,
    StepRecord,
    TaskRecord,
)
from hf_mtcompress.records.retention import left_out, surpassed, why_left_out


def step_named(record: RunRecord, name: str | None) -> StepRecord | None:
    """The step called `name`, or None."""
    return next((step for step in record.steps if step.name == name), None)


def delivered_step(record: RunRecord) -> StepRecord:
    """The step that the run was made for: the last one that saved something.

    Raises:
        PublishingError: no step of the record saved anything.
    """
    for step in reversed(record.steps):
        if step.artefacts:
            return step
    raise PublishingError(
        f"expected a record with at least one saved step, found none in '{record.name}'; finish the run first"
    )


def delivered_artefact(record: RunRecord) -> Artefact:
    """The artefact that speaks for the delivered step."""
    return delivered_step(record).artefacts[0]


def artefacts_of(record: RunRecord) -> list[tuple[StepRecord, Artefact]]:
    """Everything that was saved, each with its step."""
    return [(step, artefact) for step in record.steps for artefact in step.artefacts]


def reference_artefact(record: RunRecord) -> Artefact | None:
    """The artefact that everything is compared with, or None where the reference saved nothing."""
    step = step_named(record, record.reference)
    return step.artefacts[0] if step is not None and step.artefacts else None


def comparison_of(record: RunRecord, artefact: Artefact) -> Comparison | None:
    """How `artefact` compares with the reference, or None where that was not computed."""
    return next((comparison for comparison in record.comparisons if comparison.folder == artefact.folder), None)


def final_scores(artefact: Artefact) -> SplitScores | None:
    """Scores on the test split, else on validation, else None."""
    return artefact.scores.get("test") or artefact.scores.get("validation")


def latency_of(artefact: Artefact, batch_size: int) -> LatencyRecord | None:
    """The latency row of one batch size, or None where it was not measured."""
    return next((row for row in artefact.latency if row.batch_size == batch_size), None)


def was_busy(artefact: Artefact, batch_size: int) -> bool:
    """Whether a time was taken and is not given, since the machine was busy."""
    row = latency_of(artefact, batch_size)
    return row is not None and row.not_measured is not None


def not_timed(record: RunRecord) -> list[str]:
    """What shows that the machine was busy, by artefact and batch size; empty where every time is given."""
    return [
        f"{artefact.folder}, batch {row.batch_size}: {row.not_measured}"
        for _, artefact in artefacts_of(record)
        for row in artefact.latency
        if row.not_measured is not None
    ]


def tasks_left_out(record: RunRecord, comparison: Comparison | None) -> dict[str, str]:
    """Main tasks of which nothing can be said to be kept, with the reason: they are in no mean and no minimum."""
    return {} if comparison is None else left_out(record.tasks, comparison.undefined)


def every_task_left_out(record: RunRecord) -> dict[str, str]:
    """The same over all comparisons of a run."""
    return {name: why for comparison in record.comparisons for name, why in tasks_left_out(record, comparison).items()}


def beaten_reference(record: RunRecord) -> dict[str, tuple[StepRecord, dict[str, float | None]]]:
    """Tasks in which something beats the reference by more than chance, each with the step and its comparison."""
    found: dict[str, tuple[StepRecord, dict[str, float | None]]] = {}
    for step, artefact in artefacts_of(record):
        comparison = comparison_of(record, artefact)
        if comparison is None or step.name == record.reference or comparison.split not in artefact.scores:
            continue
        rows = {name: score.rows for name, score in artefact.scores[comparison.split].tasks.items()}
        for name in surpassed(record.tasks, comparison, rows):
            row = comparison.tasks[name]
            if name not in found or (row["score"] or 0.0) > (found[name][1]["score"] or 0.0):
                found[name] = (step, row)
    return found


def budget_of(record: RunRecord) -> dict[str, dict[str, Any]]:
    """The limits of the budget as they hold: each with `limit`, `found`, `met` (None where undecided) and `why`.

    Older records have limits as met that leave tasks out, and as missed where nothing was measured.
    """
    budget = record.budget or {}
    found = {}
    comparison = next((item for item in record.comparisons if item.folder == budget.get("artefact")), None)
    for name, entry in budget.items():
        if not isinstance(entry, dict) or "limit" not in entry:
            continue
        row = {"found": None, "met": None, "why": None} | entry
        if row["why"] is None:
            if row["found"] is None:
                row |= {"met": None, "why": "not measured"}
            elif name.startswith("latency") and (batch := re.fullmatch(r"latency_b(\d+)_ratio", name)):
                held = artefact_named(record, budget.get("artefact"))
                if held is not None and was_busy(held, int(batch[1])):
                    row |= {"found": None, "met": None, "why": NOT_TIMED}
            elif row["met"] and name in ("retention", "worst_task_retention") and comparison is not None:
                why = why_left_out(record.tasks, comparison.undefined)
                row |= {"met": None, "why": why} if why else {}
        found[name] = row
    return found


def artefact_named(record: RunRecord, folder: str | None) -> Artefact | None:
    """The artefact in a folder of the run, or None."""
    return next((artefact for _, artefact in artefacts_of(record) if artefact.folder == folder), None)


def batch_sizes(record: RunRecord) -> list[int]:
    """Every batch size that was timed, ascending."""
    return sorted({row.batch_size for step in record.steps for artefact in step.artefacts for row in artefact.latency})


def parent_of(record: RunRecord, step: StepRecord) -> StepRecord | None:
    """The step that gave `step` its weights: its source, or the teacher whose layers a student was cut from."""
    return step_named(record, step.origin or step.source)


def short_precision(artefact: Artefact) -> str:
    """The precision without its details: `int8, dynamic, per channel` is `int8`."""
    return artefact.precision.partition(",")[0]


def depends_on_company(artefact: Artefact) -> bool:
    """Whether an answer can change with the rows beside it: ranges of activations are those of the whole call."""
    kind, _, details = artefact.precision.partition(",")
    return artefact.form == "onnx" and ("dynamic" in details or (kind == "mixed" and "int8" in details))


def interfering_steps(record: RunRecord) -> list[StepRecord]:
    """Steps whose training logged how at least two tasks got along."""
    return [
        step
        for step in record.steps
        if step.interference is not None and step.interference["steps"] and len(step.interference["tasks"]) > 1
    ]


def ancestors(record: RunRecord, step: StepRecord) -> list[StepRecord]:
    """`step` and what it was made from, nearest first."""
    chain = [step]
    while (above := parent_of(record, chain[-1])) is not None and above not in chain:
        chain.append(above)
    return chain


def tasks_of(record: RunRecord, step: StepRecord) -> dict[str, TaskRecord]:
    """The tasks that the model of a step answers: auxiliary ones may have been dropped on the way."""
    return {name: task for name, task in record.tasks.items() if step.tasks is None or name in step.tasks}


def root_artefact(record: RunRecord) -> tuple[StepRecord, Artefact] | None:
    """The float torch folder that a published repository opens with.

    It is the nearest one on the way from the delivered step back to the encoder; None where the run saved none.
    """
    for step in ancestors(record, delivered_step(record)):
        for artefact in step.artefacts:
            if artefact.form == "torch":
                return step, artefact
    return None


def vocabulary_of(record: RunRecord, step: StepRecord) -> int | None:
    """Tokens that the model of `step` knows, or None where no step on the way to it cut the vocabulary."""
    cuts = [ancestor.vocabulary for ancestor in ancestors(record, step) if ancestor.vocabulary is not None]
    return cuts[0]["tokens_after"] if cuts else None


def vocabulary_cuts(record: RunRecord) -> list[StepRecord]:
    """Steps that cut the vocabulary."""
    return [step for step in record.steps if step.vocabulary is not None]


def scheduled_prunings(record: RunRecord) -> list[StepRecord]:
    """Prune steps that did more than cut once: in rounds, while they recovered, or by trying candidates."""
    return [
        step
        for step in record.steps
        if step.pruning is not None and (step.pruning["schedule"] != "one_shot" or step.pruning.get("candidates"))
    ]


def trimmed_steps(record: RunRecord) -> list[StepRecord]:
    """Steps that set single weights to 0."""
    return [step for step in record.steps if step.sparsity is not None]


def shipped_artefact(record: RunRecord, form: FormName) -> tuple[StepRecord, Artefact] | None:
    """The artefact of one form that goes into the repository: the delivered one, else the last of that form."""
    delivered = delivered_step(record)
    for step in [delivered, *reversed(record.steps)]:
        for artefact in step.artefacts:
            if artefact.form == form:
                return step, artefact
    return None


def onnx_artefact(record: RunRecord, step: str | None) -> Artefact:
    """The first ONNX artefact of a step; without a step, the one that a repository gets.

    Raises:
        PublishingError: there is none.
    """
    if step is None:
        shipped = shipped_artefact(record, "onnx")
        artefact = shipped[1] if shipped else None
    else:
        named = step_named(record, step)
        artefact = next((item for item in (named.artefacts if named else []) if item.form == "onnx"), None)
    if artefact is None:
        usable = [other.name for other in record.steps if any(item.form == "onnx" for item in other.artefacts)]
        wanted = "a step" if step is None else f"step '{step}'"
        todo = f"choose among {usable}" if usable else "add a step {kind: quantize, backend: onnxruntime, bits: 8}"
        raise PublishingError(f"expected {wanted} with an ONNX graph, found none; {todo}")
    return artefact


def headline_figures(record: RunRecord, artefact: Artefact) -> dict[str, str]:
    """What was measured of an artefact beside the reference, in words and figures: share kept, size, time."""
    reference = reference_artefact(record)
    found: dict[str, str] = {}
    if reference is None or reference.folder == artefact.folder:
        return found
    comparison = comparison_of(record, artefact)
    without = tasks_left_out(record, comparison)
    if comparison is not None and comparison.retention is not None:
        beside = f", without {', '.join(without)} (undefined)" if without else ""
        found[f"kept of {record.reference}"] = f"{100 * comparison.retention:.1f} %{beside}"
        if comparison.worst_task_retention is not None:
            found[f"kept, worst task ({comparison.worst_task})"] = f"{100 * comparison.worst_task_retention:.1f} %"
    if artefact.size is not None and reference.size is not None:
        before, after = reference.size.weights_bytes / 1e6, artefact.size.weights_bytes / 1e6
        found["size"] = f"{before:.1f} MB to {after:.1f} MB"
    for batch in batch_sizes(record):
        row = latency_of(artefact, batch)
        if row is not None and row.not_measured is not None:
            found[f"time at batch {batch}"] = NOT_TIMED
        elif row is not None and row.ratio_minimum is not None:
            found[f"time at batch {batch}"] = f"{100 * row.ratio_minimum:.1f} %"
    return found


def layers_of(structure: dict[str, Any] | None) -> dict[str, list[dict[str, Any]]]:
    """Layers by encoder name, from a structure that is keyed by encoder or speaks of the only one."""
    if not structure:
        return {}
    if isinstance(structure.get("layers"), list):
        return {"main": structure["layers"]}
    return {
        name: part["layers"]
        for name, part in structure.items()
        if isinstance(part, dict) and isinstance(part.get("layers"), list)
    }


def is_vanilla_shape(record: RunRecord, step: StepRecord) -> bool:
    """Whether the layers of `step` are all alike and lost no single heads, so that stock classes can build them."""
    for ancestor in ancestors(record, step):
        for key in ("heads", "compute"):
            removed = ancestor.settings.get(key) if ancestor.kind == "prune" else None
            if isinstance(removed, int | float) and removed > 0:
                return False
        for layers in layers_of(ancestor.structure).values():
            shapes = [(layer.get("heads"), layer.get("feed_forward"), layer.get("bias_heads")) for layer in layers]
            if any(shape != shapes[0] or shape[2] is not None for shape in shapes):
                return False
    return True
