"""Trim_vocabulary and trim_weights steps."""

import dataclasses
import json
import logging
from pathlib import Path

from hf_mtcompress.artifacts import whole_folder
from hf_mtcompress.compression.sparsity import trim_weights, zeros_of
from hf_mtcompress.compression.vocabulary import compare_readings, trim_vocabulary
from hf_mtcompress.data.readers import reader_of
from hf_mtcompress.errors import DataError, RecipeError, UnsupportedEncoderError
from hf_mtcompress.model.matrices import encoder_matrices
from hf_mtcompress.model.sparse import make_sparse
from hf_mtcompress.recipe import Role, TrimVocabularyStep, TrimWeightsStep
from hf_mtcompress.steps.rows import texts_of, texts_to_keep
from hf_mtcompress.steps.run_context import (
    RunContext,
    Start,
    StepOutcome,
    reopened,
    start_model,
    start_of,
)
from hf_mtcompress.steps.teaching import recover
from hf_mtcompress.steps.training import save_trained
from hf_mtcompress.trainers.masking import KeepTrimmed

logger = logging.getLogger(__name__)

_REPORT = "report.json"
_QUANTIZED = "quantized"
_STRUCTURE = "structure.json"


def trim_vocabulary_step(
    step: TrimVocabularyStep, source: str | None, context: RunContext, folder: Path
) -> StepOutcome:
    """Leave out tokens that no text uses, and say what the rest reads differently."""
    start = start_of(source, context)
    try:
        trimmed, report = trim_vocabulary(
            start.model,
            start.reader.processor,
            texts_to_keep(step, context),
            minimum_count=step.minimum_count,
            size=step.size,
        )
    except DataError as error:
        raise RecipeError(f"steps.{step.name}.{error}") from error
    reader = reader_of(trimmed, start.reader.max_length)
    outcome = save_trained(Start(start.model, reader), context, folder, None)
    roles: list[Role] = ["train", "validation", "test"]
    outcome.vocabulary = {
        **dataclasses.asdict(report),
        "splits": {
            role: dataclasses.asdict(
                compare_readings(start.reader.processor, trimmed, texts_of(context.sources, [role]))
            )
            for role in roles
            if context.sources.role(role)
        },
    }
    return outcome


def trim_weights_step(
    step: TrimWeightsStep, source: str | None, context: RunContext, folder: Path, work: Path
) -> StepOutcome:
    """Set small weights to 0, train the others where the step says so, and store what is left."""
    cut = work / "trimmed"
    if not cut.exists():
        model = start_model(source, context)
        try:
            report = trim_weights(
                model,
                sparsity=step.sparsity,
                threshold=step.threshold,
                pattern=step.pattern,
                scope=step.scope,
                embeddings=step.embeddings,
            )
        except UnsupportedEncoderError as error:
            # What no recipe shows: rows that a pattern does not fill, an encoder without words.
            raise RecipeError(f"steps.{step.name}: {error}") from error
        with whole_folder(cut) as scratch:
            model.save_pretrained(scratch)
            (scratch / _REPORT).write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")
    report = json.loads((cut / _REPORT).read_text(encoding="utf-8"))
    start = Start(reopened(cut, context), context.reader_of_step(source))
    fit = None
    if step.recover is not None:
        keep = [KeepTrimmed(start.model, embeddings=step.embeddings)] if report["zeros_after"] else []
        fit = recover(step.recover, start, context, work, keep)
    outcome = save_trained(start, context, folder, fit)
    dense = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    stored = make_sparse(folder).sparse if step.storage == "sparse" else dense
    matrices = encoder_matrices(start.model, embeddings=step.embeddings)
    zeros = sum(zeros_of(matrix) for matrix in matrices.values())
    outcome.sparsity = {
        **report,
        "zeros_saved": zeros,
        "sparsity_saved": zeros / report["weights"],
        "dense_bytes": dense,
        "stored_bytes": stored,
    }
    return outcome
