"""Tasks about an image."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

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

    def encode(self, inputs: Sequence[Sequence[Any]], processor: Any, max_length: int | None) -> dict[str, list[Any]]:
        pixels = processor([image.convert("RGB") for image in inputs[0]], return_tensors="np")["pixel_values"]
        return {"pixel_values": list(pixels)}


register_task(ImageClassification.kind, ImageClassification)
