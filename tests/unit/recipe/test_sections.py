"""The tables that the checks stand on cover every field and every task."""

import dataclasses
from typing import Any, get_args, get_type_hints

import pytest

from hf_mtcompress import recipe
from hf_mtcompress.recipe.sections import LIMITS
from hf_mtcompress.recipe.tasks import PRIMARY_METRICS, RESERVED_TASK_NAMES
from hf_mtcompress.tasks import base, metrics

SECTIONS = [
    getattr(recipe, name) for name in recipe.__all__ if dataclasses.is_dataclass(getattr(recipe, name))
]  # fmt: skip


def _types(annotation: Any) -> set[Any]:
    return (
        {annotation}.union(*(_types(part) for part in get_args(annotation))) if get_args(annotation) else {annotation}
    )


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_number_has_limits(section: type):
    """Without limits a negative learning rate would be noticed by nobody."""
    hints = get_type_hints(section)
    numbers = {field.name for field in dataclasses.fields(section) if _types(hints[field.name]) & {int, float}}
    assert numbers <= set(LIMITS), "add the field to LIMITS in hf_mtcompress/recipe/sections.py"


def test_limits_name_fields_that_exist():
    fields = {field.name for section in SECTIONS for field in dataclasses.fields(section)}
    assert set(LIMITS) <= fields


def test_metrics_are_those_that_are_computed():
    """Listed twice because a recipe is checked without torch, so compared here."""
    assert {problem: set(names) for problem, names in PRIMARY_METRICS.items()} == {
        problem: set(names) for problem, names in metrics.PRIMARY_METRICS.items()
    }


def test_reserved_names_are_refused_before_a_task_is_made():
    assert base.RESERVED_NAMES <= RESERVED_TASK_NAMES
