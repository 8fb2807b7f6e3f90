"""The pictures of a card, with their data beside them as CSV."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mtcompress import artifacts
from hf_mtcompress.publishing.facts import (
    artefacts_of,
    batch_sizes,
    comparison_of,
    delivered_artefact,
    delivered_step,
    final_scores,
    interfering_steps,
    latency_of,
    reference_artefact,
    short_precision,
    tasks_of,
    was_busy,
)
from hf_mtcompress.publishing.figures import NOT_TIMED
from hf_mtcompress.records import Artefact, RunRecord, StepRecord

# Imported late: matplotlib - slow to import, and whoever only reads a report needs none of it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.transforms import Bbox

# Okabe and Ito's palette, which readers with colour-blindness tell apart; forms differ in shape as well.
REFERENCE_COLOUR, DELIVERED_COLOUR, OTHER_COLOUR = "#0072B2", "#D55E00", "#7F7F7F"
CONFLICT_COLOUR, AGREEMENT_COLOUR, UNKNOWN_COLOUR = "#D55E00", "#0072B2", "#DDDDDD"
MARKERS = {"torch": "o", "bitsandbytes": "s", "torchao": "h", "onnx": "D", "openvino": "P", "vanilla": "^"}


@dataclass(frozen=True)
class Point:
    """One saved form in the picture."""

    step: str
    form: str
    precision: str
    folder: str
    average: float
    retention: float | None
    size_mb: float | None
    ratios: dict[int, float | None]
    """Latency ratio (minimum / minimum of the reference) by batch size."""


def comparison_points(record: RunRecord) -> list[Point]:
    """Every saved form that was scored, in the order of the steps."""
    points = []
    for step in record.steps:
        for artefact in step.artefacts:
            scores, comparison = final_scores(artefact), comparison_of(record, artefact)
            if scores is None or scores.average is None:
                continue
            latency = {size: latency_of(artefact, size) for size in batch_sizes(record)}
            points.append(
                Point(
                    step=step.name,
                    form=artefact.form,
                    precision=short_precision(artefact),
                    folder=artefact.folder,
                    average=scores.average,
                    retention=comparison.retention if comparison else None,
                    size_mb=artefact.size.weights_bytes / 1e6 if artefact.size else None,
                    ratios={size: row.ratio_minimum if row else None for size, row in latency.items()},
                )
            )
    return points


def draw_comparison(record: RunRecord, path: Path) -> list[Path]:
    """Draw quality against time (or size) of every saved form, and the tasks one by one.

    Args:
        record: what happened.
        path: the PNG to write; the same data go into a CSV of the same name.

    Returns:
        The files written; none where no saved form was scored.
    """
    points = comparison_points(record)
    if not points:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_points(left, points, record)
    _draw_tasks(right, record)
    figure.suptitle(f"{record.name}: what compression costs and brings", fontsize=12)
    figure.savefig(path, metadata={"Software": "hf_mtcompress"})
    data = path.with_suffix(".csv")
    artifacts.write_text(data, _csv(points, record))
    return [path, data]


def _draw_points(axes: "Axes", points: Sequence[Point], record: RunRecord) -> None:
    sizes = batch_sizes(record)
    timed = bool(sizes) and any(point.ratios.get(sizes[0]) for point in points)
    places = [(_horizontal(point, sizes[0] if timed else None), point) for point in points]
    shown = [(x, point) for x, point in places if x is not None]
    if not shown:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "time and size: not measured", ha="center", va="center", transform=axes.transAxes)
        return
    axes.set_xscale("log")
    reference, delivered = reference_artefact(record), delivered_artefact(record)
    for x, point in shown:
        colour = _colour(point.folder, reference, delivered)
        axes.scatter(x, point.average, s=90, color=colour, marker=MARKERS[point.form], zorder=3, edgecolor="white")
    label = (
        f"times as fast as {record.reference} (batch size {sizes[0]}, log scale)" if timed else "size in MB (log scale)"
    )
    busy = [artefact.folder for _, artefact in artefacts_of(record) if sizes and was_busy(artefact, sizes[0])]
    axes.set_xlabel(f"{label}\ntime {NOT_TIMED}" + (f" ({', '.join(busy)})" if timed else "") if busy else label)
    split = next((scores.split for scores in [final_scores(delivered)] if scores), "test")
    axes.set_ylabel(f"average of the main tasks ({split})")
    _round_ticks(axes, [x for x, _ in shown], [point.average for _, point in shown])
    _label(axes, shown)
    axes.grid(color="#DDDDDD", linewidth=0.7, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _horizontal(point: Point, batch_size: int | None) -> float | None:
    if batch_size is None:
        return point.size_mb
    ratio = point.ratios.get(batch_size)
    return 1 / ratio if ratio else None


def _round_ticks(axes: "Axes", xs: Sequence[float], ys: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    # Room to the right for labels, below and above so that no point sits on the frame.
    span = max(max(xs) / min(xs), 2.0)
    low, high = min(xs) / span**0.08, max(xs) * span**0.35
    axes.set_xlim(low, high)
    steps = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([step for step in steps if low <= step <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    spread = max(max(ys) - min(ys), 0.02)
    axes.set_ylim(min(ys) - 0.2 * spread, max(ys) + 0.25 * spread)


def _label(axes: "Axes", shown: Sequence[tuple[float, Point]]) -> None:
    """Write each label beside its point, where it covers least of other labels, of points and of the frame."""
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()  # settles the layout, so that data coordinates become pixels as they will be saved
    pixels = [axes.transData.transform((x, point.average)) for x, point in shown]
    taken = [Bbox.from_bounds(across - 12, up - 12, 24, 24) for across, up in pixels]
    for x, point in sorted(shown, key=lambda item: (-item[1].average, item[0])):
        size = "" if point.size_mb is None else f", {point.size_mb:.1f} MB"
        text = axes.annotate(
            f"{point.step}\n{point.form} {point.precision}{size}",
            (x, point.average),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            linespacing=1.1,
        )
        choices = []
        for preference, (across, up, horizontal, vertical) in enumerate(_LABEL_PLACES):
            text.set(x=across, y=up, ha=horizontal, va=vertical)
            choices.append((_covered(text.get_window_extent(), taken, axes.bbox), preference))
        across, up, horizontal, vertical = _LABEL_PLACES[min(choices)[1]]
        text.set(x=across, y=up, ha=horizontal, va=vertical)
        taken.append(text.get_window_extent())


_LABEL_PLACES = [
    *((9, 0, "left", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top"), (-9, 0, "right", "center")),
    *((7, 7, "left", "bottom"), (7, -7, "left", "top"), (-7, 7, "right", "bottom"), (-7, -7, "right", "top")),
    *((0, 24, "center", "bottom"), (0, -24, "center", "top")),
]
"""Where a label may stand, the best liked first: points right of and above its mark, and how it is aligned there."""


def _covered(label: "Bbox", taken: Sequence["Bbox"], frame: "Bbox") -> float:
    """Square pixels of other things that a label lies on, and of itself outside the frame."""
    from matplotlib.transforms import Bbox

    total = 0.0
    for other in taken:
        common = Bbox.intersection(label, other)
        total += 0.0 if common is None else common.width * common.height
    inside = Bbox.intersection(label, frame)
    return total + label.width * label.height - (0.0 if inside is None else inside.width * inside.height)


def _draw_tasks(axes: "Axes", record: RunRecord) -> None:
    reference, delivered = reference_artefact(record), delivered_artefact(record)
    pair = [("this model", delivered, DELIVERED_COLOUR)]
    if reference is not None and reference.folder != delivered.folder:
        pair.insert(0, (record.reference, reference, REFERENCE_COLOUR))
    names = [
        name
        for name in tasks_of(record, delivered_step(record))
        if any(_score(record, artefact, name) is not None for _, artefact, _ in pair)
    ]
    if not names:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "tasks: not measured", ha="center", va="center", transform=axes.transAxes)
        return
    height = 0.8 / len(pair)
    for number, (label, artefact, colour) in enumerate(pair):
        values = [_score(record, artefact, name) or 0.0 for name in names]
        places = [position + height * (number - (len(pair) - 1) / 2) for position in range(len(names))]
        bars = axes.barh(places, values, height * 0.92, color=colour, label=label, zorder=3)
        if len(names) <= 12:
            axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=3, fontsize=8)
    role = next((role for role, scores in delivered.scores.items() if scores is final_scores(delivered)), "test")
    chance = [record.tasks[name].baseline.get(role) for name in names]
    for position, value in enumerate(chance):
        if value is not None:
            label = "chance" if position == 0 else None
            axes.plot(
                [value, value], [position - 0.42, position + 0.42], color="black", linewidth=1.5, zorder=4, label=label
            )
    axes.set_yticks(range(len(names)), [f"{name}\n{record.tasks[name].metric}" for name in names], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, *(value or 0.0 for value in chance)), 1.12)
    axes.set_xlabel("score")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.7, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=3, frameon=False, fontsize=8)


def _score(record: RunRecord, artefact: Artefact, name: str) -> float | None:
    scores = final_scores(artefact)
    if scores is None or name not in scores.tasks:
        return None
    return scores.tasks[name].metrics.get(record.tasks[name].metric)


def _colour(folder: str, reference: Artefact | None, delivered: Artefact) -> str:
    if folder == delivered.folder:
        return DELIVERED_COLOUR
    return REFERENCE_COLOUR if reference is not None and folder == reference.folder else OTHER_COLOUR


def _csv(points: Sequence[Point], record: RunRecord) -> str:
    sizes = batch_sizes(record)
    target = StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(
        ["step", "form", "precision", "average", "retention", "size_mb", *(f"latency_b{size}_ratio" for size in sizes)]
    )
    for point in points:
        values = [point.average, point.retention, point.size_mb, *(point.ratios.get(size) for size in sizes)]
        writer.writerow(
            [point.step, point.form, point.precision, *("" if value is None else value for value in values)]
        )
    return target.getvalue()


def draw_interference(record: RunRecord, path: Path) -> list[Path]:
    """Draw the mean cosines between the tasks' gradients, one panel for each step that logged them.

    Orange is conflict, blue agreement, white neither; the same colour is the same cosine in all panels. The diagonal
    has the mean length of each task's gradient. Up to 12 tasks, cells hold their numbers.

    Args:
        record: what happened.
        path: the PNG to write; the same data go into a CSV of the same name.

    Returns:
        The files written; none where no step logged the gradients of two tasks.
    """
    steps = interfering_steps(record)
    if not steps:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    side = min(8.0, max(4.0, 0.5 * max(len((step.interference or {})["tasks"]) for step in steps) + 1.6))
    columns = min(3, len(steps))
    rows = math.ceil(len(steps) / columns)
    figure = Figure(figsize=(side * columns + 1.2, side * rows + 0.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    limit = _colour_limit(steps)
    image = None
    for axes, step in zip(panels, steps, strict=False):
        image = _draw_cosines(axes, step, limit)
    for axes in panels[len(steps) :]:
        axes.set_axis_off()
    assert image is not None
    bar = figure.colorbar(image, ax=list(panels), shrink=0.8)
    bar.set_label("mean cosine (below 0: conflict)")
    figure.suptitle(f"{record.name}: do the tasks' gradients agree?", fontsize=12)
    figure.savefig(path, metadata={"Software": "hf_mtcompress"})
    data = path.with_suffix(".csv")
    artifacts.write_text(data, _interference_csv(steps))
    return [path, data]


def _colour_limit(steps: Sequence[StepRecord]) -> float:
    """The cosine of full colour: the largest one shown, up to the next tenth, so that small ones can be told apart."""
    cosines = [abs(pair["cosine"]) for step in steps for pair in (step.interference or {})["pairs"]]
    return min(1.0, max(0.2, math.ceil(10 * max(cosines, default=0.0)) / 10))


def _draw_cosines(axes: "Axes", step: StepRecord, limit: float) -> "AxesImage":
    from matplotlib.colors import LinearSegmentedColormap

    report = step.interference or {}
    names = report["tasks"]
    colours = LinearSegmentedColormap.from_list("interference", [CONFLICT_COLOUR, "white", AGREEMENT_COLOUR])
    colours = colours.with_extremes(bad=UNKNOWN_COLOUR)
    cells = [
        [math.nan if i == j or cosine is None else float(cosine) for j, cosine in enumerate(row)]
        for i, row in enumerate(report["cosine"])
    ]
    image = axes.imshow(cells, cmap=colours, vmin=-limit, vmax=limit)
    if len(names) <= 12:
        for i, row in enumerate(cells):
            for j, cosine in enumerate(row):
                norm = report["norms"][names[i]]
                length = "" if norm is None else f"length\n{norm:.3g}"
                text = length if i == j else "never\nmet" if math.isnan(cosine) else f"{cosine:+.2f}"
                # Black is read better on everything but the full blue.
                colour = "white" if cosine > 0.75 * limit else "black"
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    small = 9 if len(names) <= 12 else 6
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=small)
    axes.set_yticks(range(len(names)), names, fontsize=small)
    axes.set_title(f"{step.name}, {report['steps']:,} steps", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _interference_csv(steps: Sequence[StepRecord]) -> str:
    target = StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(["step", "task", "other", "cosine", "conflict", "affinity", "norm", "norm_of_other"])
    for step in steps:
        report = step.interference or {}
        for i, name in enumerate(report["tasks"]):
            for j, other in enumerate(report["tasks"]):
                if i != j:
                    values = [report[matrix][i][j] for matrix in ("cosine", "conflict", "affinity")]
                    values += [report["norms"][name], report["norms"][other]]
                    writer.writerow([step.name, name, other, *("" if value is None else value for value in values)])
    return target.getvalue()
