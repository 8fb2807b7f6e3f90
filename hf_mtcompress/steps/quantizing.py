"""Quantize steps: a folder for bitsandbytes or torchao, or a graph for ONNX Runtime or OpenVINO."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_mtcompress.artifacts import GRAPHS, STEP_RECORD, WORK, whole_folder, write_text
from hf_mtcompress.compression.quantization import quantize_bitsandbytes, quantize_torchao
from hf_mtcompress.data.readers import Reader
from hf_mtcompress.errors import ArtifactError, RecipeError
from hf_mtcompress.formats.folders import folder_form
from hf_mtcompress.formats.graph_settings import check_graph, read_graph_settings
from hf_mtcompress.formats.onnx.export import export_onnx
from hf_mtcompress.formats.onnx.quantize import Calibration, quantize_onnx
from hf_mtcompress.formats.openvino.export import convert_openvino
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.publishing.sensitivity import bits_name
from hf_mtcompress.recipe import CalibrationConfig, QuantizeStep
from hf_mtcompress.records import Artefact
from hf_mtcompress.steps.mixed_bits import mix_bits
from hf_mtcompress.steps.rows import calibration_rows
from hf_mtcompress.steps.run_context import RunContext, Start, StepOutcome, probe, probe_batch, structure_of
from hf_mtcompress.steps.scoring import read_step, result_digest
from hf_mtcompress.steps.teaching import recover
from hf_mtcompress.steps.training import Fit
from hf_mtcompress.trainers.rounding import RoundToBits

logger = logging.getLogger(__name__)

_FLOAT = "float"
_QUANTIZED = "quantized"
_STRUCTURE = "structure.json"


def quantize_step(step: QuantizeStep, source: str | None, context: RunContext, folder: Path, work: Path) -> StepOutcome:
    """Store weights in fewer bits: a folder that stays in torch, or a graph."""
    assert source is not None
    match step.backend:
        case "bitsandbytes" | "torchao":
            return _quantize_in_torch(step, source, context, folder)
        case "onnxruntime" | "openvino":
            return _quantize_graph(step, source, context, folder, work)


def _quantize_in_torch(step: QuantizeStep, source: str, context: RunContext, folder: Path) -> StepOutcome:
    model, reader = context.load(source).eval(), context.reader_of_step(source)
    if step.backend == "torchao":
        quantized: Any = quantize_torchao(model)
        precision = "int8 linear layers, dynamic, per token, float32 embeddings"
        quantization: dict[str, Any] = {"backend": step.backend, "bits": step.bits}
    else:
        assert step.bits in (8, 4)
        quantized = quantize_bitsandbytes(
            model,
            step.bits,
            quant_type=step.quant_type,
            double_quantization=step.double_quantization,
            embeddings=step.embeddings,
        )
        linear, table = ("int8", "int8") if step.bits == 8 else (step.quant_type, "nf4")
        precision = f"{linear} linear layers, {table if step.embeddings else 'float32'} embeddings"
        quantization = {
            "backend": step.backend,
            "bits": step.bits,
            **({"quant_type": step.quant_type} if step.bits == 4 else {}),
            "double_quantization": step.double_quantization,
            "embeddings": step.embeddings,
        }
    assert isinstance(quantized, MultiTaskModel)
    probes = {".": probe(quantized, context, reader)}
    quantized.save_pretrained(folder)
    reader.save(folder)
    assert step.backend in ("bitsandbytes", "torchao")
    artefact = Artefact(form=step.backend, folder=".", precision=precision)
    return StepOutcome([artefact], reader, structure_of(model), probes=probes, quantization=quantization)


def _quantize_graph(step: QuantizeStep, source: str, context: RunContext, folder: Path, work: Path) -> StepOutcome:
    reader = context.reader_of_step(source)
    structure = work / _STRUCTURE
    if not structure.exists():
        # What is done stays in the work folder until the step is: its gate may send it back.
        quantization: dict[str, Any] = {}
        model = context.load(source)
        fit: Fit | None = None
        if step.recover is None:
            start = float_graph(source, context, model.eval(), reader)
        else:
            assert step.bits in (8, 4)
            rounding = RoundToBits(
                step.bits,
                block_size=step.block_size,
                embedding_bits=step.embedding_bits,
                float_layers=step.float_layers,
            )
            fit = recover(step.recover, Start(model, reader), context, work, [rounding])
            torch.nn.Module.to(model, "cpu")
            start = export_onnx(model.eval(), reader.processor, work / _FLOAT)
        with whole_folder(work / _QUANTIZED) as scratch:
            try:
                if step.bits == "mixed":
                    quantization = mix_bits(step, start, scratch, Start(model, reader), source, context, work)
                else:
                    _few_bits(step, start, scratch, Start(model, reader), context)
            except RecipeError as error:
                raise RecipeError([f"steps.{step.name}.{problem}" for problem in error.problems]) from error
        training = dataclasses.asdict(fit) if fit is not None else {}
        write_text(structure, json.dumps([structure_of(model), quantization, training], default=str))
    shutil.copytree(work / _QUANTIZED, folder, dirs_exist_ok=True)
    shape, chosen, training = json.loads(structure.read_text(encoding="utf-8"))
    form = folder_form(folder)
    settings = read_graph_settings(folder, form)
    artefact = Artefact(form=form, folder=".", precision=_graph_precision(step, settings.quantization))
    # There is no model in memory with these weights: the graph is held against itself in another process.
    answers = load_predictor(folder).logits(probe_batch(context, reader))
    return StepOutcome(
        [artefact],
        reader,
        shape,
        **training,
        probes={".": answers},
        quantization={
            "backend": step.backend,
            "bits": step.bits,
            **settings.quantization,
            **chosen,
            "stored_bytes": settings.stored_bytes,
        },
    )


def _few_bits(step: QuantizeStep, graph: Path, folder: Path, start: Start, context: RunContext) -> None:
    """Write the float graph again in the bits of a step."""
    assert step.bits != "mixed"
    if step.backend == "openvino":
        rows = (step.calibration or CalibrationConfig()).rows
        convert_openvino(graph, folder, step.bits, rows=calibration_rows(start, context, rows))
        return
    quantize_onnx(
        graph,
        folder,
        bits=step.bits,
        block_size=step.block_size,
        embedding_bits=step.embedding_bits,
        float_layers=step.float_layers,
        calibration=_calibration_of(step, start, context),
    )


def float_graph(source: str, context: RunContext, model: MultiTaskModel, reader: Reader) -> Path:
    """The float graph of a step's model, exported once for all steps that quantize it.

    It lies among the half-done things of the run and goes with them when the run is done.
    """
    record = read_step(context.step_folder(source) / STEP_RECORD)
    assert record is not None
    graphs = context.output / WORK / GRAPHS
    graphs.mkdir(parents=True, exist_ok=True)
    folder = graphs / f"{source}-{result_digest(record)[:8]}"
    try:
        check_graph(folder, read_graph_settings(folder))
    except ArtifactError:  # none yet, or one that was damaged since
        with whole_folder(folder) as scratch:
            export_onnx(model, reader.processor, scratch)
    return folder


def _calibration_of(step: QuantizeStep, start: Start, context: RunContext) -> Calibration | None:
    if step.calibration is None:
        return None
    rows = calibration_rows(start, context, step.calibration.rows)
    return Calibration(rows, step.calibration.method, step.calibration.percentile)


def _graph_precision(step: QuantizeStep, quantization: Mapping[str, Any]) -> str:
    """Kind of numbers first, then how."""
    kinds = sorted(set(quantization.get("parts", {}).values()))
    kept = f", layers {', '.join(map(str, step.float_layers))} in float" if step.float_layers else ""
    kept += ", trained with it" if step.recover is not None else ""
    match step.bits:
        case 16:
            return "float16 weights, computed in float32"
        case 8 if step.backend == "openvino":
            return f"int8, static, NNCF on {(step.calibration or CalibrationConfig()).rows} rows"
        case 8 if step.calibration is not None:
            return f"int8, static, {step.calibration.method} of {step.calibration.rows} rows{kept}"
        case 8:
            tables = f", embeddings in int4, blocks of {step.block_size}" if step.embedding_bits == 4 else ""
            return f"int8, dynamic, per channel{tables}{kept}"
        case "mixed":
            return "mixed, " + " and ".join(map(bits_name, kinds))
        case 4:
            return f"int4, blocks of {step.block_size}, embeddings in int{step.embedding_bits or 4}{kept}"
