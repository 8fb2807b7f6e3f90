"""ONNX: one graph with all heads in float32, and the same in 8 bits for ONNX Runtime."""

import contextlib
import copy
import io
import logging
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_mtcompress.artifacts import ONNX_MODEL, ONNX_SETTINGS
from hf_mtcompress.environment import package_version, require_extra
from hf_mtcompress.errors import ArtifactError, RecipeError, UnsupportedEncoderError
from hf_mtcompress.evaluation.benchmark import count_parameters
from hf_mtcompress.inference.onnx_settings import OnnxSettings, read_onnx_settings, write_onnx_settings
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.modeling import MultiTaskModel

TOLERANCE = 1e-4
"""Largest difference between graph and model, as a fraction of the largest logit."""
_FLOOR = 0.1
"""Logits are never taken to be smaller than this: on a scale of almost nothing, rounding is a large fraction."""


def export_onnx(model: MultiTaskModel, processor: Any, folder: Path) -> Path:
    """Write the graph of all heads with tokenizer or image processor and settings, and check it against the model.

    The graph takes any batch size and, for texts, any length; it has one output `logits_<task>` for each task and its
    weights inside (weights in a file of their own do not load in a browser).

    Args:
        model: a model in float precision, on any device; it is copied, never changed.
        processor: tokenizer or image processor, saved beside the graph.
        folder: where to write; made when it is not there.

    Returns:
        `folder`.

    Raises:
        ArtifactError: the graph's answers differ from the model's.
        UnsupportedEncoderError: the encoder cannot be traced, or the model is quantized.
        MissingExtraError: the extra `onnx` is not installed.
    """
    require_extra("onnx")
    import onnx_ir

    if getattr(model, "is_quantized", False):
        raise UnsupportedEncoderError(
            "expected a float model to export, found a quantized one; export the step it was made from"
        )
    source = copy.deepcopy(model)
    source.float().cpu().eval()
    graph = _trace(source, processor)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ONNX_MODEL
    onnx_ir.save(graph, path)
    inputs = [str(value.name) for value in graph.graph.inputs]
    with torch.no_grad():
        for seed, batch in enumerate((1, 3)):
            sample = _sample_inputs(source, processor, batch=batch, length=(5, 13)[seed], seed=seed)
            output = source(**sample)
            expected = {task.logits_name: output[task.logits_name].numpy() for task in source.tasks.values()}
            found = _run(path, {name: value.numpy() for name, value in sample.items()})
            difference = largest_difference(found, expected)
            if not difference <= TOLERANCE:
                path.unlink()
                raise ArtifactError(
                    f"expected the ONNX graph to answer like the model, found a relative difference of "
                    f"{difference:.2g} on a batch of {batch} (at most {TOLERANCE:g}); nothing was kept, report "
                    f"the encoder '{source.encoder.config.model_type}' with the versions of torch and transformers"
                )
    processor.save_pretrained(folder)
    write_onnx_settings(
        folder,
        OnnxSettings(
            tasks=[task.to_dict() for task in source.tasks.values()],
            preprocessing=dict((source.config.preprocessing or {}).get("main", {})),
            inputs=inputs,
            precision="float32",
            parameters=count_parameters(source),
            **_stored(path),
            versions={
                "opset": graph.opset_imports.get(""),
                **{name: package_version(name) for name in ("torch", "transformers", "onnx", "onnxruntime")},
            },
        ),
    )
    return folder


def quantize_onnx(source_folder: Path, folder: Path, bits: int = 8) -> Path:
    """Write an ONNX folder again with weights and word embeddings in 8 bits.

    Weights are quantized per output channel, activations while it runs (dynamic); that needs no calibration. Embedding
    tables are stored in 8 bits too: they are half of a small encoder. The last layer of each head stays in float, where
    it costs almost nothing and where a regression would feel the rounding most. Operators are fused for ONNX Runtime
    first, so the result runs there only, the float graph anywhere.

    Args:
        source_folder: what `export_onnx` wrote.
        folder: where to write; made when it is not there.
        bits: 8.

    Returns:
        `folder`.

    Raises:
        ArtifactError: the source is no float ONNX folder, or the result gives numbers that are not finite.
        RecipeError: another number of bits.
        MissingExtraError: the extra `onnx` is not installed.
    """
    require_extra("onnx")
    if bits != 8:
        raise RecipeError(f"expected 8 bits for ONNX Runtime, found {bits}; use bits 8, or backend bitsandbytes for 4")
    settings = read_onnx_settings(source_folder)
    if settings.precision != "float32":
        raise ArtifactError(
            f"expected a float32 graph to quantize, found {settings.precision} in {source_folder}; "
            "quantize the folder it was made from"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ONNX_MODEL
    sample = _random_feed(source_folder / ONNX_MODEL)
    with TemporaryDirectory() as scratch:
        prepared = _prepare(source_folder / ONNX_MODEL, Path(scratch), sample)
        _quantize_dynamic(prepared, path)
    if not all(np.isfinite(array).all() for array in _run(path, sample).values()):
        path.unlink()
        raise ArtifactError(
            "expected finite numbers from the 8-bit graph, found others; keep the float32 graph instead"
        )
    for item in source_folder.iterdir():
        if item.is_file() and item.name not in (ONNX_MODEL, ONNX_SETTINGS):
            shutil.copy2(item, folder / item.name)
    versions = {**settings.versions, "onnxruntime": package_version("onnxruntime")}
    write_onnx_settings(folder, replace(settings, precision="int8", versions=versions, **_stored(path)))
    return folder


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


# ---- tracing ----


class _LogitsOnly(PreTrainedModel):
    """The model without its hidden states: the exporter names one graph output for each key of the dict."""

    config_class = MultiTaskConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__(model.config)
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        output = self.model(**inputs)
        return {task.logits_name: output[task.logits_name] for task in self.model.tasks.values()}


def _trace(model: MultiTaskModel, processor: Any) -> Any:
    """The graph of `model` as an `onnx_ir.Model` whose only outputs are the logits."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    # Sizes of one would be taken for constants, so batch and length are larger, and different.
    sample = _sample_inputs(model, processor, batch=2, length=11, seed=7)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: {0: dynamic} if name == "pixel_values" else {0: dynamic, 1: dynamic} for name in sample}
    output = io.StringIO()
    try:
        with _quiet(output):
            config = OnnxConfig(dynamic=True, dynamic_shapes=shapes)
            graph = OnnxExporter().export(_LogitsOnly(model).eval(), dict(sample), config).program
            if len(model.adapters):
                # Every run of the encoder has transposed its weights for itself.
                _store_once(graph)
            return _tidy(graph)
    except Exception as error:  # whatever a tracer, a lowering or an optimiser may raise
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise UnsupportedEncoderError(
            f"expected an encoder that the ONNX exporter can trace, but '{model.encoder.config.model_type}' failed "
            f"with {type(error).__name__}: {reason}; use the torch folder or vanilla folders instead"
        ) from error


def _store_once(graph: Any) -> None:
    """Let equal weights be one weight."""
    from onnx_ir.passes.common import DeduplicateInitializersPass

    # The pass that compares hashes fails on transposed weights (onnx_ir 1.1).
    DeduplicateInitializersPass(size_limit=sys.maxsize)(graph)


def _tidy(graph: Any) -> Any:
    """Take out the exporter's notes, which hold paths of this machine, and give the free dimensions their names."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(graph)
    graph.graph.metadata_props.clear()
    names: dict[str | None, str] = {}
    for value in graph.graph.inputs:
        for size, name in zip(value.shape, ("batch", "tokens"), strict=False):
            if isinstance(size, onnx_ir.SymbolicDim):
                names[size.value] = name
    values = [*graph.graph.inputs, *(output for node in graph.graph for output in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, onnx_ir.SymbolicDim) and size.value in names:
                value.shape[axis] = names[size.value]
    return graph


def _sample_inputs(model: MultiTaskModel, processor: Any, *, batch: int, length: int, seed: int) -> dict[str, Tensor]:
    """Model inputs of a given shape; texts are random ids of unequal length, images are noise."""
    names = list(processor.model_input_names)
    generator = torch.Generator().manual_seed(seed)
    if "pixel_values" in names:
        blank = processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
        return {"pixel_values": torch.randn(batch, *blank.shape[1:], generator=generator)}
    vocabulary = int((model.config.encoders or {})["main"]["vocab_size"])
    ids = torch.randint(0, min(vocabulary, len(processor)), (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if processor.pad_token_id is not None:
        ids[ids == processor.pad_token_id] = (processor.pad_token_id + 1) % vocabulary
        mask[-1, -2:] = 0
        ids[mask == 0] = processor.pad_token_id
    sample = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in names and "type_vocab_size" in (model.config.encoders or {})["main"]:
        sample["token_type_ids"] = torch.zeros_like(ids)
    return sample


@contextlib.contextmanager
def _quiet(output: io.StringIO) -> Iterator[None]:
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


# ---- eight bits ----


def _prepare(source: Path, scratch: Path, sample: Mapping[str, np.ndarray]) -> Path:
    """The float graph with operators fused for ONNX Runtime, or as it was where a fusion changes an answer."""
    import onnx
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    fused = scratch / "fused.onnx"
    output = io.StringIO()
    try:
        with _quiet(output):
            graph = onnx_ir.load(source)
            fuse_for_onnxruntime(graph, "cpu")
            ClearMetadataAndDocStringPass()(graph)
            onnx_ir.save(graph, fused)
        model = _split_skip_norms(onnx.load(fused))
        onnx.save(model, fused)
        # Weights inside an Attention operator would stay in float.
        whole = all(node.op_type != "Attention" for node in model.graph.node)
        if whole and largest_difference(_run(fused, sample), _run(source, sample)) <= TOLERANCE:
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


def _quantize_dynamic(source: Path, target: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    # Gemm weights are transposed on the way, and shapes noted for them before would then be wrong.
    weights = {item.name for item in model.graph.initializer}
    kept = [info for info in model.graph.value_info if info.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)  # it advises a pre-processing that fails on these graphs and changes nothing
    try:
        quantize_dynamic(
            model,
            target,
            # Convolutions are left out: the integer kernel takes unsigned weights only, and is slow.
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_last_layers(model),
        )
    finally:
        root.setLevel(level)


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


def _stored(path: Path) -> dict[str, Any]:
    """Bytes of weights by type, and of the tables that `input_ids` are looked up in."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    size = {item.name: numpy_helper.to_array(item).nbytes for item in model.graph.initializer}
    stored: Counter[str] = Counter()
    for item in model.graph.initializer:
        stored[TensorProto.DataType.Name(item.data_type).lower()] += size[item.name]
    for node in model.graph.node:
        if node.op_type == "Constant":
            value = helper.get_node_attr_value(node, node.attribute[0].name)
            if isinstance(value, TensorProto):
                stored[TensorProto.DataType.Name(value.data_type).lower()] += numpy_helper.to_array(value).nbytes
    ids = {"input_ids"}
    tables = set()
    for node in model.graph.node:
        if node.op_type in ("Cast", "Reshape", "Identity") and node.input[0] in ids:
            ids.update(node.output)
        elif node.op_type == "Gather" and node.input[1] in ids:
            tables.add(node.input[0])
    embedding = sum(size.get(name, 0) for name in tables)
    return {"stored_bytes": dict(stored), "embedding_bytes": embedding or None}


def _random_feed(path: Path) -> dict[str, np.ndarray]:
    """Inputs of fixed seed that fit a graph, to compare two graphs of the same model."""
    from hf_mtcompress.inference.onnx_session import open_session

    generator = np.random.default_rng(0)
    feed: dict[str, np.ndarray] = {}
    for item in open_session(path, 1).get_inputs():
        if item.name == "pixel_values":
            shape = [size if isinstance(size, int) else 2 for size in item.shape]
            feed[item.name] = generator.standard_normal(shape).astype(np.float32)
        else:
            ids = generator.integers(5, 50, (2, 9)) if item.name == "input_ids" else np.full((2, 9), 0)
            feed[item.name] = np.ones((2, 9), dtype=np.int64) if item.name == "attention_mask" else ids
    return feed


def _run(path: Path, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    from hf_mtcompress.inference.onnx_session import open_session, run_session

    return run_session(open_session(path, 1), feed)
