"""A tiny pass through a model when it is made: what it cannot do is said before it is trained."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_mtcompress.errors import UnsupportedEncoderError, first_line
from hf_mtcompress.model.base import SharedModel

_TOKENS = 6
_PADDING = 3
_MOST = 1e-2
"""Difference of answers, relative to their size, that other kernels may make."""


def check_trainable(model: SharedModel) -> None:
    """Make sure that a model can be saved, and that each of its heads answers a text, alike in any company.

    Raises:
        UnsupportedEncoderError: its encoder is not understood, a head does not run on it, or padding changes answers.
    """
    encoder = model.encoder
    kind = type(encoder).__name__
    try:
        model.refresh_config()
    except UnsupportedEncoderError as error:
        raise UnsupportedEncoderError(
            f"expected an encoder that can be saved once it is trained, found {kind}, whose inside is not understood "
            f"({error}); give another"
        ) from error
    table = encoder.get_input_embeddings()
    # Of few bits or half precision, heads and encoder come to one type later: in autocast, or by the user's own hand.
    if not isinstance(table, nn.Embedding) or encoder.device.type == "meta" or encoder.dtype != torch.float32:
        return
    training = model.training
    own = [] if encoder.device.type == "cpu" else [encoder.device]
    try:
        with torch.no_grad(), torch.random.fork_rng(own, device_type=encoder.device.type if own else "cuda"):
            model.eval()
            alone, padded = _answers(model, table.num_embeddings)
    except Exception as error:
        raise UnsupportedEncoderError(
            f"expected an encoder whose heads answer a text of {_TOKENS} tokens, found that {kind} with the heads of "
            f"{list(model.tasks)} does not ({type(error).__name__}: {first_line(error)}); try head 'linear', or give "
            "another encoder"
        ) from error
    finally:
        model.train(training)
    for name, values in alone.items():
        difference = float((values - padded[name]).abs().max() / (1 + values.abs().max()))
        if difference > _MOST:
            raise UnsupportedEncoderError(
                f"task '{name}': expected the same answer to a text alone and beside a longer one, found that padding "
                f"changes those of {kind} by {difference:.3f}; try head 'linear', or give another encoder"
            )


def _answers(model: SharedModel, vocabulary: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits by task of one text, alone and padded on the right."""
    pad = getattr(model.encoder.config, "pad_token_id", None)
    pad = pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0
    device = model.encoder.device
    ids = torch.arange(_TOKENS, device=device)[None] % max(vocabulary - 1, 1)
    ids = torch.where(ids >= pad, ids + 1, ids) % vocabulary
    padded = nn.functional.pad(ids, (0, _PADDING), value=pad)
    mask = nn.functional.pad(torch.ones_like(ids), (0, _PADDING))
    found = []
    for tokens, counted in ((ids, torch.ones_like(ids)), (padded, mask)):
        inputs: dict[str, Any] = {model.encoder.main_input_name: tokens, "attention_mask": counted}
        output = model(**inputs)
        logits = {name: output[task.logits_name].float() for name, task in model.tasks.items()}
        found.append({name: values[:, :_TOKENS] if values.dim() == 3 else values for name, values in logits.items()})
    return found[0], found[1]
