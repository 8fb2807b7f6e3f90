"""A comparison of ways to train, as a table for the terminal and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from hf_mtcompress.publishing.report import align
from hf_mtcompress.records import ArmModel, TaskComparisonRecord, TaskDifference

# Okabe and Ito's palette, which readers with colour-blindness tell apart; arms differ in shape as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def _look(number: int) -> tuple[str, str]:
    """Colour and shape of an arm: the shapes move on by one when the colours begin again, so that 49 arms differ."""
    shape = (number + number // len(COLOURS)) % len(MARKERS)
    return COLOURS[number % len(COLOURS)], MARKERS[shape]


def comparison_table(record: TaskComparisonRecord) -> str:
    """Differences and budgets as plain aligned text for the terminal."""
    header = ["task", "metric", "n", "arm", "alone", "in the arm", "difference", _interval_name(record), "verdict"]
    rows = [header]
    for task in (*record.tasks, "average"):
        compared = record.tasks.get(task)
        for item in (item for item in record.differences if item.task == task):
            cells = [task, compared.metric if compared else "", f"{compared.rows:,}" if compared else ""]
            cells += [item.arm, _score(item.alone), _score(item.together), _signed(item.difference)]
            rows.append([*cells, _interval(item), item.verdict])
    budget = [["arm", "tasks of a model", "epochs", "optimizer steps", "rows seen", "rows seen by task"]]
    for arm in record.arms:
        for number, model in enumerate(arm.models):
            cells = [arm.name if number == 0 else "", "+".join(model.tasks), f"{round(model.epochs, 2):g}"]
            cells += [f"{model.optimizer_steps:,}", f"{model.rows_seen:,}", _rows_by_task(model)]
            budget.append(cells)
    settings = [f"Arm {arm.name}: {', '.join(arm.settings)}." for arm in record.arms if arm.settings]
    return "\n".join([align(rows), "", *_notes(record), "", align(budget), *settings]) + "\n"


def _notes(record: TaskComparisonRecord) -> list[str]:
    splits = {task.split for task in record.tasks.values()}
    if len(splits) == 1:
        where = f"{splits.pop()} scores on the same n rows"
    else:
        where = "scores on the same n rows: " + ", ".join(f"{name} {task.split}" for name, task in record.tasks.items())
    seeds = ", ".join(str(seed) for seed in record.seeds)
    training = record.training
    if training["max_steps"] is None:
        length = f"{training['epochs']:g} epoch{'' if training['epochs'] == 1 else 's'} over its own rows"
    else:
        length = f"the share of {training['max_steps']:,} steps that its rows have"
    batches = training["gradient_accumulation_steps"]
    who = "every model" if not any(arm.settings for arm in record.arms) else "every model whose arm says nothing else"
    budget = (
        f"Same budget for {who}: {length}, {f'{batches} batches' if batches > 1 else 'a batch'} of "
        f"{training['batch_size']} rows a step, learning rate {training['learning_rate']:g}, weights of the last step."
    )
    if len(record.seeds) == 1:
        return [f"Seed {seeds}; {where}. One seed: no interval; give more with --seeds.", budget]
    return [
        f"Seeds {seeds}; {where}. Difference: in the arm - alone, paired by seed, with a t interval over seeds, each "
        f"at {_percent(record)} by itself.",
        "It covers what seeds change, not which rows are in the split.",
        budget,
    ]


def _percent(record: TaskComparisonRecord) -> str:
    return f"{100 * record.confidence:g} %"


def _interval_name(record: TaskComparisonRecord) -> str:
    return f"{_percent(record)} interval"


def _rows_by_task(model: ArmModel) -> str:
    return ", ".join(f"{task} {rows:,}" for task, rows in model.task_rows_seen.items())


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _interval(item: TaskDifference) -> str:
    return "-" if item.low is None or item.high is None else f"{item.low:+.4f} to {item.high:+.4f}"


def draw_differences(record: TaskComparisonRecord, path: Path) -> Path | None:
    """Draw the differences to training alone: a row for each task, a point with its interval for each arm.

    Args:
        record: what was found.
        path: the PNG to write.

    Returns:
        The file; None where there is no difference to draw.
    """
    tasks = [*record.tasks, "average"]
    arms = list(dict.fromkeys(item.arm for item in record.differences if item.difference is not None))
    if not arms:
        return None
    # Slow to import, and whoever only prints the table needs none of it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    height = 1.8 + len(tasks) * max(0.45, 0.14 * len(arms))
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, arm in enumerate(arms):
        shift = 0.6 * ((number + 0.5) / len(arms) - 0.5)
        colour, marker = _look(number)
        shown = {item.task: item.difference for item in record.differences if item.arm == arm}
        points = {task: value for task, value in shown.items() if value is not None}
        for item in (item for item in record.differences if item.arm == arm):
            if item.low is not None and item.high is not None:
                place = tasks.index(item.task) + shift
                axes.plot([item.low, item.high], [place, place], color=colour, linewidth=2, zorder=3)
        axes.scatter(
            list(points.values()),
            [tasks.index(task) + shift for task in points],
            s=40 if len(arms) > 4 else 60,
            color=colour,
            marker=marker,
            edgecolor="white",
            zorder=4,
            label=arm,
        )
    axes.axvline(0.0, color="black", linewidth=1, zorder=2)
    axes.axhline(len(record.tasks) - 0.5, color="#7F7F7F", linewidth=0.7, linestyle="--", zorder=1)
    labels = [f"{name}\n{task.metric}, n = {task.rows:,}" for name, task in record.tasks.items()]
    axes.set_yticks(range(len(tasks)), [*labels, "average"], fontsize=9)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlabel(_axis(record))
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.7, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(arms), 4), frameon=False, fontsize=8)
    figure.suptitle(f"{record.name}: with other tasks, against alone", fontsize=12, x=0.02, ha="left")
    figure.savefig(path, metadata={"Software": "hf_mtcompress"})
    return path


def _axis(record: TaskComparisonRecord) -> str:
    splits: Sequence[str] = list(dict.fromkeys(task.split for task in record.tasks.values()))
    seeds = len(record.seeds)
    spread = f"{_interval_name(record)} over {seeds} seeds" if seeds > 1 else "one seed, no interval"
    return f"difference in {' and '.join(splits)} score ({spread}); right of 0: the others help"
