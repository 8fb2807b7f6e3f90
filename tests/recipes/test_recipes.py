"""Every recipe of the repository can be read, and says what it does, what it needs and the command."""

import re
from pathlib import Path

import pytest

from hf_mtcompress.recipe import DataConfig, QuantizeStep
from hf_mtcompress.recipe.load import dump_recipe, load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
NAMES = [str(path.relative_to(FOLDER)) for path in RECIPES]


def test_no_recipe_is_missed() -> None:
    """A glob that finds nothing would let every test below pass."""
    assert NAMES == ["intent_slots.yaml", "quickstart/recipe.yaml", "sentence_pair.yaml", "vision.yaml"]


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_is_valid(path: Path) -> None:
    """A key that was renamed in the package would only be noticed by the next newcomer."""
    recipe = load_recipe(path)
    assert recipe.reference == recipe.steps[0].name == "teacher"
    delivered = recipe.steps[-1]
    assert isinstance(delivered, QuantizeStep)
    assert delivered.backend == "onnxruntime"
    for task in recipe.tasks.values():
        assert task.metric is not None
        if isinstance(task.data, DataConfig):
            assert task.data.dataset_id, "the card needs the source of the data"
            assert Path(str(task.data.data_dir)).parent in (path.parent, path.parent / "data")
        else:
            assert task.data in recipe.tasks
    assert recipe.encoder.hub_id == recipe.encoder.path


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_resolved_recipe_reads_back(path: Path, tmp_path: Path) -> None:
    """The recipe saved with a model must describe the same run, tabs in a delimiter included."""
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump_recipe(load_recipe(path)), encoding="utf-8")
    assert dump_recipe(load_recipe(copy)) == copy.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_opens_with_what_needs_command(path: Path) -> None:
    """The command in the header must name this file and a task of it, or copying it fails."""
    header = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    assert all(f"# {part}:" in header for part in ("What it does", "What it needs", "Command"))
    assert f"recipes/{path.relative_to(FOLDER)}" in header
    recipe = load_recipe(path)
    overridden = re.findall(r"tasks\.(\w+)\.data\.data_dir=", header)
    assert all(isinstance(recipe.tasks[name].data, DataConfig) for name in overridden)
    assert overridden or path.parent.name == "quickstart"


def test_readme_lists_every_recipe() -> None:
    """A recipe that is not in the table is not found."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"({name})" in text for name in NAMES)
