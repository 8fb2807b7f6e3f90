"""One width for all feed-forward parts, so that a stock config can say it and plain transformers loads the model."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_mtcompress.compression.importance import Scores
from hf_mtcompress.compression.selection import Kept
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.surgery import expresses_width, is_vanilla, keep_layers


def check_vanilla(encoder: PreTrainedModel, kept_layers: Sequence[int]) -> None:
    """Refuse an encoder that plain transformers could not load with these of its layers alone.

    Raises:
        ValueError: it was cut unevenly, or its config cannot say what these layers are (ModernBERT's attends globally
            in every third one).
    """
    if not is_vanilla(encoder):
        raise ValueError(
            f"shape: expected layers that are alike with shape 'vanilla', found {type(encoder).__name__} cut unevenly; "
            "start from the model before that, or say shape 'free'"
        )
    if len(kept_layers) == len(find_anatomy(encoder).layers):
        return
    trial = copy.deepcopy(encoder)
    keep_layers(trial, list(kept_layers))
    if not is_vanilla(trial):
        raise ValueError(
            f"shape: expected layers that {type(encoder.config).__name__} can express with shape 'vanilla', found "
            f"{list(kept_layers)} as those to keep; remove another number of layers, or say shape 'free'"
        )


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
        ValueError: nothing fits.
    """
    (before,) = {len(values) for values in scores.feed_forward}
    steps = [*range(multiple_of, before, multiple_of), before]
    width = next((size for size in reversed(steps) if fits(size) and expresses_width(encoder, size)), None)
    if width is None:
        raise ValueError(
            f"shape: expected an amount that leaves {steps[0]} or more of {before} neurons in every layer, and all "
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
