"""What a model takes, read off its own forward: nobody has to know by which names."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from hf_mtcompress.errors import UnsupportedEncoderError


@cache
def input_names(model_class: type[PreTrainedModel]) -> tuple[str, ...]:
    """Names of the arguments that the forward of a model spells out."""
    arguments = list(inspect.signature(model_class.forward).parameters.values())[1:]
    return tuple(item.name for item in arguments if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD))


def taken_by(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the inputs that a stock model takes: a tokenizer may make more of them."""
    names = input_names(type(model))
    return {name: value for name, value in inputs.items() if name in names}


def check_repeatable(encoder: PreTrainedModel) -> None:
    """Make sure that an encoder of pictures says the same of a picture twice.

    Raises:
        UnsupportedEncoderError: it does not, as ViT-MAE, which hides three quarters of a picture at random.
    """
    side = _side_of(encoder.config)
    if side is None or encoder.device.type == "meta":
        return
    picture = _picture(encoder.config, side, device=encoder.device, dtype=encoder.dtype)
    training, own = encoder.training, [] if encoder.device.type == "cpu" else [encoder.device]
    try:
        with torch.no_grad(), torch.random.fork_rng(own, device_type=encoder.device.type if own else "cuda"):
            encoder.eval()
            once, again = (encoder(**{encoder.main_input_name: picture})[0] for _ in range(2))
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


def check_picture_size(config: PreTrainedConfig, height: int, width: int, **options: Any) -> None:
    """Make sure, before anything is trained, that an encoder has places for pictures of a size.

    Args:
        config: of the encoder; nothing of its weights is read.
        height: in pixels.
        width: in pixels.
        **options: for `AutoModel.from_config`.

    Raises:
        UnsupportedEncoderError: it has not; the message names the size that it takes.
    """
    side = _side_of(config)
    if side is None or (height, width) == (side, side):
        return
    with torch.device("meta"):
        encoder = AutoModel.from_config(config, **options).eval()
    if not _takes(encoder, height, width) and _takes(encoder, side, side):
        raise UnsupportedEncoderError(
            f"expected pictures of {side} x {side} pixels, for which this {config.model_type} has learned places, "
            f"found {height} x {width}; set image_size to {side}"
        )


def _takes(encoder: PreTrainedModel, height: int, width: int) -> bool:
    try:
        with torch.no_grad():
            encoder(**{encoder.main_input_name: _picture(encoder.config, height, width, device="meta")})
    except Exception:  # whatever a forward pass may raise
        return False
    return True


def _side_of(config: PreTrainedConfig) -> int | None:
    """Side of the square pictures that an encoder was made for; None where it says none."""
    side = getattr(config, "image_size", None)
    return side if isinstance(side, int) else None


def _picture(config: PreTrainedConfig, height: int, width: int | None = None, **options: Any) -> Tensor:
    """One picture that is nowhere the same, (1, channels, height, width)."""
    width = height if width is None else width
    values = torch.linspace(-1, 1, height * width, **options).reshape(1, 1, height, width)
    return values.expand(1, getattr(config, "num_channels", 3), height, width)
