"""Cuts an encoder and rebuilds the cut shape when it is loaded.

The structure of an encoder is plain data, by layer index and role, never by module path:

    {"layers": [{"heads": 6, "feed_forward": 768}, ...], "vocabulary": null}

Two keys appear only where a family needs them: `bias_heads` (which heads are left, for MPNet, whose layers share one
bias per head) and `template` on the first layer (it is built like that layer of the stock class, for ModernBERT, whose
first layer lacks a norm, after that first layer was dropped). The number of layers stands in the encoder's config.

What a stock class can express is written to the config too (layers, a uniform feed-forward width, for ViT and DINOv2
a uniform number of heads), so that the encoder loads with plain transformers. For other shapes the structure itself is
put into the config (see `marking.py`), so that a stock model saves it and loads again after `import hf_mtcompress`.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel

from hf_mtcompress.errors import ArtifactError, UnsupportedEncoderError
from hf_mtcompress.model.anatomy import Anatomy, Layer, encoder_of, find_anatomy
from hf_mtcompress.model.blocks import Constant, EmptyAttention, NoFeatures, SelectHeads
from hf_mtcompress.model.marking import write_mark

_HEAD_COUNT_ATTRIBUTES = ("num_attention_heads", "num_heads", "n_heads")
_LAYER_COUNT_ATTRIBUTES = ("num_hidden_layers", "num_layers", "n_layers")
_WIDTH_FIELDS = ("intermediate_size", "hidden_dim")
_STRUCTURE_KEYS = {"layers", "vocabulary"}
_LAYER_KEYS = {"heads", "feed_forward", "bias_heads", "template"}


def describe_structure(encoder: PreTrainedModel) -> dict[str, Any]:
    """What is left of every layer, as plain data (see the top of this file)."""
    anatomy = find_anatomy(encoder)
    layers: list[dict[str, Any]] = []
    for layer in anatomy.layers:
        entry: dict[str, Any] = {"heads": layer.attention.heads, "feed_forward": layer.feed_forward.width}
        if layer.attention.selection is not None:
            entry["bias_heads"] = list(layer.attention.selection.kept)
        layers.append(entry)
    stock = find_anatomy(_stock(encoder))
    if _other_weights(anatomy.layers[0]) != _other_weights(stock.layers[0]):
        layers[0]["template"] = 1
    return {"layers": layers, "vocabulary": None}


def apply_structure(encoder: PreTrainedModel, structure: Mapping[str, Any] | None) -> None:
    """Give a freshly built `encoder` the shapes of `structure`.

    Meant for loading: works on the meta device, and on weights that are about to be overwritten (the first heads and
    neurons are kept). An empty structure means that nothing was cut.

    Raises:
        ArtifactError: the structure does not fit the encoder.
    """
    if not structure:
        return
    anatomy = find_anatomy(encoder)
    entries = structure.get("layers") or []
    unknown = sorted(set(structure) - _STRUCTURE_KEYS | {key for entry in entries for key in entry} - _LAYER_KEYS)
    if unknown:
        raise ArtifactError(
            f"expected a structure of {_STRUCTURE_KEYS} and {_LAYER_KEYS}, found {unknown}; update hf_mtcompress"
        )
    if len(entries) != len(anatomy.layers):
        raise ArtifactError(
            f"expected a structure of {len(anatomy.layers)} layers as in the config, found {len(entries)}; "
            "the config was changed after the model was saved: restore it"
        )
    if "template" in entries[0]:
        _rebuild_first_layer(encoder, anatomy, entries[0]["template"])
        anatomy = find_anatomy(encoder)
    for index, (layer, entry) in enumerate(zip(anatomy.layers, entries, strict=True)):
        heads, width = entry["heads"], entry["feed_forward"]
        if not (0 <= heads <= layer.attention.heads and 0 <= width <= layer.feed_forward.width):
            raise ArtifactError(
                f"expected at most {layer.attention.heads} heads and {layer.feed_forward.width} neurons in layer "
                f"{index}, as the config says, found {heads} and {width}; the config was changed after the model was "
                "saved: restore it"
            )
        if heads < layer.attention.heads:
            _cut_heads(encoder, anatomy, layer, entry.get("bias_heads", list(range(heads))))
        if width < layer.feed_forward.width:
            _cut_feed_forward(encoder, layer, list(range(width)))


def cut(
    encoder: PreTrainedModel,
    heads: Mapping[int, Sequence[int]] | None = None,
    feed_forward: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Remove attention heads and feed-forward neurons, in place; their gradients are dropped.

    Args:
        encoder: the encoder, with float weights.
        heads: indices of the heads to keep, by layer; layers that are not named keep all.
        feed_forward: indices of the neurons to keep, by layer. An empty list removes the part: its bias is left.

    Raises:
        ValueError: an index is out of range, or given twice.
        UnsupportedEncoderError: the encoder is built in another way, or quantized.
    """
    anatomy = find_anatomy(encoder)
    wanted = [
        ("heads", heads or {}, {index: layer.attention.heads for index, layer in enumerate(anatomy.layers)}),
        (
            "neurons",
            feed_forward or {},
            {index: layer.feed_forward.width for index, layer in enumerate(anatomy.layers)},
        ),
    ]
    for what, kept, sizes in wanted:
        for index, indices in kept.items():
            if index not in sizes:
                raise ValueError(f"expected layers 0 to {len(sizes) - 1}, found layer {index}")
            if len(set(indices)) != len(indices) or not set(indices) <= set(range(sizes[index])):
                raise ValueError(
                    f"expected different {what} of layer {index} among 0 to {sizes[index] - 1}, found {list(indices)}"
                )
    refuse_quantized(encoder, anatomy)
    for index, layer in enumerate(anatomy.layers):
        if heads is not None and index in heads and len(heads[index]) < layer.attention.heads:
            _cut_heads(encoder, anatomy, layer, sorted(heads[index]))
        if feed_forward is not None and index in feed_forward and len(feed_forward[index]) < layer.feed_forward.width:
            _cut_feed_forward(encoder, layer, sorted(feed_forward[index]))
    _write_config(encoder)
    mark_structure(encoder)


def keep_layers(encoder: PreTrainedModel, indices: Sequence[int]) -> None:
    """Keep the layers at `indices` (counted from 0), in their order, and drop the others, in place.

    Raises:
        ValueError: no index, one out of range, or one given twice.
    """
    anatomy = find_anatomy(encoder)
    count = len(anatomy.layers)
    kept = sorted(indices)
    if not kept or len(set(kept)) != len(kept) or not set(kept) <= set(range(count)):
        raise ValueError(f"expected one or more different layers among 0 to {count - 1}, found {list(indices)}")
    if len(kept) == count:
        return
    encoder.set_submodule(anatomy.stack_name, nn.ModuleList([anatomy.stack[index] for index in kept]))
    for module in encoder.modules():
        for attribute in _LAYER_COUNT_ATTRIBUTES:
            if module.__dict__.get(attribute) == count:
                module.__dict__[attribute] = len(kept)
    for position, index in enumerate(kept):
        _set_layer_index(anatomy.stack[index], position)
    _replace_fields(encoder.config, _config_of_layers(encoder.config, kept))
    mark_structure(encoder)


def cut_vocabulary(model: PreTrainedModel, rows: Sequence[int]) -> None:
    """Keep rows of the word embeddings in every encoder of `model`, in place; the new ids are places in `rows`.

    What is tied to an embedding (the output layer of a masked language model) follows, and so do the vocabulary size
    and the ids of special tokens wherever a config or a module holds them. The tokenizer has to give the new ids; see
    `hf_mtcompress.compression.vocabulary`.

    Args:
        model: an encoder, a stock model with a head, or a `MultiTaskModel`.
        rows: present ids by new id.

    Raises:
        ValueError: an id is out of range or given twice, or that of a special token in a config is missing.
        UnsupportedEncoderError: there is no word embedding, its weights are quantized, or the encoder counts positions
            from the id of the padding, which would change.
    """
    encoders = [part for part in model.modules() if isinstance(part, PreTrainedModel) and _reads_words(part)]
    tables = {encoder: _word_embedding(encoder) for encoder in encoders}
    sizes = {table.num_embeddings for table in tables.values()}
    if not sizes:
        raise UnsupportedEncoderError(
            f"{type(model).__name__}: expected an encoder with a word embedding to cut, found none; a vocabulary "
            "can be cut from text encoders only"
        )
    size, new = min(sizes), {old: place for place, old in enumerate(rows)}
    if len(sizes) > 1 or not rows or len(new) < len(rows) or not set(new) <= set(range(size)):
        raise ValueError(
            f"expected one or more different ids of one vocabulary of {' or '.join(map(str, sorted(sizes)))} tokens, "
            f"found {len(rows)} ids, {len(rows) - len(new)} of them twice, the largest being {max(rows, default=None)}"
        )
    for encoder, embedding in tables.items():
        _refuse_moved_padding(encoder, embedding, new)
    # Heads and other parts may have copies of the encoder's config, and modules copies of what stands there.
    parts = [part.__dict__ for part in model.modules()]
    configs = {id(part["config"]): part["config"] for part in parts if isinstance(part.get("config"), PreTrainedConfig)}
    holders = [*parts, *(config.__dict__ for config in configs.values())]
    moved = [_moved_ids(holder, new, size) for holder in holders]
    for embedding in tables.values():
        tied = [part for part in model.modules() if isinstance(part, nn.Linear) and part.weight is embedding.weight]
        _select(embedding.weight, 0, list(rows))
        embedding.num_embeddings = len(rows)
        if embedding.padding_idx is not None:
            embedding.padding_idx = new[embedding.padding_idx]
        for linear in tied:
            if linear.bias is not None and linear.bias.shape[0] == size:
                _select(linear.bias, 0, list(rows))
            linear.out_features = len(rows)
    for holder, ids in zip(holders, moved, strict=True):
        holder.update(ids)
    for config in configs.values():
        if config.__dict__.get("vocab_size") == size:
            config.__dict__["vocab_size"] = len(rows)


def _reads_words(part: PreTrainedModel) -> bool:
    return part.base_model is part and "vocab_size" in part.config.to_dict()


def _word_embedding(encoder: PreTrainedModel) -> nn.Embedding:
    embedding = find_anatomy(encoder).word_embedding
    if embedding is None or not embedding.weight.is_floating_point():
        found = "none" if embedding is None else str(embedding.weight.dtype)
        raise UnsupportedEncoderError(
            f"{type(encoder).__name__}: expected a word embedding of config.vocab_size float rows, found {found}; "
            "cut the vocabulary first, then quantize"
        )
    return embedding


def _refuse_moved_padding(encoder: PreTrainedModel, embedding: nn.Embedding, new: Mapping[int, int]) -> None:
    """RoBERTa and its kin number positions from the id of the padding on; no other part has to know that id."""
    for part in encoder.modules():
        padding = part.__dict__.get("padding_idx")
        if part is not embedding and isinstance(padding, int) and new.get(padding) != padding:
            raise UnsupportedEncoderError(
                f"{type(encoder).__name__}: expected the padding to keep its id {padding}, from which this family "
                f"numbers positions, found {new.get(padding, 'none')} after the cut; keep at least {padding + 1} tokens"
            )


def _moved_ids(holder: Mapping[str, Any], new: Mapping[int, int], size: int) -> dict[str, int]:
    """Ids of special tokens among the attributes of a config or a module, as they are after the cut."""
    ids = {key: value for key, value in holder.items() if key.endswith("_token_id")}
    ids = {key: value for key, value in ids.items() if isinstance(value, int) and 0 <= value < size}
    missing = {key: value for key, value in ids.items() if value not in new}
    if missing:
        raise ValueError(f"expected the ids of special tokens among those to keep, found {missing} without a place")
    return {key: new[value] for key, value in ids.items()}


def is_vanilla(encoder: PreTrainedModel) -> bool:
    """Whether the encoder's own config rebuilds it, so that plain transformers loads it."""
    stock = _stock(encoder)
    heads = [_head_shapes(layer) for layer in find_anatomy(encoder).layers]
    if heads != [_head_shapes(layer) for layer in find_anatomy(stock).layers]:
        return False
    stack = find_anatomy(stock).stack_name
    ours, theirs = _shapes(encoder), _shapes(stock)
    # Outside of the stack a part of the stock encoder may be missing (a pooler that no head reads).
    needed = {name for name in theirs if name.startswith(f"{stack}.")}
    return needed <= set(ours) and all(theirs.get(name) == shape for name, shape in ours.items())


def mark_structure(model: PreTrainedModel) -> None:
    """Put the structure of an encoder, alone or in a stock model, into the config, where this cannot express it.

    `cut` and `keep_layers` do this by themselves; call it on a model whose config was made in another way.
    """
    encoder = encoder_of(model)
    write_mark(model.config, None if is_vanilla(encoder) else describe_structure(encoder))


def _set_layer_index(layer: nn.Module, index: int) -> None:
    for module in layer.modules():
        if isinstance(module.__dict__.get("layer_idx"), int):
            module.__dict__["layer_idx"] = index


# ---- cutting one layer ----


def _cut_heads(encoder: nn.Module, anatomy: Anatomy, layer: Layer, kept: list[int]) -> None:
    attention = layer.attention
    if anatomy.head_bias_total is not None and kept:
        before = attention.selection.kept if attention.selection else list(range(attention.heads))
        _select_heads(attention.core, [before[head] for head in kept], anatomy.head_bias_total)
    if not kept:
        assert isinstance(attention.output, nn.Linear)
        constant = Constant(attention.output.out_features, attention.output.bias)
        inside = attention.output_name.startswith(f"{attention.name}.")
        leaf = attention.output_name.removeprefix(f"{attention.name}.")
        if inside and "." in leaf:
            raise UnsupportedEncoderError(
                f"{type(encoder).__name__}: expected the output projection directly in '{attention.name}' to remove "
                f"all heads, found '{leaf}'; keep one head"
            )
        encoder.set_submodule(attention.name, EmptyAttention(attention.head_size, (leaf, constant) if inside else None))
        if not inside:
            encoder.set_submodule(attention.output_name, constant)
        return
    size = attention.head_size
    columns = [head * size + offset for head in kept for offset in range(size)]
    rows = [block * attention.heads * size + column for block in range(attention.blocks) for column in columns]
    for linear in attention.projections.values():
        _narrow(linear, rows=rows)
    assert isinstance(attention.output, nn.Linear)
    _narrow(attention.output, columns=columns)
    for attribute in _HEAD_COUNT_ATTRIBUTES:
        if attribute in attention.core.__dict__:
            attention.core.__dict__[attribute] = len(kept)
    if "all_head_size" in attention.core.__dict__:
        attention.core.__dict__["all_head_size"] = len(kept) * size


def _select_heads(core: nn.Module, kept: list[int], total: int) -> None:
    for key, hook in list(core._forward_pre_hooks.items()):
        if isinstance(hook, SelectHeads):
            del core._forward_pre_hooks[key]
            core._forward_pre_hooks_with_kwargs.pop(key, None)
    core.register_forward_pre_hook(SelectHeads(kept, total), with_kwargs=True)


def _cut_feed_forward(encoder: nn.Module, layer: Layer, kept: list[int]) -> None:
    part = layer.feed_forward
    assert isinstance(part.output, nn.Linear)
    if not kept:
        for name, linear in part.inputs.items():
            encoder.set_submodule(name, NoFeatures(linear.in_features))
        encoder.set_submodule(part.output_name, Constant(part.output.out_features, part.output.bias))
        return
    rows = [block * part.width + neuron for block in range(part.blocks) for neuron in kept]
    for linear in part.inputs.values():
        assert isinstance(linear, nn.Linear)
        _narrow(linear, rows=rows)
    _narrow(part.output, columns=kept)


def _narrow(linear: nn.Linear, rows: list[int] | None = None, columns: list[int] | None = None) -> None:
    """Keep rows (outputs) or columns (inputs) of a linear layer. Parameters stay the same objects, so ties hold."""
    if rows is not None:
        _select(linear.weight, 0, rows)
        if linear.bias is not None:
            _select(linear.bias, 0, rows)
        linear.out_features = len(rows)
    if columns is not None:
        _select(linear.weight, 1, columns)
        linear.in_features = len(columns)


def _select(parameter: Tensor, dimension: int, indices: list[int]) -> None:
    parameter.grad = None
    parameter.data = parameter.data.index_select(dimension, torch.tensor(indices, device=parameter.device))


def refuse_quantized(encoder: nn.Module, anatomy: Anatomy) -> None:
    """Say that weights in few bits cannot be cut.

    Raises:
        UnsupportedEncoderError: some of the layers' weights are in few bits.
    """
    for layer in anatomy.layers:
        for name, linear in [*layer.attention.projections.items(), *layer.feed_forward.inputs.items()]:
            if not isinstance(linear, nn.Linear):
                continue
            # Those of torchao are tensors of a class of their own, which says that it is of float numbers.
            if not linear.weight.is_floating_point() or is_traceable_wrapper_subclass(linear.weight):
                raise UnsupportedEncoderError(
                    f"{type(encoder).__name__}: expected float weights to cut, found {linear.weight.dtype} in "
                    f"'{name}'; prune first, then quantize"
                )


# ---- what the stock class would build ----


def _stock(encoder: PreTrainedModel, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """An encoder of the same class as transformers builds it from `config`, without memory for weights."""
    config = copy.deepcopy(encoder.config if config is None else config)
    with torch.device("meta"):
        return type(encoder)(config)


def _head_shapes(layer: Layer) -> tuple[int, int, bool]:
    return layer.attention.heads, layer.attention.head_size, layer.attention.selection is None


def _shapes(encoder: nn.Module) -> dict[str, tuple[int, ...]]:
    """Sizes of all linear layers, however their weights are stored, and shapes of all other weights."""
    linears = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear | Constant)}
    shapes = {
        name: (type(linear) is Constant, linear.in_features, linear.out_features) for name, linear in linears.items()
    }
    others = {
        name: tuple(parameter.shape)
        for name, parameter in encoder.named_parameters()
        if name.rpartition(".")[0] not in linears
    }
    return {**shapes, **others}


def _other_weights(layer: Layer) -> set[str]:
    """Weights of a layer that heads and neurons do not account for: norms and scales."""
    counted = (
        f"{layer.attention.name}.",
        f"{layer.attention.output_name}.",
        f"{layer.feed_forward.output_name}.",
        *(f"{name}." for name in layer.feed_forward.inputs),
    )
    names = {f"{layer.name}.{name}" for name, _ in layer.module.named_parameters()}
    return {name.removeprefix(f"{layer.name}.") for name in names if not name.startswith(counted)}


def _rebuild_first_layer(encoder: PreTrainedModel, anatomy: Anatomy, template: int) -> None:
    """Put a layer that is built like a later one of the stock class in the first place."""
    config = _config_of_layers(encoder.config, [0] * (template + 1))
    layer = find_anatomy(_stock(encoder, config)).layers[template].module
    like = next(anatomy.stack.parameters())
    if like.device.type != "meta":
        layer = layer.to_empty(device=like.device)
    _set_layer_index(layer, 0)
    anatomy.stack[0] = layer.to(like.dtype).train(encoder.training)


# ---- config ----


def _config_of_layers(config: PreTrainedConfig, kept: list[int]) -> PreTrainedConfig:
    """A copy of `config` for a stack of the layers at `kept`; fields with a value for each layer follow."""
    count = config.num_hidden_layers
    values = copy.deepcopy(config.to_dict())
    for key, value in values.items():
        if key.startswith("layer") and isinstance(value, list) and len(value) == count:
            values[key] = [value[index] for index in kept]
    # Backbone fields name the layers (stage1, ...): made anew.
    for key in ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices"):
        values.pop(key, None)
    for key in ("model_type", "transformers_version", "quantization_config"):
        values.pop(key, None)
    own_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values[own_name] = len(kept)
    return type(config)(**values)


def _replace_fields(config: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Take over the fields of `new` that depend on the layers; every module of the encoder shares `config`."""
    for key, value in new.__dict__.items():
        if key in config.__dict__ and not key.startswith("_attn") and config.__dict__[key] != value:
            config.__dict__[key] = value


def _write_config(encoder: PreTrainedModel) -> None:
    """Write uniform widths and heads into the config where the stock class then builds the same shapes."""
    layers = find_anatomy(encoder).layers
    widths = {layer.feed_forward.width for layer in layers}
    if len(widths) == 1 and (width := widths.pop()):
        for changes in _width_changes(encoder.config, width, layers[0].feed_forward.output.out_features):
            built = _build_with(encoder, changes)
            if built and all(layer.feed_forward.width == width for layer in built):
                _set_fields(encoder.config, changes)
                break
    counts = {layer.attention.heads for layer in layers}
    if len(counts) == 1 and (heads := counts.pop()) and heads != encoder.config.num_attention_heads:
        size = layers[0].attention.head_size
        changes = {"num_attention_heads": heads, "head_dim": size}
        built = _build_with(encoder, changes)
        if built and all((layer.attention.heads, layer.attention.head_size) == (heads, size) for layer in built):
            _set_fields(encoder.config, changes)


def expresses_width(encoder: PreTrainedModel, width: int) -> bool:
    """Whether the encoder's config can say that every feed-forward part has this width."""
    hidden_size = find_anatomy(encoder).hidden_size
    for changes in _width_changes(encoder.config, width, hidden_size):
        built = _build_with(encoder, changes)
        if built and all(layer.feed_forward.width == width for layer in built):
            return True
    return False


def _width_changes(config: PreTrainedConfig, width: int, hidden_size: int) -> list[dict[str, Any]]:
    fields = config.to_dict()
    changes: list[dict[str, Any]] = [{name: width} for name in _WIDTH_FIELDS if name in fields]
    if "mlp_ratio" in fields:
        # The field is a whole number; a gated part has two thirds of the width.
        ratios = {width // hidden_size, round(1.5 * width / hidden_size)}
        changes += [{"mlp_ratio": ratio} for ratio in sorted(ratios) if ratio]
    return changes


def _build_with(encoder: PreTrainedModel, changes: dict[str, Any]) -> list[Layer] | None:
    """The layers that the stock class builds with `changes` to the config, or None where it cannot."""
    config = copy.deepcopy(encoder.config)
    try:
        _set_fields(config, changes)
        return find_anatomy(_stock(encoder, config)).layers
    except ValueError:
        # Configs and constructors refuse combinations in this way, and so does find_anatomy.
        return None


def _set_fields(config: PreTrainedConfig, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        setattr(config, name, value)
