"""Links lead somewhere, code blocks are code, and what they import and name exists."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from hf_mtcompress.recipe.load import parse_recipe
from hf_mtcompress.recipe.text import read_yaml

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("recipes/**/*.md")])
NAMES = [str(path.relative_to(REPOSITORY)) for path in DOCUMENTS]


def blocks(name: str, language: str) -> list[str]:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """The anchor that a heading gets on the usual hosts."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_documents_are_found():
    assert {"docs/start.md", "docs/concepts.md", "docs/recipe.md", "docs/decisions.md", "CONTRIBUTING.md"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str):
    page = REPOSITORY / name
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):  # other sites are not asked
            continue
        file, _, fragment = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{name} links to {target}"
        if fragment and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in [anchor(heading) for heading in headings], f"{name} links to {target}"


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_compile_and_import_what_exists(name: str):
    """An example with a name that was renamed is worse than none."""
    for block in blocks(name, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hf_mtcompress"):
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{name}: {node.module} has no {missing}"


@pytest.mark.parametrize("name", NAMES)
def test_yaml_blocks_are_recipes(name: str):
    for block in blocks(name, "yaml"):
        data = read_yaml(block)
        if isinstance(data, dict) and "steps" in data and "encoder" in data:
            parse_recipe(data)


def test_a_recipe_is_shown():
    assert any("steps" in block for name in NAMES for block in blocks(name, "yaml"))
