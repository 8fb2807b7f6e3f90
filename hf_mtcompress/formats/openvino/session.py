"""How a graph is run by OpenVINO. Imports nothing else, so that a process that only serves a graph stays small."""

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openvino


class Session:
    """A compiled graph that several threads may call: each gets memory of its own for inputs and results."""

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        self.compiled = compiled
        self._own = threading.local()

    @property
    def request(self) -> openvino.InferRequest:
        """This thread's request."""
        if not hasattr(self._own, "request"):
            self._own.request = self.compiled.create_infer_request()
        return self._own.request


def open_session(model: Path, threads: int | None = None) -> Session:
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
    return Session(openvino.Core().compile_model(model, "CPU", config))


def output_widths(session: Session) -> dict[str, int | None]:
    """Sizes of the last axis by output name; None where they depend on the input."""
    shapes = {item.any_name: list(item.partial_shape) for item in session.compiled.outputs}
    return {name: shape[-1].get_length() if shape and shape[-1].is_static else None for name, shape in shapes.items()}


def run_session(session: Session, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One call: arrays by input name to arrays by output name; inputs that the graph does not take are left out."""
    compiled = session.compiled
    feed = {
        item.any_name: np.asarray(batch[item.any_name], dtype=item.element_type.to_dtype()) for item in compiled.inputs
    }
    found = session.request.infer(feed)
    # The next call writes into the same memory.
    return {item.any_name: np.array(found[item]) for item in compiled.outputs}
