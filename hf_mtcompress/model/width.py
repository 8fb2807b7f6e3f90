"""Hidden states of fewer numbers, in a shape that the stock class itself builds.

Everything that reads or writes hidden states is cut: embeddings, norms, projections, feed-forward parts, heads. Which
dimension of which weight that is, the stock class says: it is built once more from a config of the wanted width, and
where its shapes differ, hidden states are meant. Heads keep their size, so a model loses heads as it loses width; where
the config ties feed-forward parts to the width (DINOv2 has a ratio), neurons go too.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.anatomy import Anatomy, encoder_of, find_anatomy
from hf_mtcompress.model.base import SharedModel, align_weights
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.surgery import cut, is_vanilla

_FOLLOWING_FIELDS = ("pooler_hidden_size", "embedding_size")
"""Fields that some families have beside the width, and that must equal it where they do."""

_POOLER = "pooler"


def narrower_anatomy(model: PreTrainedModel, width: int) -> Anatomy:
    """What the stock class builds for hidden states of `width` numbers; weights are on the meta device.

    Args:
        model: a `MultiTaskModel` with one encoder, a stock model or an encoder, whose layers are alike.
        width: numbers that are left: fewer than there are, and a multiple of the size of a head.

    Raises:
        ValueError: the width is none of these.
        UnsupportedEncoderError: layers differ, or the stock class has no such shape.
    """
    return find_anatomy(_part(_shell(model, width)))


def cut_width(
    model: PreTrainedModel,
    kept: Sequence[int],
    heads: Mapping[int, Sequence[int]],
    feed_forward: Mapping[int, Sequence[int]] | None = None,
) -> PreTrainedModel:
    """A copy of a model whose hidden states have the numbers at `kept` alone; it loads with plain transformers.

    Args:
        model: a `MultiTaskModel` with one encoder, a stock model or an encoder; left as it is.
        kept: different places in the hidden states, counted from 0; a multiple of the size of a head.
        heads: by layer, which heads are left, as many as `narrower_anatomy` has.
        feed_forward: by layer, which neurons are left, where `narrower_anatomy` has fewer.

    Raises:
        ValueError: places, heads or neurons are not those that are wanted.
        UnsupportedEncoderError: the stock class has no such shape.
    """
    whole = find_anatomy(_part(model)).hidden_size
    if len(set(kept)) != len(kept) or not set(kept) <= set(range(whole)):
        raise ValueError(f"expected different places among 0 to {whole - 1} of the hidden states, found {list(kept)}")
    narrow, source = _shell(model, len(kept)), copy.deepcopy(model)
    cut(_part(source), heads, feed_forward)
    for index, (found, wanted) in enumerate(
        zip(find_anatomy(_part(source)).sizes, find_anatomy(_part(narrow)).sizes, strict=True)
    ):
        if found != wanted:
            raise ValueError(
                f"expected {wanted[0]} heads and {wanted[1]} neurons to be left in layer {index} at a width of "
                f"{len(kept)}, found {found[0]} and {found[1]}"
            )
    places = torch.tensor(kept, device=_part(source).device)
    state, shapes = source.state_dict(), {name: value.shape for name, value in narrow.state_dict().items()}
    narrow.load_state_dict(
        {name: _select(name, state[name], shape, places, whole) for name, shape in shapes.items()}, assign=True
    )
    _take_over(narrow, source)
    return narrow


def _part(model: PreTrainedModel) -> PreTrainedModel:
    return model.encoder if isinstance(model, SharedModel) else encoder_of(model)


def _shell(model: PreTrainedModel, width: int) -> PreTrainedModel:
    """A model of the same class, parts and heads with narrower hidden states, without memory for weights."""
    encoder = _part(model)
    config, encoder_config = copy.deepcopy(model.config), _narrower_config(encoder, width)
    if isinstance(config, MultiTaskConfig):
        config.encoders, config.structure = {"main": encoder_config.to_dict()}, {}
    elif model.config is encoder.config:
        config = encoder_config
    else:
        raise UnsupportedEncoderError(
            f"{type(model).__name__}: expected a model with one config for encoder and head to cut hidden states, "
            "found one for each; make it a MultiTaskModel (from_encoder), or cut the encoder alone"
        )
    with torch.device("meta"):
        narrow: PreTrainedModel = cast(Any, type(model))(config)
    built = _part(narrow)
    before = set(model.state_dict())
    # A pooler that no head reads may be there or not, by how the model came about: without it nothing is lost.
    if not all(isinstance(getattr(one, _POOLER, None), nn.Module) for one in (encoder, built)):
        if hasattr(built, _POOLER):
            setattr(built, _POOLER, None)
        pooler = getattr(encoder, _POOLER, None)
        unread = set(pooler.parameters()) if isinstance(pooler, nn.Module) else set()
        before -= {name for name, weight in model.named_parameters() if weight in unread}
    if before != set(narrow.state_dict()):
        raise UnsupportedEncoderError(
            f"{type(encoder).__name__}: expected the same weights at a width of {width}, found "
            f"{sorted(before ^ set(narrow.state_dict()))[:3]} in one of both shapes only; choose another width"
        )
    size, left = (find_anatomy(one).layers[0].attention.head_size for one in (encoder, built))
    if size != left:
        raise UnsupportedEncoderError(
            f"{type(encoder).__name__}: expected heads of {size} numbers at a width of {width}, found {left}; its "
            "config cannot say such a shape: remove neurons or layers"
        )
    return narrow


def _narrower_config(encoder: PreTrainedModel, width: int) -> PreTrainedConfig:
    config, anatomy = encoder.config, find_anatomy(encoder)
    attention = anatomy.layers[0].attention
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
    if not 0 < width < anatomy.hidden_size or width % attention.head_size:
        raise ValueError(
            f"expected a width from {attention.head_size} to below {anatomy.hidden_size} in multiples of "
            f"{attention.head_size}, the size of a head, found {width}"
        )
    narrow = copy.deepcopy(config)
    for field in _FOLLOWING_FIELDS:
        if getattr(config, field, None) == anatomy.hidden_size and field in config.to_dict():
            setattr(narrow, field, width)
    # Heads that went before (ViT, whose config has a size of heads) do not come back.
    heads = min(width // attention.head_size, attention.heads)
    narrow.hidden_size, narrow.num_attention_heads = width, heads
    if heads * attention.head_size != width:
        cast(Any, narrow).head_dim = attention.head_size
    return narrow


def _take_over(narrow: PreTrainedModel, source: PreTrainedModel) -> None:
    """What a model is beside its weights."""
    buffers, trained = dict(source.named_buffers()), dict(source.named_parameters())
    for name, buffer in list(narrow.named_buffers()):
        if buffer.is_meta:
            owner, _, key = name.rpartition(".")
            narrow.get_submodule(owner)._buffers[key] = buffers[name].clone()
    for name, parameter in narrow.named_parameters():
        parameter.requires_grad_(trained[name].requires_grad)
    narrow.tie_weights()
    if isinstance(narrow, SharedModel) and isinstance(source, SharedModel):
        narrow.tasks = dict(source.tasks)
        narrow.refresh_config()
    kernel = _part(source).config._attn_implementation
    if kernel is not None and _part(narrow).config._attn_implementation != kernel:
        _part(narrow).set_attn_implementation(kernel)
    align_weights(narrow)
    narrow.train(source.training)


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
    return value.detach().clone()
