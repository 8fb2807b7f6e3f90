"""On what the times are taken by which prune steps and searches choose."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class TimingConfig:
    """How block times are measured: once for an architecture, on this machine."""

    runtime: Literal["torch", "onnx", "onnx_int8"] = "onnx_int8"
    """What the model will run on: torch, ONNX Runtime in float, or in 8 bits."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Rows in a call; a cut goes by the first of them."""
    tokens: int = 64
    """Real tokens in every row."""
    threads: int | None = None
    """Threads of the runtime; default: all cores this process may use."""
    repetitions: int = 20
    """Turns of each of about twenty shapes, with a timed call or five short ones; the fastest counts."""
    wait: float = 30.0
    """Seconds to wait for a moment in which no other process needs the cores."""
