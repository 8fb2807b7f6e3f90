"""What happens inside an encoder during one forward pass, by the names that criteria of distillation use."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_mtcompress.losses.criteria import EMBEDDING, HIDDEN
from hf_mtcompress.losses.distillation import mean_pooled
from hf_mtcompress.model.relations import RelationRecord, record_relations, relation_width


class StateReader:
    """Reads states after a forward pass; made by `reading_states`.

    Attributes:
        wants_hidden: whether the forward pass must return hidden states.
    """

    def __init__(self, names: Iterable[str], records: dict[int, RelationRecord]) -> None:
        self._names = list(names)
        self._records = records
        self.wants_hidden = any(_parts(name)[0] == HIDDEN for name in self._names)

    def read(self, outputs: Any, mask: Tensor) -> dict[str, Tensor]:
        """States by name.

        Args:
            outputs: of the forward pass; `hidden_states` with the embeddings first, else `last_hidden_state`.
            mask: (batch, positions) of texts, 1 where a position counts; (batch,) of images.
        """
        relations = {layer: record.take()._asdict() for layer, record in self._records.items()}
        found = {}
        for name in self._names:
            kind, layer = _parts(name)
            if kind == HIDDEN:
                found[name] = outputs.hidden_states[layer + 1]
            elif kind == EMBEDDING:
                last = outputs.get("last_hidden_state")
                last = outputs.hidden_states[-1] if last is None else last
                every = torch.ones(last.shape[:2], dtype=torch.bool, device=last.device)
                found[name] = mean_pooled(last, mask.bool() if mask.dim() == 2 else every)
            else:
                found[name] = relations[layer][kind]
        return found


@contextmanager
def reading_states(encoder: PreTrainedModel, names: Iterable[str]) -> Iterator[StateReader]:
    """Watch an encoder while it runs inside of the block.

    Args:
        encoder: runs by being called, alone or inside of a larger model.
        names: of states, see `hf_mtcompress.losses.criteria.state_name`.
    """
    names = list(names)
    layers = sorted({layer for kind, layer in map(_parts, names) if kind not in (HIDDEN, EMBEDDING)})
    with ExitStack() as stack:
        records = {layer: stack.enter_context(record_relations(encoder, layer)) for layer in layers}
        yield StateReader(names, records)


def state_width(encoder: PreTrainedModel, name: str) -> int:
    """Width of a state."""
    kind, layer = _parts(name)
    return encoder.config.hidden_size if kind in (HIDDEN, EMBEDDING) else relation_width(encoder, layer)


def _parts(name: str) -> tuple[str, int]:
    kind, _, layer = name.partition("_")
    return kind, int(layer or 0)
