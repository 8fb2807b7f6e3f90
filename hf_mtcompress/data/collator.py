"""Rows to batches: inputs padded to the longest row, labels stacked as each task says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_mtcompress.data.mixing import SIGNALS, UNCOUNTED
from hf_mtcompress.data.readers import Reader, collate_inputs, padded_length, positions_of
from hf_mtcompress.tasks import Task


@dataclass
class MultiTaskCollator:
    """Pads model inputs and stacks the labels of the tasks that the rows belong to.

    Where rows of several sources share a batch, a task's labels are those of its own rows, and `rows_<task>` says which
    rows of the batch they are.

    Args:
        tasks: tasks by name.
        reader: what the rows were encoded with; without one they must be of one size.
        pad_to_multiple_of: pad token sequences to a multiple of this.
    """

    tasks: Mapping[str, Task]
    reader: Reader | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = collate_inputs(rows, self.reader, self.pad_to_multiple_of)
        length = padded_length(batch)
        mask = positions_of(batch) if length is not None else None
        for task in self.tasks.values():
            own = [place for place, row in enumerate(rows) if task.label_name in row]
            if own:
                batch[task.label_name] = task.collate_labels([rows[place][task.label_name] for place in own], length)
            if 0 < len(own) < len(rows):
                batch[task.rows_name] = torch.tensor(own)
        if any(UNCOUNTED in row for row in rows):
            batch[UNCOUNTED] = torch.tensor([bool(row.get(UNCOUNTED)) for row in rows])
        return {**batch, **stack_signals(rows, mask)}


def stack_signals(rows: Sequence[Mapping[str, Any]], attention_mask: Tensor | None) -> dict[str, Tensor]:
    """What a teacher said of the rows of a batch: of those that have it, NaN at positions that are padded.

    Args:
        rows: with arrays (width,), or (positions that count, width), under names that begin with `SIGNALS`.
        attention_mask: (batch, tokens); None where rows have no tokens, and are of one size.
    """
    names = dict.fromkeys(key for row in rows for key in row if key.startswith(SIGNALS))
    stacked = {}
    for name in names:
        own = [place for place, row in enumerate(rows) if name in row]
        arrays = [np.asarray(rows[place][name]) for place in own]
        if arrays[0].ndim == 2 and attention_mask is not None:
            mask = attention_mask.bool().numpy()
            padded = np.full((len(own), mask.shape[1], arrays[0].shape[1]), np.nan, dtype=arrays[0].dtype)
            for number, place in enumerate(own):
                padded[number, mask[place]] = arrays[number]
            stacked[name] = torch.from_numpy(padded)
        else:
            stacked[name] = torch.from_numpy(np.stack(arrays))
    return stacked
