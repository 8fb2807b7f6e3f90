"""The times of blocks on this machine, by which prune steps and searches choose."""

import hashlib
import json
import logging

from hf_mtcompress.artifacts import WORK
from hf_mtcompress.compression.latency import LatencyTable, measure_latency
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.student import fresh_student_of
from hf_mtcompress.recipe import TimingConfig
from hf_mtcompress.steps.run_context import RunContext, probe_samples

logger = logging.getLogger(__name__)


def latency_table(timing: TimingConfig, context: RunContext, source: str) -> LatencyTable:
    """Times of the blocks of a step's encoder as they were before any of its heads and neurons went.

    Measured once for a kind of encoder, a runtime and a machine, and kept in the run: models that were cut from one
    find its table, whatever is left of their layers and of their vocabulary.
    """
    whole = fresh_student_of(context.load(source), {})
    anatomy = find_anatomy(whole.encoder)
    config = whole.encoder.config
    facts = {
        "timing": [timing.runtime, timing.tokens, timing.threads, timing.repetitions, sorted(timing.batch_sizes)],
        "blocks": [config.model_type, anatomy.hidden_size, anatomy.layers[0].attention.head_size],
        "activation": config.to_dict().get("hidden_act"),
        "tasks": [[task.name, task.num_outputs] for task in whole.tasks.values()],
        "machine": environment_facts(),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]
    heads, width = anatomy.sizes[0]
    for path in sorted((context.output / WORK).glob(f"latency-{digest}-*.json")):
        try:
            found = LatencyTable.load(path)
        except ArtifactError as error:
            logger.warning("%s", error)
            continue
        if all(times.covers(heads, width) for times in found.batches.values()):
            return found
    logger.warning("timing the blocks of the encoder, %s", timing.runtime)
    table = measure_latency(
        whole,
        context.reader_of_step(source).processor,
        probe_samples(context),
        runtime=timing.runtime,
        tokens=timing.tokens,
        batch_sizes=timing.batch_sizes,
        threads=timing.threads,
        repetitions=timing.repetitions,
        wait=timing.wait,
    )
    for size, times in table.batches.items():
        logger.info("batch size %d: the sum of blocks misses by at most %.1f %%", size, 100 * times.largest_error)
    if table.busy is not None:
        logger.warning("blocks were timed while the machine was busy, so a cut by time is rough: %s", table.busy)
        return table  # not kept: another run may find a quiet moment
    table.save(context.output / WORK / f"latency-{digest}-{heads}-{width}.json")
    return table
