"""Several processes train what one process trains on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[3]
WORKER = "tests.unit.trainers.process_worker"
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(
    folder: Path, launcher: list[str], batch_size: int, *modes: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder.mkdir()
    command = [sys.executable, *launcher, "-m", WORKER, str(folder), str(batch_size), *modes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "result.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "modes",
    [
        ("touch", "mixed"),
        ("find", "distill"),
        ("touch", "branch"),
        pytest.param(("touch", "window"), marks=pytest.mark.slow),
        pytest.param(("find",), marks=pytest.mark.slow),
        pytest.param(("touch", "adapters"), marks=pytest.mark.slow),
        pytest.param(("find", "gradual"), marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path: Path, modes: tuple[str, ...]) -> None:
    """Counts are summed over ranks, heads without rows do not stop DDP, whether it looks for them or not.

    Batches of one source and a plain sum; batches of several, which differ between ranks, learned weights, gradient
    surgery and looks at validation rows; adapters on a frozen encoder, those of tasks without rows in a batch too; a
    teacher that both ask before, and projections that run outside of the model's forward pass; heads and neurons that
    go while it trains; top layers that only some tasks read; surgery between batches of one source.
    """
    one, alone = train(tmp_path / "one", [], 4, *modes)
    two, together = train(tmp_path / "two", TWO, 2, *modes)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert alone.keys() == together.keys()
    for key, weights in alone.items():
        assert torch.allclose(weights, together[key], atol=2e-6), key
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
    assert len(one["losses"]) == len(two["losses"]) > 3
    for ours, theirs in zip(two["losses"], one["losses"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert (one["looks"] is None) == (not {"mixed", "window"} & set(modes))
    if "mixed" in modes:  # looks at the same validation rows in every process
        assert two["looks"]["steps"] == one["looks"]["steps"] > 2
        for ours, theirs in zip(two["looks"]["cosine"], one["looks"]["cosine"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)
