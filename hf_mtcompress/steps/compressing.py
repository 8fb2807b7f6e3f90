"""Trim_vocabulary, trim_weights and quantize steps; see `pruning.py` for the other way to a smaller model."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from hf_mtcompress.artifacts import GRAPHS, STEP_RECORD, WORK, whole_folder, write_text
from hf_mtcompress.compression.quantization import quantize_bitsandbytes
from hf_mtcompress.compression.sparsity import trim_weights, zeros_of
from hf_mtcompress.compression.vocabulary import compare_readings, trim_vocabulary
from hf_mtcompress.config import CalibrationConfig, QuantizeStep, Role, TrimVocabularyStep, TrimWeightsStep
from hf_mtcompress.errors import DataError, RecipeError, UnsupportedEncoderError
from hf_mtcompress.exporting.onnx import export_onnx
from hf_mtcompress.exporting.onnx_quantization import Calibration, quantize_onnx
from hf_mtcompress.exporting.openvino import convert_openvino
from hf_mtcompress.inference.graph_settings import GraphForm, read_graph_settings
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
from hf_mtcompress.steps.rows import calibration_rows, texts_of, texts_to_keep
from hf_mtcompress.steps.teaching import recover
from hf_mtcompress.steps.training import save_trained
from hf_mtcompress.trainers.masking import KeepTrimmed

logger = logging.getLogger(__name__)

_REPORT = "report.json"
_QUANTIZED = "quantized"
_STRUCTURE = "structure.json"


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
    match step.backend:
        case "bitsandbytes":
            assert step.bits != 16
            model, processor = bench.load(source).eval(), bench.processor_of(source)
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
            quantization = {
                "backend": step.backend,
                "bits": step.bits,
                **({"quant_type": step.quant_type} if step.bits == 4 else {}),
                "double_quantization": step.double_quantization,
                "embeddings": step.embeddings,
            }
            return StepOutcome([artefact], processor, structure_of(model), probes=probes, quantization=quantization)
        case "onnxruntime" | "openvino":
            return _quantize_graph(step, source, bench, folder, work)


def _quantize_graph(step: QuantizeStep, source: str, bench: Bench, folder: Path, work: Path) -> StepOutcome:
    processor = bench.processor_of(source)
    structure = work / _STRUCTURE
    if not structure.exists():
        # What is done stays in the work folder until the step is: its gate may send it back.
        model = bench.load(source).eval()
        start = float_graph(source, bench, model, processor)
        with whole_folder(work / _QUANTIZED) as scratch:
            try:
                _few_bits(step, start, scratch, Start(model, processor), bench)
            except RecipeError as error:
                raise RecipeError([f"steps.{step.name}.{problem}" for problem in error.problems]) from error
        write_text(structure, json.dumps(structure_of(model)))
    shutil.copytree(work / _QUANTIZED, folder, dirs_exist_ok=True)
    form: GraphForm = "onnx" if step.backend == "onnxruntime" else "openvino"
    settings = read_graph_settings(folder, form)
    artefact = Artefact(form=form, folder=".", precision=_graph_precision(step))
    # There is no model in memory with these weights: the graph is held against itself in another process.
    answers = load_predictor(folder).logits(probe_batch(bench, processor))
    return StepOutcome(
        [artefact],
        processor,
        json.loads(structure.read_text(encoding="utf-8")),
        probes={".": answers},
        quantization={
            "backend": step.backend,
            "bits": step.bits,
            **settings.quantization,
            "stored_bytes": settings.stored_bytes,
        },
    )


def _few_bits(step: QuantizeStep, graph: Path, folder: Path, start: Start, bench: Bench) -> None:
    """Write the float graph again in the bits of a step."""
    if step.backend == "openvino":
        rows = (step.calibration or CalibrationConfig()).rows
        convert_openvino(graph, folder, step.bits, rows=calibration_rows(start, bench, rows))
        return
    quantize_onnx(
        graph,
        folder,
        bits=step.bits,
        block_size=step.block_size,
        embedding_bits=step.embedding_bits,
        float_layers=step.float_layers,
        calibration=_calibration_of(step, start, bench),
    )


def float_graph(source: str, bench: Bench, model: MultiTaskModel, processor: Any) -> Path:
    """The float graph of a step's model, exported once for all steps that quantize it.

    It lies among the half-done things of the run and goes with them when the run is done.
    """
    record = json.loads((bench.step_folder(source) / STEP_RECORD).read_text(encoding="utf-8"))
    graphs = bench.output / WORK / GRAPHS
    graphs.mkdir(parents=True, exist_ok=True)
    folder = graphs / f"{source}-{record['fingerprint'][:8]}"
    if not folder.exists():
        with whole_folder(folder) as scratch:
            export_onnx(model, processor, scratch)
    return folder


def _calibration_of(step: QuantizeStep, start: Start, bench: Bench) -> Calibration | None:
    if step.calibration is None:
        return None
    rows = calibration_rows(start, bench, step.calibration.rows)
    return Calibration(rows, step.calibration.method, step.calibration.percentile)


def _graph_precision(step: QuantizeStep) -> str:
    """Kind of numbers first, then how."""
    kept = f", layers {', '.join(map(str, step.float_layers))} in float" if step.float_layers else ""
    match step.bits:
        case 16:
            return "float16 weights, computed in float32"
        case 8 if step.backend == "openvino":
            return f"int8, static, NNCF on {(step.calibration or CalibrationConfig()).rows} rows"
        case 8 if step.calibration is not None:
            return f"int8, static, {step.calibration.method} of {step.calibration.rows} rows{kept}"
        case 8:
            return f"int8, dynamic, per channel{kept}"
        case 4:
            return f"int4, blocks of {step.block_size}, embeddings in int{step.embedding_bits or 4}{kept}"
