"""Tasks about a text or a pair of texts."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from hf_mtcompress.tasks.base import register_task
from hf_mtcompress.tasks.classification import Classification


@dataclass
class SequenceClassification(Classification):
    """One label, several labels or a number for a text or a pair of texts.

    Args:
        text: column with a string, or with a list of words.
        text_pair: column with the second text.

    Example:
        >>> SequenceClassification("mood", text="sentence", label="mood", labels=["calm", "angry"]).num_outputs
        2
    """

    kind: ClassVar[str] = "sequence-classification"
    columns: ClassVar[tuple[str, ...]] = ("label", "text", "text_pair")

    _: KW_ONLY
    text: str | None = None
    text_pair: str | None = None

    @property
    def auto_class(self) -> str:
        return "AutoModelForSequenceClassification"

    @property
    def pipeline(self) -> str:
        return "text-classification"

    @property
    def input_columns(self) -> tuple[str, ...]:
        return tuple(column for column in (self.text, self.text_pair) if column is not None)

    def encode(self, inputs: Sequence[Sequence[Any]], processor: Any, max_length: int | None) -> dict[str, list[Any]]:
        split = len(inputs[0]) > 0 and not isinstance(inputs[0][0], str)
        texts = [[list(row) if split else row for row in column] for column in inputs]
        return dict(processor(*texts, truncation=True, max_length=max_length, is_split_into_words=split))


register_task(SequenceClassification.kind, SequenceClassification)
