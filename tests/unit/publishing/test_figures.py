"""A number can only be printed when the record holds it, and is found again in the text."""

import pytest

from hf_mtcompress.publishing.figures import NO_OWN_WORDS, Figures, numbers_in, own_words_of
from tests.unit.publishing.factory import make_record


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("kept 97.1 % of 0.883, lost -0.045 and +0.010", ["97.1", "0.883", "-0.045", "0.010"]),
        ("13,084 rows at 5e-05", ["13,084", "5e-05"]),
        ("int8 b32 f1 `teacher-int8` cc-by-4.0", ["4.0"]),
        ("version 2.13.0.", ["2.13.0"]),
        ("3 to 9 and 640-864", ["3", "9", "640", "864"]),
        ("---\nvalue: 0.5\n---\nx 0.6", ["0.6"]),
        ("a\n```python\nx = 7\n```\nb 8\n```text\n9\n```\n", ["8", "9"]),
        ("[here](assets/1.png) <!-- 2 --> ![alt 3](p.png)", ["3"]),
        ("<!-- own words: begin -->\n4 GPUs\n<!-- own words: end --> 5", ["5"]),
    ],
)
def test_numbers_in(text: str, found: list[str]):
    """A number that the search overlooks is never checked; a word taken for a number blocks a good card."""
    assert numbers_in(text) == found


@pytest.mark.parametrize(
    ("method", "value", "text"),
    [
        ("percent", 0.3, "30.0 %"),
        ("percent", None, "not measured"),
        ("score", 0.7325, "0.733"),
        ("difference", 0.7325, "+0.733"),
        ("megabytes", 14_750_000, "14.8 MB"),
        ("cosine", -0.3, "-0.30"),
        ("cosine", None, "not measured"),
        ("length", 5e-05, "5e-05"),
        ("length", 1227, "1.23e+03"),
        ("parameters", 22_750_000, "22.8 M"),
        ("parameters", 30_000, "30,000"),
        ("milliseconds", 6.25, "6.25 ms"),
        ("milliseconds", 480.0, "480.0 ms"),
        ("duration", 240.0, "4.0 min"),
        ("duration", 12.5, "12.5 s"),
        ("times_faster", 0.1, "10.0"),
        ("times_faster", 0.32, "3.12"),
        ("count", 13084, "13,084"),
        ("plain", 1227, "1227"),
        ("plain", 5e-05, "5e-05"),
        ("plain", 3.0, "3"),
    ],
)
def test_texts(method: str, value: float | None, text: str):
    """A wrong unit or factor is off by powers of ten and looks right."""
    assert getattr(Figures(make_record()), method)(value) == text


def test_quotient_needs_both_numbers():
    """A quotient of something that was never measured would pass for a measurement."""
    figures = Figures(make_record())
    assert figures.times(90_875_000, 14_750_000) == "6.16"
    assert figures.times(None, 14_750_000) == figures.times(90_875_000, 0) == "not measured"
    with pytest.raises(ValueError, match="stands in the record"):
        figures.times(90_875_000, 14_750_001)


def test_foreign_number_is_refused():
    """A number that a template makes up by itself."""
    with pytest.raises(ValueError, match=r"expected a number that stands in the record, found 0.12345"):
        Figures(make_record()).score(0.12345)


def test_strings_of_the_record_do_not_break_tables():
    """A label with a bar in it moves every column to its right."""
    assert Figures(make_record()).text("a|b\nc <d>") == "a\\|b c \\<d>"


def test_own_words():
    """What an author wrote is lost when the card is written again."""
    card = f"x <!-- own words: begin -->\n{NO_OWN_WORDS}\nMine, all <!-- ? --> of 3.\n<!-- own words: end --> y"
    assert own_words_of(card) == "Mine, all <!-- ? --> of 3."
    assert own_words_of(f"x <!-- own words: begin --> {NO_OWN_WORDS} <!-- own words: end -->") is None
    assert own_words_of("no marks") is None
