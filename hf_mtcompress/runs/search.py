"""Search for the smallest checkpoint that a budget allows: a family from one trajectory, its front, and the choice.

The starting model is cut in stages by the clock of this machine, each stage from the one before and recovered, and
every stage is quantized where the runtime is. Sizes, times (in turns, side by side) and validation scores make the
front; of what meets the budget the smallest is delivered, else the smallest that may, where a time could not be taken
or the reference is at chance, else what comes nearest. Its test scores, card and record are made by an ordinary run of
the steps that lead to it. Finished stages are skipped, as in every run.
"""

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hf_mtcompress import records
from hf_mtcompress.artifacts import ASSETS, write_text
from hf_mtcompress.compression.latency import LatencyTable
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.errors import RecipeError
from hf_mtcompress.evaluation.benchmark import BenchmarkResult, benchmark
from hf_mtcompress.evaluation.compare import MEGABYTE, check_budget, compare
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.publishing.family import draw_family, family_csv
from hf_mtcompress.recipe import (
    BudgetConfig,
    ExportStep,
    PruneStep,
    QuantizeStep,
    Recipe,
    SearchConfig,
    StepConfig,
    teachers_of,
)
from hf_mtcompress.recipe.lineage import lineage_of
from hf_mtcompress.records import Artefact, Candidate, Comparison, SearchRecord, StepRecord, TaskRecord
from hf_mtcompress.records.retention import left_out
from hf_mtcompress.runs.rehearsal import check_run
from hf_mtcompress.runs.run import do_step, prepare_output, run
from hf_mtcompress.steps.run_context import RunContext, probe_samples
from hf_mtcompress.steps.scoring import task_record
from hf_mtcompress.steps.timing import latency_table

_BEYOND = 0.92
"""Share of the budget's time that the last stage aims at. A prediction may miss by some percent; but small models lose
quality fast, and a stage that is much faster than asked for would lose it for nothing."""
_SMALLEST_SHARE = 0.15
"""Share of the time that the last stage keeps where no limit of the budget is about time."""

_Member = tuple[str, float | None, Literal[8, 4] | None]
"""Of a family: the float step that it was made from, the share of that model's time that is kept (None for all of it),
and bits of the embeddings."""


def search(recipe: Recipe, output: Path) -> SearchRecord:
    """Find the smallest checkpoint within the recipe's budget.

    Args:
        recipe: with `budget` and `search`; its steps make the reference and what the family starts from.
        output: folder of the run; made when it is not there. `search.json`, `assets/front.csv` and `assets/front.png`
            show the family, `record.json` and the card are about the delivered one.

    Raises:
        RecipeError: there is no section `search` or `budget`.
        ArtifactError: the folder cannot be written, or something saved does not reload.
    """
    settings, budget = recipe.search, recipe.budget
    if settings is None or budget is None:
        missing = "search" if settings is None else "budget"
        raise RecipeError(f"{missing}: expected the section that says what is searched for, found none; add it")
    sources = load_sources(recipe.tasks, recipe.seed)
    context = check_run(recipe, sources, output)
    prepare_output(output)
    done: dict[str, StepRecord] = {}
    for step in recipe.steps:
        done[str(step.name)] = do_step(step, done, context)
    first = str(recipe.steps[0].name)
    reference = done[recipe.reference or first].artefacts[0]
    start = settings.source or recipe.reference or first
    table = latency_table(settings.timing, context, start)
    whole = find_anatomy(context.load(start).encoder).sizes
    shares = settings.shares or shares_for(budget, table, whole, settings.points)
    kinds = settings.embedding_bits if settings.timing.runtime == "onnx_int8" else (None,)
    places: list[tuple[str, Sequence[float]]] = [(name, ()) for name in settings.members]
    places += [(start, shares[:count]) for count in range(len(shares) + 1)]
    family: dict[_Member, tuple[StepConfig, ...]] = {
        (name, cuts[-1] if cuts else None, bits): _path(settings, name, cuts, bits, name == start)
        for name, cuts in places
        for bits in kinds
    }
    made = {str(step.name): step for path in family.values() for step in path}
    # Lineage, and what a model reads with, are those of the steps of the recipe.
    context = dataclasses.replace(context, recipe=dataclasses.replace(recipe, steps=(*recipe.steps, *made.values())))
    for name, step in made.items():
        done[name] = do_step(step, done, context)
    last = {member: path[-1].name if path else member[0] for member, path in family.items()}
    artefacts = {member: done[str(name)].artefacts[0] for member, name in last.items()}
    timed = _time([reference, *artefacts.values()], context)
    tasks = {name: task_record(name, context) for name in sources.tasks}
    candidates = {}
    for member, artefact in artefacts.items():
        floats = [str(step.name) for step in family[member] if not isinstance(step, ExportStep | QuantizeStep)]
        found = _candidate(artefact, compare(tasks, reference, artefact, step="", split="validation"), budget, tasks)
        found.steps, found.share = [str(step.name) for step in family[member]], member[1]
        if member[0] == start and table.busy is None:
            # The table is of its hidden width.
            sizes = find_anatomy(context.load(floats[-1] if floats else start).encoder).sizes
            found.predicted_ms = {str(size): table.milliseconds(sizes, size) for size in table.batches}
        candidates[member] = found
    mark_front(list(candidates.values()))
    chosen = choose(list(candidates.values()))
    record = SearchRecord(
        name=recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment=environment_facts(),
        reference=reference.folder,
        runtime=settings.timing.runtime,
        budget={key: value for key, value in dataclasses.asdict(budget).items() if value is not None},
        candidates=list(candidates.values()),
        chosen=chosen.folder,
        met=None if chosen.missed == 0 and chosen.undecided else chosen.missed == 0,
        conditions=timed.conditions,
    )
    (output / ASSETS).mkdir(exist_ok=True)
    write_text(output / "search.json", records.to_json(record))
    write_text(output / ASSETS / "front.csv", family_csv(record))
    draw_family(record, output / ASSETS / "front.png")
    # What leads to the chosen one is done already: this measures it on test rows and writes record and card.
    member, path = next((member, family[member]) for member, found in candidates.items() if found is chosen)
    steps = (*_leading_to(recipe, member[0], path), *path)
    run(dataclasses.replace(recipe, steps=steps, search=None), output)
    return record


def _candidate(
    artefact: Artefact, comparison: Comparison, budget: BudgetConfig, tasks: Mapping[str, TaskRecord]
) -> Candidate:
    """What was measured on one member, held against the budget."""
    limits = check_budget(budget, tasks, artefact, comparison)
    limits.pop("artefact")
    missed = sum(_missed(name, row) for name, row in limits.items())
    scores = artefact.scores.get("validation")
    busy = {str(row.batch_size): row.not_measured for row in artefact.latency if row.not_measured is not None}
    return Candidate(
        folder=artefact.folder,
        form=f"{artefact.form} {artefact.precision}",
        size_mb=None if artefact.size is None else artefact.size.weights_bytes / MEGABYTE,
        ratios={str(row.batch_size): row.ratio_minimum for row in artefact.latency},
        measured_ms={str(row.batch_size): row.minimum_ms for row in artefact.latency},
        average=None if scores is None else scores.average,
        retention=comparison.retention,
        worst_task_retention=comparison.worst_task_retention,
        limits=limits,
        missed=missed if math.isfinite(missed) else None,
        not_measured=busy,
        undefined=left_out(tasks, comparison.undefined),
    )


def _time(artefacts: Sequence[Artefact], context: RunContext) -> BenchmarkResult:
    """Time the reference, which is the first, and the family in turns, and put the times into the artefacts."""
    every = {artefact.folder: artefact for artefact in artefacts}
    folders = {folder: context.output / folder for folder in every}
    config = context.recipe.benchmark
    timed = benchmark(folders, reference=artefacts[0].folder, config=config, samples=probe_samples(context))
    for folder, artefact in every.items():
        artefact.latency = timed.latency[folder]
    return timed


# ---- the family ----


def shares_for(budget: BudgetConfig, table: LatencyTable, shape: Sequence[tuple[int, int]], points: int) -> list[float]:
    """Shares of the starting model's time for each stage, evenly spaced as ratios.

    The last one is a little faster than the tightest limit on time; see `_BEYOND`. Limits are ratios to the reference
    in torch float32, which the table holds beside the times of the runtime.
    """
    targets = []
    for size, ratio in ((1, budget.latency_b1_ratio), (32, budget.latency_b32_ratio)):
        if ratio is not None and size in table.batches:
            targets.append(ratio * table.batches[size].reference / table.milliseconds(shape, size))
    last = min(targets, default=_SMALLEST_SHARE / _BEYOND) * _BEYOND
    # What is not in the layers cannot be cut.
    least = max(times.of([(0, 0)] * len(shape)) / times.of(shape) for times in table.batches.values())
    last = min(max(last, 1.1 * least, 0.02), 0.9)
    return [last ** (number / points) for number in range(1, points + 1)]


def _path(
    settings: SearchConfig, start: str, shares: Sequence[float], embedding_bits: Literal[8, 4] | None, main: bool
) -> tuple[StepConfig, ...]:
    """Steps from a model to the form that is deployed, through one cut for each share."""
    path: list[StepConfig] = []
    source, spent = start, 1.0
    if settings.vocabulary is not None:
        name = "vocabulary" if main else f"vocabulary-{source}"
        path.append(dataclasses.replace(settings.vocabulary, name=name, source=source))
        source = name
    for share in shares:
        name = f"cut-{round(1000 * share):03d}"
        prune = settings.prune or PruneStep()
        path.append(
            dataclasses.replace(prune, name=name, source=source, latency=1.0 - share / spent, timing=settings.timing)
        )
        source, spent = name, share
    match settings.timing.runtime:
        case "torch":
            pass
        case "onnx":
            path.append(ExportStep(name=f"{source}-onnx", source=source, formats=("onnx",)))
        case "onnx_int8":
            name, bits = (f"{source}-int8-4", 4) if embedding_bits == 4 else (f"{source}-int8", None)
            path.append(QuantizeStep(name=name, source=source, backend="onnxruntime", bits=8, embedding_bits=bits))
    return tuple(path)


def _leading_to(recipe: Recipe, origin: str, path: Sequence[StepConfig]) -> list[StepConfig]:
    """Those of the recipe's steps that have a part in what is delivered: parents, teachers, and the reference."""
    needed = {str(recipe.reference or recipe.steps[0].name), origin}
    needed.update(name for step in path for name in teachers_of(step))
    # Parents and teachers of a step stand before it.
    for name, lineage in reversed(lineage_of(recipe).items()):
        if name in needed:
            needed.update(lineage.teachers, [] if lineage.parent is None else [lineage.parent])
    return [step for step in recipe.steps if step.name in needed]


# ---- the choice ----


def _missed(name: str, row: dict[str, Any]) -> float:
    """How far a limit is missed, as a fraction of it; nothing where that is open, all where quality is unknown."""
    if row["met"] is False:
        return abs(row["found"] - row["limit"]) / row["limit"]
    return math.inf if row["found"] is None and "retention" in name else 0.0


def mark_front(candidates: Sequence[Candidate]) -> None:
    """Mark those that no other beats: at least as good in size, every time and quality, and better in one.

    Quality is retention; the average of scores where the reference has none above chance.
    """

    def costs(item: Candidate) -> list[float]:
        quality = item.retention if item.retention is not None else item.average
        found = [item.size_mb, *item.ratios.values(), None if quality is None else -quality]
        return [math.inf if value is None else value for value in found]

    for item in candidates:
        own = costs(item)
        item.on_front = not any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in map(costs, candidates)
        )


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The smallest that meets the budget; else the smallest that may, as far as was measured; else the nearest."""
    may = [item for item in candidates if item.missed == 0]
    within = [item for item in may if not item.undecided] or may
    if within:
        return min(within, key=lambda item: (item.size_mb or math.inf, -(item.retention or 0.0)))
    return min(candidates, key=lambda item: math.inf if item.missed is None else item.missed)
