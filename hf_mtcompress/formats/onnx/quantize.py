"""ONNX graphs with fewer bits for ONNX Runtime: half precision, 8 bits (dynamic or calibrated) and 4 bits in blocks."""

import contextlib
import io
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from hf_mtcompress.environment import package_version, require_extra
from hf_mtcompress.errors import ArtifactError, RecipeError
from hf_mtcompress.formats.graph_settings import GraphSettings, write_graph_settings
from hf_mtcompress.formats.onnx.graphs import (
    copy_processor,
    float_settings,
    largest_difference,
    quiet,
    random_feed,
    run_graph,
    stored_bytes,
)
from hf_mtcompress.formats.onnx.prepare import last_layers, load_prepared, products_of, weight_of
from hf_mtcompress.formats.onnx.tables import large_tables, store_tables
from hf_mtcompress.records.forms import ONNX_MODEL

# Imported late: onnx, onnxruntime - of the extra "onnx".

logger = logging.getLogger(__name__)

HALF_TOLERANCE = 1e-2
"""Largest difference between a graph in half precision and the float one, as a fraction of the largest logit."""
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Weights that may share a scale in 4 bits: what the kernels take."""
_BITS_OF_A_BLOCK = 36
"""A scale in float32 and a zero point of 4 bits."""
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Calibration:
    """How the ranges of activations are found for static 8 bits.

    Attributes:
        batches: model inputs, best one real row each: padding would count among the numbers that are seen.
        method: `percentile` leaves out the rarest numbers, `entropy` chooses the range that changes the distribution
            least (Kullback-Leibler), `minmax` takes all.
        percentile: share of the numbers inside the range, in percent, for `percentile`.
    """

    batches: Sequence[Mapping[str, np.ndarray]]
    method: Literal["percentile", "entropy", "minmax"] = "percentile"
    percentile: float = 99.99


@dataclass
class _Left:
    """Matrices that were not stored as asked for: names by reason."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, []).append(name)


def quantize_onnx(
    source_folder: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    bits: int = 8,
    *,
    block_size: int = 64,
    embedding_bits: int | None = None,
    float_layers: Sequence[int] = (),
    calibration: Calibration | None = None,
) -> Path:
    """Write an ONNX folder again with weights and word embeddings in fewer bits.

    - 16: matrices and tables in half precision. ONNX Runtime turns matrices into float32 when it opens the graph and
      computes in float32, so this halves the file and changes neither time nor, but for rounding, answers. Tables stay
      in half precision in memory too. The graph is plain ONNX, for any runtime.
    - 8: weights per output channel, activations while it runs (dynamic), which needs no calibration; with `calibration`
      the ranges of activations are fixed beforehand (static). Tables in 8 bits, or in 4 where `embedding_bits` says
      so; small ones (positions, types of tokens) stay in 8.
    - 4: weights in blocks that share a scale and a zero point (MatMulNBits), tables likewise or in 8 bits. Activations
      are rounded to 8 bits while it runs, block by block.

    In 8 and 4 bits the last layer of each head stays in float, where it costs almost nothing and where a regression
    would feel the rounding most. Operators are fused for ONNX Runtime first, so these run there only, the float graph
    anywhere.

    Args:
        source_folder: what `export_onnx` wrote.
        folder: where to write; made when it is not there.
        bits: 16, 8 or 4.
        block_size: with 4 bits, weights along the input that share a scale: 16, 32, 64, 128 or 256. The last block of
            a width that is no multiple is padded; where that would take more than 8 bits a weight, 8 bits are taken.
        embedding_bits: 4 or 8 for tables, with 4 and with dynamic 8 bits; default: as many as `bits`.
        float_layers: with 8 and 4 bits, encoder layers whose matrices stay in float, counted from 0.
        calibration: real rows, for static 8 bits.

    Returns:
        `folder`.

    Raises:
        ArtifactError: the source is no float ONNX folder, or the result gives numbers that are not finite.
        RecipeError: a number of bits, a block size or a layer that does not exist.
        MissingExtraError: the extra `onnx` is not installed.
    """
    source_folder, folder = Path(source_folder), Path(folder)
    require_extra("onnx")
    _check_arguments(bits, block_size, embedding_bits, float_layers, calibration)
    settings = float_settings(source_folder)
    folder.mkdir(parents=True, exist_ok=True)
    source, path = source_folder / ONNX_MODEL, folder / ONNX_MODEL
    sample = random_feed(source)
    left = _Left()
    try:
        if bits == 16:
            _store_half(source, path, left)
        else:
            with TemporaryDirectory() as scratch:
                prepared = load_prepared(source, Path(scratch), sample)
                excluded = [*last_layers(prepared), *products_of(prepared, float_layers)]
                if calibration is not None:
                    _quantize_static(prepared, path, excluded, calibration)
                else:
                    few = {"MatMul": bits == 4, "Gather": (embedding_bits or bits) == 4}
                    if any(few.values()):
                        names = [node.name for node in prepared.graph.node if few.get(node.op_type)]
                        _quantize_blocks(prepared, path, excluded, names, block_size, left)
                    else:
                        _quantize_dynamic(prepared, path, excluded)
        found = run_graph(path, sample)
        if not all(np.isfinite(array).all() for array in found.values()):
            raise ArtifactError(
                f"expected finite numbers from the {bits}-bit graph, found others; keep the float32 graph instead"
            )
        if bits == 16 and not (difference := largest_difference(found, run_graph(source, sample))) <= HALF_TOLERANCE:
            raise ArtifactError(
                f"expected the graph in half precision to answer like the float one, found a relative difference of "
                f"{difference:.2g} (at most {HALF_TOLERANCE:g}); keep the float32 graph instead"
            )
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    for reason, names in left.names.items():
        logger.warning("%d of the matrices %s: %s", len(names), reason, ", ".join(names[:4]))
    copy_processor(source_folder, folder)
    write_quantized_settings(
        settings,
        folder,
        "float16" if bits == 16 else f"int{bits}",
        {
            **(
                {"block_size": block_size, "embedding_bits": embedding_bits or bits}
                if 4 in (bits, embedding_bits)
                else {}
            ),
            **({"float_layers": list(float_layers)} if float_layers else {}),
            **(
                {"calibration": {"method": calibration.method, "batches": len(calibration.batches)}}
                if calibration is not None
                else {}
            ),
            **({"exceptions": {reason: len(names) for reason, names in left.names.items()}} if left.names else {}),
        },
    )
    return folder


def write_quantized_settings(
    settings: GraphSettings, folder: Path, precision: str, quantization: dict[str, Any]
) -> None:
    """Write the settings of the float graph for the one in `folder` that was made from it."""
    versions = {**settings.versions, "onnxruntime": package_version("onnxruntime")}
    written = replace(
        settings,
        precision=precision,
        quantization=quantization,
        versions=versions,
        **stored_bytes(folder / ONNX_MODEL),
    )
    write_graph_settings(folder, written)


def _check_arguments(
    bits: int,
    block_size: int,
    embedding_bits: int | None,
    float_layers: Sequence[int],
    calibration: Calibration | None,
) -> None:
    problems = []
    if bits not in (16, 8, 4):
        problems.append(f"bits: expected 16, 8 or 4 for ONNX Runtime, found {bits}; choose one of them")
    problems += block_size_problems(block_size)
    if embedding_bits not in (None, 8, 4) or (embedding_bits is not None and bits not in (8, 4)):
        problems.append(f"embedding_bits: expected 8 or 4, with bits 8 or 4, found {embedding_bits} with bits {bits}")
    if embedding_bits is not None and calibration is not None:
        problems.append(
            f"embedding_bits: expected it without calibration, found {embedding_bits} beside it; remove one"
        )
    if calibration is not None and bits != 8:
        problems.append(f"calibration: expected bits 8 with it, found {bits}; leave it out")
    if calibration is not None and not calibration.batches:
        problems.append("calibration: expected at least one row, found none; give training rows")
    if float_layers and bits == 16:
        problems.append("float_layers: expected bits 8 or 4 with it, found 16; leave it out")
    if problems:
        raise RecipeError(problems)


# ---- half precision ----


def _store_half(source: Path, target: Path, left: _Left, wanted: Collection[str] | None = None) -> None:
    """Store matrices and tables, or those of them in `wanted`, in half precision, with a Cast behind each.

    Vectors (biases, norms) stay: they are next to nothing. Converting the operators as well, as
    `onnxruntime.transformers.float16` does, gains nothing on a processor: ONNX Runtime has no kernels for most of them
    there and puts a Cast to float32 around each.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source)
    graph = model.graph
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    first: list[Any] = []
    behind: dict[str, Any] = {}
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        if wanted is not None and tensor.name not in wanted:
            continue
        name, array = tensor.name, numpy_helper.to_array(tensor)
        if np.abs(array).max(initial=0.0) > _LARGEST_HALF:
            left.add("stay in float32, since they hold numbers too large for half precision", name)
            continue
        half = f"{name}_half"
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), half))
        reading = users.get(name, [])
        if reading and all(node.op_type == "Gather" and node.input[0] == name for node in reading):
            # Behind the look-up few rows are cast, and the table stays small in memory.
            for node in reading:
                node.input[0], out = half, node.output[0]
                node.output[0] = f"{out}_half"
                behind[node.output[0]] = helper.make_node("Cast", [node.output[0]], [out], to=TensorProto.FLOAT)
        else:
            first.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
    nodes = list(first)
    for node in graph.node:
        nodes.append(node)
        nodes += [behind[name] for name in node.output if name in behind]
    del graph.node[:]
    graph.node.extend(nodes)
    stale = {tensor.name for tensor in graph.initializer} | set(behind)
    kept = [info for info in graph.value_info if info.name not in stale]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    onnx.save(model, target)


# ---- a number of bits for each part ----


def write_parts(
    model: Any, target: Path, parts: Mapping[str, Sequence[str]], bits: Mapping[str, int], block_size: int = 64
) -> dict[str, int]:
    """Write a prepared graph with the matrices of each part in bits of its own.

    Args:
        model: what `load_prepared` gave; it is changed.
        target: where to write.
        parts: names of nodes by part, as `parts_of` finds them; matrices in no part stay in float32.
        bits: 32, 16, 8 or 4 for parts by name; 32 for those that are not named.
        block_size: of 4 bits.

    Returns:
        How many matrices were not stored as asked for, by reason.
    """
    left = _Left()
    of_node = {name: bits.get(part, 32) for part, names in parts.items() for name in names}
    matrices = [node for node in model.graph.node if node.op_type in ("MatMul", "Gather")]
    excluded = [node.name for node in matrices if of_node.get(node.name, 32) > 8]
    halves = {weight_of(node) for node in matrices if of_node.get(node.name) == 16}
    if four := {name for name, number in of_node.items() if number == 4}:
        _quantize_blocks(model, target, excluded, four, block_size, left)
    else:
        _quantize_dynamic(model, target, excluded)
    if halves:
        _store_half(target, target, left, halves)
    return {reason: len(names) for reason, names in left.names.items()}


# ---- eight bits ----


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """Keep the quantizer's own words off log and terminal.

    It advises a pre-processing that fails on these graphs and changes nothing, prints what it counts, and sets up the
    logging of the whole process when it is imported.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    root.setLevel(logging.ERROR)
    try:
        with quiet(io.StringIO()):
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _quantize_dynamic(model: Any, target: Path, excluded: Sequence[str]) -> None:
    with _no_advice():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            model,
            target,
            # Convolutions are left out: the integer kernel takes unsigned weights only, and is slow.
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(excluded),
        )


def _quantize_static(model: Any, target: Path, excluded: Sequence[str], calibration: Calibration) -> None:
    """Fix the ranges of the activations that enter linear layers; products of two activations stay in float.

    `transformers.exporters` has this too, but hands all rows over at once, which histograms of texts of unequal length
    refuse and long texts have no memory for.
    """
    with _no_advice():
        from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

        method = {
            "percentile": CalibrationMethod.Percentile,
            "entropy": CalibrationMethod.Entropy,
            "minmax": CalibrationMethod.MinMax,
        }[calibration.method]
        # Tables first: their quantizer for static graphs knows one scale for activations and table together.
        with TemporaryDirectory() as scratch:
            tables = Path(scratch) / "tables.onnx"
            products = [node.name for node in model.graph.node if node.op_type == "MatMul"]
            _quantize_dynamic(model, tables, products)
            rows: Any = _Rows(calibration.batches)  # known to the calibrator by its methods
            quantize_static(
                tables,
                target,
                rows,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(excluded),
                calibrate_method=method,
                extra_options={
                    "MatMulConstBOnly": True,
                    "CalibStridedMinMax": 1,
                    **({"CalibPercentile": calibration.percentile} if calibration.method == "percentile" else {}),
                },
            )


class _Rows:
    """What the calibrator reads rows through, one batch at a time."""

    def __init__(self, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        self.batches = batches
        self.waiting: list[Mapping[str, np.ndarray]] = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.waiting = list(self.batches[start_index:end_index])

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        return self.waiting.pop(0) if self.waiting else None


# ---- four bits ----


def block_size_problems(block_size: int) -> list[str]:
    """What is wrong with a number of weights in a block, if anything."""
    if block_size in BLOCK_SIZES:
        return []
    return [f"block_size: expected one of {', '.join(map(str, BLOCK_SIZES))}, found {block_size}; take 64"]


def fits_blocks(width: int, block_size: int) -> bool:
    """Whether a matrix of so many inputs is smaller in 4 bits, in blocks, than in 8."""
    return math.ceil(width / block_size) * (4 * block_size + _BITS_OF_A_BLOCK) <= 8 * width


def _quantize_blocks(
    model: Any, target: Path, excluded: Sequence[str], wanted: Collection[str], block_size: int, left: _Left
) -> None:
    """Products and look-ups named in `wanted` in 4 bits; the others, and those that do not fit, in 8."""
    import onnx

    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer if item.data_type == 1}
    chosen = set()
    for node in model.graph.node:
        if node.name not in wanted or node.name in excluded:
            continue
        if node.op_type == "MatMul" and len(shape := shapes.get(node.input[1], ())) == 2:
            blocks = math.ceil(shape[0] / block_size)
            if not fits_blocks(shape[0], block_size):
                reason = f"are in 8 bits, since a width of {shape[0]} in blocks of {block_size} would take more"
                left.add(reason, node.input[1])
                continue
            if shape[0] % block_size:
                left.add(f"are padded from a width of {shape[0]} to {blocks * block_size}", node.input[1])
            chosen.add(node.name)
    tables, odd = large_tables(model, set(wanted).difference(excluded))
    for table, width in odd.items():
        left.add(f"are in 8 bits, since a row of {width} numbers does not fill its bytes in 4", table)
    with TemporaryDirectory() as scratch:
        eight = Path(scratch) / "eight.onnx"
        _quantize_dynamic(model, eight, [*excluded, *sorted(chosen | tables)])
        mixed = onnx.load(eight)
    if tables:
        store_tables(mixed, tables, block_size)
    onnx.save(_products_in_blocks(mixed, chosen, block_size) if chosen else mixed, target)


def _products_in_blocks(model: Any, chosen: Collection[str], block_size: int) -> Any:
    with _no_advice():
        # Importing it sets the level of the whole process's log, which is undone when this block ends.
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    with _no_advice():
        others = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in chosen]
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=4,
            block_size=block_size,
            is_symmetric=False,
            accuracy_level=4,  # activations in 8 bits: faster than float, and no worse beside weights in 4
            nodes_to_exclude=others,
            op_types_to_quantize=("MatMul",),
            quant_axes=(("MatMul", 0),),
        )
        quantizer.process()
    wrapped: Any = quantizer.model
    graph = wrapped.model.graph
    # A weight that several products read has been packed for each of them, under the same name.
    once = {item.name: item for item in graph.initializer}
    kept = list(once.values())
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return wrapped.model
