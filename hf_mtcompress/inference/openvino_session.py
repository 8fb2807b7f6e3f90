"""How a graph is run by OpenVINO. Imports nothing else, so that a process that only serves a graph stays small."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openvino


def open_session(model: Path, threads: int | None = None) -> openvino.CompiledModel:
    """Compile a graph for the processor.

    Args:
        model: the `.xml` file.
        threads: threads within an operation; None for all cores.
    """
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        # By default processors with bfloat16 units compute in that, and answers then differ from machine to machine.
        "INFERENCE_PRECISION_HINT": "f32",
        **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
    }
    return openvino.Core().compile_model(model, "CPU", config)


def run_session(session: openvino.CompiledModel, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One call: arrays by input name to arrays by output name; inputs that the graph does not take are left out."""
    feed = {
        item.any_name: np.asarray(batch[item.any_name], dtype=item.element_type.to_dtype()) for item in session.inputs
    }
    found = session(feed)
    # The next call writes into the same memory.
    return {item.any_name: np.array(found[item]) for item in session.outputs}
