"""Imports that are easily overlooked: in functions, under TYPE_CHECKING, and of a folder by what is in it.

import-linter follows the first two, but not the third, and asks nobody for a reason.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hf_mtcompress"
NO_REASON = ("noqa", "pyright:", "type:")


def sources() -> dict[str, str]:
    """The text of every module."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file.read_text(encoding="utf-8")
    return found


def parents(name: str) -> list[str]:
    """`a.b.c`: `a`, `a.b` and itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def names_in(node: ast.AST) -> list[str]:
    """What an import statement asks for; a name from a module counts as one below it."""
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


# ---- circles ----


def imports(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """By module, which others it imports anywhere in its text; with a module come the folders that it is in."""
    found: dict[str, set[str]] = {}
    for module, text in texts.items():
        found[module] = set()
        for name in (name for node in ast.walk(ast.parse(text)) for name in names_in(node)):
            *folders, target = [place for place in parents(name) if place in texts] or [module]
            found[module] |= {target, *(place for place in folders if place not in parents(module))} - {module}
    return found


def circle(texts: Mapping[str, str]) -> str:
    """The first circle, told in the order of imports; empty where there is none."""
    try:
        TopologicalSorter(imports(texts)).prepare()
    except CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return ""


def test_no_circle():
    """A circle that is hidden in a function or under TYPE_CHECKING is one all the same: neither file stands alone."""
    found = circle(sources())
    assert not found, found


@pytest.mark.parametrize(
    "text",
    [
        "from house.two import thing",
        "import house.two",
        "def late():\n    from house import two",
        "if TYPE_CHECKING:\n    from house.two import Thing",
    ],
)
def test_circles_are_seen_wherever_the_import_stands(text: str):
    texts = {"house": "", "house.one": text, "house.two": "import house.three", "house.three": "import house.one"}
    assert circle(texts).count(" imports ") == 3
    assert "house.three imports house.one" in circle(texts)
    assert circle({**texts, "house.three": ""}) == ""


def test_circles_through_a_folder_are_seen():
    texts = {"house": "", "house.room": "import house.room.bed", "house.room.bed": "", "house.door": ""}
    assert circle(texts) == ""
    assert circle({**texts, "house.room.bed": "from house.room import lamp\nimport house.door"})
    assert circle({**texts, "house.room": "import house.door", "house.door": "import house.room.bed"})


# ---- reasons ----


def late_imports(text: str) -> Iterator[list[ast.stmt]]:
    """Imports below the top of a file, those that stand together."""
    for node in ast.walk(ast.parse(text)):
        for part in ("body", "orelse", "finalbody"):
            statements = getattr(node, part, None)
            if isinstance(statements, list) and not isinstance(node, ast.Module):
                yield from (list(group) for late, group in groupby(statements, is_import) if late)


def has_reason(lines: list[str], first: int) -> bool:
    """Whether a comment stands in the line with this number, or above it; TYPE_CHECKING may stand between."""
    comments = re.findall(r"#\s*(.+)", lines[first - 1])
    above = "\n".join(lines[: first - 1])
    comments += re.findall(r"(?:^\s*|TYPE_CHECKING:\s*)#\s*(.+)(?:\nif TYPE_CHECKING:)?\Z", above, re.MULTILINE)
    return any(not comment.startswith(NO_REASON) for comment in comments)


def unexplained(text: str) -> list[str]:
    """Late imports without a reason, neither beside them nor for the file: `# Imported late: NAMES - why`."""
    explained = set(", ".join(re.findall(r"^# Imported late: ([\w., ]+) - \w", text, re.MULTILINE)).split(", "))
    found = []
    for group in late_imports(text):
        if not has_reason(text.splitlines(), group[0].lineno):
            names = [name for node in group for name in names_in(node)]
            found += [name for name in names if not explained & set(parents(name))]
    return found


def test_late_imports_have_a_reason():
    """Without one, nobody knows whether the import hides a circle, or may move to the top."""
    found = {module: names for module, text in sources().items() if (names := unexplained(text))}
    assert not found, f"{found}: say why beside the import, or in the file: # Imported late: NAMES - why"


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("import onnx", []),
        ("def f():\n    import onnx", ["onnx"]),
        ("async def f():\n    if x:\n        from onnx import helper", ["onnx.helper"]),
        ("try:\n    import onnx\nexcept ImportError:\n    pass", ["onnx"]),
        ("def f():\n    import onnx  # noqa", ["onnx"]),
        ("def f():\n    import onnx  # an extra", []),
        ("def f():\n    # An extra.\n    import onnx\n\n    import ours", []),
        ("def f():\n    # An extra.\n    import onnx\n    x = 1\n    import ours", ["ours"]),
        ("if TYPE_CHECKING:\n    import onnx", ["onnx"]),
        ("if TYPE_CHECKING:  # slow to import\n    import onnx", []),
        ("# Slow to import.\nif TYPE_CHECKING:\n    import onnx", []),
        ("# Imported late: ours, onnx - an extra.\ndef f():\n    from onnx.numpy import x", []),
        ("# Imported late: onnx - of ours.\ndef f():\n    import ours", ["ours"]),
        ("# Imported late: onnx\ndef f():\n    import onnx", ["onnx"]),
    ],
)
def test_only_a_comment_is_a_reason(text: str, without: list[str]):
    assert unexplained(text) == without


def named_for_types(text: str) -> list[str]:
    """Modules of ours that are imported under TYPE_CHECKING."""
    guarded = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    names = [name for node in guarded for inner in ast.walk(node) for name in names_in(inner)]
    return [name for name in names if name.split(".")[0] == PACKAGE.name]


def test_own_types_are_imported_openly():
    """Such an import hides a circle; a type that both ends know belongs in a file below both.

    Not at the very top, below which everything else is: there it keeps the start light.
    """
    found = {
        module: names
        for module, text in sources().items()
        if module not in (PACKAGE.name, f"{PACKAGE.name}.cli") and (names := named_for_types(text))
    }
    assert not found


def test_hidden_imports_of_types_are_seen():
    assert named_for_types("import typing\nif typing.TYPE_CHECKING:\n    from hf_mtcompress.records import RunRecord")
    assert not named_for_types("if TYPE_CHECKING:\n    from matplotlib.axes import Axes")
