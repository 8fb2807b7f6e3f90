"""docs/recipe.md is in step with the config classes."""

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from hf_mtcompress import recipe
from hf_mtcompress.recipe.tasks import PRIMARY_METRICS

SCRIPT = Path(__file__).parents[2] / "docs/make_reference.py"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_in_step(reference: ModuleType):
    """A key that was renamed would still be documented, and nobody could use the new one."""
    page = reference.PAGE.read_text(encoding="utf-8")
    assert reference.render(page) == page, "run: make docs"


def test_every_section_has_a_table(reference: ModuleType):
    sections = {getattr(recipe, name) for name in recipe.__all__}
    documented = {cls for cls, _ in reference.TABLES.values()}
    assert {section for section in sections if dataclasses.is_dataclass(section)} <= documented


def test_every_key_has_a_meaning(reference: ModuleType):
    for name, (cls, _) in reference.TABLES.items():
        missing = {field.name for field in dataclasses.fields(cls)} - set(reference.meanings(cls))
        assert not missing, f"{name}: write what {missing} mean, below the field"


def test_metrics_are_named(reference: ModuleType):
    page = reference.PAGE.read_text(encoding="utf-8")
    words = set(re.findall(r"`([a-z0-9_]+)`", page))
    assert {metric for names in PRIMARY_METRICS.values() for metric in names} <= words
