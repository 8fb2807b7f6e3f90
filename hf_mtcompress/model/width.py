"""Hidden states of fewer numbers, in a shape that the stock class itself builds.

Everything that reads or writes hidden states is cut: embeddings, norms, projections, feed-forward parts, heads. Which
dimension of which weight that is, the stock class says: it is built once more from a config of the wanted width, and
where its shapes differ, hidden states are meant. Heads keep their size, so a model loses heads as it loses width; where
the config ties feed-forward parts to the width (DINOv2), neurons go too.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.anatomy import Anatomy, encoder_of, find_anatomy
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.marking import write_mark
from hf_mtcompress.model.modeling import MultiTaskModel, align_weights
from hf_mtcompress.model.surgery import cut, is_vanilla

_HEAD_FIELDS = ("hidden_size", "num_attention_heads")
_FOLLOWING_FIELDS = ("pooler_hidden_size", "embedding_size")
"""Fields that some families have beside the width, and that must equal it where they do."""


def narrower_anatomy(encoder: PreTrainedModel, width: int) -> Anatomy:
    """What the stock class builds for hidden states of `width` numbers; weights are on the meta device.

    Args:
        encoder: whose layers are alike.
        width: numbers that are left: fewer than there are, and a multiple of the size of a head.

    Raises:
        ValueError: the width is none of these.
        UnsupportedEncoderError: layers differ, or the config cannot express it.
    """
    with torch.device("meta"):
        return find_anatomy(type(encoder)(_narrower_config(encoder, width)))


def cut_width(
    model: PreTrainedModel,
    kept: Sequence[int],
    heads: Mapping[int, Sequence[int]],
    feed_forward: Mapping[int, Sequence[int]] | None = None,
) -> PreTrainedModel:
    """A copy of a model whose hidden states have the numbers at `kept` alone; it loads with plain transformers.

    Args:
        model: a `MultiTaskModel` with one encoder, or a stock model; left as it is.
        kept: different places in the hidden states, counted from 0; a multiple of the size of a head.
        heads: by layer, which heads are left: `len(kept)` / size of a head of them.
        feed_forward: by layer, which neurons are left, where `narrower_anatomy` has fewer.

    Raises:
        ValueError: places, heads or neurons are not those that are wanted.
        UnsupportedEncoderError: the stock class has no such shape.
    """
    source = copy.deepcopy(model)
    encoder = source.encoder if isinstance(source, MultiTaskModel) else encoder_of(source)
    whole = find_anatomy(encoder).hidden_size
    if len(set(kept)) != len(kept) or not set(kept) <= set(range(whole)):
        raise ValueError(f"expected different places among 0 to {whole - 1} of the hidden states, found {list(kept)}")
    target = narrower_anatomy(encoder, len(kept))
    config = _narrower_config(encoder, len(kept))
    cut(encoder, heads, feed_forward)
    for index, (found, wanted) in enumerate(zip(find_anatomy(encoder).layers, target.layers, strict=True)):
        sizes = [(layer.attention.heads, layer.feed_forward.width) for layer in (found, wanted)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"expected {sizes[1][0]} heads and {sizes[1][1]} neurons to be left in layer {index} at a width of "
                f"{len(kept)}, found {sizes[0][0]} and {sizes[0][1]}"
            )
    narrow = _build(source, config)
    places = torch.tensor(kept, device=encoder.device)
    before, after = source.state_dict(), narrow.state_dict()
    if before.keys() != after.keys():
        raise UnsupportedEncoderError(
            f"{type(encoder).__name__}: expected the same weights at a width of {len(kept)}, found "
            f"{sorted(before.keys() ^ after.keys())[:3]} in one of both shapes only; choose another width"
        )
    state = {name: _select(name, value, after[name].shape, places, whole) for name, value in before.items()}
    narrow.load_state_dict(state)
    narrow.tie_weights()
    nn.Module.to(narrow, device=encoder.device, dtype=encoder.dtype)
    if isinstance(narrow, MultiTaskModel) and isinstance(source, MultiTaskModel):
        narrow.tasks = dict(source.tasks)
        narrow.refresh_config()
    align_weights(narrow)
    return narrow.train(model.training)


def _narrower_config(encoder: PreTrainedModel, width: int) -> PreTrainedConfig:
    config, anatomy = encoder.config, find_anatomy(encoder)
    size = anatomy.layers[0].attention.head_size
    if anatomy.head_bias_total is not None:
        raise UnsupportedEncoderError(
            f"{type(encoder).__name__}: expected layers with heads of their own to cut hidden states, found a bias for "
            "each head that all layers share; remove heads, neurons or layers"
        )
    if not is_vanilla(encoder):
        raise UnsupportedEncoderError(
            f"{type(encoder).__name__}: expected layers that are alike to cut hidden states, found it cut unevenly; "
            "start from the model before that"
        )
    if not 0 < width < anatomy.hidden_size or width % size:
        raise ValueError(
            f"expected a width from {size} to below {anatomy.hidden_size} in multiples of {size}, the size of a head, "
            f"found {width}"
        )
    narrow = copy.deepcopy(config)
    for field in _FOLLOWING_FIELDS:
        if getattr(config, field, None) == anatomy.hidden_size and field in config.to_dict():
            setattr(narrow, field, width)
    for field, value in zip(_HEAD_FIELDS, (width, width // size), strict=True):
        setattr(narrow, field, value)
    return narrow


def _build(model: PreTrainedModel, encoder_config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class and heads around an encoder of another shape; its weights mean nothing yet."""
    config = copy.deepcopy(model.config)
    write_mark(config, None)
    if isinstance(config, MultiTaskConfig):
        config.encoders = {"main": encoder_config.to_dict()}
        config.structure = {}
    else:
        for field in (*_HEAD_FIELDS, *_FOLLOWING_FIELDS):
            if field in (*config.to_dict(), *config.attribute_map):
                setattr(config, field, getattr(encoder_config, field))
    return cast(Any, type(model))(config)


def _select(name: str, value: Tensor, shape: torch.Size, places: Tensor, whole: int) -> Tensor:
    for dimension, (before, after) in enumerate(zip(value.shape, shape, strict=True)):
        if before == after:
            continue
        blocks = before // whole
        if before % whole or after != blocks * len(places):
            raise UnsupportedEncoderError(
                f"expected '{name}' to change from {whole} to {len(places)} with the hidden states, found a change "
                f"from {before} to {after}; cut another model, or heads and neurons alone"
            )
        # DINOv2's head reads two of them side by side.
        every = torch.cat([places + block * whole for block in range(blocks)])
        value = value.index_select(dimension, every)
    return value
