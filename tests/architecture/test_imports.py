"""The floors of the house hold, in the text of the code and when it runs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HEAVY = ["torch", "transformers"]
HEAVY_AT_START = [*HEAVY, "datasets", "numpy", "pydantic", "matplotlib", "huggingface_hub"]
LIGHT = {
    **dict.fromkeys(["hf_mtcompress", "hf_mtcompress.cli", "hf_mtcompress.registration_hooks"], HEAVY_AT_START),
    **{
        f"hf_mtcompress.{name}": HEAVY
        for name in ("artifacts", "recipe", "recipe.load", "environment", "errors", "locks", "publishing", "records")
    },
}
"""What each light module must run without; every start loads the first ones."""


def test_imports_only_look_down():
    """A cycle or an import of torch from the light floors would creep in unseen."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache", "--config", "pyproject.toml"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_run_without_torch(name: str):
    """The linter reads the text only; here the module is really imported while heavy libraries are refused."""
    program = f"import sys; sys.modules.update(dict.fromkeys({LIGHT[name]})); import {name}"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def test_contributors_read_the_floors_that_are_checked():
    """Written down twice, so compared."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    checked = [re.sub(r"[()]", "", floor) for floor in settings["contracts"][0]["layers"]]
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.search(r"```\n(cli > .*?)\n```", text, re.DOTALL)
    assert shown is not None
    assert [" ".join(floor.split()) for floor in shown[1].split(">")] == [
        floor for floor in checked if floor != "__main__"
    ]
