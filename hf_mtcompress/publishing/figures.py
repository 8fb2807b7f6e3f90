"""The only way a number gets into a card: through `Figures`, which refuses what the record does not hold.

Each method turns one number of the record (or the quotient of two) into text and remembers the text. The linter then
looks up every number that it finds in a card among the remembered ones and among the strings of the record.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from hf_mtcompress.publishing import markup
from hf_mtcompress.records import RunRecord
from hf_mtcompress.records.timing import BUSY

NOT_MEASURED = "not measured"
NOT_TIMED = f"{NOT_MEASURED}: {BUSY}"
"""In place of a time that does not hold together with what else is known of the machine and of other times."""

_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_CODE = re.compile(r"^```(?:python|bash|yaml|console)\n.*?^```$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_TARGET = re.compile(r"\]\([^)\s]*\)")
OWN_WORDS_BEGIN = "<!-- own words: begin -->"
OWN_WORDS_END = "<!-- own words: end -->"
NO_OWN_WORDS = "<!-- Text between these two marks is kept when the card is written again. -->"
_OWN_WORDS = re.compile(re.escape(OWN_WORDS_BEGIN) + r"(.*?)" + re.escape(OWN_WORDS_END), re.DOTALL)


def numbers_in(text: str) -> list[str]:
    """Every number of a card that claims something, in order and as written.

    Left out: the front matter, code a reader would run, comments, link targets, the author's own words (between their
    two marks), and digits that belong to a word such as int8.
    """
    text = _FRONT_MATTER.sub("", text)
    for pattern in (_OWN_WORDS, _CODE, _COMMENT, _TARGET):
        text = pattern.sub(" ", text)
    return [match.group().lstrip("+") for match in _NUMBER.finditer(text)]


def without_own_words(text: str) -> str:
    """The card without what stands between the marks of the author's own words."""
    return _OWN_WORDS.sub("", text)


def own_words_of(text: str) -> str | None:
    """What an author wrote between the marks of a card, or None where there is nothing."""
    found = _OWN_WORDS.search(text)
    return (found.group(1).replace(NO_OWN_WORDS, "").strip() or None) if found else None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield len(value)
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        yield len(value)
        for item in value:
            yield from _leaves(item)
    else:
        yield value


class Figures:
    """Numbers of one record, as text.

    Args:
        record: what a number must stand in; how many items a list or dict of it has counts as standing in it.
    """

    def __init__(self, record: RunRecord) -> None:
        values = dataclasses.asdict(record)
        for step in values["steps"]:
            # Digests: the digits that many of them begin with are no figures.
            del step["fingerprint"], step["inputs"], step["files"]
        leaves = list(_leaves(values))
        self._numbers = {float(leaf) for leaf in leaves if isinstance(leaf, int | float) and not isinstance(leaf, bool)}
        self.allowed: set[str] = set()
        """Every number printed so far and every number inside a string of the record."""
        for leaf in leaves:
            if isinstance(leaf, str):
                self.allowed.update(numbers_in(leaf))

    def _print(self, text: str, *values: float) -> str:
        for value in values:
            if float(value) not in self._numbers:
                raise ValueError(
                    f"expected a number that stands in the record, found {value!r} for '{text}'; add it to the record"
                )
        self.allowed.update(numbers_in(text))
        return text

    def plain(self, value: float | None) -> str:
        """The number itself, six significant digits."""
        if value is None or not math.isfinite(value):
            return NOT_MEASURED
        if isinstance(value, int) and abs(value) < 10_000:
            return self._print(str(value), value)
        return self.count(value) if isinstance(value, int) else self._print(f"{value:.6g}", value)

    def count(self, value: float | None) -> str:
        """A number of things, with thousands set apart."""
        return NOT_MEASURED if value is None else self._print(f"{value:,.0f}", value)

    def score(self, value: float | None) -> str:
        """A metric, three decimals."""
        return NOT_MEASURED if value is None else self._print(f"{value:.3f}", value)

    def difference(self, value: float | None) -> str:
        """A difference of two metrics with its sign, three decimals."""
        return NOT_MEASURED if value is None else self._print(f"{value:+.3f}", value)

    def cosine(self, value: float | None) -> str:
        """A cosine with its sign, two decimals."""
        return NOT_MEASURED if value is None else self._print(f"{value:+.2f}", value)

    def length(self, value: float | None) -> str:
        """A number of any size, three significant digits."""
        return NOT_MEASURED if value is None else self._print(f"{value:.3g}", value)

    def percent(self, value: float | None) -> str:
        """A fraction as per cent, one decimal."""
        return NOT_MEASURED if value is None else self._print(f"{100 * value:.1f} %", value)

    def megabytes(self, value: float | None) -> str:
        """Bytes as 10**6 bytes, one decimal."""
        return NOT_MEASURED if value is None else self._print(f"{value / 1e6:.1f} MB", value)

    def parameters(self, value: float | None) -> str:
        """Parameters, in millions from one million on."""
        if value is None:
            return NOT_MEASURED
        return self._print(f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:,.0f}", value)

    def milliseconds(self, value: float | None) -> str:
        """A time in milliseconds, two decimals below ten."""
        if value is None:
            return NOT_MEASURED
        return self._print(f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms", value)

    def duration(self, value: float | None) -> str:
        """Seconds, as minutes from two minutes on."""
        if value is None:
            return NOT_MEASURED
        return self._print(f"{value / 60:.1f} min" if value >= 120 else f"{value:.1f} s", value)

    def times(self, numerator: float | None, denominator: float | None) -> str:
        """How often one number holds another, one decimal and two below ten."""
        if numerator is None or not denominator:
            return NOT_MEASURED
        quotient = numerator / denominator
        return self._print(f"{quotient:.2f}" if quotient < 10 else f"{quotient:.1f}", numerator, denominator)

    def times_faster(self, ratio: float | None) -> str:
        """1 / ratio of two times, one decimal and two below ten."""
        if not ratio:
            return NOT_MEASURED
        return self._print(f"{1 / ratio:.2f}" if 1 / ratio < 10 else f"{1 / ratio:.1f}", ratio)

    def text(self, value: str) -> str:
        """A string of the record, in a sentence or a cell."""
        return self._print(markup.text(value))

    def code(self, value: str) -> str:
        """A string of the record, as a code span outside of tables."""
        return self._print(markup.code(value))

    def any(self, value: Any) -> str:
        """Whatever a free-form part of the record holds."""
        if value is None:
            return "not set"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int | float):
            return self.plain(value)
        if isinstance(value, dict):
            return ", ".join(f"{self.text(str(key))} {self.any(item)}" for key, item in value.items()) or "none"
        if isinstance(value, list | tuple):
            return ", ".join(self.any(item) for item in value) or "none"
        return self.text(str(value))
