"""What a model takes, read off its own forward: nobody has to know by which names."""

import inspect
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from hf_mtcompress.errors import UnsupportedEncoderError

_PIXELS = "pixel_values"
_DATA = (_PIXELS, "bbox", "image", "visual_embeds", "visual_feats", "input_values", "input_features")
"""Names under which encoders take what is not made of a text: pixels, places on a page, sound."""


@cache
def input_names(model_class: type[PreTrainedModel]) -> tuple[str, ...]:
    """Names of the arguments that the forward of a model spells out."""
    arguments = list(inspect.signature(model_class.forward).parameters.values())[1:]
    return tuple(item.name for item in arguments if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD))


def taken_by(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the inputs that a stock model takes: a tokenizer may make more of them."""
    names = input_names(type(model))
    return {name: value for name, value in inputs.items() if name in names}


def left_out(model_class: type[PreTrainedModel], made: Collection[str]) -> list[str]:
    """What a model takes of the data themselves beside the inputs that are made: pictures and places beside texts."""
    return [name for name in input_names(model_class) if name in _DATA and name not in made]


def check_everything_is_read(model_class: type[PreTrainedModel], made: Collection[str]) -> None:
    """Make sure that a graph, whose inputs are fixed, has all of its encoder's.

    Raises:
        UnsupportedEncoderError: the reader does not make all of them.
    """
    if found := left_out(model_class, made):
        raise UnsupportedEncoderError(
            f"expected all inputs of {model_class.__name__}, found none for {', '.join(found)}: its graph would answer "
            f"from {', '.join(made)} alone; use the torch folder, or an encoder that reads nothing else"
        )


def check_repeatable(encoder: PreTrainedModel) -> None:
    """Make sure that an encoder of pictures says the same of a picture twice.

    Raises:
        UnsupportedEncoderError: it does not, as ViT-MAE, which hides three quarters of a picture at random.
    """
    side, channels = (getattr(encoder.config, name, None) for name in ("image_size", "num_channels"))
    if encoder.main_input_name != _PIXELS or not isinstance(side, int) or encoder.device.type == "meta":
        return
    picture = torch.linspace(-1, 1, side * side, device=encoder.device, dtype=encoder.dtype).reshape(1, 1, side, side)
    training, own = encoder.training, [] if encoder.device.type == "cpu" else [encoder.device]
    try:
        with torch.no_grad(), torch.random.fork_rng(own):
            encoder.eval()
            once, again = (encoder(picture.expand(1, channels or 3, side, side))[0] for _ in range(2))
    except Exception:  # whatever a forward pass may raise, the first step of a training raises again
        return
    finally:
        encoder.train(training)
    if not torch.allclose(once.float(), again.float(), rtol=1e-2, atol=1e-2):
        masked = getattr(encoder.config, "mask_ratio", None)
        raise UnsupportedEncoderError(
            f"expected an encoder that says the same of a picture twice, found {type(encoder).__name__}, which does not"
            + (
                f": it hides {masked:.0%} of each at random; save its weights as a ViT and give that folder: "
                "ViTModel.from_pretrained(PATH, add_pooling_layer=False).save_pretrained(FOLDER)"
                if masked
                else "; give another"
            )
        )


def check_picture_size(config: PreTrainedConfig, inputs: Mapping[str, Tensor], **options: Any) -> None:
    """Make sure, before anything is trained, that an encoder has places for pictures of a size.

    Args:
        config: of the encoder; nothing of its weights is read.
        inputs: a batch as a reader makes it; without pixels there is nothing to check.
        **options: for `AutoModel.from_config`.

    Raises:
        UnsupportedEncoderError: it has not; the message names the size that it takes.
    """
    side = getattr(config, "image_size", None)
    if _PIXELS not in inputs or not isinstance(side, int):
        return
    *shape, height, width = inputs[_PIXELS].shape
    if (height, width) == (side, side):
        return
    with torch.device("meta"):
        encoder = AutoModel.from_config(config, **options).eval()
    if not _takes(encoder, [*shape, height, width]) and _takes(encoder, [*shape, side, side]):
        raise UnsupportedEncoderError(
            f"expected pictures of {side} x {side} pixels, for which this {config.model_type} has learned places, "
            f"found {height} x {width}; set image_size to {side}"
        )


def _takes(encoder: PreTrainedModel, shape: list[int]) -> bool:
    try:
        with torch.no_grad():
            encoder(pixel_values=torch.empty(shape, device="meta"))
    except Exception:  # whatever a forward pass may raise
        return False
    return True
