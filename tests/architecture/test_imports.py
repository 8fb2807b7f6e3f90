"""The floors of the house hold, in the text of the code and when it runs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = {contract["id"]: contract for contract in PROJECT["tool"]["importlinter"]["contracts"]}
REFUSED = {
    module: contract["forbidden_modules"]
    for contract in (CONTRACTS["light"], CONTRACTS["start"])
    for module in contract["source_modules"]
    if not module.endswith("__main__")  # that would run it
}
"""What each light module must be imported without."""
REFUSED["hf_mtcompress.recipe.load"] = REFUSED["hf_mtcompress.recipe"]


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


@pytest.mark.parametrize("name", REFUSED)
def test_light_modules_run_without_torch(name: str):
    """The linter reads the text only; here the module is really imported while heavy libraries are refused."""
    program = f"import sys; sys.modules.update(dict.fromkeys({REFUSED[name]})); import {name}"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def test_contributors_read_the_floors_that_are_checked():
    """Written down twice, so compared."""
    checked = [re.sub(r"[()]", "", floor) for floor in CONTRACTS["floors"]["layers"]]
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.search(r"```\n(cli > .*?)\n```", text, re.DOTALL)
    assert shown is not None
    assert [" ".join(floor.split()) for floor in shown[1].split(">")] == [
        floor for floor in checked if floor != "__main__"
    ]
