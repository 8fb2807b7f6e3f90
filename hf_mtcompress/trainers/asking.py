"""Asking teachers about many rows at once, for caches and for a first look at what they know."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_mtcompress.data.alignment import aligned, columns_of_rows, token_starts
from hf_mtcompress.data.preprocessing import max_length_of
from hf_mtcompress.data.teacher_cache import Signals
from hf_mtcompress.errors import DataError
from hf_mtcompress.tasks import Task
from hf_mtcompress.trainers.teachers import Teacher, TeacherPanel, positions_of

logger = logging.getLogger(__name__)

_MATCHED_AT_LEAST = 0.5
"""Share of tokens below which two tokenizers hardly fit each other."""
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


@dataclass(frozen=True)
class Asking:
    """How rows are put before a panel of teachers.

    Attributes:
        panel: the teachers.
        processor: the student's tokenizer or image processor.
        collate: makes a batch of the student's inputs.
        max_length: the student's longest input in tokens.
        device: where the teachers are.
        batch_size: rows a forward pass.
    """

    panel: TeacherPanel
    processor: Any
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    max_length: int | None
    device: torch.device
    batch_size: int

    def about(
        self,
        dataset: Dataset,
        raw: Any,
        indices: Sequence[int],
        tasks: dict[str, Task],
        states: Sequence[str],
        *,
        guests: Sequence[str] = (),
    ) -> Signals:
        """What the teachers say of some rows, in their order: arrays over the positions that count in each row.

        Args:
            dataset: rows encoded for the student.
            raw: the same rows as they were given, for teachers that read inputs of their own.
            indices: of the rows.
            tasks: tasks to answer, by name; those of these rows.
            states: names of states to show.
            guests: those of the tasks that the rows were not made for: their columns are not looked for.
        """
        readers = [task for name, task in tasks.items() if name not in guests]
        text = "input_ids" in dataset.column_names
        if text:
            dataset = dataset.select_columns([name for name in dataset.column_names if name in _INPUTS])
            dataset = dataset.with_format(None)
        lengths = [len(ids) for ids in dataset[list(indices)]["input_ids"]] if text else None
        order = list(range(len(indices))) if lengths is None else np.argsort(lengths, kind="stable").tolist()
        found: dict[int, dict[str, np.ndarray]] = {}
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            chosen = [int(indices[place]) for place in places]
            batch, counted = self._signals_of(tasks, readers, dataset, raw, chosen, states)
            for number, place in enumerate(places):
                found[place] = {
                    name: _own(values[number], None if values.dim() == 2 or counted is None else counted[number])
                    for name, values in batch.items()
                }
        return {name: [found[place][name] for place in range(len(indices))] for name in found[0]}

    def _signals_of(
        self,
        tasks: dict[str, Task],
        readers: Sequence[Task],
        dataset: Dataset,
        raw: Any,
        indices: list[int],
        states: Sequence[str],
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Signals of one batch, and which positions of it count; None for images."""
        rows = [dataset[index] for index in indices]
        text = "input_ids" in rows[0]
        features = self._on_device(self.collate([{key: row[key] for key in row if key in _INPUTS} for row in rows]))
        found = {}
        for key, (teacher, names, wanted) in self.panel.asked(tasks, states).items():
            if teacher.processor is None:
                found[key] = teacher.signals(features, names, wanted)
            elif text:
                found[key] = self._signals_of_other_tokens(teacher, readers, raw, indices, features, names, wanted)
            else:
                images = list(raw[indices][readers[0].input_columns[0]])
                own = teacher.processor(images, return_tensors="pt")
                found[key] = teacher.signals(self._on_device(own), names, wanted)
        signals = {name: values.float().cpu() for name, values in self.panel.combined(found, tasks, states).items()}
        return signals, positions_of(features).bool().cpu() if text else None

    def _signals_of_other_tokens(
        self,
        teacher: Teacher,
        readers: Sequence[Task],
        raw: Any,
        indices: list[int],
        features: Mapping[str, Tensor],
        names: list[str],
        wanted: Sequence[str],
    ) -> dict[str, Tensor]:
        """Of a teacher with a tokenizer of its own: signals by position are moved to where the student reads them."""
        leader = next((task for task in readers if task.problem == "token_classification"), None)
        task = leader or readers[0]
        columns = task.input_columns
        if raw is None or not columns or any(column not in raw.column_names for column in columns):
            raise DataError(
                f"task '{task.name}': expected the texts of the rows for a teacher with a tokenizer of its own, found "
                "encoded rows; pass raw rows and processing_class, so that each can read them for itself"
            )
        rows = raw[indices]
        split = leader is not None or not isinstance(rows[columns[0]][0], str)
        inputs = columns_of_rows(rows, columns, split=split)
        _, mine = token_starts(inputs, self.processor, max_length_of(self.processor, self.max_length), split=split)
        length = max_length_of(teacher.processor, teacher.max_length)
        encoded, theirs = token_starts(inputs, teacher.processor, length, split=split)
        tokenizer: Any = teacher.processor
        batch = tokenizer.pad(
            [{key: values[row] for key, values in encoded.items() if key in _INPUTS} for row in range(len(indices))],
            return_tensors="pt",
        )
        signals = teacher.signals(self._on_device(batch), names, wanted)
        places = torch.full(features["input_ids"].shape, -1)
        for row, (own, other) in enumerate(zip(mine, theirs, strict=True)):
            # Texts may be padded on the left; starts are those of the unpadded row.
            first, their_first = (int(found["attention_mask"][row].argmax()) for found in (features, batch))
            matched = torch.tensor(aligned(own, other))
            places[row, first : first + len(own)] = torch.where(matched < 0, matched, matched + their_first)
        texts = features["attention_mask"].bool().cpu()
        if (share := float((places[texts] >= 0).float().mean())) < _MATCHED_AT_LEAST:
            logger.warning(
                "only %.0f %% of the student's tokens begin where one of the teacher's does; others are not compared",
                100 * share,
            )
        places = places.to(self.device)
        return {name: values if values.dim() == 2 else _moved(values, places) for name, values in signals.items()}

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {key: values.to(self.device) for key, values in batch.items() if isinstance(values, Tensor)}


def _own(values: Tensor, counted: Tensor | None) -> np.ndarray:
    """One row's values, a copy, so that the padded batch can go."""
    return (values if counted is None else values[counted]).numpy().copy()


def _moved(values: Tensor, places: Tensor) -> Tensor:
    """(batch, positions, width) taken from other positions; NaN where there is none."""
    taken = values.float().gather(1, places.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))
    return taken.masked_fill((places < 0)[..., None], float("nan"))
