"""Facts about the machine: complete, JSON-able, and without anything that names a user."""

import getpass
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hf_mtcompress import environment
from hf_mtcompress.environment import ending_of
from hf_mtcompress.errors import MissingExtraError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_facts_are_complete_and_plain():
    """A fact that is not JSON would make a finished run fail when its record is written."""
    facts = json.loads(json.dumps(environment.environment_facts()))
    assert set(facts) == {"python", "platform", "system", "processor", "cores", "memory_gb", "packages"}
    assert facts["cores"] >= 1
    assert facts["memory_gb"] is None or facts["memory_gb"] > 0
    assert facts["processor"]
    assert facts["packages"]["transformers"].startswith("5.")


def test_facts_name_no_user_and_no_folder():
    """The facts are printed on public cards."""
    text = json.dumps(environment.environment_facts()["packages"])
    assert str(Path.home()) not in text
    assert "/" not in text
    assert getpass.getuser() not in text


def test_package_that_is_not_installed_has_no_version():
    assert environment.package_version("no-such-package-anywhere") is None


def test_load_average_is_a_number_or_unknown():
    load = environment.load_average()
    assert load is None or load >= 0


def test_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch):
    """Without this the user sees a bare ModuleNotFoundError from deep inside a library."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "hf_mtcompress\[onnx\]"'):
        environment.require_extra("onnx")


def test_installed_extra_passes():
    environment.require_extra("onnx")


def test_extras_are_those_of_the_package():
    """Written down twice, so compared: a renamed extra would put a wrong command into the message."""
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(environment.EXTRAS) == set(extras) - {"dev"}
    modules_of = {"cvxpy-base": "cvxpy"}
    for extra, modules in environment.EXTRAS.items():
        # What some Pythons cannot have (it carries a marker) is asked for where it is used.
        names = {re.split(r"[^\w-]", requirement)[0] for requirement in extras[extra] if ";" not in requirement}
        assert {modules_of.get(name, name) for name in names} == set(modules)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("sys.exit(3)", "ended with code 3"),
        ("os.kill(os.getpid(), signal.SIGILL)", "was ended by SIGILL (an instruction that this processor, "),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL (most often for want of memory"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "was ended by SIGTERM"),
    ],
)
def test_how_a_process_ended(way: str, words: str):
    """A number below 0 tells nobody that the processor is too old."""
    child = subprocess.run([sys.executable, "-c", f"import os, signal, sys; {way}"], check=False)
    assert ending_of(child.returncode).startswith(words)
