"""What is measured of every artefact after the last decision: fresh-process reload, test scores, size, times."""

import datetime
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_mtcompress.environment import environment_facts
from hf_mtcompress.evaluation.benchmark import benchmark
from hf_mtcompress.evaluation.compare import check_budget, compare
from hf_mtcompress.formats.reload.check import ReloadCheck, check_reload
from hf_mtcompress.formats.reload.probes import reload_checks
from hf_mtcompress.recipe import (
    BenchmarkConfig,
    Recipe,
)
from hf_mtcompress.records import Artefact, FormName, RunRecord, StepRecord
from hf_mtcompress.steps.run_context import RunContext, probe_samples
from hf_mtcompress.steps.scoring import result_digest, score_folder, task_record

logger = logging.getLogger(__name__)


def measure_artefacts(context: RunContext, steps: list[StepRecord], last: RunRecord | None) -> RunRecord:
    """Reload, test scores and times of every artefact.

    Args:
        context: the run.
        steps: what the steps left.
        last: the record of an earlier call; what it measured on exactly these artefacts is kept.
    """
    recipe = context.recipe
    reference = recipe.reference or steps[0].name
    record = RunRecord(
        name=recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=recipe.seed,
        environment=environment_facts(),
        encoder=_encoder_facts(context),
        tasks={name: task_record(name, context) for name in context.sources.tasks},
        reference=reference,
        steps=steps,
    )
    known = _keep_measured(steps, last)
    fresh = [step for step in steps if step.name not in known]
    if fresh:
        check_reloads(context.output, fresh, probe_samples(context))
    if context.sources.role("test"):
        for artefact in (artefact for step in fresh for artefact in step.artefacts):
            artefact.scores["test"] = score_folder(context, context.output / artefact.folder, "test")
    if last is not None and not fresh and _same_conditions(last, steps, reference, recipe.benchmark):
        record.created, record.benchmark = last.created, last.benchmark
    else:
        # Times are only comparable within one run, so all are taken again.
        _time_artefacts(context, record, recipe.benchmark)
    _compare(record, recipe)
    return record


def _keep_measured(steps: Sequence[StepRecord], last: RunRecord | None) -> set[str]:
    """Put what an earlier call measured on exactly these artefacts back in place; the names of steps it holds."""
    earlier = {step.fingerprint: step for step in last.steps} if last is not None else {}
    known = set()
    for step in steps:
        old = earlier.get(step.fingerprint)
        if old is not None and (old.name, old.files) == (step.name, step.files):
            step.artefacts = old.artefacts
            known.add(step.name)
    return known


def _same_conditions(last: RunRecord, steps: Sequence[StepRecord], reference: str, config: BenchmarkConfig) -> bool:
    """Whether the times in the last record are of these artefacts, taken as wanted now."""
    found = last.benchmark or {}
    wanted = {
        "tokens": config.tokens,
        "batch_sizes": list(config.batch_sizes),
        "repetitions": config.repetitions,
        "warmup": config.warmup,
        "threads": config.threads or found.get("threads"),
    }
    if any(row.not_measured for step in last.steps for artefact in step.artefacts for row in artefact.latency):
        return False  # the machine may be quiet now
    same_steps = [result_digest(step) for step in last.steps] == [result_digest(step) for step in steps]
    return same_steps and last.reference == reference and all(found.get(key) == wanted[key] for key in wanted)


def check_reloads(output: Path, steps: Sequence[StepRecord], samples: Sequence[Any] | None = None) -> None:
    """Load every artefact in a fresh process and hold its logits against those of the model before it was saved."""
    checks: dict[str, ReloadCheck] = {}
    for step in steps:
        forms: dict[str, FormName] = {within_step(step, item): item.form for item in step.artefacts}
        found = reload_checks(output / step.name, forms, samples)
        checks |= {join(step.name, folder): check for folder, check in found.items()}
    results = dict(zip(checks, check_reload(list(checks.values())), strict=True))
    for artefact in (artefact for step in steps for artefact in step.artefacts):
        artefact.reload = results.get(artefact.folder)
        if artefact.reload is not None and not artefact.reload["passed"]:
            logger.warning("%s does not reload as it was saved: %s", artefact.folder, artefact.reload["problems"])


def _time_artefacts(context: RunContext, record: RunRecord, config: BenchmarkConfig) -> None:
    artefacts = {artefact.folder: artefact for step in record.steps for artefact in step.artefacts}
    reference = next(step for step in record.steps if step.name == record.reference).artefacts[0].folder
    samples = probe_samples(context)
    result = benchmark(
        {label: context.output / label for label in artefacts}, reference=reference, config=config, samples=samples
    )
    for label, rows in result.latency.items():
        artefacts[label].latency = rows
        artefacts[label].peak_memory_mb = result.peak_memory_mb.get(label)
    record.benchmark = result.conditions


def _compare(record: RunRecord, recipe: Recipe) -> None:
    reference = next(step for step in record.steps if step.name == record.reference).artefacts[0]
    record.comparisons = [
        compare(record.tasks, reference, artefact, step=step.name)
        for step in record.steps
        for artefact in step.artefacts
    ]
    if recipe.budget is not None:
        last = record.steps[-1].artefacts[0]
        comparison = next(item for item in record.comparisons if item.folder == last.folder)
        record.budget = check_budget(recipe.budget, record.tasks, last, comparison)


def _encoder_facts(context: RunContext) -> dict[str, Any]:
    encoder = context.recipe.encoder
    path = Path(encoder.path)
    saved = json.loads((context.output / str(context.recipe.steps[0].name) / "config.json").read_text(encoding="utf-8"))
    return {
        "path_or_id": path.name if path.is_absolute() or path.exists() else encoder.path,
        "hub_id": encoder.hub_id or (None if path.is_absolute() or path.exists() else encoder.path),
        "revision": encoder.revision,
        "max_length": context.reader.max_length,
        "image_size": encoder.image_size,
        "model_type": saved["encoders"]["main"]["model_type"],
    }


def within_step(step: StepRecord, artefact: Artefact) -> str:
    """An artefact's folder relative to its step."""
    return artefact.folder.removeprefix(step.name).strip("/") or "."


def join(step: str, folder: str) -> str:
    """The folder of an artefact relative to the run."""
    return step if folder == "." else f"{step}/{folder}"
