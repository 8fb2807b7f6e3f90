"""Trim_vocabulary and quantize steps; see `pruning.py` for the other way to a smaller model."""

import dataclasses
import logging
from pathlib import Path

from hf_mtcompress.artifacts import whole_folder
from hf_mtcompress.compression.quantization import quantize_bitsandbytes
from hf_mtcompress.compression.vocabulary import compare_readings, trim_vocabulary
from hf_mtcompress.config import QuantizeStep, Role, TrimVocabularyStep
from hf_mtcompress.errors import DataError, RecipeError
from hf_mtcompress.exporting.onnx import export_onnx, quantize_onnx
from hf_mtcompress.inference.predictor import load_predictor
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.records import Artefact
from hf_mtcompress.steps.bench import Bench, Start, StepOutcome, probe, probe_batch, start_of, structure_of
from hf_mtcompress.steps.rows import texts_of, texts_to_keep
from hf_mtcompress.steps.training import save_trained

logger = logging.getLogger(__name__)


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


def quantize_step(step: QuantizeStep, source: str | None, bench: Bench, folder: Path, work: Path) -> StepOutcome:
    """Store weights in fewer bits: a bitsandbytes folder or an ONNX graph."""
    assert source is not None
    model, processor = bench.load(source).eval(), bench.processor_of(source)
    match step.backend:
        case "bitsandbytes":
            quantized = quantize_bitsandbytes(model, step.bits)
            assert isinstance(quantized, MultiTaskModel)
            probes = {".": probe(quantized, bench, processor)}
            quantized.save_pretrained(folder)
            processor.save_pretrained(folder)
            precision = (
                "int8 linear layers, float32 embeddings" if step.bits == 8 else "nf4 linear layers, float32 embeddings"
            )
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
