"""A recipe from beginning to end: data, steps, scores, sizes, times, record, card.

load data -> for each step: skip if done, else run and save whole, score on validation
          -> every artefact: fresh-process reload, test scores, size, latency -> record.json, card, picture
"""

import dataclasses
import logging
import os
import shutil
import time
from pathlib import Path

from transformers.utils import logging as transformers_logging

from hf_mtcompress import records
from hf_mtcompress.artifacts import (
    ASSETS,
    CARD,
    COMPARISON,
    DIGESTS,
    GRAPHS,
    RECIPE,
    RECORD,
    STEP_RECORD,
    WORK,
    telling_of_full_disk,
    whole_folder,
    write_text,
)
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.digests import file_digests, keep, recall, values_digest
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.evaluation.benchmark import measure_size
from hf_mtcompress.evaluation.compare import compare
from hf_mtcompress.formats.reload.probes import save_probes
from hf_mtcompress.locks import sole_use
from hf_mtcompress.recipe import QuantizeStep, Recipe, StepConfig
from hf_mtcompress.recipe.load import dump_recipe
from hf_mtcompress.recipe.sections import plain_settings
from hf_mtcompress.records import RunRecord, StepRecord
from hf_mtcompress.records.retention import left_out, surpassed
from hf_mtcompress.runs.fingerprint import foreign_files, short, step_inputs, why_again
from hf_mtcompress.runs.measure import join, measure_artefacts
from hf_mtcompress.runs.rehearsal import check_run
from hf_mtcompress.runs.results import last_record, write_results
from hf_mtcompress.steps.gate import pass_gate
from hf_mtcompress.steps.run import run_step
from hf_mtcompress.steps.run_context import RunContext, probe_batch
from hf_mtcompress.steps.scoring import read_step, score_folder, task_record

logger = logging.getLogger(__name__)


def run(recipe: Recipe, output: str | os.PathLike[str]) -> RunRecord:
    """Do every step that is not done yet, measure what came out, write record and card.

    A repeated call skips finished steps; a killed run goes on from its last checkpoint.

    Args:
        recipe: what is wanted.
        output: folder of the run; made when it is not there.

    Raises:
        RecipeError: the recipe does not fit its data or models.
        ArtifactError: the folder cannot be written, another process works in it, or something saved does not reload.
    """
    output = Path(output)
    transformers_logging.set_verbosity_error()
    recall(output / WORK / DIGESTS)
    sources = load_sources(recipe.tasks, recipe.seed)
    context = check_run(recipe, sources, output)
    prepare_output(output)
    with sole_use(output), telling_of_full_disk(output):
        write_text(output / RECIPE, dump_recipe(recipe))
        done: dict[str, StepRecord] = {}
        for step in recipe.steps:
            done[str(step.name)] = do_step(step, done, context)
        keep(output / WORK / DIGESTS)
        shutil.rmtree(output / WORK / GRAPHS, ignore_errors=True)
        record = measure_artefacts(context, list(done.values()), last_record(output))
        write_results(context, record)
    return record


def prepare_output(output: Path) -> None:
    """Make the folder of a run.

    Raises:
        ArtifactError: it cannot be made or written, or holds files of somebody else that a run would replace.
    """
    ours = any((output / name).exists() for name in (WORK, RECORD, COMPARISON))
    if not ours and (found := [name for name in (RECIPE, CARD, ASSETS) if (output / name).exists()]):
        raise ArtifactError(
            f"expected a folder of its own for the run, found {' and '.join(found)} in {output}, which no run made and "
            "this one would replace; choose another folder with --output"
        )
    try:
        (output / WORK).mkdir(parents=True, exist_ok=True)
        probe = output / WORK / "writable"
        probe.write_text("")
        probe.unlink(missing_ok=True)  # another process may share the folder
    except OSError as error:
        raise ArtifactError(
            f"expected a folder that can be written at {output}, found that it cannot ({error.strerror}); "
            "choose another with --output"
        ) from error


def do_step(step: StepConfig, done: dict[str, StepRecord], context: RunContext) -> StepRecord:
    """Run a step unless its folder holds the result of exactly this step."""
    name = str(step.name)
    lineage = context.lineage[name]
    inputs = step_inputs(step, done, context)
    fingerprint = values_digest(inputs)
    folder = context.step_folder(name)
    work = context.output / WORK / f"{name}-{fingerprint[:8]}"
    within = context.for_step(step)
    found = read_step(folder / STEP_RECORD)
    again = why_again(folder, found, inputs)
    if found is not None:
        _refuse_foreign_files(folder, found)
    if found is not None and again is None:
        logger.warning("%s: done already, skipped", name)
        if isinstance(step, QuantizeStep):
            # The limits of a gate do not change what was made: they are held against it again.
            pass_gate(step, done[str(lineage.parent)], found, within, work)
            found.settings = plain_settings(step)
            shutil.rmtree(work, ignore_errors=True)
        _judge_reference(found, done, context)
        return found
    if folder.exists():
        if not (folder / STEP_RECORD).exists():
            raise ArtifactError(
                f"expected the step '{name}' of this run at {folder}, or nothing, found a folder without "
                f"{STEP_RECORD}, which would be replaced; move it elsewhere, or choose another folder with --output"
            )
        logger.warning("%s: made again, %s", name, again)
    logger.warning("%s: %s%s", name, step.kind, f" from {lineage.parent}" if lineage.parent else "")
    work.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with telling_of_full_disk(context.output), whole_folder(folder) as scratch:
        outcome = run_step(step, lineage.parent, within, scratch, work)
        record = StepRecord(
            name=name,
            kind=step.kind,
            source=lineage.parent,
            origin=lineage.origin if lineage.origin in done else None,
            fingerprint=fingerprint,
            settings=plain_settings(step),
            seconds=0.0,
            tasks=list(lineage.ends.tasks),
            artefacts=[
                dataclasses.replace(artefact, folder=join(name, artefact.folder)) for artefact in outcome.artefacts
            ],
            structure=outcome.structure,
            training=outcome.training,
            interference=outcome.interference,
            vocabulary=outcome.vocabulary,
            pruning=outcome.pruning,
            sparsity=outcome.sparsity,
            quantization=outcome.quantization,
            inputs=short(inputs),
        )
        for made, artefact in zip(outcome.artefacts, record.artefacts, strict=True):
            artefact.size = measure_size(scratch / made.folder)
            artefact.scores["validation"] = score_folder(context, scratch / made.folder, "validation")
        if isinstance(step, QuantizeStep):
            pass_gate(step, done[str(lineage.parent)], record, within, work)
        save_probes(scratch, probe_batch(within, outcome.reader), outcome.probes)
        record.files = file_digests(scratch)
        record.seconds = time.monotonic() - begin
        write_text(scratch / STEP_RECORD, records.to_json(record))
    shutil.rmtree(work, ignore_errors=True)
    logger.warning("%s: done in %.0f s, validation average %s", name, record.seconds, _average(record))
    _judge_reference(record, done, context)
    return record


def _judge_reference(record: StepRecord, done: dict[str, StepRecord], context: RunContext) -> None:
    """Say at once what the reference has not learnt, and where it is beaten: what is kept of it means little there."""
    reference = context.recipe.reference or str(context.recipe.steps[0].name)
    if record.name != reference and reference not in done:
        return
    tasks = {name: task_record(name, context) for name in context.sources.tasks}
    known = record if record.name == reference else done[reference]
    comparison = compare(tasks, known.artefacts[0], record.artefacts[0], step=record.name, split="validation")
    if record.name == reference:
        for name, why in left_out(tasks, comparison.undefined).items():
            logger.warning(
                "%s: %s on validation rows, so what is kept of %s will be undefined; train it longer, or look at its "
                "labels",
                name,
                why,
                name,
            )
        return
    rows = {name: score.rows for name, score in record.artefacts[0].scores["validation"].tasks.items()}
    for name in surpassed(tasks, comparison, rows):
        row = comparison.tasks[name]
        logger.warning(
            "%s beats the reference %s on %s (%.3f against %.3f), so the reference is probably undertrained",
            record.name,
            reference,
            name,
            row["score"],
            row["reference"],
        )


def _refuse_foreign_files(folder: Path, record: StepRecord) -> None:
    """Making the step again would delete what the user put there.

    Raises:
        ArtifactError: there are some.
    """
    if foreign := foreign_files(folder, record):
        raise ArtifactError(
            f"expected in {folder} what the step '{record.name}' saved, found {', '.join(foreign[:4])} besides, which "
            "changes what is loaded from there; move it elsewhere or delete it, and run again"
        )


def _average(record: StepRecord) -> str:
    average = record.artefacts[0].scores["validation"].average
    return "not defined" if average is None else f"{average:.4f}"
