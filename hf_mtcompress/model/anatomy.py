"""Where an encoder keeps its layers, attention heads and feed-forward neurons, found by structure.

Module names differ between families and change between versions of transformers, so nothing here names a module path.
What is looked for:

- the stack: a module list whose elements are of one class and each hold one attention;
- the attention core: the innermost module that knows the size of a head (`head_dim`, `attention_head_size`);
- its projections: the linear layers of the core, all from the hidden size to the heads; with the heads' output
  projection last, in the core or in a module around it;
- the feed-forward part: the linear layers of the layer outside of the attention, one or two up (a gated one may be
  fused into a single layer of twice the width), one down.

Shapes must agree; where they do not, the encoder is refused instead of guessed at.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.blocks import Constant, EmptyAttention, NoFeatures, SelectHeads

_HEAD_SIZE_ATTRIBUTES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


@dataclass(frozen=True)
class Attention:
    """The attention of one layer."""

    name: str
    """Module path of the core in the encoder."""
    core: nn.Module
    projections: dict[str, nn.Linear]
    """Query, key, value (or all three fused), and others whose rows are heads, by module path."""
    blocks: int
    """Rows of a projection are (blocks, heads, head size): 3 for a fused one, else 1."""
    output_name: str
    output: nn.Linear | Constant
    head_size: int
    heads: int
    selection: SelectHeads | None
    """Which of the encoder's heads are left, where the encoder computes a bias for each."""


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward part of one layer."""

    inputs: dict[str, nn.Linear | NoFeatures]
    """One, or gate and up, by module path."""
    blocks: int
    """Rows of an input are (blocks, width): 2 where gate and up are fused, else 1."""
    output_name: str
    output: nn.Linear | Constant
    width: int


@dataclass(frozen=True)
class Layer:
    """One layer of the stack."""

    name: str
    module: nn.Module
    attention: Attention
    feed_forward: FeedForward


@dataclass(frozen=True)
class Anatomy:
    """The parts of an encoder that can be cut."""

    stack_name: str
    stack: nn.ModuleList
    layers: list[Layer]
    hidden_size: int
    word_embedding_name: str | None
    word_embedding: nn.Embedding | None
    head_bias_total: int | None
    """Heads of a bias table that all layers share (MPNet), else None."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Heads and neurons of each layer."""
        return [(layer.attention.heads, layer.feed_forward.width) for layer in self.layers]


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder of a stock model with a head; an encoder itself."""
    encoder = model.base_model
    assert isinstance(encoder, PreTrainedModel)
    return encoder


def find_anatomy(encoder: PreTrainedModel) -> Anatomy:
    """Find layers, attention and feed-forward parts of `encoder`, whatever was cut before.

    Raises:
        UnsupportedEncoderError: the structure described above is not there.
    """
    hidden_size = encoder.config.to_dict().get("hidden_size", getattr(encoder.config, "hidden_size", None))
    if not isinstance(hidden_size, int):
        raise _unsupported(encoder, "a config with one `hidden_size`", f"hidden_size {hidden_size!r}")
    stack_name, stack = _find_stack(encoder)
    layers = [
        Layer(
            name,
            layer,
            attention := _find_attention(encoder, name, layer, hidden_size),
            _find_feed_forward(encoder, name, layer, attention, hidden_size),
        )
        for name, layer in ((f"{stack_name}.{index}", layer) for index, layer in enumerate(stack))
    ]
    for layer in layers:
        _refuse_other_parameters(encoder, layer, hidden_size)
    _refuse_shared_weights(encoder, layers)
    embedding_name, embedding = _find_word_embedding(encoder)
    return Anatomy(
        stack_name, stack, layers, hidden_size, embedding_name, embedding, _find_head_bias(encoder, stack, hidden_size)
    )


def _unsupported(encoder: nn.Module, expected: str, found: str) -> UnsupportedEncoderError:
    return UnsupportedEncoderError(
        f"{type(encoder).__name__}: expected {expected}, found {found}; heads, neurons and layers can be cut from "
        "encoders built like BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, DeBERTa-v2, ModernBERT, ViT, DINOv2 and CLIP's "
        "towers: choose one of these, or leave pruning out"
    )


def _cores(module: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules that know the size of a head, by path below `module`."""
    found = {name: child for name, child in module.named_modules() if name and _head_size(child) is not None}
    return {name: core for name, core in found.items() if not any(other.startswith(f"{name}.") for other in found)}


def _head_size(module: nn.Module) -> int | None:
    for attribute in _HEAD_SIZE_ATTRIBUTES:
        size = module.__dict__.get(attribute)
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return None


def _find_stack(encoder: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    lists = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [(name, found) for name, found in lists if len(found) and all(_cores(layer) for layer in found)]
    # A list inside a layer of another list (an attention made of parts) belongs to that layer.
    stacks = [(name, found) for name, found in stacks if not any(name.startswith(f"{other}.") for other, _ in stacks)]
    attributes = " or ".join(f"`{name}`" for name in _HEAD_SIZE_ATTRIBUTES)
    if len(stacks) != 1:
        raise _unsupported(
            encoder,
            f"one module list whose elements each hold an attention (a module with {attributes})",
            f"{len(stacks)} among {[name for name, _ in lists] or 'no module lists'}",
        )
    name, stack = stacks[0]
    classes = sorted({type(layer).__name__ for layer in stack})
    if len(classes) != 1:
        raise _unsupported(encoder, f"layers of one class in '{name}'", ", ".join(classes))
    layers = encoder.config.num_hidden_layers
    if layers != len(stack):
        raise _unsupported(
            encoder, f"as many layers in '{name}' as config.num_hidden_layers ({layers})", str(len(stack))
        )
    return name, stack


def _linear_like(module: nn.Module) -> Iterator[tuple[str, nn.Linear | Constant | NoFeatures]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Constant | NoFeatures):
            yield name, child


def _find_attention(encoder: nn.Module, name: str, layer: nn.Module, hidden_size: int) -> Attention:
    cores = _cores(layer)
    if len(cores) != 1:
        raise _unsupported(encoder, f"one attention in '{name}'", f"{len(cores)} ({', '.join(cores)})")
    path, core = next(iter(cores.items()))
    head_size = _head_size(core)
    assert head_size is not None
    inside = [f"{path}.{child}" for child, _ in _linear_like(core)]
    around = [f"{child}" for child, _ in _attention_linears(layer, path) if child not in inside]
    linears = dict(_linear_like(layer))
    # Registration order is the order of computation in every family; a law in the tests holds it to that.
    output_path = around[-1] if around else inside[-1] if inside else None
    output = linears.get(output_path or "")
    shape_of = {child: (linears[child].in_features, linears[child].out_features) for child in [*inside, *around]}
    heads, remainder = divmod(output.in_features, head_size) if output is not None else (0, 1)
    projections = {child: linears[child] for child in inside if child != output_path}
    blocks = 3 if len(projections) == 1 else 1
    fits = (
        isinstance(output, nn.Linear | Constant)
        and output.out_features == hidden_size
        and remainder == 0
        and len(around) <= 1
        and (isinstance(core, EmptyAttention) or len(projections) not in (0, 2))
        and all(shape_of[child] == (hidden_size, blocks * heads * head_size) for child in projections)
    )
    if not fits:
        raise _unsupported(
            encoder,
            f"in '{name}.{path}' query, key and value from {hidden_size} to heads of {head_size}, or one fused layer "
            f"of three times that, and one output projection back to {hidden_size}",
            f"linear layers {shape_of}",
        )
    assert isinstance(output, nn.Linear | Constant)
    selections = [hook for hook in core._forward_pre_hooks.values() if isinstance(hook, SelectHeads)]
    return Attention(
        name=f"{name}.{path}",
        core=core,
        projections={
            f"{name}.{child}": linear for child, linear in projections.items() if isinstance(linear, nn.Linear)
        },
        blocks=blocks,
        output_name=f"{name}.{output_path}",
        output=output,
        head_size=head_size,
        heads=heads,
        selection=selections[0] if selections else None,
    )


def _attention_linears(layer: nn.Module, core_path: str) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers of the layer's child that holds the core, by path below the layer."""
    child = core_path.split(".")[0]
    for name, linear in _linear_like(layer.get_submodule(child)):
        yield f"{child}.{name}".removesuffix("."), linear


def _find_feed_forward(
    encoder: nn.Module, name: str, layer: nn.Module, attention: Attention, hidden_size: int
) -> FeedForward:
    core_path = attention.name.removeprefix(f"{name}.")
    taken = {child for child, _ in _attention_linears(layer, core_path)}
    linears = {child: linear for child, linear in _linear_like(layer) if child not in taken}
    shape_of = {child: (linear.in_features, linear.out_features) for child, linear in linears.items()}
    *input_paths, output_path = linears or [""]
    output = linears.get(output_path)
    width = output.in_features if output is not None else 0
    blocks = 2 if len(input_paths) == 1 and width and linears[input_paths[0]].out_features == 2 * width else 1
    fits = (
        isinstance(output, nn.Linear | Constant)
        and output.out_features == hidden_size
        and 1 <= len(input_paths) <= 2
        and all(shape_of[child] == (hidden_size, blocks * width) for child in input_paths)
    )
    if not fits:
        raise _unsupported(
            encoder,
            f"in '{name}' outside of its attention one or two linear layers from {hidden_size} to the feed-forward "
            f"width (or one of twice the width) and one back to {hidden_size}",
            f"linear layers {shape_of}",
        )
    assert isinstance(output, nn.Linear | Constant)
    return FeedForward(
        inputs={
            f"{name}.{child}": linear
            for child in input_paths
            if isinstance(linear := linears[child], nn.Linear | NoFeatures)
        },
        blocks=blocks,
        output_name=f"{name}.{output_path}",
        output=output,
        width=width,
    )


def _refuse_other_parameters(encoder: nn.Module, layer: Layer, hidden_size: int) -> None:
    """Weights that are neither linear layers nor norms may belong to heads, and would not follow a cut."""
    core = layer.attention.name.removeprefix(f"{layer.name}.")
    known = {f"{path}.{leaf}" for path, linear in _linear_like(layer.module) for leaf, _ in linear.named_parameters()}
    for path, parameter in layer.module.named_parameters():
        # A norm over all heads together would see other statistics after a cut; one over the hidden state does not.
        allowed = layer.attention.head_size if path.startswith(f"{core}.") else hidden_size
        if path not in known and tuple(parameter.shape) != (allowed,):
            raise _unsupported(
                encoder,
                f"in '{layer.name}' no weights besides linear layers, norms within a head and norms of the hidden "
                "state",
                f"'{path}' of shape {tuple(parameter.shape)}",
            )


def _refuse_shared_weights(encoder: nn.Module, layers: list[Layer]) -> None:
    owners: dict[int, str] = {}
    for layer in layers:
        for path, parameter in layer.module.named_parameters():
            owner = owners.setdefault(id(parameter), layer.name)
            if owner != layer.name:
                raise _unsupported(
                    encoder, "layers with weights of their own", f"'{path}' shared by '{owner}' and '{layer.name}'"
                )


def _find_word_embedding(encoder: PreTrainedModel) -> tuple[str | None, nn.Embedding | None]:
    words = encoder.config.to_dict().get("vocab_size")
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == words:
            return name, module
    return None, None


def _find_head_bias(encoder: PreTrainedModel, stack: nn.ModuleList, hidden_size: int) -> int | None:
    """Heads of an embedding outside of the stack that is one number wide for each head."""
    total = encoder.config.num_attention_heads
    inside = set(stack.modules())
    for module in encoder.modules():
        if isinstance(module, nn.Embedding) and module not in inside and module.embedding_dim == total != hidden_size:
            return total
    return None
