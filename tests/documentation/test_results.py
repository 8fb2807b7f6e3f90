"""The README's table is that of the record it links to."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from hf_mtcompress.publishing.lint import lint_card

SCRIPT = Path(__file__).parents[2] / "docs/make_results.py"


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_results", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_made_from_the_record(results: ModuleType) -> None:
    """A number typed by hand would outlive the run that it came from."""
    page = results.PAGE.read_text(encoding="utf-8")
    assert results.render(page, results.shown_record()) == page, "run: python docs/make_results.py"


def test_the_card_shown_holds_no_number_of_its_own(results: ModuleType) -> None:
    text = (results.SHOWN / "README.md").read_text(encoding="utf-8")
    assert lint_card(text, results.SHOWN, results.shown_record()) == []
