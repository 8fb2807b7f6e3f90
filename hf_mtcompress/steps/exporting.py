"""Export steps."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from hf_mtcompress.artifacts import ONNX_TASKS, TRANSFORMERS_JS
from hf_mtcompress.data.readers import Reader
from hf_mtcompress.evaluation.evaluate import evaluate_folder
from hf_mtcompress.formats.onnx.export import export_onnx, split_onnx
from hf_mtcompress.formats.openvino.export import convert_openvino
from hf_mtcompress.formats.transformers_js import write_transformers_js
from hf_mtcompress.formats.vanilla import write_vanilla
from hf_mtcompress.model.inputs import taken_by
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.recipe import ExportStep
from hf_mtcompress.records import Artefact
from hf_mtcompress.steps.run_context import RunContext, StepOutcome, probe, probe_batch, structure_of


def export_step(step: ExportStep, source: str | None, context: RunContext, folder: Path) -> StepOutcome:
    """The same weights in other forms: plain folders, ONNX graphs, folders for transformers.js."""
    assert source is not None
    model, reader = context.load(source).eval(), context.reader_of_step(source)
    outcome = StepOutcome([], reader, structure_of(model))
    for form in step.formats:
        match form:
            case "vanilla":
                write_vanilla(model, reader.processor, folder / form)
                outcome.artefacts.append(Artefact(form=form, folder=form, precision="float32"))
                outcome.probes[form] = {
                    **probe(model, context, reader),
                    **_probe_merged(model, context, reader),
                }
            case "onnx":
                export_onnx(model, reader.processor, folder / form)
                outcome.artefacts.append(Artefact(form=form, folder=form, precision="float32"))
                outcome.probes[form] = probe(model, context, reader)
                if step.per_task:
                    for name in split_onnx(folder / form, folder / ONNX_TASKS, model):
                        place = f"{ONNX_TASKS}/{name}"
                        outcome.artefacts.append(
                            Artefact(form=form, folder=place, precision=f"float32, task {name} alone")
                        )
                        outcome.probes[place] = {name: outcome.probes[form][name]}
            case "openvino":
                with TemporaryDirectory() as scratch:
                    graph = export_onnx(model, reader.processor, Path(scratch) / "onnx")
                    convert_openvino(graph, folder / form)
                outcome.artefacts.append(Artefact(form=form, folder=form, precision="float32"))
                outcome.probes[form] = probe(model, context, reader)
            case "transformers_js":
                pass  # made from the graph, wherever that stands in the list
    if "transformers_js" in step.formats:
        outcome.quantization = {
            TRANSFORMERS_JS: write_transformers_js(
                model, reader.processor, folder / "onnx", folder / TRANSFORMERS_JS, partial(_validate_graph, context)
            )
        }
    return outcome


def _validate_graph(context: RunContext, task: str, folder: Path) -> dict[str, Any]:
    """The validation score of a graph of one task, which nothing else of the run opens."""
    tasks = context.sources.tasks
    rows = {name: data for name, data in context.sources.role("validation").items() if name == task}
    scores = evaluate_folder(folder, tasks, rows, split="validation").tasks
    return {str(tasks[task].metric): scores[task].metrics[str(tasks[task].metric)]} if task in scores else {}


def _probe_merged(model: MultiTaskModel, context: RunContext, reader: Reader) -> dict[str, np.ndarray]:
    """Logits of tasks with an adapter as their plain models give them, since a sum of weights rounds otherwise."""
    batch = {key: torch.as_tensor(value) for key, value in probe_batch(context, reader).items()}
    found = {}
    for name in model.config.adapters or {}:
        stock = model.to_stock(name).eval()
        with torch.inference_mode():
            found[name] = stock(**taken_by(stock, batch)).logits.float().numpy()
    return found
