"""What holds for every test: no network, fixed seeds, one thread, nothing left behind in the repository."""

import gc
import ipaddress
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_OURS = {".git", ".venv", "__pycache__", "runs", "build", "dist", ".cache"}
"""Folders that tools write to while tests run."""


class NetworkAccessError(RuntimeError):
    """A test tried to leave this machine. Not an OSError: libraries would swallow that and go on."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="threads of torch; tiny models are fastest with one")
    parser.addoption(
        "--check-tree",
        action="store_true",
        default=bool(os.environ.get("CI")),
        help="fail a test file that leaves files in the repository (always on where CI is set)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before torch and transformers are first imported; child processes inherit it."""
    home = tempfile.mkdtemp(prefix="mtcompress-tests-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    os.environ.update(
        HF_HOME=home,
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        TOKENIZERS_PARALLELISM="false",
        OMP_NUM_THREADS=str(config.getoption("--threads")),
        MPLBACKEND="Agg",
        CUDA_VISIBLE_DEVICES=""
        if "not gpu" in str(config.getoption("-m"))
        else os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
    )


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):  # a Unix socket
        return True
    host = str(address[0])
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def _quick_collections() -> Iterator[None]:
    """Trainer collects garbage at every start, which walks over all that was imported: most of a tiny training."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only loopback through, whatever a library does behind our back."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(address: Any) -> None:
        if not _is_local(address):
            raise NetworkAccessError(f"expected a test that needs no network, but it asked for {address}")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        check((host if host is not None else "", 0))
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test from the same random state, whichever tests ran before it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _quiet_machine() -> Iterator[None]:
    """Tests run beside each other: that the machine is busy is for those to find that are about it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_mtcompress.evaluation.benchmark.busy_seconds", lambda: None)
        patch.setattr("hf_mtcompress.evaluation.benchmark.doubtful_times", lambda *_: {})
        yield


def _tree() -> set[Path]:
    found = set()
    for folder, folders, files in os.walk(REPOSITORY):
        folders[:] = [name for name in folders if name not in NOT_OURS and not name.endswith(("_cache", ".egg-info"))]
        found.update(Path(folder, name) for name in files)
    return found


@pytest.fixture(autouse=True, scope="module")
def _leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the file whose tests wrote into the repository instead of `tmp_path`."""
    if not request.config.getoption("--check-tree"):
        yield
        return
    before = _tree()
    yield
    new = sorted(str(path.relative_to(REPOSITORY)) for path in _tree() - before)
    assert not new, f"expected tests to write below tmp_path only, but the repository now holds {', '.join(new)}"
