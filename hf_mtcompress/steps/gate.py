"""The gate of a quantize step: what must be kept of the float model, and what to do where it is not."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mtcompress.errors import QualityError
from hf_mtcompress.evaluation.compare import check_gate, compare
from hf_mtcompress.publishing.report import align
from hf_mtcompress.publishing.sensitivity import sensitivity_rows
from hf_mtcompress.recipe import MixedConfig, QuantizeStep
from hf_mtcompress.records import Comparison, StepRecord, TaskRecord
from hf_mtcompress.records.retention import left_out
from hf_mtcompress.steps.mixed_bits import sensitivity_of
from hf_mtcompress.steps.quantizing import float_graph
from hf_mtcompress.steps.run_context import RunContext, start_of
from hf_mtcompress.steps.scoring import task_record

logger = logging.getLogger(__name__)


def pass_gate(step: QuantizeStep, source: StepRecord, record: StepRecord, context: RunContext, work: Path) -> None:
    """Hold what a quantize step saved against the limits of its gate, and write the outcome into its record.

    Where ONNX Runtime's 8 or 4 bits miss a limit, sensitivities are measured, to say which parts it comes from.

    Args:
        step: with the limits.
        source: record of the float model that it was made from.
        record: of the step; gets `quantization.gate`, and `quantization.sensitivity` where that was measured.
        context: the run.
        work: work folder of the step, which keeps measured sensitivities.

    Raises:
        QualityError: a limit is missed and the step is not told to keep the result.
    """
    record.quantization = {**(record.quantization or {}), "gate": None}
    if step.retention is None and step.worst_task_retention is None:
        return
    tasks = {name: task_record(name, context) for name in context.sources.tasks}
    comparison = compare(tasks, source.artefacts[0], record.artefacts[0], step=record.name, split="validation")
    limits = check_gate(comparison, step.retention, step.worst_task_retention)
    met = all(row["met"] for row in limits.values())
    record.quantization["gate"] = {
        "reference": source.name,
        "split": comparison.split,
        "limits": limits,
        "met": met,
        "tasks": comparison.tasks,
        "undefined": left_out(tasks, comparison.undefined),
    }
    if met:
        return
    plain = step.backend == "onnxruntime" and step.bits in (8, 4) and not (step.calibration or step.recover)
    if plain and "sensitivity" not in record.quantization:
        logger.warning("%s: a limit is missed; looking for the parts that it comes from", step.name)
        start = start_of(source.name, context)
        graph = float_graph(source.name, context, start.model.eval(), start.reader)
        work.mkdir(parents=True, exist_ok=True)
        found, _ = sensitivity_of(graph, start, context, work, (4, 8), MixedConfig().rows, step.block_size)
        record.quantization["sensitivity"] = found.to_dict()
    message = _gate_message(step, source, limits, comparison, tasks, record.quantization.get("sensitivity"))
    if not step.keep:
        raise QualityError(message)
    logger.warning("%s\nIt is kept, as the recipe says.", message)


def _gate_message(
    step: QuantizeStep,
    source: StepRecord,
    limits: Mapping[str, dict[str, Any]],
    comparison: Comparison,
    tasks: Mapping[str, TaskRecord],
    sensitivity: Mapping[str, Any] | None,
) -> str:
    """What was expected, what was found, task by task and part by part, and what can be done."""

    def shown(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.4f}"

    missed = [
        f"{name} of at least {row['limit']:g}, found {shown(row['found'])}"
        for name, row in limits.items()
        if not row["met"]
    ]
    rows = [["task", "metric", source.name, str(step.name), "retention"]]
    for name, row in comparison.tasks.items():
        values = [shown(row["reference"]), shown(row["score"]), shown(row["retention"])]
        reason = f" ({comparison.undefined[name]})" if name in comparison.undefined else ""
        rows.append([name, tasks[name].metric, *values[:2], values[2] + reason])
    todo = "; ".join(_proposals(step, source.name, sensitivity))
    parts = "" if sensitivity is None else f"\n\n{align(sensitivity_rows(sensitivity))}\n"
    return (
        f"steps.{step.name}: expected {' and '.join(missed)} of '{source.name}' on the {comparison.split} split\n"
        f"{align(rows)}{parts}\nWhat to do: {todo}; keep: true keeps it all the same"
    )


def _proposals(step: QuantizeStep, source: str, sensitivity: Mapping[str, Any] | None) -> list[str]:
    """What may come closer to float, the likeliest first."""
    better = []
    if sensitivity is not None and step.bits in (8, 4):
        worst = max(sensitivity["parts"], key=lambda part: part["bits"][str(step.bits)]["divergence"])
        better.append(f"bits: mixed finds the smallest graph that reaches this ('{worst['part']}' hurts most now)")
    if step.backend == "onnxruntime" and step.bits in (8, 4):
        better.append("float_layers: [...] keeps layers in float")
        if step.recover is None and step.calibration is None:
            better.append(f"recover: {{kind: distill, teacher: {source}}} trains with numbers rounded as they will be")
    match step.bits:
        case 4 if step.backend == "onnxruntime":
            better += ["block_size: 32 or embedding_bits: 8 is closer to float", "bits: 8 closer still"]
        case 4:
            better.append("bits: 8 is closer to float")
        case 8 if step.backend == "openvino":
            better.append("calibration: {rows: ...} with more rows, or backend: onnxruntime, may be closer to float")
        case 8 if step.calibration is not None:
            better.append("no calibration (dynamic), more rows or another method may be closer to float")
        case 8 if step.backend == "onnxruntime":
            better.append("bits: 16 is almost exact")
        case "mixed":
            better.append("mixed: {choices: [8, 16, 32]}, without size_mb, leaves room for more bits")
        case _:
            better.append("backend: onnxruntime with bits: 16 is almost exact")
    return better
