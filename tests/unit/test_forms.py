"""The table of saved forms against what writes, opens and shows them."""

from typing import get_args

from hf_mtcompress.environment import EXTRAS
from hf_mtcompress.publishing.picture import MARKERS
from hf_mtcompress.recipe import ExportStep, QuantizeStep
from hf_mtcompress.records import FORMS, FormName, form_of_backend


def choices(section: type, key: str) -> set[str]:
    """The words that a key of a recipe allows."""
    found: set[str] = set()
    pending = [section.__annotations__[key]]
    while pending:
        for value in get_args(pending.pop()):
            found.update([value] if isinstance(value, str) else [])
            pending += [] if isinstance(value, str) else [value]
    return found


def test_every_form_is_in_the_table_once():
    """A record names its form by these words: one that the table does not hold could not be opened."""
    assert tuple(FORMS) == get_args(FormName)
    assert all(form.name == name for name, form in FORMS.items())


def test_a_graph_is_told_by_a_file_of_its_own():
    """Two forms with the same settings file could not be told apart."""
    graphs = [form for form in FORMS.values() if form.layout == "graph"]
    assert all(form.graph for form in graphs)
    assert len({form.settings for form in graphs}) == len(graphs)
    assert not any(form.graph for form in FORMS.values() if form not in graphs)


def test_extras_are_those_that_pip_knows():
    wanted = {extra for form in FORMS.values() for extra in (form.extra, *form.extras_to_write) if extra}
    assert wanted <= set(EXTRAS)


def test_what_a_recipe_asks_for_is_a_form():
    """Recipes are checked without the table: the words there are held to it here."""
    assert choices(ExportStep, "formats") - {"transformers_js"} == {"onnx", "openvino", "vanilla"}
    assert choices(ExportStep, "formats") - {"transformers_js"} <= set(FORMS)
    assert choices(QuantizeStep, "backend") == {form.backend for form in FORMS.values() if form.backend}
    assert form_of_backend("onnxruntime").name == "onnx"


def test_every_form_has_a_marker_in_the_picture():
    assert set(MARKERS) == set(FORMS)
    assert len(set(MARKERS.values())) == len(FORMS)
