"""One width for all feed-forward parts, so that a stock config can say it and plain transformers loads the model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_mtcompress.compression.importance import Scores
from hf_mtcompress.compression.selection import Kept
from hf_mtcompress.model.surgery import expresses_width, is_vanilla


def select_one_width(
    encoder: PreTrainedModel, scores: Scores, fits: Callable[[int], bool], multiple_of: int
) -> tuple[Kept, Kept]:
    """All heads, and as many neurons in every layer as fit and the encoder's config can express.

    Args:
        encoder: whose layers are alike.
        scores: of its parts.
        fits: whether a width is small enough.
        multiple_of: widths are multiples of this, or what there is.

    Raises:
        ValueError: layers have unlike widths already, or nothing fits.
    """
    widths = sorted({len(values) for values in scores.feed_forward})
    if len(widths) > 1 or not is_vanilla(encoder):
        raise ValueError(
            f"shape: expected layers that are alike with shape 'vanilla', found one cut unevenly, of widths {widths}; "
            "start from the model before that, or say shape 'free'"
        )
    steps = [*range(multiple_of, widths[0], multiple_of), widths[0]]
    width = next((size for size in reversed(steps) if fits(size) and expresses_width(encoder, size)), None)
    if width is None:
        raise ValueError(
            f"shape: expected an amount that leaves {steps[0]} or more of {widths[0]} neurons in every layer, and all "
            f"heads, in a width that {type(encoder.config).__name__} can express, found more to remove; remove layers "
            "too, or less"
        )
    heads = {layer: list(range(len(values))) for layer, values in enumerate(scores.heads)}
    return heads, select_uniform(scores.feed_forward, width)


def select_uniform(scores: Sequence[Tensor], width: int) -> Kept:
    """The `width` neurons with the highest scores of every layer, of neurons that are alike the first.

    Args:
        scores: by layer, of shape (neurons,).
        width: 1 or more, and at most what each layer has.
    """
    order = {layer: torch.sort(values, descending=True, stable=True).indices for layer, values in enumerate(scores)}
    return {layer: sorted(ranked[:width].tolist()) for layer, ranked in order.items()}
