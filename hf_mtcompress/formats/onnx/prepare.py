"""The float graph as quantizers want it: operators fused, and what each of its matrices belongs to."""

import io
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_mtcompress.errors import RecipeError
from hf_mtcompress.formats.onnx.export import LAYER_MARK
from hf_mtcompress.formats.onnx.graphs import TOLERANCE, largest_difference, quiet, run_graph

# Imported late: onnx, onnx_ir, onnxruntime, transformers.exporters - they are of the extra "onnx", or need it.

EMBEDDINGS = "embeddings"
OTHER_MATRICES = "other matrices"
_MARK = re.compile(LAYER_MARK + r"(\d+)/(?:(attention|feed_forward)/)?")
_FLOAT = 1  # TensorProto.FLOAT


def load_prepared(source: Path, scratch: Path, sample: Mapping[str, np.ndarray]) -> Any:
    """The fused graph with every linear layer as a MatMul that has a name."""
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    wrapped = ONNXModel(onnx.load(_prepare(source, scratch, sample)))
    wrapped.replace_gemm_with_matmul()
    wrapped.clean_initializers()
    model = wrapped.model
    # Weights are transposed on the way, and shapes noted for them before would then be wrong.
    weights = {item.name for item in model.graph.initializer}
    kept = [info for info in model.graph.value_info if info.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{number}"
    return model


def _prepare(source: Path, scratch: Path, sample: Mapping[str, np.ndarray]) -> Path:
    """The float graph with operators fused for ONNX Runtime, or as it was where a fusion changes an answer."""
    import onnx
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    fused = scratch / "fused.onnx"
    output = io.StringIO()
    try:
        with quiet(output):
            graph = onnx_ir.load(source)
            fuse_for_onnxruntime(graph, "cpu")
            ClearMetadataAndDocStringPass()(graph)
            onnx_ir.save(graph, fused)
        model = join_biases(split_skip_norms(onnx.load(fused)))
        onnx.save(model, fused)
        # Weights inside an Attention operator would stay in float.
        whole = all(node.op_type != "Attention" for node in model.graph.node)
        if whole and largest_difference(run_graph(fused, sample), run_graph(source, sample)) <= TOLERANCE:
            return fused
    except Exception as error:  # a fusion that fails on some encoder costs speed, nothing else
        logging.getLogger(__name__).info("operators are not fused: %s", error)
    return source


def split_skip_norms(model: Any) -> Any:
    """Replace SkipLayerNormalization by the Add and LayerNormalization it stands for: its CPU kernel is slower."""
    from onnx import helper

    nodes = []
    read = {name for node in model.graph.node for name in node.input} | {item.name for item in model.graph.output}
    for index, node in enumerate(model.graph.node):
        # Statistics that a node could give have names, read or not.
        if node.op_type != "SkipLayerNormalization" or read.intersection(node.output[1:3]):
            nodes.append(node)
            continue
        first, second, scale, shift, bias = [*node.input, "", ""][:5]
        if bias:
            nodes.append(helper.make_node("Add", [first, bias], [f"skip_norm_bias_{index}"]))
            first = f"skip_norm_bias_{index}"
        total = node.output[3] if len(node.output) > 3 and node.output[3] else f"skip_norm_sum_{index}"
        nodes.append(helper.make_node("Add", [first, second], [total]))
        epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
        inputs = [total, scale, shift] if shift else [total, scale]
        nodes.append(helper.make_node("LayerNormalization", inputs, [node.output[0]], axis=-1, epsilon=epsilon))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def join_biases(model: Any) -> Any:
    """Add the biases of query, key and value before their common product is split, in one operator instead of three."""
    from onnx import helper, numpy_helper

    graph = model.graph
    before = list(graph.node)
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer if len(item.dims) == 1}
    readers: dict[str, list[Any]] = {item.name: [None] for item in graph.output}
    for node in before:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes: list[Any] = []
    joined: set[str] = set()
    for node in before:
        following = [readers.get(name, []) for name in node.output]
        alone = all(len(found) == 1 and found[0] is not None and found[0].op_type == "Add" for found in following)
        # A bias lies along the last axis.
        last = any(attribute.name == "axis" and attribute.i == -1 for attribute in node.attribute)
        if node.op_type == "Split" and last and alone:
            adds = [found[0] for found in following]
            biases = [constants[name] for add in adds for name in add.input if name in constants]
            sizes = constants.get(node.input[1]) if len(node.input) > 1 else None
            if sizes is not None and [len(bias) for bias in biases] == sizes.tolist():
                whole = numpy_helper.from_array(np.concatenate(biases), f"{node.output[0]}_joined_biases")
                graph.initializer.append(whole)
                total = f"{whole.name}_added"
                nodes.append(helper.make_node("Add", [node.input[0], whole.name], [total], name=total))
                node.input[0] = total
                outputs = [add.output[0] for add in adds]
                joined.update(outputs)
                del node.output[:]
                node.output.extend(outputs)
        nodes.append(node)
    kept = [node for node in nodes if node.op_type != "Add" or node.output[0] not in joined]
    del graph.node[:]
    graph.node.extend(kept)
    return model


def last_layers(model: Any) -> list[str]:
    """Names of the matrix products that the logits come from (also under the name that a split Gemm gets)."""
    maker = {output: node for node in model.graph.node for output in node.output}
    names: list[str] = []
    for result in model.graph.output:
        node = maker.get(result.name)
        while node is not None and node.op_type not in ("MatMul", "Gemm"):
            node = next((maker[name] for name in node.input if name in maker), None)
        if node is not None:
            names += [node.name, f"{node.name}_MatMul"]
    return names


def products_of(model: Any, layers: Sequence[int]) -> list[str]:
    """Names of the matrix products of encoder layers.

    A product that the fusion made anew (query, key and value in one) has lost the name of its layer; it belongs to the
    layer of the next product behind it that still has one.
    """
    of_layer: dict[int, list[str]] = {}
    for name, mark in _marks_of(model).items():
        if mark is not None:
            of_layer.setdefault(mark[0], []).append(name)
    missing = [layer for layer in layers if layer not in of_layer]
    if missing:
        known = f"0 to {max(of_layer)}" if of_layer else "none that could be told apart"
        raise RecipeError(f"float_layers: expected encoder layers among {known}, found {missing}; count from 0")
    return [name for layer in layers for name in of_layer[layer]]


def parts_of(model: Any) -> dict[str, list[str]]:
    """Names of the nodes that read a matrix or a table, by part of the model, without the last layers of the heads.

    Parts are `embeddings`, `layer 0 attention`, `layer 0 feed-forward` and so on, and `other matrices` for those
    outside of the layers (poolers, hidden layers of heads), for layers of branches, and for an encoder with adapters,
    whose runs the graph does not tell apart.
    """
    tables = matrices_of(model)
    parts: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in tables:
            parts.setdefault(EMBEDDINGS, []).append(node.name)
    last = set(last_layers(model))
    marks = {name: mark for name, mark in _marks_of(model).items() if name not in last}
    for name, mark in marks.items():
        if mark is not None:
            parts.setdefault(f"layer {mark[0]} {mark[1]}".rstrip(), []).append(name)
    # In the order of the model: what lies outside of the layers comes last.
    if outside := [name for name, mark in marks.items() if mark is None]:
        parts[OTHER_MATRICES] = outside
    return parts


def matrices_of(model: Any) -> dict[str, int]:
    """Numbers in each stored float matrix."""
    return {
        item.name: item.dims[0] * item.dims[1]
        for item in model.graph.initializer
        if item.data_type == _FLOAT and len(item.dims) == 2
    }


def weight_of(node: Any) -> str:
    """Name of the matrix that a product, or the table that a look-up, reads."""
    return node.input[0] if node.op_type == "Gather" else node.input[1]


def _marks_of(model: Any) -> dict[str, tuple[int, str] | None]:
    """Layer and half of it, if it is in a layer, of every product with a stored matrix, in the order of the graph."""
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    weights = {item.name for item in model.graph.initializer}
    products = {id(node) for node in model.graph.node if node.op_type == "MatMul" and weights.intersection(node.input)}
    return {node.name: _mark_of(node, readers, products) for node in model.graph.node if id(node) in products}


def _mark_of(node: Any, readers: Mapping[str, Sequence[Any]], products: Collection[int]) -> tuple[int, str] | None:
    """Encoder layer, and half of it, that a product, or else the next one behind it, is named after.

    The way there leads through attention alone: behind a norm or another product that has no name, other parts begin.
    """
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop(0)
        if mark := _MARK.match(current.name):
            return int(mark[1]), (mark[2] or "").replace("_", "-")
        if current.op_type.endswith("Normalization") or (current is not node and id(current) in products):
            continue
        for name in current.output:
            for reader in readers.get(name, ()):
                if id(reader) not in seen:
                    seen.add(id(reader))
                    waiting.append(reader)
    return None
