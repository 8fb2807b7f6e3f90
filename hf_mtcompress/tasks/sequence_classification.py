"""Tasks about a text or a pair of texts."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

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


register_task(SequenceClassification.kind, SequenceClassification)
