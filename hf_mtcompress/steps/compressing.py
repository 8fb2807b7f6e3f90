"""Trim_vocabulary, trim_weights and quantize steps; see `pruning.py` for the other way to a smaller model."""

import dataclasses
import json
import logging
from pathlib import Path

from hf_mtcompress.artifacts import whole_folder
from hf_mtcompress.compression.quantization import quantize_bitsandbytes
from hf_mtcompress.compression.sparsity import trim_weights, zeros_of
from hf_mtcompress.compression.vocabulary import compare_readings, trim_vocabulary
from hf_mtcompress.config import QuantizeStep, Role, TrimVocabularyStep, TrimWeightsStep
from hf_mtcompress.errors import DataError, RecipeError, UnsupportedEncoderError
from hf_mtcompress.exporting.onnx import export_onnx, quantize_onnx
from hf_mtcompress.inference.predictor import load_predictor
from hf_mtcompress.model.matrices import encoder_matrices
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.sparse import make_sparse
from hf_mtcompress.records import Artefact
from hf_mtcompress.steps.bench import (
    Bench,
    Start,
    StepOutcome,
    probe,
    probe_batch,
    reopened,
    start_model,
    start_of,
    structure_of,
)
from hf_mtcompress.steps.rows import texts_of, texts_to_keep
from hf_mtcompress.steps.teaching import recover
from hf_mtcompress.steps.training import save_trained
from hf_mtcompress.trainers.masking import KeepTrimmed

logger = logging.getLogger(__name__)

_REPORT = "report.json"


def trim_vocabulary_step(step: TrimVocabularyStep, source: str | None, bench: Bench, folder: Path) -> StepOutcome:
    """Leave out tokens that no text uses, and say what the rest reads differently."""
    start = start_of(source, bench)
    try:
        trimmed, report = trim_vocabulary(
            start.model,
            start.processor,
            texts_to_keep(step, bench),
            minimum_count=step.minimum_count,
            size=step.size,
        )
    except DataError as error:
        raise RecipeError(f"steps.{step.name}.{error}") from error
    outcome = save_trained(Start(start.model, trimmed), bench, folder, None)
    roles: list[Role] = ["train", "validation", "test"]
    outcome.vocabulary = {
        **dataclasses.asdict(report),
        "splits": {
            role: dataclasses.asdict(compare_readings(start.processor, trimmed, texts_of(bench.sources, [role])))
            for role in roles
            if bench.sources.role(role)
        },
    }
    return outcome


def trim_weights_step(step: TrimWeightsStep, source: str | None, bench: Bench, folder: Path, work: Path) -> StepOutcome:
    """Set small weights to 0, train the others where the step says so, and store what is left."""
    cut = work / "trimmed"
    if not cut.exists():
        model = start_model(source, bench)
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
    start = Start(reopened(cut, bench), bench.processor_of(source))
    fit = None
    if step.recover is not None:
        keep = [KeepTrimmed(start.model, embeddings=step.embeddings)] if report["zeros_after"] else []
        fit = recover(step.recover, start, bench, work, keep)
    outcome = save_trained(start, bench, folder, fit)
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


def quantize_step(step: QuantizeStep, source: str | None, bench: Bench, folder: Path, work: Path) -> StepOutcome:
    """Store weights in fewer bits: a bitsandbytes folder or an ONNX graph."""
    assert source is not None
    model, processor = bench.load(source).eval(), bench.processor_of(source)
    match step.backend:
        case "bitsandbytes":
            quantized = quantize_bitsandbytes(
                model,
                step.bits,
                quant_type=step.quant_type,
                double_quantization=step.double_quantization,
                embeddings=step.embeddings,
            )
            assert isinstance(quantized, MultiTaskModel)
            probes = {".": probe(quantized, bench, processor)}
            quantized.save_pretrained(folder)
            processor.save_pretrained(folder)
            linear, table = ("int8", "int8") if step.bits == 8 else (step.quant_type, "nf4")
            precision = f"{linear} linear layers, {table if step.embeddings else 'float32'} embeddings"
            artefact = Artefact(form="bitsandbytes", folder=".", precision=precision)
            return StepOutcome([artefact], processor, structure_of(model), probes=probes)
        case "onnxruntime":
            with whole_folder(work / "float32") as scratch:
                export_onnx(model, processor, scratch)
            quantize_onnx(work / "float32", folder, bits=step.bits)
            artefact = Artefact(form="onnx", folder=".", precision=f"int{step.bits}, dynamic, per channel")
            # There is no model in memory with these weights: the graph is held against itself in another process.
            answers = load_predictor(folder).logits(probe_batch(bench, processor))
            return StepOutcome([artefact], processor, structure_of(model), probes={".": answers})
