"""ONNX graphs: run once, compared, measured."""

import contextlib
import io
import logging
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from hf_mtcompress.data.readers import load_reader
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.formats.graph_settings import GraphSettings, check_graph, read_graph_settings
from hf_mtcompress.records import FORMS

# Imported late: onnx, hf_mtcompress.formats.onnx.session - they are of the extra "onnx", or need it.

TOLERANCE = 1e-4
"""Largest difference between graph and model, as a fraction of the largest logit."""
_FLOOR = 0.1
"""Logits are never taken to be smaller than this: on a scale of almost nothing, rounding is a large fraction."""


def largest_difference(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Largest difference of any output, as a fraction of that output's largest number; infinite for unlike shapes.

    Example:
        >>> largest_difference({"a": np.array([2.0, 4.0])}, {"a": np.array([2.0, 5.0])})
        0.2
    """
    worst = 0.0
    for name, array in expected.items():
        if name not in found or found[name].shape != array.shape:
            return float("inf")
        difference = np.abs(found[name] - array).max(initial=0.0) / max(np.abs(array).max(initial=0.0), _FLOOR)
        worst = max(worst, float(difference) if np.isfinite(difference) else float("inf"))
    return worst


def float_settings(folder: Path) -> GraphSettings:
    """The settings of a whole float32 graph, which others are made from.

    Raises:
        ArtifactError: the folder holds none.
    """
    settings = read_graph_settings(folder)
    check_graph(folder, settings)
    if settings.precision != "float32":
        raise ArtifactError(
            f"expected a float32 graph, found {settings.precision} in {folder}; take the folder it was made from"
        )
    return settings


def copy_processor(source: Path, folder: Path) -> None:
    """Copy what lies beside a graph, tokenizer or image processor, but for its settings."""
    for item in source.iterdir():
        if item.is_file() and item.name not in FORMS["onnx"].files:
            shutil.copy2(item, folder / item.name)


@contextlib.contextmanager
def quiet(output: io.StringIO) -> Iterator[None]:
    """Keep progress marks and warnings of the export machinery off the terminal; errors still rise."""
    level = transformers_logging.get_verbosity()
    torch_logger = logging.getLogger("torch")
    disabled = torch_logger.level
    with contextlib.redirect_stdout(output), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        torch_logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            torch_logger.setLevel(disabled)


def stored_bytes(path: Path) -> dict[str, Any]:
    """Bytes of weights by type, and of the tables that the first input, tokens, is looked up in."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(path)
    size = {item.name: _bytes_of(item) for item in model.graph.initializer}
    stored: Counter[str] = Counter()
    for item in model.graph.initializer:
        stored[TensorProto.DataType.Name(item.data_type).lower()] += size[item.name]
    for node in model.graph.node:
        if node.op_type == "Constant":
            value = helper.get_node_attr_value(node, node.attribute[0].name)
            if isinstance(value, TensorProto):
                stored[TensorProto.DataType.Name(value.data_type).lower()] += _bytes_of(value)
    ids = {model.graph.input[0].name}
    tables = set()
    for node in model.graph.node:
        if node.op_type in ("Cast", "Reshape", "Identity") and node.input[0] in ids:
            ids.update(node.output)
        elif node.op_type == "Gather" and node.input[1] in ids:
            tables.add(node.input[0])
    embedding = sum(size.get(name, 0) for name in tables)
    return {"stored_bytes": dict(stored), "embedding_bytes": embedding or None}


def _bytes_of(tensor: Any) -> int:
    """Bytes that a tensor of a graph takes; two numbers of 4 bits share one."""
    from onnx import TensorProto, helper

    count = prod(tensor.dims)
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (count + 1) // 2
    return count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def random_feed(path: Path) -> dict[str, np.ndarray]:
    """Inputs of fixed seed that fit the graph of a folder, to compare two graphs of the same model."""
    return {name: tensor.numpy() for name, tensor in load_reader(path.parent).example(2).items()}


def run_graph(path: Path, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a graph for one batch, on one thread."""
    from hf_mtcompress.formats.onnx.session import open_session, run_session

    return run_session(open_session(path, 1), feed)
