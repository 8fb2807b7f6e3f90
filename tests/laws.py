"""Laws that hold for every encoder family, as functions that assert them.

A law takes the name of a family (see `tests/tiny.py`), makes its own tiny model and says in its docstring what would go
wrong in silence without it. Tests parametrize over `FAMILIES`.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.surgery import apply_structure, cut, describe_structure, keep_layers
from tests.tiny import FEED_FORWARD, HEADS, LAYERS, tiny_encoder, tiny_inputs

Kept = Mapping[int, Sequence[int]]

UNEVEN_HEADS: Kept = {0: [1, 3], 1: [0], 2: [0, 2, 3]}
UNEVEN_NEURONS: Kept = {0: range(5, 21), 1: range(32), 2: [7]}
EMPTY_HEADS: Kept = {0: [2], 1: []}
EMPTY_NEURONS: Kept = {1: [], 2: [0, 9]}
AGAIN_HEADS: Kept = {0: [1], 1: [], 2: [0, 2]}
AGAIN_NEURONS: Kept = {0: range(3), 1: [], 2: [0]}
"""Of what the uneven cut left."""


def hidden(model: PreTrainedModel, family: str) -> Tensor:
    """Last hidden state on fixed inputs, without gradient."""
    with torch.no_grad():
        return model(**tiny_inputs(family)).last_hidden_state


def assert_cutting_nothing_is_the_identity(family: str) -> None:
    """Otherwise a recipe with `heads: 0` changes the model."""
    encoder = tiny_encoder(family)
    before, config = hidden(encoder, family), encoder.config.to_dict()
    everything = {layer: range(HEADS) for layer in range(LAYERS)}
    cut(encoder, everything, {layer: range(FEED_FORWARD) for layer in range(LAYERS)})
    keep_layers(encoder, range(LAYERS))
    apply_structure(encoder, describe_structure(encoder))
    assert torch.equal(hidden(encoder, family), before)
    assert encoder.config.to_dict() == config


def assert_cutting_equals_masking(family: str, heads: Kept, feed_forward: Kept) -> None:
    """Otherwise the wrong rows are cut, or an attribute that follows them is stale, and only quality tells."""
    encoder = tiny_encoder(family)
    unmasked = hidden(encoder, family)
    hooks = []
    for index, layer in enumerate(find_anatomy(encoder).layers):
        for part, kept, size in (
            (layer.attention.output, heads, layer.attention.head_size),
            (layer.feed_forward.output, feed_forward, 1),
        ):
            mask = torch.zeros(part.in_features // size, size)
            mask[list(kept.get(index, range(len(mask))))] = 1
            hooks.append(part.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask.flatten(),)))
    masked = hidden(encoder, family)
    for hook in hooks:
        hook.remove()
    cut(encoder, heads, feed_forward)
    assert (masked - unmasked).abs().max() > 0.1, "the mask must change something, or the law says nothing"
    torch.testing.assert_close(hidden(encoder, family), masked, rtol=0, atol=5e-6)


def assert_structure_round_trip(family: str, heads: Kept, feed_forward: Kept) -> None:
    """Otherwise a saved model is rebuilt in another shape than it had."""
    encoder = tiny_encoder(family)
    cut(encoder, heads, feed_forward)
    structure = describe_structure(encoder)
    rebuilt = tiny_encoder(family, seed=1)
    apply_structure(rebuilt, structure)
    assert describe_structure(rebuilt) == structure
    rebuilt.load_state_dict(encoder.state_dict(), strict=True)
    assert torch.equal(hidden(rebuilt, family), hidden(encoder, family))


def assert_cut_model_trains(family: str, heads: Kept, feed_forward: Kept) -> None:
    """Otherwise recovery after pruning fails on a shape that only the backward pass sees."""
    encoder = tiny_encoder(family)
    cut(encoder, heads, feed_forward)
    encoder.train()
    encoder(**tiny_inputs(family)).last_hidden_state.square().sum().backward()
    stack = find_anatomy(encoder).stack
    missing = [name for name, parameter in stack.named_parameters() if parameter.grad is None]
    wrong = [name for name, p in stack.named_parameters() if p.grad is not None and p.grad.shape != p.shape]
    assert (missing, wrong) == ([], [])


def assert_prune_save_load_prune_again(family: str, folder: Path) -> None:
    """Otherwise gradual pruning breaks at its second step: stale attributes, or a stale structure in the config."""
    encoder = tiny_encoder(family)
    cut(encoder, UNEVEN_HEADS, UNEVEN_NEURONS)
    for step in range(2):
        encoder.save_pretrained(folder / str(step))
        loaded = AutoModel.from_pretrained(folder / str(step))
        assert torch.equal(hidden(loaded, family), hidden(encoder, family))
        assert describe_structure(loaded) == describe_structure(encoder)
        again = copy.deepcopy(loaded)
        for model in (encoder, loaded, again):
            cut(model, AGAIN_HEADS, AGAIN_NEURONS) if step == 0 else keep_layers(model, [1, 2])
        assert torch.equal(hidden(loaded, family), hidden(encoder, family))
        # The copy has its own hooks and attributes, not those of the original.
        assert torch.equal(hidden(again, family), hidden(encoder, family))
    encoder.save_pretrained(folder / "last")
    assert torch.equal(hidden(AutoModel.from_pretrained(folder / "last"), family), hidden(encoder, family))
