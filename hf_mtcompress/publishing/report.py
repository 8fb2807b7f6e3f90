"""The record as rows: for `report --json`, for the terminal and for the card.

A latency ratio is minimum / minimum of the reference. The minimum of repeated calls hardly moves when something else
runs on the machine, the median does; both stand in the rows, the median under its own key.
"""

from collections.abc import Sequence
from typing import Any

from hf_mtcompress.publishing.facts import (
    batch_sizes,
    beaten_reference,
    budget_of,
    comparison_of,
    delivered_step,
    every_task_left_out,
    final_scores,
    latency_of,
    not_timed,
    parent_of,
    scheduled_prunings,
    short_precision,
    tasks_of,
    trimmed_steps,
    vocabulary_cuts,
    was_busy,
)
from hf_mtcompress.publishing.figures import NOT_MEASURED, NOT_TIMED, Figures
from hf_mtcompress.records import Artefact, RunRecord, StepRecord

REPORTED_BATCH_SIZES = (1, 32)


def report_rows(record: RunRecord) -> list[dict[str, Any]]:
    """One object for each step, in order; what was not measured is None.

    Returns:
        Objects with `step`, `kind`, `from`, `split`, `rows`, `average`, `retention`, `retention_above_chance`,
        `worst_task_retention`, `worst_task`, `undefined` (tasks that are left out of the three, with the reason),
        `scores` (primary metric by task), `parameters`, `size_mb` (10**6 bytes of
        weights and graph), `latency_b1_ratio` and `latency_b32_ratio` (minimum over minimum of the reference), the same
        with `_median`, `minimum_ms_b1`, `median_ms_b1` and so on, `not_measured` (by batch size, why its times are not
        given), `pruning`, `vocabulary` and `sparsity` (where the
        step cut parts, tokens or single weights), `seconds`, `delivered`, and `artefacts`: the same of every saved
        form, with `form`, `folder` and `precision`. A step's own numbers are its first artefact's.
    """
    delivered = delivered_step(record).name if any(step.artefacts for step in record.steps) else None
    return [
        {
            "step": step.name,
            "kind": step.kind,
            "from": step.source,
            **_measured(record, step.artefacts[0] if step.artefacts else None),
            **({"vocabulary": step.vocabulary} if step.vocabulary is not None else {}),
            **({"pruning": step.pruning} if step.pruning is not None else {}),
            **({"sparsity": step.sparsity} if step.sparsity is not None else {}),
            **({"quantization": step.quantization} if step.quantization is not None else {}),
            "seconds": step.seconds,
            "delivered": step.name == delivered,
            "artefacts": [
                {
                    "form": artefact.form,
                    "folder": artefact.folder,
                    "precision": artefact.precision,
                    **_measured(record, artefact),
                }
                for artefact in step.artefacts
            ],
        }
        for step in record.steps
    ]


def _measured(record: RunRecord, artefact: Artefact | None) -> dict[str, Any]:
    scores = final_scores(artefact) if artefact is not None else None
    comparison = comparison_of(record, artefact) if artefact is not None else None
    size = artefact.size if artefact is not None else None
    row: dict[str, Any] = {
        "split": scores.split if scores else None,
        "average": scores.average if scores else None,
        "retention": comparison.retention if comparison else None,
        "retention_above_chance": comparison.retention_above_chance if comparison else None,
        "worst_task_retention": comparison.worst_task_retention if comparison else None,
        "worst_task": comparison.worst_task if comparison else None,
        "undefined": comparison.undefined if comparison else {},
        "scores": {
            name: scores.tasks[name].metrics.get(task.metric)
            for name, task in record.tasks.items()
            if name in scores.tasks
        }
        if scores
        else {},
        "rows": {name: score.rows for name, score in scores.tasks.items()} if scores else {},
        "parameters": size.parameters if size else None,
        "size_mb": size.weights_bytes / 1e6 if size else None,
    }
    for batch_size in sorted({*REPORTED_BATCH_SIZES, *batch_sizes(record)}):
        latency = latency_of(artefact, batch_size) if artefact is not None else None
        row[f"latency_b{batch_size}_ratio"] = latency.ratio_minimum if latency else None
        row[f"latency_b{batch_size}_ratio_median"] = latency.ratio_median if latency else None
        row[f"minimum_ms_b{batch_size}"] = latency.minimum_ms if latency else None
        row[f"median_ms_b{batch_size}"] = latency.median_ms if latency else None
    row["not_measured"] = {
        str(latency.batch_size): latency.not_measured
        for latency in (artefact.latency if artefact is not None else [])
        if latency.not_measured is not None
    }
    return row


def report_table(record: RunRecord) -> str:
    """The run as plain aligned text for the terminal: one line per saved artefact, one column per task."""
    figures = Figures(record)
    sizes = batch_sizes(record)
    header = ["step", "form", "precision", "split", "average", "kept", "worst task"]
    header += ["parameters", "size", *(f"time b{size}" for size in sizes), *record.tasks]
    rows = [
        [
            f"{step.name} *" if step is delivered_step(record) and number == 0 else step.name if number == 0 else "",
            artefact.form,
            short_precision(artefact),
            *_score_cells(record, artefact, figures),
            figures.parameters(artefact.size.parameters if artefact.size else None),
            figures.megabytes(artefact.size.weights_bytes if artefact.size else None),
            *(_ratio(artefact, size, figures) for size in sizes),
            *task_scores(record, step, artefact, figures),
        ]
        for step in record.steps
        for number, artefact in enumerate(step.artefacts)
    ]
    metrics = ", ".join(f"{name}: {task.metric}" for name, task in record.tasks.items())
    notes = [
        f"* what the run delivers. Kept and time are against '{record.reference}': mean of score / reference score "
        "over the main tasks, and minimum / minimum time."
        if rows
        else "No step has saved anything yet.",
        f"Metrics: {metrics}." if metrics else "",
    ]
    notes += [
        *pruning_lines(record, figures),
        *vocabulary_lines(record, figures),
        *sparsity_lines(record, figures),
        *gate_lines(record, figures),
        *doubt_lines(record, figures),
    ]
    if record.budget:
        notes.append("Budget: " + "; ".join(budget_lines(record, figures)) + ".")
    cells = [[cell.replace(NOT_MEASURED, "-") for cell in row] for row in [header, *rows]]
    return "\n".join([align(cells), "", *(note for note in notes if note)]) + "\n"


def _score_cells(record: RunRecord, artefact: Artefact, figures: Figures) -> list[str]:
    scores, comparison = final_scores(artefact), comparison_of(record, artefact)
    return [
        scores.split if scores else "-",
        figures.score(scores.average if scores else None),
        figures.percent(comparison.retention if comparison else None),
        figures.percent(comparison.worst_task_retention if comparison else None),
    ]


def _ratio(artefact: Artefact, batch_size: int, figures: Figures) -> str:
    latency = latency_of(artefact, batch_size)
    if was_busy(artefact, batch_size):
        return "busy"
    return figures.percent(latency.ratio_minimum if latency else None)


def task_scores(record: RunRecord, step: StepRecord, artefact: Artefact, figures: Figures) -> list[str]:
    """The primary metric of every task of the run, in order; `dropped` where the model of the step has it no longer."""
    scores, kept = final_scores(artefact), tasks_of(record, step)
    cells = []
    for name, task in record.tasks.items():
        value = scores.tasks[name].metrics.get(task.metric) if scores is not None and name in scores.tasks else None
        cells.append(figures.score(value) if name in kept else "dropped")
    return cells


def budget_lines(record: RunRecord, figures: Figures) -> list[str]:
    """One phrase for each limit of the budget: what was allowed, what was found, whether it holds."""
    phrases = []
    for name, entry in budget_of(record).items():
        verdict = "not decided" if entry["met"] is None else "met" if entry["met"] else "missed"
        found = [] if entry["found"] is None else [f"found {figures.plain(entry['found'])}"]
        why = [] if entry["met"] is not None else [entry["why"]]
        limits = ", ".join([f"limit {figures.plain(entry['limit'])}", *found, *why])
        phrases.append(f"{name} {verdict} ({limits})")
    return phrases


def doubt_lines(record: RunRecord, figures: Figures) -> list[str]:
    """What the figures cannot say: tasks with nothing to keep, a reference that is beaten, times that are not given."""
    lines = []
    for name, why in every_task_left_out(record).items():
        lines.append(f"Kept leaves {name} out, where it is undefined: {why}.")
    beaten = [
        f"{name} ({figures.score(row['score'])} of '{step.name}' against {figures.score(row['reference'])})"
        for name, (step, row) in beaten_reference(record).items()
    ]
    if beaten:
        lines.append(f"'{record.reference}' is beaten on {', '.join(beaten)}: it is probably undertrained.")
    if reasons := not_timed(record):
        lines.append(f"busy: {NOT_TIMED} ({'; '.join(map(figures.text, reasons))}).")
    return lines


def pruning_lines(record: RunRecord, figures: Figures) -> list[str]:
    """One sentence for each prune step that did not cut at once: in how many rounds, when, and of which candidates."""
    lines = []
    for step in scheduled_prunings(record):
        pruning = step.pruning or {}
        gradual, tried = pruning.get("gradual"), pruning.get("candidates") or []
        phrases = []
        if pruning["schedule"] == "iterative":
            sizes = [figures.parameters(part["parameters_after"]) for part in pruning["rounds"]]
            phrases.append(f"was cut in {figures.plain(len(sizes))} rounds, to {', '.join(sizes)} parameters")
        if gradual:
            phrases.append(
                f"was pruned while it was trained, from step {figures.plain(gradual['first_step'])} to step "
                f"{figures.plain(gradual['last_step'])} in {figures.plain(len(gradual['changes']))} parts"
                + ("" if gradual["complete"] else ", and stopped before all was removed")
            )
        for number, candidates in enumerate(tried, 1):
            scores = [one["average"] for one in candidates if one["average"] is not None]
            where = f" of round {figures.plain(number)}" if len(tried) > 1 else ""
            spread = (
                f" (validation average {figures.score(max(scores))}, the worst {figures.score(min(scores))})"
                if scores
                else ""
            )
            phrases.append(f"is the best of {figures.plain(len(candidates))} random candidates{where}{spread}")
        if phrases:
            lines.append(f"Step {step.name} {'; '.join(phrases)}.")
    return lines


def vocabulary_lines(record: RunRecord, figures: Figures) -> list[str]:
    """One sentence for each step that cut the vocabulary: what is left, and how much became unknown."""
    lines = []
    for step in vocabulary_cuts(record):
        cut = step.vocabulary or {}
        unknown = [
            f"{role} {figures.percent(reading['unknown_after'])} ({figures.percent(reading['unknown_before'])} before)"
            for role, reading in cut["splits"].items()
        ]
        lines.append(
            f"Step {step.name} kept {figures.count(cut['tokens_after'])} of {figures.count(cut['tokens_before'])} "
            f"tokens, {figures.megabytes(cut['embedding_bytes_after'])} of "
            f"{figures.megabytes(cut['embedding_bytes_before'])} of word embeddings. "
            f"Unknown tokens: {', '.join(unknown)}."
        )
    return lines


def sparsity_lines(record: RunRecord, figures: Figures) -> list[str]:
    """Two sentences for each step that trimmed weights: how many are 0, and what that saves."""
    lines = []
    for step in trimmed_steps(record):
        found = step.sparsity or {}
        how = f" in the pattern {found['pattern']}" if found["pattern"] else ""
        dense = figures.megabytes(found["dense_bytes"])
        stored = (
            f"Stored without zeros, the weights of the whole model take {figures.megabytes(found['stored_bytes'])}; "
            f"dense they would take {dense}."
            if found["stored_bytes"] < found["dense_bytes"]
            else f"The weights of the whole model are stored dense, in {dense}."
        )
        lines.append(
            f"Step {step.name} trimmed{how}: {figures.count(found['zeros_saved'])} of "
            f"{figures.count(found['weights'])} weights of the trimmed matrices are 0 "
            f"({figures.percent(found['sparsity_saved'])}). {stored} Time is that of the dense model."
        )
    return lines


def gate_lines(record: RunRecord, figures: Figures) -> list[str]:
    """A sentence for each quantize step with a gate: what it had to keep, and what it kept."""
    lines = []
    for step in record.steps:
        gate = (step.quantization or {}).get("gate")
        if gate is None:
            continue
        without = ", ".join(gate.get("undefined") or {})
        beside = f", without {without}, where nothing can be said to be kept" if without else ""
        parts = [
            f"{GATE_WORDS[name]} {figures.percent(row['found'])} (asked for: at least {figures.percent(row['limit'])})"
            for name, row in gate["limits"].items()
        ]
        verdict = "" if gate["met"] else " It missed that and was kept on request."
        lines.append(
            f"Step {step.name} kept of {gate['reference']} on the {gate['split']} split{beside}: {', '.join(parts)}."
            f"{verdict}"
        )
    return lines


GATE_WORDS = {"retention": "on average", "worst_task_retention": "in the task that kept least"}


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text in columns; cells that start with a digit or a sign are set to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if cell[:1].isdigit() or cell[:1] in ("+", "-") else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table; the first row is the header, columns of figures are set to the right."""
    columns = range(len(rows[0]))
    body = rows[1:]
    right = [all(_is_figure(row[column]) for row in body) for column in columns]
    rule = ["---:" if right[column] and body else "---" for column in columns]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def _is_figure(cell: str) -> bool:
    return cell == NOT_MEASURED or cell == "reference" or cell.lstrip("*+-~`")[:1].isdigit()


def lineage(record: RunRecord) -> str:
    """The steps as a tree: what was made from what."""
    parents = {step.name: parent_of(record, step) for step in record.steps}
    delivered = delivered_step(record)

    def branch(parent: StepRecord | None, indent: str) -> list[str]:
        children = [step for step in record.steps if parents[step.name] is parent]
        lines = []
        for child in children:
            last = child is children[-1]
            fork = "" if parent is None else ("└─ " if last else "├─ ")
            mark = "   <- this model" if child is delivered else ""
            lines.append(f"{indent}{fork}{child.name} ({child.kind}){mark}")
            lines += branch(child, indent + ("" if parent is None else "   " if last else "│  "))
        return lines

    return "\n".join(branch(None, ""))
