"""Folders that were damaged at random are answered from or refused, in bounded memory."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_folders_are_refused_in_words_and_cheaply(seed: int):
    """What is downloaded was made by somebody: no traceback of a library, no gigabytes for a number in a file."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.formats.hostile", str(seed), "250"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert not found["raw"], "\n\n".join(found["raw"])
    assert found["refused"] > 100
    assert found["grown_mb"] < 1000
