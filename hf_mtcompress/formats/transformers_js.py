"""Folders that transformers.js opens: one for each task, with the same graph in three precisions."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_mtcompress.artifacts import save_processor
from hf_mtcompress.environment import require_extra
from hf_mtcompress.errors import TaskError
from hf_mtcompress.formats.onnx.export import split_onnx
from hf_mtcompress.formats.onnx.quantize import quantize_onnx
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.records.forms import ONNX_MODEL
from hf_mtcompress.tasks import Task

logger = logging.getLogger(__name__)

GRAPH_NAMES = {32: "model.onnx", 8: "model_quantized.onnx", 4: "model_q4.onnx"}
"""By bits of a weight: the names that transformers.js asks for with `dtype` `fp32`, `q8` and `q4`."""


_SEVERAL_LABELS = ("text-classification",)
"""Pipelines of transformers.js that look whether a model has several labels."""


def write_transformers_js(
    model: MultiTaskModel,
    processor: Any,
    graphs: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    measure: Callable[[str, Path], dict[str, Any]] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Write `folder/TASK` for each task: configuration, tokenizer or image processor, and `onnx/` with three graphs.

    Tasks that transformers.js would answer wrongly (`wrong_there`) are left out, and said.

    Args:
        model: what the graphs were made from; its heads have to be stock ones.
        processor: tokenizer or image processor.
        graphs: what `export_onnx` wrote: the graph of all tasks in float32.
        folder: where to write.
        measure: given a task and an ONNX folder of this task alone, returns what is to be said of it.

    Returns:
        By task and file below its folder: `bytes`, and what `measure` found.

    Raises:
        TaskError: a head is not the stock one, or no task is left.
        ArtifactError: `graphs` is no ONNX folder.
        MissingExtraError: the extra `onnx` is not installed.
    """
    folder = Path(folder)
    require_extra("onnx")
    reasons = {name: reason for name, task in model.tasks.items() if (reason := wrong_there(task))}
    for name, reason in reasons.items():
        logger.warning("%s: no folder for transformers.js, %s; use the ONNX folder or the page", name, reason)
    if len(reasons) == len(model.tasks):
        raise TaskError(
            f"expected a task that transformers.js answers, found {', '.join(reasons)}, "
            f"{next(iter(reasons.values()))}; leave transformers_js out"
        )
    written: dict[str, dict[str, dict[str, Any]]] = {}
    with TemporaryDirectory() as scratch:
        for name, whole in split_onnx(graphs, Path(scratch) / "32", model).items():
            if name in reasons:
                continue
            own = folder / name
            (own / "onnx").mkdir(parents=True)
            model.to_stock(name).config.save_pretrained(own)
            save_processor(processor, own)
            written[name] = {}
            for bits, file in GRAPH_NAMES.items():
                graph = whole if bits == 32 else quantize_onnx(whole, Path(scratch) / str(bits) / name, bits)
                target = own / "onnx" / file
                _rename_output(graph / ONNX_MODEL, target, model.tasks[name].logits_name)
                found = measure(name, graph) if measure is not None else {}
                written[name][f"onnx/{file}"] = {"bytes": target.stat().st_size, **found}
    return written


def wrong_there(task: Task) -> str | None:
    """Why a pipeline of transformers.js (4.3) would answer a task wrongly; None where it is right.

    It takes the softmax of whatever a model answers, but for texts with several labels.
    """
    if task.problem == "regression":
        return "whose pipelines answer with 1 whatever number a model finds"
    if task.problem == "multi_label_classification" and task.pipeline not in _SEVERAL_LABELS:
        return f"whose pipeline '{task.pipeline}' knows one label only"
    return None


def _rename_output(source: Path, target: Path, name: str) -> None:
    """Save a graph with its output called `logits`, as stock models call it."""
    import onnx  # of the extra "onnx"

    model = onnx.load(source)
    for node in model.graph.node:
        node.input[:] = ["logits" if value == name else value for value in node.input]
        node.output[:] = ["logits" if value == name else value for value in node.output]
    (output,) = model.graph.output
    output.name = "logits"
    onnx.save(model, target)
