"""What is shipped: the wheel's content, the public names, the command."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "hf_mtcompress"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from this checkout, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file).namelist()


def test_wheel_holds_code_templates_and_recipes(wheel: list[str]):
    """A template that stays behind fails only on the machine of a user."""
    for folder, pattern in ((PACKAGE, "*.py"), (PACKAGE / "publishing/templates", "*")):
        expected = [path for path in folder.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts]
        assert expected, folder
        missing = {str(path.relative_to(REPOSITORY)) for path in expected} - set(wheel)
        assert not missing
    recipes = sorted((REPOSITORY / "recipes").rglob("*.yaml"))
    assert len(recipes) >= 4
    assert {f"hf_mtcompress/{path.relative_to(REPOSITORY)}" for path in recipes} <= set(wheel)
    assert "hf_mtcompress/py.typed" in wheel


def test_wheel_holds_nothing_else(wheel: list[str]):
    """Prepared data, runs and tests would be shipped to everybody."""
    ours = [name for name in wheel if ".dist-info/" not in name]
    assert all(name.startswith("hf_mtcompress/") for name in ours)
    assert not [name for name in ours if name.endswith((".jsonl", ".safetensors", ".pyc", ".onnx"))]


def _has_docstring(name: str, module: Path) -> bool:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node) is not None
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return True
    return False


def test_public_names_exist_and_are_documented():
    """`__all__` of every package: each name is imported from a module that defines and describes it."""
    packages = [path for path in PACKAGE.rglob("__init__.py") if "__all__" in path.read_text(encoding="utf-8")]
    assert PACKAGE / "recipe/__init__.py" in packages
    for init in packages:
        tree = ast.parse(init.read_text(encoding="utf-8"))
        origin = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        public = next(
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
        )
        assert len(public) == len(set(public))
        for name in public:
            if name not in origin:
                continue  # defined in the `__init__` itself, such as `__version__`
            source, defined = origin[name]
            module = REPOSITORY / f"{source.replace('.', '/')}.py"
            if module.exists():
                assert _has_docstring(defined, module), f"{name} of {source} has no docstring"
            else:  # passed on by another package, whose own `__all__` is looked at too
                module = REPOSITORY / source.replace(".", "/") / "__init__.py"
                assert f'"{defined}"' in module.read_text(encoding="utf-8"), f"{defined} is not public in {source}"


def test_every_version_bound_has_its_reason():
    """A bound whose reason nobody knows is never lifted."""
    lines = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    head = lines[: next(index for index, line in enumerate(lines) if line.startswith("[tool."))]
    bounds = [line for line in head if any(f"{sign}" in line.split("#")[0] for sign in (">=", "<", "==", "~="))]
    assert len(bounds) >= 5
    assert not [line for line in bounds if "#" not in line]
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert pins[0].startswith("#")


def test_command_is_declared():
    assert PROJECT["project"]["scripts"] == {"hf-mtcompress": "hf_mtcompress.cli:main"}
