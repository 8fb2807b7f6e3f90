"""Where the tokens of one tokenizer begin among those of another.

So that what one model says of a word reaches a model that reads the word in other pieces.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_mtcompress.errors import DataError

Start = tuple[int, int, int]
"""Part of the input (0, or 1 for the second text), word (0 where texts are not split into words), first character."""


def token_starts(
    inputs: Sequence[Sequence[Any]], processor: Any, max_length: int | None, *, split: bool
) -> tuple[dict[str, list[Any]], list[list[Start | None]]]:
    """Model inputs, and where each token begins.

    Args:
        inputs: one sequence of texts for each input column; lists of words where `split`.
        processor: a fast tokenizer.
        max_length: longest input in tokens.
        split: whether texts come as lists of words.

    Returns:
        Inputs as the tokenizer gives them, and for each row one start a token, None for special tokens.

    Raises:
        DataError: the tokenizer does not say where tokens begin.
    """
    if not getattr(processor, "is_fast", False):
        raise DataError(
            f"expected a fast tokenizer, which says where tokens begin, found {type(processor).__name__}; save the "
            "teacher with its fast tokenizer (tokenizer.json)"
        )
    encoded = processor(
        *inputs, truncation=True, max_length=max_length, is_split_into_words=split, return_offsets_mapping=True
    )
    starts = []
    for row in range(len(inputs[0])):
        words = encoded.word_ids(row) if split else None
        found: list[Start | None] = []
        parts = zip(encoded.sequence_ids(row), encoded["offset_mapping"][row], strict=True)
        for token, (part, (first, last)) in enumerate(parts):
            word = 0 if words is None else words[token]
            if part is None or word is None:
                found.append(None)
                continue
            text = inputs[part][row][word] if split else inputs[part][row]
            # Some tokenizers count the space before a word to its first piece.
            blank = len(text[first:last]) - len(text[first:last].lstrip())
            found.append((part, word, first + blank))
        starts.append(found)
    return {key: value for key, value in encoded.items() if key != "offset_mapping"}, starts


def aligned(student: Sequence[Start | None], teacher: Sequence[Start | None]) -> list[int]:
    """For each token of the student the teacher's token that begins at the same character, -1 where none does.

    The first special token stands for the whole input in both.
    """
    places = {start: token for token, start in reversed(list(enumerate(teacher))) if start is not None}
    found = [-1 if start is None else places.get(start, -1) for start in student]
    if student and teacher and student[0] is None and teacher[0] is None:
        found[0] = 0
    return found


def columns_of_rows(rows: Mapping[str, Sequence[Any]], columns: Sequence[str], *, split: bool) -> list[list[Any]]:
    """Input columns as lists, texts as lists of words where `split`."""
    return [split_texts(rows[column]) if split else list(rows[column]) for column in columns]


def split_texts(column: Sequence[Any]) -> list[list[str]]:
    """Texts as lists of words."""
    return [row.split() if isinstance(row, str) else list(row) for row in column]
