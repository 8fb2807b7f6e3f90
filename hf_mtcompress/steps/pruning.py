"""Prune steps: at once, in rounds, or while the model recovers; by importance, or the best of random candidates.

The work folder of a step holds what a killed run need not do again:

    cut/                 the model after the cut, with report.json
    candidates.json      scores of the candidates that were tried
    checkpoint-N/        of the recovery
    round-K/             the same for each round of an iterative schedule, and recovered/, the model after it
"""

import copy
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_mtcompress.artifacts import whole_folder, write_text
from hf_mtcompress.compression.pruning import PruneReport, TimeBudget, Whole, mean_length, prune
from hf_mtcompress.compression.schedule import GradualPruning
from hf_mtcompress.compression.width import prune_width
from hf_mtcompress.data.readers import Reader
from hf_mtcompress.errors import MTCompressError, RecipeError
from hf_mtcompress.evaluation.evaluate import evaluate_predictor
from hf_mtcompress.formats.predictor import Predictor
from hf_mtcompress.formats.runtime import Runtime
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.recipe import (
    DistillStep,
    FinetuneStep,
    GradualSchedule,
    IterativeSchedule,
    OneShotSchedule,
    PruneStep,
    TrainingConfig,
)
from hf_mtcompress.steps.rows import calibration_batches, validation_rows
from hf_mtcompress.steps.run_context import RunContext, Start, StepOutcome, reopened, start_model
from hf_mtcompress.steps.teaching import recover
from hf_mtcompress.steps.timing import latency_table
from hf_mtcompress.steps.training import Fit, merged_training, save_trained

logger = logging.getLogger(__name__)
_REPORT = "report.json"
_FIT = "fit.json"
_CANDIDATES = "candidates.json"


def prune_step(step: PruneStep, source: str | None, context: RunContext, folder: Path, work: Path) -> StepOutcome:
    """Cut heads, neurons and layers, and train what is left where the step says so."""
    match step.schedule:
        case OneShotSchedule():
            return _prune_in_rounds(step, source, context, folder, [work])
        case IterativeSchedule(rounds=rounds):
            # With one round it is the other schedule, folders included.
            places = [work / f"round-{number}" for number in range(1, rounds + 1)] if rounds > 1 else [work]
            return _prune_in_rounds(step, source, context, folder, places)
        case GradualSchedule() as schedule:
            return _prune_gradually(step, schedule, source, context, folder, work)
        case _:
            assert_never(step.schedule)


def recoveries(step: PruneStep, defaults: TrainingConfig) -> list[FinetuneStep | DistillStep]:
    """The trainings of a step in order: its recovery, or that in as many parts as there are rounds.

    Args:
        step: the step.
        defaults: of the recipe, which the recovery may leave epochs or steps to.
    """
    if step.recover is None:
        return []
    rounds = step.schedule.rounds if isinstance(step.schedule, IterativeSchedule) else 1
    if rounds == 1:
        return [step.recover]
    merged = merged_training(step.recover, defaults)
    if merged.max_steps is not None:
        ends = [merged.max_steps * number // rounds for number in range(rounds + 1)]
        parts = [max(end - begin, 1) for begin, end in pairwise(ends)]
        return [dataclasses.replace(step.recover, max_steps=part) for part in parts]
    epochs = merged.epochs if merged.epochs is not None else 3.0  # as TrainingArguments has it
    return [dataclasses.replace(step.recover, epochs=epochs / rounds)] * rounds


# ---- at once and in rounds ----


def _prune_in_rounds(
    step: PruneStep, source: str | None, context: RunContext, folder: Path, places: Sequence[Path]
) -> StepOutcome:
    """Cut and recover in as many rounds as there are work folders; what a round has done is not done again."""
    reader = context.reader_of_step(source)
    trainings = recoveries(step, context.recipe.training)
    reports: list[dict[str, Any]] = []
    candidates: list[list[dict[str, Any]]] = []
    fits: list[Fit] = []
    model: MultiTaskModel | None = None
    for number, place in enumerate(places):
        last = number == len(places) - 1
        recovered = place / "recovered"
        place.mkdir(parents=True, exist_ok=True)
        before = None if number == 0 else places[number - 1] / ("recovered" if trainings else "cut")
        load = _loader(source, context) if before is None else _loader(before, context)
        wanted = _part_of(step, number, len(places), reports)
        if step.latency and source is not None and not (place / "cut").exists():
            table = latency_table(step.timing, context, source)
            wanted["latency"] = TimeBudget(table, step.timing.batch_sizes[0], step.latency)
        _cut(step, load, reader, context, place, wanted)
        reports.append(json.loads((place / "cut" / _REPORT).read_text(encoding="utf-8")))
        if step.candidates > 1:
            candidates.append(json.loads((place / _CANDIDATES).read_text(encoding="utf-8")))
        if not trainings or (not last and recovered.exists()):
            if trainings:
                fits.append(Fit(**json.loads((recovered / _FIT).read_text(encoding="utf-8"))))
            continue
        model = _loader(place / "cut", context)()
        fits.append(recover(trainings[number], Start(model, reader), context, place))
        if not last:
            with whole_folder(recovered) as scratch:
                torch.nn.Module.to(model, "cpu")
                model.save_pretrained(scratch)
                (scratch / _FIT).write_text(json.dumps(dataclasses.asdict(fits[-1]), default=str))
    if model is None:
        model = _loader(places[-1] / "cut", context)()
    outcome = save_trained(Start(model, reader), context, folder, _joined(fits))
    outcome.pruning = {
        "schedule": step.schedule.kind,
        "rounds": [_summary(report) for report in reports],
        **({"candidates": candidates} if candidates else {}),
    }
    return outcome


def _part_of(step: PruneStep, number: int, rounds: int, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is to be gone after a round, as arguments of `prune`; fractions are of the model before the first one."""
    share = (number + 1) / rounds
    wanted = {
        "heads": step.heads * share,
        "feed_forward": step.feed_forward * share,
        "compute": step.compute * share,
        "layers": step.layers * (number + 1) // rounds - step.layers * number // rounds,
        "length": step.length,
    }
    if not reports:
        return wanted
    left = [(layer["heads"], layer["feed_forward"]) for layer in reports[0]["before"]["layers"]]
    for report in reports:
        left = [sizes for layer, sizes in enumerate(left) if layer not in report["removed_layers"]]
    whole = Whole(layers=left, multiply_adds=reports[0]["multiply_adds_before"])
    return {**wanted, "length": reports[0]["length"], "whole": whole}


def _loader(place: str | Path | None, context: RunContext) -> Callable[[], MultiTaskModel]:
    """Loads the model of a step, of the recipe, or of a work folder, with the columns of this recipe."""

    def load() -> MultiTaskModel:
        return reopened(place, context) if isinstance(place, Path) else start_model(place, context)

    return load


def _cut(
    step: PruneStep,
    load: Callable[[], MultiTaskModel],
    reader: Reader,
    context: RunContext,
    place: Path,
    wanted: Mapping[str, Any],
) -> None:
    """Make `cut` in a work folder, unless it is there."""
    if (place / "cut").exists():
        return
    model = load()
    batches = calibration_batches(Start(model, reader), context, step.rows)
    if step.width:
        model, report = _narrow(step, model, batches)
        _keep_cut(model, report, place)
        return

    def prune_with(seed: int, pruned: MultiTaskModel, progress: bool = True) -> PruneReport:
        try:
            return prune(
                pruned,
                batches,
                importance=step.importance,
                combine=step.combine,
                rearrange=step.rearrange,
                repair=step.repair,
                multiple_of=step.multiple_of,
                shape=step.shape,
                seed=seed,
                progress=progress,
                **wanted,
            )
        except MTCompressError:
            raise
        except ValueError as error:
            # What no recipe shows: the encoder has fewer layers, or its layers keep more than the wanted share.
            raise RecipeError(f"steps.{step.name}.{error}") from error

    seed = context.recipe.seed
    if step.candidates > 1:
        seed = _best_seed(step, model, reader, context, place, prune_with)
    report = prune_with(seed, model)
    for task, share in report.lost_importance.items():
        logger.info("%s: task '%s' lost %.1f %% of the importance of heads and neurons", step.name, task, 100 * share)
    if report.repair is not None:
        logger.info(
            "%s: repair brought the distance from %.3g to %.3g",
            step.name,
            report.repair["error_before"],
            report.repair["error_after"],
        )
    _keep_cut(model, report, place)


def _narrow(
    step: PruneStep, model: MultiTaskModel, batches: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[MultiTaskModel, PruneReport]:
    try:
        narrow, report = prune_width(model, batches, step.width)
    except MTCompressError:
        raise
    except ValueError as error:
        raise RecipeError(f"steps.{step.name}.{error}") from error
    assert isinstance(narrow, MultiTaskModel)
    return narrow, report


def _keep_cut(model: MultiTaskModel, report: PruneReport, place: Path) -> None:
    with whole_folder(place / "cut") as scratch:
        model.save_pretrained(scratch)
        (scratch / _REPORT).write_text(json.dumps(dataclasses.asdict(report), default=str))


def _joined(fits: Sequence[Fit]) -> Fit | None:
    """The trainings of all rounds as one, whose log says for each row what round it is of."""
    if len(fits) < 2:
        return fits[0] if fits else None
    log = [{**row, "round": number} for number, fit in enumerate(fits, 1) for row in fit.training["log"]]
    totals = {key: sum(fit.training[key] for fit in fits) for key in ("steps", "epochs")}
    return Fit({**fits[-1].training, **totals, "log": log}, fits[-1].interference)


def _summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report without the scores of single parts, which nobody reads in a record."""
    return {key: value for key, value in report.items() if key != "scores"}


# ---- the best of random candidates ----


def _best_seed(
    step: PruneStep,
    model: MultiTaskModel,
    reader: Reader,
    context: RunContext,
    place: Path,
    prune_with: Callable[[int, MultiTaskModel, bool], PruneReport],
) -> int:
    """The seed of the random cut that scores best on validation rows; scores of a killed run are kept."""
    file = place / _CANDIDATES
    tried: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    rows = validation_rows(context, step.rows)
    numbers = range(len(tried), step.candidates)
    bar = tqdm(numbers, desc="trying candidates", unit="cut", initial=len(tried), total=step.candidates)
    for number in bar:
        # The first one is what a plain random cut would be.
        drawn = np.random.default_rng([context.recipe.seed, number]).integers(2**31)
        seed = int(drawn) if number else context.recipe.seed
        pruned = copy.deepcopy(model)
        report = prune_with(seed, pruned, False)
        predictor = Predictor(_InMemory(pruned, reader))
        scores = evaluate_predictor(predictor, context.sources.tasks, rows, split="validation")
        tried.append(
            {
                "seed": seed,
                "average": scores.average,
                "rows": max((score.rows for score in scores.tasks.values()), default=0),
                "tasks": {
                    name: score.metrics[str(context.sources.tasks[name].metric)] for name, score in scores.tasks.items()
                },
                "parameters": report.parameters_after,
            }
        )
        write_text(file, json.dumps(tried))
    # Of candidates that are alike the first one.
    best = max(range(len(tried)), key=lambda number: (_value(tried[number]["average"]), -number))
    logger.info("%s: candidate %d of %d has the best average", step.name, best + 1, len(tried))
    return int(tried[best]["seed"])


def _value(average: float | None) -> float:
    """An average to compare by; one that is not defined is the worst."""
    return average if average is not None and math.isfinite(average) else -math.inf


class _InMemory(Runtime):
    """A model that lies in no folder."""

    form = "torch"

    def __init__(self, model: MultiTaskModel, reader: Reader) -> None:
        self.folder = Path()
        self.model = model.eval()
        self.tasks = dict(model.tasks)
        self.reader = reader

    def logits(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            output = self.model(**{key: torch.as_tensor(value, device=device) for key, value in batch.items()})
            return {name: output[task.logits_name].float().cpu().numpy() for name, task in self.tasks.items()}


# ---- while it recovers ----


def _prune_gradually(
    step: PruneStep, schedule: GradualSchedule, source: str | None, context: RunContext, folder: Path, work: Path
) -> StepOutcome:
    """Drop layers where the step says so, then train while heads and neurons go; a killed training goes on."""
    assert step.recover is not None
    reader = context.reader_of_step(source)
    reports = []
    load = _loader(source, context)
    if step.layers:
        _cut(step, load, reader, context, work, {"layers": step.layers})
        reports.append(json.loads((work / "cut" / _REPORT).read_text(encoding="utf-8")))
        load = _loader(work / "cut", context)
    start = Start(load(), reader)
    length = None
    if step.compute:
        length = step.length or mean_length(start.model, calibration_batches(start, context, step.rows))
    pruning = GradualPruning(
        heads=step.heads,
        feed_forward=step.feed_forward,
        compute=step.compute,
        length=length,
        begin=schedule.begin,
        end=schedule.end,
        every=schedule.every,
        importance="magnitude" if step.importance == "magnitude" else "first_order",
        multiple_of=step.multiple_of,
    )
    try:
        fit = recover(step.recover, start, context, work, [pruning])
    except MTCompressError:
        raise
    except ValueError as error:
        # What no recipe shows: the layers keep more than the wanted share.
        raise RecipeError(f"steps.{step.name}.{error}") from error
    outcome = save_trained(start, context, folder, fit)
    outcome.pruning = {
        "schedule": schedule.kind,
        "rounds": [_summary(report) for report in reports],
        # A Trainer that is told to restore callbacks reports to another one.
        "gradual": dataclasses.asdict(pruning.report) if pruning.report is not None else None,
    }
    return outcome
