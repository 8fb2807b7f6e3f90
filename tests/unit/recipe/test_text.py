"""YAML as recipes need it."""

from typing import Any

import pytest

from hf_mtcompress.recipe.text import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-5", 3e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-2", -2),
        ("012", 12),
        ("0x1f", 31),
        ("true", True),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("2024-01-31", "2024-01-31"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("'3e-5'", "3e-5"),
    ],
)
def test_plain_values(text: str, value: Any):
    """YAML 1.1 reads 3e-5 as text, and the labels `yes` and `no` as booleans that match no row."""
    found = read_yaml(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_written_text_reads_back_the_same():
    data = {"words": ["yes", "1e5", "3", "null", "12:30", "", "é", "a\nb"], "numbers": [3e-5, 1, True, None], "s": {}}
    assert read_yaml(write_yaml(data)) == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' is written twice in one section"),
        ("a: {b: 1, b: 1}", "line 1, column 11: the key 'b' is written twice in one section"),
        ("a: [1", "line 1, column 6"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_bad_text(text: str, message: str):
    """PyYAML keeps the last of two equal keys without a word."""
    with pytest.raises(ValueError, match=message):
        read_yaml(text)


def test_sections_can_be_shared():
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}")["b"] == {"x": 1, "y": 3}
