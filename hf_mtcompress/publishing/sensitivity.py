"""How far answers move when one part of a model is stored in few bits: table, sentences and picture."""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mtcompress import artifacts
from hf_mtcompress.publishing.figures import Figures
from hf_mtcompress.records import RunRecord, StepRecord

# Imported late: matplotlib - slow to import, and whoever only prints the table needs none of it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {4: "#c2410c", 8: "#2563eb", 16: "#94a3b8"}
_SMALLEST = 1e-7
"""Divergences are drawn on a scale of logarithms, which has no place for 0."""


def bits_name(bits: int) -> str:
    """What weights in so many bits are called: `int4`, `int8`, `float16`, `float32`."""
    return f"int{bits}" if bits < 16 else f"float{bits}"


def sensitive_steps(record: RunRecord) -> list[StepRecord]:
    """Steps that measured sensitivities."""
    return [step for step in record.steps if (step.quantization or {}).get("sensitivity")]


def sensitivity_rows(
    sensitivity: Mapping[str, Any], chosen: Mapping[str, int] | None = None, figures: Figures | None = None
) -> list[list[str]]:
    """A table of parts: numbers in each, how far answers move by bits, and the bits that were chosen.

    Args:
        sensitivity: `quantization.sensitivity` of a step's record.
        chosen: bits by part; None leaves the column out.
        figures: of the card it is for; None for the terminal.
    """
    bits = _tried(sensitivity)
    rows = [["part", "weights", *(f"{bits_name(number)} alone" for number in bits), *(["chosen"] if chosen else [])]]
    for part in sensitivity["parts"]:
        moved = [part["bits"][str(number)]["divergence"] for number in bits]
        rows.append(
            [
                part["part"],
                f"{part['weights']:,}" if figures is None else figures.count(part["weights"]),
                *(f"{value:.5f}" if figures is None else figures.length(value) for value in moved),
                *([bits_name(chosen[part["part"]])] if chosen else []),
            ]
        )
    return rows


def sensitivity_words(step: StepRecord, figures: Figures) -> str:
    """What the table of a step shows, in a sentence or two."""
    quantization = step.quantization or {}
    sensitivity = quantization["sensitivity"]
    text = (
        f"Mean Kullback-Leibler divergence (nats) of the tasks' answers from the float graph's on "
        f"{figures.count(sensitivity['rows'])} training rows, with one part alone in few bits."
    )
    if "divergence" in quantization:
        text += (
            f" With the chosen bits together it is {figures.length(quantization['divergence']['mean'])}"
            f" (the sum of the parts' is {figures.length(quantization['estimated']['divergence'])})."
        )
    return text


def draw_sensitivity(record: RunRecord, path: Path) -> list[Path]:
    """Draw how far answers move by part and bits, one panel for each step that measured it; what was chosen is ringed.

    Args:
        record: what happened.
        path: the PNG to write; the same data go into a CSV of the same name.

    Returns:
        The files written; none where no step measured sensitivities.
    """
    steps = sensitive_steps(record)
    if not steps:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = max(len((step.quantization or {})["sensitivity"]["parts"]) for step in steps)
    figure = Figure(figsize=(6.4 * len(steps), 0.32 * longest + 1.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, step in zip(figure.subplots(1, len(steps), squeeze=False).flatten(), steps, strict=True):
        _draw(axes, step)
    figure.suptitle(f"{record.name}: which parts need their bits?", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": "hf_mtcompress"})
    data = path.with_suffix(".csv")
    artifacts.write_text(data, _csv(steps))
    return [path, data]


def _draw(axes: "Axes", step: StepRecord) -> None:
    quantization = step.quantization or {}
    sensitivity, chosen = quantization["sensitivity"], quantization.get("parts", {})
    parts = sensitivity["parts"]
    places = list(range(len(parts)))
    for number in _tried(sensitivity):
        values = [max(part["bits"][str(number)]["divergence"], _SMALLEST) for part in parts]
        axes.scatter(values, places, s=36, color=_COLOURS[number], label=bits_name(number), zorder=3)
        ringed = [place for place in places if chosen.get(parts[place]["part"]) == number]
        axes.scatter(
            [values[place] for place in ringed], ringed, s=110, facecolors="none", edgecolors="black", zorder=4
        )
    axes.set_xscale("log")
    axes.set_yticks(places, [part["part"] for part in parts], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="both", color="#e5e7eb", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("divergence from the float graph, this part alone (nats)")
    axes.set_title(step.name + (" (ringed: chosen)" if chosen else ""), fontsize=10)
    axes.legend(fontsize=8, loc="best")


def _csv(steps: Sequence[StepRecord]) -> str:
    target = StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(["step", "part", "weights", "bits", "divergence", "saved_bytes", "chosen"])
    for step in steps:
        quantization = step.quantization or {}
        chosen = quantization.get("parts", {})
        for part in quantization["sensitivity"]["parts"]:
            for bits, found in part["bits"].items():
                mark = int(chosen.get(part["part"]) == int(bits))
                writer.writerow(
                    [step.name, part["part"], part["weights"], bits, found["divergence"], found["saved_bytes"], mark]
                )
    return target.getvalue()


def _tried(sensitivity: Mapping[str, Any]) -> list[int]:
    return sorted({int(bits) for part in sensitivity["parts"] for bits in part["bits"]})
