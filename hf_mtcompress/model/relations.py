"""Queries, keys and values of one attention layer, recorded while an encoder runs.

MiniLMv2 compares the relations among a layer's queries, among its keys and among its values. They are read where the
projections answer, so that they are the same with every attention kernel, and after heads were pruned. Where a family
does more to them afterwards (ModernBERT's rotation by position, DeBERTa's position scores), that is not part of them.

Which projection is which is told by the order of the calls: query, key, value, then anything else. The order of
registration says less: CLIP registers the key first. A fused projection answers with the three in that order.

References:
    Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
    Transformers", Findings of ACL.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_mtcompress.errors import TrainingError, UnsupportedEncoderError
from hf_mtcompress.model.anatomy import Attention, find_anatomy


class Relations(NamedTuple):
    """What the projections of one layer gave, each of shape (batch, tokens, heads times head size)."""

    query: Tensor
    key: Tensor
    value: Tensor


class RelationRecord:
    """The last forward pass of an encoder under `record_relations`.

    Args:
        name: of the attention, for messages.
        fused: whether one projection answers for all three.
    """

    def __init__(self, name: str, fused: bool) -> None:
        self._name = name
        self._fused = fused
        self._answers: dict[nn.Module, Tensor] = {}
        self._running = False
        self._with_gradient = False
        self._gradient_lost = False

    def take(self) -> Relations:
        """The relations of the last forward pass, which the record then forgets.

        Raises:
            TrainingError: the encoder has not run to its end since the last `take`; or it ran under a gradient
                checkpointing that cuts what is recorded off from the student's gradient.
            UnsupportedEncoderError: the attention did not call three projections of (batch, tokens, width).
        """
        answers, lost = list(self._answers.values()), self._gradient_lost
        self._answers.clear()
        # A pass that failed half-way has not finished.
        if not answers or self._running:
            raise TrainingError(
                f"expected a forward pass of the encoder while '{self._name}' is recorded, found none; run the encoder "
                "itself, not a copy of it (DataParallel), inside of `record_relations` before taking the relations"
            )
        if lost:
            raise TrainingError(
                f"expected queries, keys and values of '{self._name}' with a gradient, found reentrant gradient "
                "checkpointing, which runs the layer without; set `activation_checkpointing_kwargs` to "
                "{'use_reentrant': False}"
            )
        parts = answers[0].chunk(3, dim=-1) if self._fused else answers[:3]
        if len(parts) != 3 or any(part.dim() != 3 or part.shape != parts[0].shape for part in parts):
            raise UnsupportedEncoderError(
                f"expected '{self._name}' to project to query, key and value, each of shape (batch, tokens, width), "
                f"found {[tuple(part.shape) for part in parts]}; choose another criterion for this encoder"
            )
        return Relations(*parts)

    def start(self) -> None:
        """The encoder begins a forward pass."""
        self._answers.clear()
        self._running = True
        self._with_gradient = torch.is_grad_enabled()
        self._gradient_lost = False

    def add(self, projection: nn.Module, answer: Tensor) -> None:
        """A projection has answered. Only the first answer in a pass counts: DeBERTa may use it again for positions."""
        if self._running and projection not in self._answers:
            self._answers[projection] = answer
            self._gradient_lost |= self._with_gradient and not torch.is_grad_enabled()

    def finish(self) -> None:
        """The encoder is done. What runs from here on is the recomputation of checkpointed layers, or a branch."""
        self._running = False


@contextmanager
def record_relations(encoder: PreTrainedModel, layer: int) -> Iterator[RelationRecord]:
    """Record query, key and value of one layer whenever `encoder` runs inside of the block.

    Gradients are kept as the forward pass keeps them. Every pass replaces what the one before has left. The block may
    hold one step or a whole training; the record can still be read after it.

    Args:
        encoder: runs by being called, alone or inside of a larger model.
        layer: counted from 0.

    Raises:
        UnsupportedEncoderError: the encoder has no such layer, no heads are left in it, or its attention is not found.
    """
    attention = _attention_of(encoder, layer)
    record = RelationRecord(attention.name, fused=attention.blocks == 3)
    hooks = [
        encoder.register_forward_pre_hook(_Hook(encoder, lambda *_: record.start())),
        *(module.register_forward_hook(_Hook(module, record.add)) for module in attention.projections.values()),
        encoder.register_forward_hook(_Hook(encoder, lambda *_: record.finish())),
    ]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def relation_width(encoder: PreTrainedModel, layer: int) -> int:
    """Width of each of query, key and value in one layer: its heads times their size.

    Args:
        encoder: pruned or not.
        layer: counted from 0.

    Raises:
        UnsupportedEncoderError: as `record_relations`.
    """
    attention = _attention_of(encoder, layer)
    return attention.heads * attention.head_size


def _attention_of(encoder: PreTrainedModel, layer: int) -> Attention:
    layers = find_anatomy(encoder).layers
    if not 0 <= layer < len(layers):
        raise UnsupportedEncoderError(
            f"{type(encoder).__name__}: expected a layer from 0 to {len(layers) - 1} to record relations of, found "
            f"{layer}; layers are counted from 0"
        )
    attention = layers[layer].attention
    if not attention.heads:
        usable = [index for index, other in enumerate(layers) if other.attention.heads]
        raise UnsupportedEncoderError(
            f"{type(encoder).__name__}: expected heads in '{attention.name}' to record relations of, found none left; "
            f"choose among the layers {usable}, or leave the criterion out"
        )
    return attention


class _Hook:
    """A hook for one module alone.

    A copy of the module, deep or shallow, may hold the same hook, and must neither write into the record nor keep it.
    """

    def __init__(self, module: nn.Module, action: Callable[[nn.Module, Any], None]) -> None:
        self._module = module
        self._action = action

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if module is self._module:
            self._action(module, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _do_nothing


def _do_nothing(*args: Any) -> None:
    """Stands where a copied module had a hook."""
