"""Tasks about an image."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from hf_mtcompress.tasks.base import register_task
from hf_mtcompress.tasks.classification import Classification


@dataclass
class ImageClassification(Classification):
    """One label, several labels or a number for an image.

    Args:
        image: column with PIL images.
    """

    kind: ClassVar[str] = "image-classification"
    columns: ClassVar[tuple[str, ...]] = ("label", "image")

    _: KW_ONLY
    image: str | None = None

    @property
    def auto_class(self) -> str:
        return "AutoModelForImageClassification"

    @property
    def pipeline(self) -> str:
        return "image-classification"

    @property
    def input_columns(self) -> tuple[str, ...]:
        return (self.image,) if self.image is not None else ()


register_task(ImageClassification.kind, ImageClassification)
