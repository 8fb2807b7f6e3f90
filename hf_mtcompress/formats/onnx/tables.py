"""Look-up tables of a graph in 4 bits, in operators that every runtime has and that cost a call next to no time."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

OPSET = 21
"""The first one in which a scale is of a block."""
_SMALL_TABLE = 8
"""A table with less than this part of the largest one's rows (positions, types of tokens) is left as it is."""


def worth_four_bits(shape: Sequence[int], most_rows: int) -> bool:
    """Whether a table is stored in 4 bits beside others, the largest of which has so many rows.

    A table of a few hundred rows is next to nothing beside a vocabulary, and would cost as many operators. A row of odd
    width does not fill its bytes.
    """
    rows, width = shape
    return rows * _SMALL_TABLE >= most_rows and width % 2 == 0


def large_tables(model: Any, names: Collection[str]) -> tuple[set[str], dict[str, int]]:
    """Those of the look-ups in `names` whose tables are stored in 4 bits, and widths of large tables that are odd."""
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer if item.data_type == 1}
    lookups = {
        node.name: shapes[node.input[0]]
        for node in model.graph.node
        if node.op_type == "Gather" and node.name in names and len(shapes.get(node.input[0], ())) == 2
    }
    most = max((rows for rows, _ in lookups.values()), default=0)
    found, odd = set(), {}
    for node in model.graph.node:
        rows, width = lookups.get(node.name, (0, 0))
        if rows and width % 2 and rows * _SMALL_TABLE >= most:
            odd[node.input[0]] = width
        elif rows and worth_four_bits((rows, width), most):
            found.add(node.name)
    return found, odd


def store_tables(model: Any, names: Collection[str], block_size: int) -> None:
    """Store the tables of the look-ups in `names` in 4 bits, in place.

    A byte holds a number of the first half of a row and one of the second half, so that a row is unpacked by a mask, a
    shift and one concatenation. GatherBlockQuantized does all of it in one operator, of ONNX Runtime alone and slower:
    it works number by number.

    Args:
        model: with float tables; its opset is raised to 21.
        names: of Gather nodes whose tables have an even width, as `large_tables` finds them.
        block_size: numbers of a row that share a scale and a zero point.
    """
    from onnx import TensorProto, helper, numpy_helper  # of the extra "onnx"

    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            # What it changed in operators that were there before is more types.
            opset.version = max(opset.version, OPSET)
    model.ir_version = max(model.ir_version, 10)
    graph = model.graph
    tables = {item.name: item for item in graph.initializer}
    stored: dict[str, list[Any]] = {}
    nodes: list[Any] = []
    for node in graph.node:
        if node.name not in names:
            nodes.append(node)
            continue
        table, rows = node.input
        if table not in stored:
            numbers, scales, zeros = in_four_bits(numpy_helper.to_array(tables[table]), block_size)
            half = numbers.shape[1] // 2
            stored[table] = [
                numpy_helper.from_array(numbers[:, :half] | numbers[:, half:] << 4, f"{table}_packed"),
                numpy_helper.from_array(scales, f"{table}_scales"),
                numpy_helper.from_array(zeros, f"{table}_zeros"),
            ]
        found = [f"{node.name}_{part}" for part in ("packed", "scales", "zeros")]
        for tensor, out in zip(stored[table], found, strict=True):
            nodes.append(helper.make_node("Gather", [tensor.name, rows], [out], name=out, axis=0))
        packed, scales, zeros = found
        low, high, whole = (f"{node.name}_{part}" for part in ("low", "high", "whole"))
        nodes += [
            helper.make_node("BitwiseAnd", [packed, "four_bits_mask"], [low], name=low),
            helper.make_node("BitShift", [packed, "four_bits_shift"], [high], name=high, direction="RIGHT"),
            helper.make_node("Concat", [low, high], [whole], name=whole, axis=-1),
        ]
        if stored[table][1].data_type == TensorProto.FLOAT16:
            scales = f"{node.name}_float_scales"
            nodes.append(helper.make_node("Cast", [found[1]], [scales], name=scales, to=TensorProto.FLOAT))
        nodes.append(
            helper.make_node(
                "DequantizeLinear",
                [whole, scales, zeros],
                [node.output[0]],
                name=node.name,
                axis=-1,
                block_size=block_size,
            )
        )
    mask, shift = np.array(15, np.uint8), np.array(4, np.uint8)
    kept = [item for item in graph.initializer if item.name not in stored]
    kept += [item for parts in stored.values() for item in parts]
    kept += [numpy_helper.from_array(mask, "four_bits_mask"), numpy_helper.from_array(shift, "four_bits_shift")]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


def in_four_bits(
    table: NDArray[np.float32], block_size: int
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8]]:
    """Numbers from 0 to 15 for a table, with scale and zero point of each block: number = (4 bits - zero) * scale.

    Args:
        table: (rows, width).
        block_size: numbers of a row that share both; the last block of a row may be shorter.

    Returns:
        (rows, width); (rows, blocks), in float16 unless its range is too small for them; (rows, blocks).
    """
    rows, width = table.shape
    blocks = math.ceil(width / block_size)
    padded = np.pad(table.astype(np.float32), ((0, 0), (0, blocks * block_size - width)))
    padded = padded.reshape(rows, blocks, block_size)
    # Zero is a number of every block: zeros stay zeros.
    low, high = np.minimum(padded.min(-1), 0), np.maximum(padded.max(-1), 0)
    scales: NDArray[Any] = (high - low) / 15
    scales[scales == 0] = 1.0
    limits = np.finfo(np.float16)
    if limits.tiny <= scales.min() and scales.max() <= limits.max:
        scales = scales.astype(np.float16)
    wide = scales.astype(np.float32)
    zeros = np.clip(np.round(-low / wide), 0, 15)
    numbers = np.clip(np.round(padded / wide[..., None]) + zeros[..., None], 0, 15)
    return numbers.reshape(rows, -1)[:, :width].astype(np.uint8), scales, zeros.astype(np.uint8)
