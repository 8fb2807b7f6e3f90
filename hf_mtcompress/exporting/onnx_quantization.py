"""ONNX graphs with fewer bits for ONNX Runtime: half precision, 8 bits (dynamic or calibrated) and 4 bits in blocks."""

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from hf_mtcompress.artifacts import ONNX_MODEL
from hf_mtcompress.environment import package_version, require_extra
from hf_mtcompress.errors import ArtifactError, RecipeError
from hf_mtcompress.exporting.graphs import (
    TOLERANCE,
    copy_processor,
    float_settings,
    largest_difference,
    quiet,
    random_feed,
    run_graph,
    stored_bytes,
)
from hf_mtcompress.exporting.onnx import LAYER_MARK
from hf_mtcompress.inference.graph_settings import GraphSettings, write_graph_settings

logger = logging.getLogger(__name__)

HALF_TOLERANCE = 1e-2
"""Largest difference between a graph in half precision and the float one, as a fraction of the largest logit."""
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Weights that may share a scale in 4 bits: what the kernels take."""
_BITS_OF_A_BLOCK = 36
"""A scale in float32 and a zero point of 4 bits."""
_LARGEST_HALF = 65504.0
_OPSET_OF_FOUR_BITS = 21


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
    source_folder: Path,
    folder: Path,
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
      the ranges of activations are fixed beforehand (static). Tables in 8 bits.
    - 4: weights in blocks that share a scale and a zero point (MatMulNBits), tables likewise (GatherBlockQuantized) or
      in 8 bits. Activations are rounded to 8 bits while it runs, block by block.

    In 8 and 4 bits the last layer of each head stays in float, where it costs almost nothing and where a regression
    would feel the rounding most. Operators are fused for ONNX Runtime first, so these run there only, the float graph
    anywhere.

    Args:
        source_folder: what `export_onnx` wrote.
        folder: where to write; made when it is not there.
        bits: 16, 8 or 4.
        block_size: with 4 bits, weights along the input that share a scale: 16, 32, 64, 128 or 256. The last block of
            a width that is no multiple is padded; where that would take more than 8 bits a weight, 8 bits are taken.
        embedding_bits: with 4 bits, 4 or 8 for tables; default: 4.
        float_layers: with 8 and 4 bits, encoder layers whose matrices stay in float, counted from 0.
        calibration: real rows, for static 8 bits.

    Returns:
        `folder`.

    Raises:
        ArtifactError: the source is no float ONNX folder, or the result gives numbers that are not finite.
        RecipeError: a number of bits, a block size or a layer that does not exist.
        MissingExtraError: the extra `onnx` is not installed.
    """
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
                prepared = _load_prepared(source, Path(scratch), sample)
                excluded = [*_last_layers(prepared), *_products_of(prepared, float_layers)]
                if calibration is not None:
                    _quantize_static(prepared, path, excluded, calibration)
                elif bits == 8:
                    _quantize_dynamic(prepared, path, excluded)
                else:
                    _quantize_blocks(prepared, path, excluded, block_size, (embedding_bits or 4) == 4, left)
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
    _write_settings(
        settings,
        folder,
        "float16" if bits == 16 else f"int{bits}",
        {
            **({"block_size": block_size, "embedding_bits": embedding_bits or 4} if bits == 4 else {}),
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


def _write_settings(settings: GraphSettings, folder: Path, precision: str, quantization: dict[str, Any]) -> None:
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
    if block_size not in BLOCK_SIZES:
        problems.append(f"block_size: expected one of {', '.join(map(str, BLOCK_SIZES))}, found {block_size}; take 64")
    if embedding_bits not in (None, 8, 4) or (embedding_bits is not None and bits != 4):
        problems.append(f"embedding_bits: expected 8 or 4, with bits 4 only, found {embedding_bits} with bits {bits}")
    if calibration is not None and bits != 8:
        problems.append(f"calibration: expected bits 8 with it, found {bits}; leave it out")
    if calibration is not None and not calibration.batches:
        problems.append("calibration: expected at least one row, found none; give training rows")
    if float_layers and bits == 16:
        problems.append("float_layers: expected bits 8 or 4 with it, found 16; leave it out")
    if problems:
        raise RecipeError(problems)


# ---- half precision ----


def _store_half(source: Path, target: Path, left: _Left) -> None:
    """Store matrices and tables in half precision, with a Cast behind each.

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


# ---- what 8 and 4 bits share ----


def _load_prepared(source: Path, scratch: Path, sample: Mapping[str, np.ndarray]) -> Any:
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
        model = _split_skip_norms(onnx.load(fused))
        onnx.save(model, fused)
        # Weights inside an Attention operator would stay in float.
        whole = all(node.op_type != "Attention" for node in model.graph.node)
        if whole and largest_difference(run_graph(fused, sample), run_graph(source, sample)) <= TOLERANCE:
            return fused
    except Exception as error:  # a fusion that fails on some encoder costs speed, nothing else
        logging.getLogger(__name__).info("operators are not fused: %s", error)
    return source


def _split_skip_norms(model: Any) -> Any:
    """Replace SkipLayerNormalization by the Add and LayerNormalization it stands for: its CPU kernel is slower."""
    from onnx import helper

    nodes = []
    for index, node in enumerate(model.graph.node):
        if node.op_type != "SkipLayerNormalization" or any(node.output[1:3]):
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


def _last_layers(model: Any) -> list[str]:
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


def _products_of(model: Any, layers: Sequence[int]) -> list[str]:
    """Names of the matrix products of encoder layers.

    A product that the fusion made anew (query, key and value in one) has lost the name of its layer; it belongs to the
    layer of the next product behind it that still has one.
    """
    if not layers:
        return []
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    weights = {item.name for item in model.graph.initializer}
    of_layer: dict[int, list[str]] = {}
    for node in model.graph.node:
        if node.op_type != "MatMul" or not weights.intersection(node.input):
            continue
        number = _layer_of(node, readers)
        if number is not None:
            of_layer.setdefault(number, []).append(node.name)
    missing = [layer for layer in layers if layer not in of_layer]
    if missing:
        known = f"0 to {max(of_layer)}" if of_layer else "none that could be told apart"
        raise RecipeError(f"float_layers: expected encoder layers among {known}, found {missing}; count from 0")
    return [name for layer in layers for name in of_layer[layer]]


def _layer_of(node: Any, readers: Mapping[str, Sequence[Any]]) -> int | None:
    """Number of the encoder layer that a product, or else the next one behind it, is named after."""
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop(0)
        if current.name.startswith(LAYER_MARK):
            return int(current.name.removeprefix(LAYER_MARK).partition("/")[0])
        for name in current.output:
            for reader in readers.get(name, ()):
                if id(reader) not in seen:
                    seen.add(id(reader))
                    waiting.append(reader)
    return None


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


# ---- eight bits ----


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


def _quantize_blocks(
    model: Any, target: Path, excluded: Sequence[str], block_size: int, tables: bool, left: _Left
) -> None:
    """Linear layers (and tables, where `tables`) in 4 bits; what does not fit, and tables otherwise, in 8."""
    import onnx

    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer if item.data_type == 1}
    chosen = set()
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.name not in excluded and len(shape := shapes.get(node.input[1], ())) == 2:
            blocks = math.ceil(shape[0] / block_size)
            if blocks * (4 * block_size + _BITS_OF_A_BLOCK) > 8 * shape[0]:
                reason = f"are in 8 bits, since a width of {shape[0]} in blocks of {block_size} would take more"
                left.add(reason, node.input[1])
                continue
            if shape[0] % block_size:
                left.add(f"are padded from a width of {shape[0]} to {blocks * block_size}", node.input[1])
            chosen.add(node.name)
        elif tables and node.op_type == "Gather" and len(shapes.get(node.input[0], ())) == 2:
            chosen.add(node.name)
    with TemporaryDirectory() as scratch:
        eight = Path(scratch) / "eight.onnx"
        _quantize_dynamic(model, eight, [*excluded, *sorted(chosen)])
        mixed = onnx.load(eight)
    with _no_advice():
        # Importing it sets the level of the whole process's log, which is undone when this block ends.
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    with _no_advice():
        for opset in mixed.opset_import:
            if opset.domain in ("", "ai.onnx"):
                # The first one with numbers of 4 bits; what it changed in operators that were there is more types.
                opset.version = max(opset.version, _OPSET_OF_FOUR_BITS)
        mixed.ir_version = max(mixed.ir_version, 10)
        others = [
            node.name for node in mixed.graph.node if node.op_type in ("MatMul", "Gather") and node.name not in chosen
        ]
        quantizer = MatMulNBitsQuantizer(
            mixed,
            bits=4,
            block_size=block_size,
            is_symmetric=False,
            accuracy_level=4,  # activations in 8 bits: faster than float, and no worse beside weights in 4
            nodes_to_exclude=others,
            op_types_to_quantize=("MatMul", "Gather"),
            quant_axes=(("MatMul", 0), ("Gather", 1)),
        )
        quantizer.process()
    wrapped: Any = quantizer.model
    graph = wrapped.model.graph
    # A weight that several products read has been packed for each of them, under the same name.
    once = {item.name: item for item in graph.initializer}
    kept = list(once.values())
    del graph.initializer[:]
    graph.initializer.extend(kept)
    onnx.save(wrapped.model, target)
