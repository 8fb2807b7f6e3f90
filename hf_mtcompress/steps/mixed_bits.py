"""Bits for each part of a model in a quantize step: within a size, or the smallest graph that keeps enough.

The work folder holds what a killed run need not do again: sensitivity.json, and tried.json with the scores of graphs
that were tried.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hf_mtcompress.artifacts import STEP_RECORD, write_text
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.evaluation.compare import check_gate, compare
from hf_mtcompress.formats.onnx.mixed_bits import (
    BitChoice,
    Sensitivity,
    best_choices,
    choose_within_size,
    measure_sensitivity,
    quantize_mixed,
)
from hf_mtcompress.recipe import MixedConfig, QuantizeStep
from hf_mtcompress.records import Artefact
from hf_mtcompress.steps.rows import calibration_batches, inputs_of
from hf_mtcompress.steps.run_context import RunContext, Start
from hf_mtcompress.steps.scoring import read_step, score_folder, task_record

logger = logging.getLogger(__name__)

_SENSITIVITY = "sensitivity.json"
_TRIED = "tried.json"
_SHOWN = 40
"""Choices of the front that a record holds, evenly spread, and that are told apart when one is looked for."""


def sensitivity_of(
    graph: Path, start: Start, context: RunContext, work: Path, bits: tuple[int, ...], rows: int, block_size: int
) -> tuple[Sensitivity, list[dict[str, np.ndarray]]]:
    """Sensitivities of a float graph, measured once, with the rows they were measured on."""
    batches = [
        {name: tensor.numpy() for name, tensor in inputs_of(batch).items()}
        for batch in calibration_batches(start, context, rows)
    ]
    path = work / _SENSITIVITY
    if not path.exists():
        write_text(path, json.dumps(measure_sensitivity(graph, batches, bits, block_size=block_size).to_dict()))
    return Sensitivity.from_dict(json.loads(path.read_text(encoding="utf-8"))), batches


def mix_bits(
    step: QuantizeStep, graph: Path, folder: Path, start: Start, source: str, context: RunContext, work: Path
) -> dict[str, Any]:
    """Write the float graph with the best bits for each part.

    Returns:
        For the record: `sensitivity`, `estimated` size and divergence, `front` (megabytes and divergence of the best
        choices), and `tried`, where choices were tried, with what they kept.
    """
    mixed = step.mixed or MixedConfig()
    sensitivity, batches = sensitivity_of(graph, start, context, work, mixed.choices, mixed.rows, step.block_size)
    front = best_choices(sensitivity, mixed.choices)
    shown = [front[round(place)] for place in np.linspace(0, len(front) - 1, min(_SHOWN, len(front)))]
    tried: list[dict[str, Any]] = []
    if mixed.size_mb is not None:
        chosen = choose_within_size(front, mixed.size_mb)
    else:
        tries = _Tries(step, graph, source, context, work)
        chosen = smallest_that_keeps(shown, tries.keeps)
        tried = list(tries.known.values())
    quantize_mixed(graph, folder, chosen.bits, block_size=step.block_size, rows=batches)
    return {
        "sensitivity": sensitivity.to_dict(),
        "estimated": {"size_mb": chosen.size_bytes / 1e6, "divergence": chosen.divergence},
        "front": [[choice.size_bytes / 1e6, choice.divergence] for choice in shown],
        **({"tried": tried} if tried else {}),
    }


def smallest_that_keeps(choices: list[BitChoice], keeps: Callable[[BitChoice], bool]) -> BitChoice:
    """The first of choices, from the smallest to the largest, that keeps enough, by halving; the last if none does.

    What is kept need not grow with every choice; then a choice that keeps enough is found, whose smaller neighbour does
    not.
    """
    low, high = 0, len(choices) - 1
    while low < high:
        middle = (low + high) // 2
        if keeps(choices[middle]):
            high = middle
        else:
            low = middle + 1
    return choices[high]


class _Tries:
    """Writes choices and scores them on the validation rows, each once."""

    def __init__(self, step: QuantizeStep, graph: Path, source: str, context: RunContext, work: Path) -> None:
        self.step, self.graph, self.context = step, graph, context
        self.path = work / _TRIED
        self.tasks = {name: task_record(name, context) for name in context.sources.tasks}
        record = read_step(context.step_folder(source) / STEP_RECORD)
        assert record is not None
        self.reference = record.artefacts[0]
        self.known: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def keeps(self, choice: BitChoice) -> bool:
        """Whether a choice reaches the limits of the step."""
        key = ",".join(map(str, choice.bits.values()))
        if key not in self.known:
            self.known[key] = {"bits": dict(choice.bits), **self._try(choice.bits)}
            write_text(self.path, json.dumps(self.known))
            logger.warning("%s: %.2f MB keeps %s", self.step.name, choice.size_bytes / 1e6, _shown(self.known[key]))
        return bool(self.known[key]["met"])

    def _try(self, bits: Mapping[str, int]) -> dict[str, Any]:
        with TemporaryDirectory() as scratch:
            try:
                folder = quantize_mixed(self.graph, Path(scratch), bits, block_size=self.step.block_size)
            except ArtifactError:  # numbers that are not finite
                return {"retention": None, "worst_task_retention": None, "met": False}
            scores = score_folder(self.context, folder, "validation")
        artefact = Artefact(form="onnx", folder=".", precision="mixed", scores={"validation": scores})
        found = compare(self.tasks, self.reference, artefact, step=str(self.step.name), split="validation")
        limits = check_gate(found, self.step.retention, self.step.worst_task_retention)
        return {
            "retention": found.retention,
            "worst_task_retention": found.worst_task_retention,
            "met": all(row["met"] for row in limits.values()),
        }


def _shown(found: Mapping[str, Any]) -> str:
    share, worst = (
        "undefined" if found[name] is None else f"{found[name]:.4f}" for name in ("retention", "worst_task_retention")
    )
    return f"{share}, {worst} in the worst task"
