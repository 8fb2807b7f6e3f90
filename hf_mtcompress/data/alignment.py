"""Which word or character each token of a text begins at.

So that labels of words find their tokens, and what one model says of a token reaches a model that reads the text in
other pieces. A list of words is read as the text that it makes, joined by spaces: tokenizers take a word and its space
together (byte-level BPE, Unigram), and a text is to be read alike whoever reads it.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_mtcompress.errors import DataError

Text = str | Sequence[str]
"""A text as such, or as a list of its words."""
Start = tuple[int, int]
"""Part of the input (0, or 1 for the second text), and first character."""


def as_text(row: Any) -> str:
    """A text as a tokenizer reads it.

    Raises:
        DataError: it is neither a text nor a list of words.
    """
    if isinstance(row, str):
        return row
    # Not any sequence or mapping: the keys of a record are no words.
    words = list(row) if isinstance(row, list | tuple | np.ndarray) else None
    wrong = [row] if words is None else [word for word in words if not isinstance(word, str)]
    if wrong:
        where = "" if words is None else " among its words"
        raise DataError(
            f"expected a text or a list of words, found {wrong[0]!r}{where}; convert or leave out such rows"
        )
    return " ".join(words or [])


def words_of(row: Text) -> list[str]:
    """Its words; of a text, what stands between white space."""
    return row.split() if isinstance(row, str) else list(row)


def read_with_starts(
    texts: Sequence[Sequence[str]], processor: Any, max_length: int | None
) -> tuple[dict[str, list[Any]], list[list[Start | None]]]:
    """Model inputs, and where each token begins.

    Args:
        texts: one sequence of texts for each input column.
        processor: a fast tokenizer.
        max_length: longest input in tokens.

    Returns:
        Inputs as the tokenizer gives them, and for each row one start a token, None for special tokens.

    Raises:
        DataError: the tokenizer does not say where tokens begin.
    """
    if not getattr(processor, "is_fast", False):
        raise DataError(
            f"expected a fast tokenizer, which says where tokens begin, found {type(processor).__name__}; load or save "
            "the fast one (tokenizer.json)"
        )
    encoded = processor(*texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
    starts = []
    for row, offsets in enumerate(encoded["offset_mapping"]):
        found: list[Start | None] = []
        for part, (first, last) in zip(encoded.sequence_ids(row), offsets, strict=True):
            if part is None:
                found.append(None)
                continue
            piece = str(texts[part][row])[first:last]
            # Some tokenizers count the space before a word to its first piece.
            found.append((part, first + len(piece) - len(piece.lstrip())))
        starts.append(found)
    return {key: value for key, value in encoded.items() if key != "offset_mapping"}, starts


def words_of_tokens(row: Text, starts: Sequence[Start | None]) -> list[int | None]:
    """The word of the first text that each token begins in; None for all others."""
    spans = _word_spans(row)
    firsts = [first for first, _ in spans]
    found: list[int | None] = []
    for start in starts:
        word = -1 if start is None or start[0] > 0 else bisect_right(firsts, start[1]) - 1
        found.append(word if start is not None and word >= 0 and start[1] < spans[word][1] else None)
    return found


def _word_spans(row: Text) -> list[tuple[int, int]]:
    """First character of each word in `as_text(row)`, and the one behind its last."""
    if isinstance(row, str):
        return [word.span() for word in re.finditer(r"\S+", row)]
    spans, first = [], 0
    for word in row:
        spans.append((first, first + len(word)))
        first += len(word) + 1
    return spans


def aligned(student: Sequence[Start | None], teacher: Sequence[Start | None]) -> list[int]:
    """For each token of the student the teacher's token that begins at the same character, -1 where none does.

    The first special token stands for the whole input in both.
    """
    places = {start: token for token, start in reversed(list(enumerate(teacher))) if start is not None}
    found = [-1 if start is None else places.get(start, -1) for start in student]
    if student and teacher and student[0] is None and teacher[0] is None:
        found[0] = 0
    return found
