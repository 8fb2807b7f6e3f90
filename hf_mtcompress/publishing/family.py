"""The family of checkpoints that a search made: as a table for the terminal, as CSV, and as a picture of its front."""

import csv
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mtcompress.publishing.figures import NOT_TIMED
from hf_mtcompress.publishing.picture import DELIVERED_COLOUR, OTHER_COLOUR, REFERENCE_COLOUR
from hf_mtcompress.publishing.report import align
from hf_mtcompress.records import Candidate, SearchRecord

# Imported late: matplotlib - slow to import, and whoever only prints the table needs none of it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOWER_LIMITS = ("retention", "worst_task_retention")


def family_table(record: SearchRecord) -> str:
    """Size, time and quality of every candidate as plain aligned text, the chosen one marked."""
    sizes = _batch_sizes(record)
    rows = [["", "folder", "MB", *(f"time b{size}" for size in sizes), "kept", "worst task", "front", "budget"]]
    rows += [
        [
            "*" if item.folder == record.chosen else "",
            item.folder,
            "-" if item.size_mb is None else f"{item.size_mb:.1f}",
            *("busy" if size in item.not_measured else _percent(item.ratios.get(size)) for size in sizes),
            _percent(item.retention),
            _percent(item.worst_task_retention),
            "yes" if item.on_front else "",
            "; ".join(_verdicts(item)) or "met",
        ]
        for item in record.candidates
    ]
    limits = ", ".join(f"{name} {limit:g}" for name, limit in record.budget.items())
    outcome = "meets the budget" if record.met else "comes nearest to the budget, which none meets"
    if record.met is None:
        outcome = "is the smallest that may meet the budget, which is not decided"
    left_out = {name: why for item in record.candidates for name, why in item.undefined.items()}
    busy = [
        f"{item.folder}, batch {size}: {why}" for item in record.candidates for size, why in item.not_measured.items()
    ]
    notes = [
        f"Budget: {limits}. {record.chosen} {outcome}.",
        f"Times: share of {record.reference} in torch float32, minimum of turns; scores of validation rows.",
        *(f"Kept leaves {name} out, where it is undefined: {why}." for name, why in left_out.items()),
        *([f"busy: {NOT_TIMED} ({'; '.join(busy)})."] if busy else []),
    ]
    return "\n".join([align(rows), "", *notes]) + "\n"


def family_csv(record: SearchRecord) -> str:
    """The same figures, one row for each candidate."""
    sizes = _batch_sizes(record)
    target = StringIO()
    writer = csv.writer(target, lineterminator="\n")
    names = ["folder", "form", "share", "size_mb", "average", "retention", "worst_task_retention", "on_front"]
    columns = [f"{name}_b{size}" for name in ("latency_ratio", "measured_ms", "predicted_ms") for size in sizes]
    writer.writerow([*names, "chosen", *columns])
    for item in record.candidates:
        figures = [getattr(item, name) for name in names]
        times = [column.get(size) for column in (item.ratios, item.measured_ms, item.predicted_ms) for size in sizes]
        values = [*figures, item.folder == record.chosen, *times]
        writer.writerow(["" if value is None else value for value in values])
    return target.getvalue()


def draw_family(record: SearchRecord, path: Path) -> Path | None:
    """Draw what is kept against time, one panel for each batch size, with the limits of the budget.

    Args:
        record: what was found.
        path: the PNG to write.

    Returns:
        The file; None where nothing was timed and scored.
    """
    sizes = [size for size in _batch_sizes(record) if any(_place(item, size) for item in record.candidates)]
    busy = any(item.not_measured for item in record.candidates)
    if not sizes:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(5.5 * len(sizes), 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        _draw_panel(axes, record, size)
    title = f"{record.name}: the family that the search made"
    figure.suptitle(f"{title}\nsome times {NOT_TIMED}" if busy else title, fontsize=12)
    figure.savefig(path, metadata={"Software": "hf_mtcompress"})
    return path


def _draw_panel(axes: "Axes", record: SearchRecord, size: str) -> None:
    shown = [(place, item) for item in record.candidates if (place := _place(item, size)) is not None]
    front = sorted(place for place, item in shown if item.on_front)
    axes.plot([x for x, _ in front], [y for _, y in front], color=REFERENCE_COLOUR, linewidth=1, zorder=2)
    for (x, y), item in shown:
        chosen = item.folder == record.chosen
        colour = DELIVERED_COLOUR if chosen else REFERENCE_COLOUR if item.on_front else OTHER_COLOUR
        axes.scatter(x, y, s=70, color=colour, marker="D" if chosen else "o", edgecolor="white", zorder=3)
        megabytes = "" if item.size_mb is None else f"{item.size_mb:.1f} MB"
        axes.annotate(megabytes, (x, y), xytext=(7, -3), textcoords="offset points", fontsize=8)
    limit, lowest = record.budget.get(f"latency_b{size}_ratio"), record.budget.get("retention")
    if limit is not None:
        axes.axvline(100 * limit, color="black", linewidth=1, linestyle="--", zorder=1)
    if lowest is not None:
        axes.axhline(100 * lowest, color="black", linewidth=1, linestyle="--", zorder=1)
    axes.set_xlim(left=0)
    axes.margins(x=0.18, y=0.1)
    axes.set_xlabel(f"time at batch size {size}, % of {record.reference}")
    kept = any(item.retention is not None for item in record.candidates)
    without = ", ".join({name: why for item in record.candidates for name, why in item.undefined.items()})
    beside = f", without {without}" if without else ""
    axes.set_ylabel(f"kept, % (validation{beside})" if kept else "average x 100 (validation)")
    axes.grid(color="#DDDDDD", linewidth=0.7, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _place(item: Candidate, size: str) -> tuple[float, float] | None:
    ratio, quality = item.ratios.get(size), item.average if item.retention is None else item.retention
    return None if ratio is None or quality is None else (100 * ratio, 100 * quality)


def _batch_sizes(record: SearchRecord) -> list[str]:
    return sorted({size for item in record.candidates for size in item.ratios}, key=int)


def _verdicts(item: Candidate) -> list[str]:
    """Limits that are missed, with what was found, and those that are not decided, with the reason."""
    missed, open_ = [], []
    for name, row in item.limits.items():
        sign = "<" if name in _LOWER_LIMITS else ">"
        if row["met"] is None:
            open_.append(f"{name} ({row['why']})")
        elif not row["met"]:
            missed.append(f"{name} ({row['found']:.3g} {sign} {row['limit']:g})")
    found = [f"misses {', '.join(missed)}"] if missed else []
    return found + ([f"not decided: {', '.join(open_)}"] if open_ else [])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
