"""Sub-models: what only some tasks read of an encoder, a branch with top layers of its own or a depth.

Both run the family's own forward on a twin of the encoder whose embeddings answer with a hidden state that was computed
already, and whose layers are those of the branch. So masks, positions, final norms and poolers are the family's,
without a line about any of them here. A twin shares all modules that it does not replace, and is part of nothing.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_mtcompress.errors import TaskError, UnsupportedEncoderError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.base import SharedModel
from hf_mtcompress.model.surgery import keep_layers

_BEFORE_LAYERS = ("embeddings_project", "pre_layrnorm")
"""Children of an encoder that stand between its embeddings and its layers (ELECTRA's projection, CLIP's norm)."""


class Branch(nn.Module):
    """The top layers of an encoder and what follows them (final norm, pooler), as copies of their own.

    Args:
        trunk: the encoder whose lower layers and embeddings the branch shares.
        layers: how many top layers are the branch's own, 1 to all.

    Raises:
        UnsupportedEncoderError: the encoder has fewer layers.
    """

    def __init__(self, trunk: PreTrainedModel, layers: int) -> None:
        super().__init__()
        anatomy = find_anatomy(trunk)
        if not 1 <= layers <= len(anatomy.layers):
            raise UnsupportedEncoderError(
                f"expected a branch of 1 to {len(anatomy.layers)} layers of {type(trunk).__name__}, found {layers}"
            )
        self.layers = nn.ModuleList(copy.deepcopy(layer.module) for layer in anatomy.layers[-layers:])
        holder = anatomy.stack_name.split(".")[0]
        apart = {holder, _embeddings_name(trunk), *_BEFORE_LAYERS}
        self.after = nn.ModuleDict(
            {
                name: copy.deepcopy(module)
                for name, module in trunk.named_children()
                if name not in apart and any(True for _ in module.parameters())
            }
        )


def run_branch(trunk: PreTrainedModel, branch: Branch, states: tuple[Tensor, ...], inputs: Mapping[str, Any]) -> Any:
    """Output of an encoder whose top layers are the branch's.

    Args:
        trunk: the encoder.
        branch: made from it.
        states: hidden states of the encoder, the embeddings first.
        inputs: what the encoder was called with.
    """
    shared = len(find_anatomy(trunk).layers) - len(branch.layers)
    return _run_on(trunk, states[shared], branch.layers, dict(branch.after.named_children()), inputs)


def run_depth(trunk: PreTrainedModel, layer: int, states: tuple[Tensor, ...], inputs: Mapping[str, Any]) -> Any:
    """Output of an encoder that ends after `layer` layers, with its final norm and pooler on that state.

    The last of these layers is run once more, since some families' forward needs a layer.
    """
    last = find_anatomy(trunk).layers[layer - 1].module
    return _run_on(trunk, states[layer - 1], nn.ModuleList([last]), {}, inputs)


def whole_encoder(model: SharedModel, name: str) -> PreTrainedModel:
    """The encoder that one task reads, as an encoder of its own: a copy where a branch or a depth is read."""
    task = model.tasks[name]
    root = model.config.root_of(task.encoder)
    trunk = model.encoders[root]
    assert isinstance(trunk, PreTrainedModel)
    branch = dict(model.branches.items()).get(task.encoder)
    if branch is None and task.layer is None:
        return trunk
    encoder = copy.deepcopy(trunk)
    if branch is not None:
        assert isinstance(branch, Branch)
        anatomy = find_anatomy(encoder)
        for index, layer in enumerate(branch.layers, len(anatomy.layers) - len(branch.layers)):
            anatomy.stack[index] = copy.deepcopy(layer)
        for part, module in branch.after.named_children():
            setattr(encoder, part, copy.deepcopy(module))
    if task.layer is not None:
        keep_layers(encoder, list(range(task.layer)))
    return encoder


def check_depth(model: SharedModel) -> None:
    """Every task reads a place that is there.

    Raises:
        TaskError: an encoder or branch that does not exist, or a layer beyond its depth.
    """
    for task in model.tasks.values():
        if task.encoder not in model.encoders and task.encoder not in model.branches:
            raise TaskError(
                f"task '{task.name}': expected an encoder among {[*model.encoders, *model.branches]}, found "
                f"'{task.encoder}'"
            )
        if task.layer is None:
            continue
        if task.encoder in model.branches:
            raise TaskError(f"task '{task.name}': expected a branch to be read at its end, found layer {task.layer}")
        depth = len(find_anatomy(model.encoders[task.encoder]).layers)  # type: ignore[arg-type]  # a ModuleDict of encoders
        if not 1 <= task.layer <= depth:
            raise TaskError(f"task '{task.name}': expected a layer from 1 to {depth}, found {task.layer}")


def reads_elsewhere(model: SharedModel) -> bool:
    """Whether a task reads anything but the end of the main encoder: a branch, another encoder or a lower layer."""
    return any((task.encoder, task.layer) != ("main", None) for task in model.tasks.values())


def refuse_sub_models(model: SharedModel, what: str) -> None:
    """Say what cannot be done with branches, several encoders and depths yet.

    Raises:
        UnsupportedEncoderError: the model has one.
    """
    deep = [task.name for task in model.tasks.values() if task.layer is not None]
    own = [*model.branches, *(name for name in model.encoders if name != "main")]
    if own or deep:
        raise UnsupportedEncoderError(
            f"expected tasks that all read the last layer of one encoder for {what}, found the branches {own} and the "
            f"tasks {deep} that read a lower layer; do it before branches are added, or export the tasks and compress "
            "them one by one"
        )


def _run_on(
    trunk: PreTrainedModel,
    hidden: Tensor,
    layers: nn.ModuleList,
    after: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
) -> Any:
    embeddings = _embeddings_name(trunk)
    given = copy.copy(getattr(trunk, embeddings))
    given.forward = lambda *args, **kwargs: hidden
    swaps = {find_anatomy(trunk).stack_name: layers, embeddings: given, **after}
    swaps |= {name: nn.Identity() for name, _ in trunk.named_children() if name in _BEFORE_LAYERS}
    return twin(trunk, swaps)(**inputs, return_dict=True)


def _embeddings_name(trunk: nn.Module) -> str:
    found = [name for name, _ in trunk.named_children() if name == "embeddings"]
    if not found:
        raise UnsupportedEncoderError(
            f"expected an encoder with a child 'embeddings', found {[name for name, _ in trunk.named_children()]} in "
            f"{type(trunk).__name__}; branches and depths need it"
        )
    return found[0]


def twin(module: nn.Module, swaps: Mapping[str, nn.Module]) -> Any:
    """A shallow copy with some descendants, named by their paths, replaced; everything else is the same object."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    # A forward that was put on the object (to move inputs between devices) is bound to the original and its children.
    found.__dict__.pop("forward", None)
    for name, child in module._modules.items():
        inner = {path[len(name) + 1 :]: new for path, new in swaps.items() if path.startswith(f"{name}.")}
        if name in swaps:
            found._modules[name] = swaps[name]
        elif inner and child is not None:
            found._modules[name] = twin(child, inner)
    return found
