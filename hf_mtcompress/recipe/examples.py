"""The recipes that come with the package: their names, and copies to start from."""

import shutil
from pathlib import Path

from hf_mtcompress.errors import RecipeError
from hf_mtcompress.recipe.sections import near

_PACKAGE = Path(__file__).parents[1]
_CARRIED = (".yaml", ".py", ".md")
"""What an installed package holds of the folder; a checkout may have data in there, too."""


def example_recipes() -> dict[str, Path]:
    """The recipe files by name.

    Raises:
        RecipeError: they are not there.
    """
    # Inside of an installed package, beside that of a checkout.
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        found = {path.stem: path for path in folder.glob("*.yaml")}
        found |= {path.parent.name: path for path in folder.glob("*/recipe.yaml")}
        if found:
            return dict(sorted(found.items()))
    raise RecipeError(f"expected recipes in {_PACKAGE / 'recipes'}, found none; install hf_mtcompress again")


def headline(path: Path) -> str:
    """The first line of a recipe file, which says what it is about."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def copy_example(name: str, folder: Path) -> Path:
    """Copy a recipe, with the scripts that belong to it, to change it.

    Args:
        name: one of `example_recipes`.
        folder: gets NAME.yaml, or NAME with several files; made where it is missing.

    Returns:
        The copied recipe.

    Raises:
        RecipeError: there is no such recipe, or something of its name is there already.
    """
    recipes = example_recipes()
    if name not in recipes:
        raise RecipeError(f"expected the name of a recipe, found '{name}'; {near(name, list(recipes))}")
    recipe = recipes[name]
    alone = recipe.stem == name
    source = recipe if alone else recipe.parent
    target = folder / source.name
    if target.exists():
        raise RecipeError(f"expected no '{source.name}' in {folder}, found one; choose another folder")
    copied = [recipe] if alone else [path for path in sorted(source.iterdir()) if path.suffix in _CARRIED]
    for path in copied:
        place = folder / path.relative_to(source.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return folder / recipe.relative_to(source.parent)
