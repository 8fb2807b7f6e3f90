"""Asking teachers about many rows at once, for caches and for a first look at what they know."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_mtcompress.data.alignment import aligned
from hf_mtcompress.data.readers import Reader, input_columns, lengths_of, positions_of
from hf_mtcompress.data.teacher_cache import Signals
from hf_mtcompress.errors import DataError
from hf_mtcompress.tasks import Task
from hf_mtcompress.trainers.teachers import Teacher, TeacherPanel

logger = logging.getLogger(__name__)

_MATCHED_AT_LEAST = 0.5
"""Share of tokens below which two tokenizers hardly fit each other."""


@dataclass(frozen=True)
class Asking:
    """How rows are put before a panel of teachers.

    Attributes:
        panel: the teachers.
        reader: the student's, where it has one.
        collate: makes a batch of the student's inputs.
        device: where the teachers are.
        batch_size: rows a forward pass.
        whole_rows: whether `collate` gets rows as they are, and not only their inputs.
    """

    panel: TeacherPanel
    reader: Reader | None
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    device: torch.device
    batch_size: int
    whole_rows: bool = False

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
        hosts = [task for name, task in tasks.items() if name not in guests]
        lengths = lengths_of(dataset.select(list(indices)))
        if lengths is not None and not self.whole_rows:
            dataset = dataset.select_columns(input_columns(dataset.column_names, self.reader)).with_format(None)
        order = list(range(len(indices))) if lengths is None else np.argsort(lengths, kind="stable").tolist()
        found: dict[int, dict[str, np.ndarray]] = {}
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            chosen = [int(indices[place]) for place in places]
            batch, counted = self._signals_of(tasks, hosts, dataset, raw, chosen, states)
            for number, place in enumerate(places):
                found[place] = {
                    name: _own(values[number], None if values.dim() == 2 or counted is None else counted[number])
                    for name, values in batch.items()
                }
        return {name: [found[place][name] for place in range(len(indices))] for name in found[0]}

    def _signals_of(
        self,
        tasks: dict[str, Task],
        hosts: Sequence[Task],
        dataset: Dataset,
        raw: Any,
        indices: list[int],
        states: Sequence[str],
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Signals of one batch, and which tokens of it count; None where rows have none."""
        rows = [dataset[index] for index in indices]
        inputs = list(rows[0]) if self.whole_rows else input_columns(rows[0], self.reader)
        features = self._on_device(self.collate([{key: row[key] for key in inputs if key in row} for row in rows]))
        found = {}
        for key, (teacher, names, wanted) in self.panel.asked(tasks, states).items():
            if teacher.reader is None:
                found[key] = teacher.signals(features, names, wanted)
            else:
                found[key] = self._signals_of_other_inputs(
                    teacher, teacher.reader, hosts, raw, indices, features, names, wanted
                )
        signals = {name: values.float().cpu() for name, values in self.panel.combined(found, tasks, states).items()}
        counted = positions_of(features).bool().cpu()
        return signals, counted if counted.dim() == 2 else None

    def _signals_of_other_inputs(
        self,
        teacher: Teacher,
        reader: Reader,
        tasks: Sequence[Task],
        raw: Any,
        indices: list[int],
        features: Mapping[str, Tensor],
        names: list[str],
        wanted: Sequence[str],
    ) -> dict[str, Tensor]:
        """Of a teacher with a reader of its own: signals by token are moved to where the student reads them."""
        task = tasks[0]
        columns = task.input_columns
        if raw is None or self.reader is None or not columns or any(name not in raw.column_names for name in columns):
            raise DataError(
                f"task '{task.name}': expected the texts of the rows for a teacher with a tokenizer of its own, found "
                "encoded rows; pass raw rows and processing_class, so that each can read them for itself"
            )
        rows = raw[indices]
        inputs = [list(rows[column]) for column in columns]
        encoded, theirs = reader.encode_with_starts(inputs)
        batch = reader.collate([{key: values[row] for key, values in encoded.items()} for row in range(len(indices))])
        signals = teacher.signals(self._on_device(batch), names, wanted)
        _, mine = (None, None) if theirs is None else self.reader.encode_with_starts(inputs)
        if mine is None or theirs is None:
            return signals
        own_mask, their_mask = positions_of(features).cpu(), positions_of(batch)
        places = torch.full(own_mask.shape, -1)
        for row, (own, other) in enumerate(zip(mine, theirs, strict=True)):
            # Texts may be padded on the left; starts are those of the unpadded row.
            first, their_first = int(own_mask[row].argmax()), int(their_mask[row].argmax())
            matched = torch.tensor(aligned(own, other))
            places[row, first : first + len(own)] = torch.where(matched < 0, matched, matched + their_first)
        if (share := float((places[own_mask.bool()] >= 0).float().mean())) < _MATCHED_AT_LEAST:
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
