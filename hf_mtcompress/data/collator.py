"""Rows to batches: inputs padded to the longest row, labels stacked as each task says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_mtcompress.data.mixing import SIGNALS, UNCOUNTED
from hf_mtcompress.tasks import Task

_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass
class MultiTaskCollator:
    """Pads model inputs and stacks the labels of the tasks that the rows belong to.

    Where rows of several sources share a batch, a task's labels are those of its own rows, and `rows_<task>` says which
    rows of the batch they are.

    Args:
        tasks: tasks by name.
        processor: tokenizer that pads; not needed for images.
        pad_to_multiple_of: pad token sequences to a multiple of this.
    """

    tasks: Mapping[str, Task]
    processor: Any | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        length = None
        if "input_ids" in rows[0]:
            inputs = [{key: row[key] for key in _TEXT_INPUTS if key in row} for row in rows]
            if self.processor is not None:
                padded = self.processor.pad(inputs, return_tensors="pt", pad_to_multiple_of=self.pad_to_multiple_of)
                batch.update({key: padded[key] for key in padded})
            else:
                batch.update(_stack_equal(inputs))
            length = batch["input_ids"].shape[1]
        if "pixel_values" in rows[0]:
            batch["pixel_values"] = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
        for task in self.tasks.values():
            own = [place for place, row in enumerate(rows) if task.label_name in row]
            if own:
                batch[task.label_name] = task.collate_labels([rows[place][task.label_name] for place in own], length)
            if 0 < len(own) < len(rows):
                batch[task.rows_name] = torch.tensor(own)
        if any(UNCOUNTED in row for row in rows):
            batch[UNCOUNTED] = torch.tensor([bool(row.get(UNCOUNTED)) for row in rows])
        return {**batch, **stack_signals(rows, batch.get("attention_mask"))}


def stack_signals(rows: Sequence[Mapping[str, Any]], attention_mask: Tensor | None) -> dict[str, Tensor]:
    """What a teacher said of the rows of a batch: of those that have it, NaN at positions that are padded.

    Args:
        rows: with arrays (width,), or (positions that count, width), under names that begin with `SIGNALS`.
        attention_mask: (batch, tokens) of texts; None for images, which are of one size.
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


def _stack_equal(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([list(row[key]) for row in rows]) for key in rows[0]}
