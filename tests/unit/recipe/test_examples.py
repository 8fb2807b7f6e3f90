"""Who installed the package finds its recipes without knowing where it lies."""

from pathlib import Path

import pytest

from hf_mtcompress.cli import main
from hf_mtcompress.recipe.examples import example_recipes

RECIPES = Path(__file__).parents[3] / "recipes"


def test_all_are_listed_with_what_they_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["intent_slots", "quickstart", "sentence_pair", "vision"]
    assert lines[1].endswith("  Quickstart: one small, fast checkpoint for three tasks over the same sentences.")
    assert sorted(example_recipes().values()) == sorted(RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "files"),
    [("vision", ["vision.yaml"]), ("quickstart", ["quickstart/prepare.py", "quickstart/recipe.yaml"])],
)
def test_one_is_copied_with_its_scripts(
    name: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quickstart is nothing without the script that fetches its data."""
    folder = tmp_path / "my" / "own"
    assert main(["recipes", "--copy", name, str(folder)]) == 0
    copied = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert copied == files
    assert all((folder / file).read_bytes() == (RECIPES / file).read_bytes() for file in files)
    assert capsys.readouterr().out.splitlines()[0] == str(folder / files[-1])


def test_a_file_of_the_user_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vision.yaml").write_text("mine")
    assert main(["recipes", "--copy", "vision", str(tmp_path)]) == 2
    assert "expected no 'vision.yaml' in" in capsys.readouterr().err
    assert (tmp_path / "vision.yaml").read_text() == "mine"


def test_a_name_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--copy", "visoin", str(tmp_path / "my")]) == 2
    assert "expected the name of a recipe, found 'visoin'; did you mean 'vision'" in capsys.readouterr().err
    assert not (tmp_path / "my").exists()
