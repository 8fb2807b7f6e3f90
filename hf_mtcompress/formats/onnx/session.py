"""How a graph is run by ONNX Runtime. Imports nothing else, so that a process that only serves a graph stays small."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime


def open_session(model: Path, threads: int | None = None) -> onnxruntime.InferenceSession:
    """Open a graph on the processor.

    Args:
        model: the `.onnx` file.
        threads: threads within an operation; None for all cores.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors only; fusions that do not apply are no news
    # Threads must not spin after a call: they would slow down whatever the process does next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        str(model),
        options,
        providers=["CPUExecutionProvider"],
        # The fused kernel takes four times as long as Add and LayerNormalization do (measured on 1.32, AVX-512).
        disabled_optimizers=["SkipLayerNormFusion"],
    )


def output_widths(session: onnxruntime.InferenceSession) -> dict[str, int | None]:
    """Sizes of the last axis by output name; None where they depend on the input."""
    shapes = {item.name: item.shape for item in session.get_outputs()}
    return {name: shape[-1] if shape and isinstance(shape[-1], int) else None for name, shape in shapes.items()}


def run_session(session: onnxruntime.InferenceSession, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One call: arrays by input name to arrays by output name; inputs that the graph does not take are left out."""
    wanted = {item.name: _TYPES[item.type] for item in session.get_inputs()}
    feed = {name: np.asarray(batch[name], dtype=dtype) for name, dtype in wanted.items()}
    names = [item.name for item in session.get_outputs()]
    return {name: np.asarray(array) for name, array in zip(names, session.run(names, feed), strict=True)}


_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
