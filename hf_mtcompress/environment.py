"""Facts about the machine and the installed packages. Imports neither torch nor transformers."""

import importlib.util
import logging
import os
import platform
import signal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_mtcompress.errors import MissingExtraError

PACKAGES = (
    "hf_mtcompress",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "safetensors",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "bitsandbytes",
    "torchao",
    "torchjd",
)
"""Packages whose versions can change a score, a size or a time."""

# Trainer imports bitsandbytes where it is installed, which then warns of a kernel package that nobody here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)
# transformers imports torchao where it is installed, which then warns of its kernels for GPUs and of its own types.
logging.getLogger("torchao").addFilter(lambda record: "Failed to load" not in record.getMessage())
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "Enum subclass" not in record.getMessage())

EXTRAS = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino", "nncf"),
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
    "surgery": ("torchjd", "qpsolvers", "quadprog", "cvxpy", "clarabel"),
}
"""Modules that each extra of `pyproject.toml` brings."""


def environment_facts() -> dict[str, Any]:
    """What the card and the record say about where a run took place; nothing that names a user or a folder.

    Returns:
        `python`, `platform`, `system` (operating system), `processor`, `cores` (those this process may use),
        `memory_gb` (10**9 bytes, None where unknown) and `packages` (name -> version, None where not installed).
    """
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "system": _operating_system(),
        "processor": _processor(),
        "cores": available_cores(),
        "memory_gb": _memory_gb(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def package_version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def available_cores() -> int:
    """Cores this process may run on, which in a container are often fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no such function
        return os.cpu_count() or 1


def busy_seconds() -> float | None:
    """Seconds since its start that the cores of this process have worked for anybody; None where that is not told.

    What other guests of the same hardware took from a virtual machine counts, too.
    """
    import psutil  # of no use to those who measure nothing

    try:
        cores = psutil.cpu_times(percpu=True)
        mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(len(cores)))
    except (OSError, RuntimeError, NotImplementedError):  # such as no /proc
        return None
    if max(mine, default=0) < len(cores):
        cores = [cores[core] for core in sorted(mine)]
    parts = ("user", "nice", "system", "irq", "softirq", "interrupt", "dpc", "steal")
    total = sum(getattr(core, part, 0.0) for core in cores for part in parts)
    return total or None  # some sandboxes show zeros


def load_average() -> float | None:
    """Mean number of processes that wanted to run in the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):  # Windows has no such function
        return None


def ending_of(returncode: int) -> str:
    """How a child process ended, in words; with what to do where its processor or memory was too small for it.

    Args:
        returncode: as `subprocess` has it, below 0 for the number of a signal.
    """
    if returncode >= 0:
        return f"ended with code {returncode}"
    names = {number.value: number.name for number in signal.Signals}
    found = names.get(-returncode, f"signal {-returncode}")
    advice = {
        "SIGILL": f" (an instruction that this processor, {_processor()}, does not have: install a build of the "
        "runtime that is made for it, or take another form, such as the torch folder)",
        "SIGKILL": " (most often for want of memory: close other programs, or take smaller batches)",
    }
    return f"was ended by {found}{advice.get(found, '')}"


def require_extra(extra: str) -> None:
    """Make sure that the modules of an optional extra can be imported.

    Args:
        extra: a key of `EXTRAS`.

    Raises:
        MissingExtraError: a module is not installed; the message holds the command that installs it.
    """
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"expected the extra '{extra}', but {', '.join(missing)} cannot be imported; "
            f'install it with: pip install "hf_mtcompress[{extra}]"'
        )


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:  # not a Linux distribution
        return f"{platform.system()} {platform.release()}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):  # Windows has no such function
        return None
