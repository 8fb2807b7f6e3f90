"""The graph of all heads for OpenVINO, in float or in 8 bits by NNCF."""

import io
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_mtcompress.environment import package_version, require_extra
from hf_mtcompress.errors import ArtifactError, RecipeError
from hf_mtcompress.formats.graph_settings import write_graph_settings
from hf_mtcompress.formats.onnx.graphs import (
    TOLERANCE,
    copy_processor,
    float_settings,
    largest_difference,
    quiet,
    random_feed,
    run_graph,
)
from hf_mtcompress.records.forms import ONNX_MODEL, OPENVINO_MODEL

# Imported late: openvino, nncf, hf_mtcompress.formats.openvino.session - they are of the extra "openvino", or need it.


def convert_openvino(
    source_folder: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    bits: int = 32,
    *,
    rows: Sequence[Mapping[str, np.ndarray]] = (),
) -> Path:
    """Write an ONNX folder again for OpenVINO, which on many processors is the fastest way to run it.

    - 32: the same weights and answers.
    - 8: weights per output channel and activations by fixed ranges, found on `rows` by NNCF, which smooths outliers
      (Xiao et al. 2023, "SmoothQuant") and corrects biases. Word embeddings in 8 bits, too.

    What is not in 8 bits is computed in float32 on every processor.

    Args:
        source_folder: what `export_onnx` wrote.
        folder: where to write; made when it is not there.
        bits: 32 or 8.
        rows: with 8 bits, real model inputs, best one row each: padding would count among the numbers that are seen.

    Returns:
        `folder`.

    Raises:
        ArtifactError: the source is no float ONNX folder; the result answers otherwise, or not with numbers.
        RecipeError: another number of bits, or no rows with 8 bits.
        MissingExtraError: the extra `openvino` or `onnx` is not installed.
    """
    source_folder, folder = Path(source_folder), Path(folder)
    require_extra("onnx")
    require_extra("openvino")
    import openvino

    from hf_mtcompress.formats.openvino.session import open_session, run_session

    if bits not in (32, 8):
        raise RecipeError(f"bits: expected 32 or 8 for OpenVINO, found {bits}; choose one of them")
    if bits == 8 and not rows:
        raise RecipeError("calibration: expected at least one row, found none; give training rows")
    settings = float_settings(source_folder)
    source = source_folder / ONNX_MODEL
    graph = openvino.Core().read_model(source)
    if bits == 8:
        graph = _in_eight_bits(graph, rows)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / OPENVINO_MODEL
    openvino.save_model(graph, path, compress_to_fp16=False)
    sample = random_feed(source)
    found = run_session(open_session(path, 1), sample)
    difference = largest_difference(found, run_graph(source, sample))
    # Eight bits are judged by scores; here only that there are numbers.
    if not difference <= (TOLERANCE if bits == 32 else 1e6):
        path.unlink()
        path.with_suffix(".bin").unlink()
        raise ArtifactError(
            f"expected the OpenVINO graph to answer like the ONNX one, found a relative difference of "
            f"{difference:.2g}; nothing was kept, report the encoder with the version of openvino"
        )
    copy_processor(source_folder, folder)
    versions = {name: package_version(name) for name in ("openvino", *(("nncf",) if bits == 8 else ()))}
    written = replace(
        settings,
        precision="float32" if bits == 32 else "int8",
        quantization={} if bits == 32 else {"calibration": {"method": "nncf", "batches": len(rows)}},
        versions={**settings.versions, **versions},
        **_stored_bytes(graph),
    )
    write_graph_settings(folder, written, "openvino")
    return folder


def _in_eight_bits(graph: Any, rows: Sequence[Mapping[str, np.ndarray]]) -> Any:
    # NNCF reports how it is used to its makers unless it is told not to.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    level = logging.getLogger("nncf").level
    logging.getLogger("nncf").setLevel(logging.ERROR)
    names = [item.any_name for item in graph.inputs]
    try:
        with quiet(io.StringIO()):
            return nncf.quantize(
                graph,
                nncf.Dataset([{name: row[name] for name in names} for row in rows]),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(rows),
            )
    finally:
        logging.getLogger("nncf").setLevel(level)


def _stored_bytes(graph: Any) -> dict[str, Any]:
    """Bytes of weights by type, and of the tables that are looked up."""
    stored: Counter[str] = Counter()
    tables = 0
    for node in graph.get_ops():
        if node.get_type_name() != "Constant":
            continue
        size = int(np.prod(list(node.shape), dtype=np.int64)) * node.get_element_type().size
        stored[node.get_element_type().get_type_name()] += size
        if len(node.shape) == 2 and _is_looked_up(node):
            tables += size
    return {"stored_bytes": dict(stored), "embedding_bytes": tables or None}


def _is_looked_up(constant: Any) -> bool:
    """Whether a table reaches a Gather, through the operators that turn 8 bits into numbers."""
    waiting = [constant]
    while waiting:
        for target in waiting.pop().output(0).get_target_inputs():
            node = target.get_node()
            if node.get_type_name() == "Gather":
                return target.get_index() == 0
            if node.get_type_name() in ("Convert", "Multiply", "Subtract", "FakeQuantize") and target.get_index() == 0:
                waiting.append(node)
    return False
