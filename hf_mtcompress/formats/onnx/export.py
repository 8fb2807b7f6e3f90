"""ONNX: one graph with all heads in float32; `onnx_quantization.py` makes smaller ones from it."""

import ast
import copy
import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_mtcompress.data.readers import Reader, reader_of
from hf_mtcompress.environment import package_version, require_extra
from hf_mtcompress.errors import ArtifactError, UnsupportedEncoderError
from hf_mtcompress.formats.graph_settings import GraphSettings, check_graph, read_graph_settings, write_graph_settings
from hf_mtcompress.formats.onnx.graphs import (
    TOLERANCE,
    copy_processor,
    largest_difference,
    quiet,
    run_graph,
    stored_bytes,
)
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.inputs import input_names
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.sizes import count_parameters, word_table
from hf_mtcompress.records.forms import ONNX_MODEL

# Imported late: onnx_ir, transformers.exporters - they are of the extra "onnx", or need it.

LAYER_MARK = "layer_"
"""Matrix products of encoder layer 2 have names that begin with `layer_2/attention/` or `layer_2/feed_forward/`."""


def export_onnx(model: MultiTaskModel, processor: Any, folder: str | os.PathLike[str]) -> Path:
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
        UnsupportedEncoderError: the encoder cannot be traced, or reads more than the processor makes, or the model is
            quantized.
        MissingExtraError: the extra `onnx` is not installed.
    """
    folder = Path(folder)
    require_extra("onnx")
    import onnx_ir

    if getattr(model, "is_quantized", False):
        raise UnsupportedEncoderError(
            "expected a float model to export, found a quantized one; export the step it was made from"
        )
    reader = reader_of(processor)
    check_everything_is_read(type(model.encoder), reader)
    source = copy.deepcopy(model)
    source.float().cpu().eval()
    graph = _trace(source, reader)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ONNX_MODEL
    onnx_ir.save(graph, path)
    inputs = [str(value.name) for value in graph.graph.inputs]
    with torch.no_grad():
        for seed, batch in enumerate((1, 3)):
            sample = _example(source, reader, batch, (5, 13)[seed], seed)
            output = source(**sample)
            expected = {task.logits_name: output[task.logits_name].numpy() for task in source.tasks.values()}
            found = run_graph(path, {name: value.numpy() for name, value in sample.items()})
            difference = largest_difference(found, expected)
            if not difference <= TOLERANCE:
                path.unlink()
                raise ArtifactError(
                    f"expected the ONNX graph to answer like the model, found a relative difference of "
                    f"{difference:.2g} on a batch of {batch} (at most {TOLERANCE:g}); nothing was kept, report "
                    f"the encoder '{source.encoder.config.model_type}' with the versions of torch and transformers"
                )
    reader.save(folder)
    write_graph_settings(
        folder,
        GraphSettings(
            tasks=[task.to_dict() for task in source.tasks.values()],
            preprocessing=dict((source.config.preprocessing or {}).get("main", {})),
            inputs=inputs,
            precision="float32",
            parameters=count_parameters(source),
            **stored_bytes(path),
            versions={
                "opset": graph.opset_imports.get(""),
                **{name: package_version(name) for name in ("torch", "transformers", "onnx", "onnxruntime")},
            },
        ),
    )
    return folder


def check_everything_is_read(encoder: type[PreTrainedModel], reader: Reader) -> None:
    """Make sure that a graph, which has no more inputs than its reader makes, has those of its encoder.

    Raises:
        UnsupportedEncoderError: the encoder reads pictures or places on a page too, which the reader does not make.
    """
    if found := reader.left_out(input_names(encoder)):
        raise UnsupportedEncoderError(
            f"expected all inputs of {encoder.__name__}, found none for {', '.join(found)}: its graph would answer "
            f"from {', '.join(reader.input_names)} alone; use the torch folder, or an encoder that reads nothing else"
        )


def split_onnx(
    source_folder: str | os.PathLike[str], folder: str | os.PathLike[str], model: MultiTaskModel
) -> dict[str, Path]:
    """Write a graph for each task from the graph of all, with the nodes and weights that this task needs.

    Nothing is traced again, so each answers as the whole graph does, to the bit where the runtime fuses alike.

    Args:
        source_folder: what `export_onnx` wrote.
        folder: gets an ONNX folder for each task, by name.
        model: what it was made from, for the number of parameters of each head.

    Returns:
        The folders by task.

    Raises:
        ArtifactError: the source is no ONNX folder.
        MissingExtraError: the extra `onnx` is not installed.
    """
    source_folder, folder = Path(source_folder), Path(folder)
    require_extra("onnx")
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    settings = read_graph_settings(source_folder)
    check_graph(source_folder, settings)
    made = {}
    for name, task in settings.build_tasks().items():
        graph = onnx_ir.load(source_folder / ONNX_MODEL)
        whole = _count_weights(graph)
        kept = [output for output in graph.graph.outputs if output.name == task.logits_name]
        graph.graph.outputs[:] = kept
        RemoveUnusedNodesPass()(graph)
        made[name] = folder / name
        made[name].mkdir(parents=True, exist_ok=True)
        onnx_ir.save(graph, made[name] / ONNX_MODEL)
        copy_processor(source_folder, made[name])
        own = [model.heads[task.head_name], *(model.adapters[key] for key in model.adapters if key == task.head_name)]
        head = sum(parameter.numel() for part in own for parameter in part.parameters())
        # What else is gone belonged to the encoder: a pooler that this head does not read.
        gone = max(whole - _count_weights(graph) - (settings.parameters["head"] - head), 0)
        encoder = settings.parameters["encoder"] - gone
        write_graph_settings(
            made[name],
            replace(
                settings,
                tasks=[task.to_dict()],
                parameters={**settings.parameters, "encoder": encoder, "head": head},
                **stored_bytes(made[name] / ONNX_MODEL),
            ),
        )
    return made


def _count_weights(graph: Any) -> int:
    import onnx_ir

    return sum(
        value.const_value.size
        for value in graph.graph.initializers.values()
        if value.const_value.dtype == onnx_ir.DataType.FLOAT
    )


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


def _trace(model: MultiTaskModel, reader: Reader) -> Any:
    """The graph of `model` as an `onnx_ir.Model` whose only outputs are the logits."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    # Sizes of one would be taken for constants, so batch and length are larger, and different.
    sample, other = _example(model, reader, 2, 11, seed=7), _example(model, reader, 3, 12, seed=7)
    shapes = {
        name: {
            axis: torch.export.Dim.DYNAMIC
            for axis, sizes in enumerate(zip(value.shape, other[name].shape, strict=True))
            if len(set(sizes)) > 1
        }
        for name, value in sample.items()
    }
    output = io.StringIO()
    try:
        with quiet(output):
            config = OnnxConfig(dynamic=True, dynamic_shapes=shapes)
            graph = OnnxExporter().export(_LogitsOnly(model).eval(), dict(sample), config).program
            if len(model.adapters):
                # Every run of the encoder has transposed its weights for itself.
                _store_once(graph)
            _name_layers(graph, model)
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


def _name_layers(graph: Any, model: MultiTaskModel) -> None:
    """Write the encoder layer that a matrix product belongs to, and which half of it, into its name.

    The exporter's notes that tell it go before the graph is stored.
    """
    numbers: dict[str, int] = {}
    feed_forward: set[str] = set()
    names = {module: name for name, module in model.named_modules()}
    for encoder in model.encoders.values():
        assert isinstance(encoder, PreTrainedModel)
        try:
            layers = find_anatomy(encoder).layers
        except UnsupportedEncoderError:
            continue  # no layers to keep apart later, which is said when somebody asks for it
        for number, layer in enumerate(layers):
            numbers[f"model.{names[layer.module]}"] = number
            linear = [*layer.feed_forward.inputs.values(), layer.feed_forward.output]
            feed_forward |= {f"model.{names[module]}" for module in linear}
    for node in graph.graph:
        if node.op_type in ("MatMul", "Gemm"):
            scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
            found = [numbers[scope] for scope in scopes if scope in numbers]
            if found:
                half = "attention" if feed_forward.isdisjoint(scopes) else "feed_forward"
                node.name = f"{LAYER_MARK}{found[0]}/{half}/{node.name}"


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


def _example(model: MultiTaskModel, reader: Reader, rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """Made-up inputs of the model; where they have tokens, the last row is shorter by two."""
    example = model.inputs_in(reader.example(rows, length=length, padding=2, seed=seed))
    if (table := word_table(model.encoder)) is not None:
        # A tokenizer may know more tokens than its encoder.
        example[model.main_input_name] %= table.num_embeddings
    return example
