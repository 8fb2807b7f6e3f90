"""Adapters: low-rank additions to a frozen encoder's linear layers, one set for each task.

The layers are those of `peft`, but the encoder does not hold them. A task's adapter is a module of its own, stored by
layer index and role, since names of modules change between versions of transformers; to run it, its layers are put on
a twin of the encoder that shares everything else. So the encoder itself stays as its family builds it (found by
structure, quantized, saved and cut as ever), no run changes what another one reads, and activations that are computed
again in the backward pass are computed with the adapter of their own run.

References:
    Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from hf_mtcompress.errors import ArtifactError, TaskError, UnsupportedEncoderError
from hf_mtcompress.model.anatomy import Layer, find_anatomy
from hf_mtcompress.model.base import SharedModel
from hf_mtcompress.model.branches import twin, whole_encoder
from hf_mtcompress.recipe import AdapterConfig, AdapterTargets
from hf_mtcompress.tasks import Task

# Imported late: peft - it takes seconds to import, and most models have no adapters.
if TYPE_CHECKING:
    from peft.tuners.lora import Linear

ADAPTERS = "adapters"
"""Where a model holds its adapters."""


class Adapter(nn.Module):
    """The low-rank layers of one task. Before training they add zero.

    Args:
        encoder: the encoder that they belong to; it is left as it is.
        settings: rank and the like.
        name: by which `peft` knows the adapter.

    Raises:
        UnsupportedEncoderError: pruning left none of the wanted linear layers.
    """

    def __init__(self, encoder: PreTrainedModel, settings: AdapterConfig, name: str) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        self.settings = settings
        self.paths = [_linear_layers(layer, settings.targets) for layer in find_anatomy(encoder).layers]
        """Module paths in the encoder, by layer index and role."""
        roles = sorted({role for layer in self.paths for role in layer})
        if not roles:
            raise UnsupportedEncoderError(
                f"{type(encoder).__name__}: expected linear layers of targets '{settings.targets}' to adapt, found "
                "that pruning left none; choose other targets"
            )
        # peft is shown the linear layers alone, under names of ours, and wraps each.
        self.layers = nn.ModuleList(
            nn.ModuleDict({role: encoder.get_submodule(path) for role, path in layer.items()}) for layer in self.paths
        )
        wanted = LoraConfig(
            r=settings.rank,
            lora_alpha=cast(int, settings.alpha),  # a factor; peft's annotation is narrower than its use
            lora_dropout=settings.dropout,
            target_modules=roles,
        )
        # peft freezes them; whoever takes the adapter freezes the encoder.
        trained = [parameter for parameter in self.layers.parameters() if parameter.requires_grad]
        inject_adapter_in_model(wanted, self, adapter_name=name)
        for parameter in trained:
            parameter.requires_grad_(True)
        for layer in self.by_path().values():
            # The encoder's; here it would be saved a second time.
            del layer._modules["base_layer"]

    def by_path(self) -> "dict[str, Linear]":
        """The low-rank layers by the module path of the encoder's layer that they add to."""
        found = {}
        for layer, paths in zip(self.layers, self.paths, strict=True):
            assert isinstance(layer, nn.ModuleDict)
            found |= {path: layer[role] for role, path in paths.items()}
        return found


def build_adapters(model: SharedModel) -> nn.ModuleDict:
    """The adapters that the model's config describes, by the name of the task's head.

    Raises:
        ArtifactError: the config describes them in a way that is not known, or of tasks that are not there.
    """
    described = model.config.adapters or {}
    known = {item.name for item in dataclasses.fields(AdapterConfig)}
    wrong = [name for name, values in described.items() if name not in model.tasks or not set(values) <= known]
    if wrong:
        raise ArtifactError(
            f"expected adapters of the tasks {list(model.tasks)} with {sorted(known)}, found "
            f"{ {name: described[name] for name in wrong} }; update hf_mtcompress, or restore the config"
        )
    return nn.ModuleDict(
        {
            model.tasks[name].head_name: _build(model, model.tasks[name], AdapterConfig(**values))
            for name, values in described.items()
        }
    )


def new_adapters(model: SharedModel, tasks: list[str], settings: AdapterConfig) -> dict[str, Adapter]:
    """Fresh adapters by task, on the device of the encoder.

    Raises:
        TaskError: tasks that are not there, or that have an adapter already; see also `build_adapter`.
    """
    wrong = [name for name in tasks if name not in model.tasks or adapter_of(model, name) or tasks.count(name) > 1]
    if wrong or not tasks:
        without = [name for name in model.tasks if adapter_of(model, name) is None]
        raise TaskError(
            f"expected one or more different tasks without an adapter, among {without}, found {tasks}; a task has one "
            "adapter, which further training goes on with"
        )
    return {name: build_adapter(model, model.tasks[name], settings).train(model.training) for name in tasks}


def build_adapter(model: SharedModel, task: Task, settings: AdapterConfig) -> Adapter:
    """A fresh adapter for a task, on the device of the encoder; the model does not hold it yet.

    Raises:
        TaskError: settings out of range.
        UnsupportedEncoderError: the task reads a branch or a lower layer, or the weights pass no gradient.
    """
    rank, dropout = settings.rank, settings.dropout
    if rank < 1 or settings.alpha <= 0 or not 0 <= dropout < 1 or settings.targets not in get_args(AdapterTargets):
        raise TaskError(
            f"expected adapters of rank 1 or more, alpha above 0, dropout from 0 to below 1 and targets among "
            f"{list(get_args(AdapterTargets))}, found {dataclasses.asdict(settings)}"
        )
    if task.layer is not None or task.encoder not in model.encoders:
        raise UnsupportedEncoderError(
            f"task '{task.name}': expected one that reads a whole encoder {list(model.encoders)} for an adapter, found "
            f"encoder '{task.encoder}' and layer {task.layer}; build the model without branches and lower layers, an "
            "adapter is a task's own part too"
        )
    if not passes_gradients(model):
        raise UnsupportedEncoderError(
            "expected an encoder in float, or in few bits of bitsandbytes, to put adapters on, found weights of "
            "torchao, which pass no gradient; quantize with bitsandbytes, or after the training"
        )
    return _build(model, task, settings)


def passes_gradients(model: PreTrainedModel) -> bool:
    """Whether what is below a linear layer can be trained; weights in few bits, too, may let gradients through."""
    return bool(getattr(getattr(model, "hf_quantizer", None), "is_trainable", True))


def adapter_of(model: SharedModel, name: str) -> Adapter | None:
    """The adapter of a task; None where it has none."""
    head = model.tasks[name].head_name
    if head not in model.adapters:
        return None
    adapter = model.adapters[head]
    assert isinstance(adapter, Adapter)
    return adapter


def describe_adapters(model: SharedModel) -> dict[str, dict[str, Any]]:
    """What the config says of the adapters, by task."""
    found = {name: adapter_of(model, name) for name in model.tasks}
    return {name: dataclasses.asdict(adapter.settings) for name, adapter in found.items() if adapter is not None}


def adapted(encoder: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """The encoder with an adapter on it: a twin that shares its weights, made for one run."""
    # The hooks that collect hidden states are put on modules that both share, so once, through the encoder.
    maybe_install_capturing_hooks(encoder)
    return twin(encoder, _on(encoder, adapter))


def merged_encoder(model: SharedModel, name: str) -> PreTrainedModel:
    """The encoder that one task reads, its adapter added to the float weights of a copy."""
    encoder, adapter = whole_encoder(model, name), adapter_of(model, name)
    if adapter is None:
        return encoder
    encoder = copy.deepcopy(encoder)
    with torch.no_grad():
        for layer in _on(encoder, adapter).values():
            layer.merge()
    return encoder


@contextlib.contextmanager
def trains_adapters(model: Any) -> Iterator[None]:
    """Let a Trainer that is made here know that a model has adapters, without which it refuses quantized weights.

    It looks for a mark that transformers sets on models whose adapters it manages itself. The mark is taken off again,
    since a model that carries it saves its adapters only.
    """
    quantized = bool(getattr(model, "is_quantized", False)) and passes_gradients(model)
    marked = quantized and len(getattr(model, "adapters", ())) > 0
    if marked:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if marked:
            del model._hf_peft_config_loaded


def refuse_adapters(model: SharedModel, what: str) -> None:
    """Say what cannot be done with adapters.

    Raises:
        UnsupportedEncoderError: the model has one.
    """
    if len(model.adapters):
        raise UnsupportedEncoderError(
            f"expected a model without adapters for {what}, found some of {list(describe_adapters(model))}; do it "
            "before adapters are added, or export the tasks and compress them one by one"
        )


def _build(model: SharedModel, task: Task, settings: AdapterConfig) -> Adapter:
    encoder = model.encoders[model.config.root_of(task.encoder)]
    assert isinstance(encoder, PreTrainedModel)
    # The name of the head, since a task may be called like an attribute of a ModuleDict.
    return Adapter(encoder, settings, task.head_name)


def _linear_layers(layer: Layer, targets: AdapterTargets) -> dict[str, str]:
    """Module paths by role; what pruning removed is left out."""
    attention, feed_forward = layer.attention, layer.feed_forward
    groups: dict[str, tuple[Mapping[str, nn.Module], str, nn.Module]] = {
        "attention": (attention.projections, attention.output_name, attention.output),
        "feed_forward": (feed_forward.inputs, feed_forward.output_name, feed_forward.output),
    }
    found: dict[str, str] = {}
    for group, (inputs, output_name, output) in groups.items():
        if targets not in (group, "all"):
            continue
        found |= {f"{group}_{index}": path for index, (path, part) in enumerate(inputs.items()) if _is_linear(part)}
        if _is_linear(output):
            found[f"{group}_output"] = output_name
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _on(encoder: PreTrainedModel, adapter: Adapter) -> "dict[str, Linear]":
    """The adapter's layers, each a copy around the encoder's own layer; they share the adapter's weights."""
    found = {}
    for path, layer in adapter.by_path().items():
        found[path] = whole = copy.copy(layer)
        whole._modules = {"base_layer": encoder.get_submodule(path), **layer._modules}
        whole.merged_adapters = []
    return found
