"""What teachers say of many rows: a first look at what they know, and a cache of all their answers.

A trainer with teachers asks them about rows of the training set before it begins. What was said then comes along with
the rows, and changes no gradient.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from hf_mtcompress.data.collator import MultiTaskCollator, stack_signals
from hf_mtcompress.data.mixing import SIGNALS, MixedDataset
from hf_mtcompress.data.preprocessing import EncodedGroup
from hf_mtcompress.data.readers import Reader, input_columns, positions_of
from hf_mtcompress.data.teacher_cache import (
    CachedSignals,
    CacheSummary,
    Precision,
    Signals,
    digest_of,
    fill_cache,
    input_digest,
    open_cache,
)
from hf_mtcompress.errors import DataError, TaskError
from hf_mtcompress.tasks import Task
from hf_mtcompress.trainers.asking import Asking
from hf_mtcompress.trainers.probing import agreement
from hf_mtcompress.trainers.teachers import STOCK_TASK, TeacherPanel, logits_name

logger = logging.getLogger(__name__)


class AsksAhead:
    """The part of `DistillationMixin` that asks before training."""

    # What it uses of the mixin, and of the Trainer that this is mixed with.
    args: Any
    train_dataset: Any
    data_collator: Any
    processing_class: Any
    reader: Reader | None
    panel: TeacherPanel
    caches: list[CacheSummary]
    _stock: Task | None
    _their_states: Sequence[str] = ()

    # The next two are defined by `DistillationMixin`, the only class that is made of this one.
    @property
    def _answered(self) -> dict[str, Task]:
        raise NotImplementedError

    def _label_key(self, name: str) -> str:
        raise NotImplementedError

    def _groups(self, role: str) -> list[tuple[EncodedGroup, Any]]:
        """Encoded rows with the raw rows they came from."""
        if self._stock is not None:
            dataset = self.train_dataset if role == "train" else getattr(self, "eval_dataset", None)
            if not isinstance(dataset, Dataset):
                return []
            return [(EncodedGroup((STOCK_TASK,), dataset), dataset)]
        groups = self.train_groups if role == "train" else self.eval_groups  # type: ignore[attr-defined]  # of the Trainer
        rows = self.train_rows if role == "train" else self.eval_rows  # type: ignore[attr-defined]  # of the Trainer
        return [(group, rows.get(group.tasks[0])) for group in groups]

    def _ask_about(self, group: EncodedGroup, raw: Any, indices: Sequence[int], states: Sequence[str]) -> Signals:
        """What the teachers say of some rows, in their order."""
        tasks = {name: self._answered[name] for name in group.tasks}
        own = MultiTaskCollator({}, self.reader)
        asking = Asking(
            panel=self.panel,
            reader=self.reader,
            collate=own if self._stock is None else self._as_trained(_plain(self.data_collator)),
            whole_rows=self._stock is not None,
            device=self.args.device,
            batch_size=self.args.eval_batch_size,
        )
        return asking.about(group.dataset, raw, indices, tasks, states, guests=group.guests)

    def _as_trained(self, collator: Any) -> Any:
        """A batch of a stock student as its Trainer makes it of rows, without labels."""
        collate = self._get_collator_with_removed_columns(collator)  # type: ignore[attr-defined]  # of the Trainer
        return lambda rows: {key: value for key, value in collate(rows).items() if key != "labels"}

    def _probe(self, count: int) -> None:
        """Refuse teachers that answer no better than a guess.

        Raises:
            TaskError: one line for each task.
        """
        problems = []
        for group, raw in self._groups("validation") or self._groups("train"):
            indices = list(range(0, len(group.dataset), max(1, len(group.dataset) // count)))[:count]
            signals = self._ask_about(group, raw, indices, ())
            for name in group.tasks:
                task = self._answered[name]
                column = next(
                    (key for key in (self._label_key(name), "label") if key in group.dataset.column_names), None
                )
                key = column or self._label_key(name)
                labels = [group.dataset[index].get(key) for index in indices]
                if any(label is None for label in labels):
                    continue
                found = agreement(task, signals[logits_name(name)], labels)
                if found.near_chance:
                    regression = task.problem == "regression"
                    measure = "a correlation" if regression else "an agreement beyond chance (kappa)"
                    cause = found.cause or (
                        "it was not trained on this task, reads another tokenizer's ids, or the columns are not those "
                        "it was trained on"
                    )
                    problems.append(
                        f"task '{name}': expected a teacher that knows it, found {measure} of {found.value:.2f} on "
                        f"{found.items} items; likely cause: {cause}"
                    )
        if problems:
            raise TaskError(
                "\n".join(
                    [
                        *problems,
                        "give another teacher, or probe_rows=0 (in a recipe arguments: {probe_rows: 0}) to trust it",
                    ]
                )
            )

    def ask_teachers(self, folder: str | os.PathLike[str], part: tuple[int, int] = (0, 1)) -> tuple[int, int]:
        """Ask about all training rows, or a part of them, and keep the answers in a folder.

        Args:
            folder: of caches; what is there already is not asked again.
            part: (number, of): see `hf_mtcompress.data.teacher_cache.fill_cache`.

        Returns:
            Files that are there, and files that there must be.

        Raises:
            DataError: rows are streams, or change when they are read.
            ArtifactError: the folder cannot be written.
        """
        folder = Path(folder)
        counts = [
            fill_cache(
                folder,
                digest,
                len(group.dataset),
                lambda indices, group=group, raw=raw: self._ask_about(group, raw, indices, self._their_states),
                precision=self._cache_precision,
                part=part,
                description=f"Asking the teacher about {group.name}",
            )
            for digest, group, raw in self._cached_groups
        ]
        return sum(there for there, _ in counts), sum(wanted for _, wanted in counts)

    def _use_cache(self, folder: Path) -> None:
        """Let batches bring along what the teachers said of their rows, asking where nobody did."""
        self.ask_teachers(folder)
        tables = [
            open_cache(folder, digest, len(group.dataset), self._cache_precision)
            for digest, group, _ in self._cached_groups
        ]
        self.caches = [table.summary for table in tables]
        logger.warning(
            "teachers' answers to %d rows take %.1f MB on disk and took %.0f s to ask for",
            sum(summary.rows for summary in self.caches),
            sum(summary.bytes for summary in self.caches) / 1e6,
            sum(summary.seconds for summary in self.caches),
        )
        if self._stock is not None:
            self.train_dataset = _WithSignals(self.train_dataset, tables[0])
            self.data_collator = _SignalCollator(self.data_collator)
        else:
            assert isinstance(self.train_dataset, MixedDataset)
            self.train_dataset.signals = tables
            if not isinstance(self.data_collator, MultiTaskCollator):
                self.data_collator = _SignalCollator(self.data_collator)

    @property
    def _cache_precision(self) -> Precision:
        precision: Any = getattr(self.args, "cache_precision", "float16")
        if precision not in get_args(Precision):
            raise TaskError(f"expected cache_precision among {get_args(Precision)}, found '{precision}'")
        return precision

    @cached_property
    def _cached_groups(self) -> list[tuple[str, EncodedGroup, Any]]:
        """Sources of training rows, each with the digest of all that a teacher's answers to them depend on."""
        if getattr(self, "train_streams", None):
            raise DataError(
                "expected rows with a length for a teacher's cache, found streams; load them without streaming"
            )
        if getattr(self.processing_class, "padding_side", "right") == "left":
            raise DataError(
                "expected a tokenizer that pads on the right for a teacher's cache, found padding_side='left', with "
                "which positions, and so answers, depend on the other rows of a batch; set padding_side='right'"
            )
        digests = [teacher.digest() for teacher in self.panel.teachers]
        foreign = any(teacher.reader is not None for teacher in self.panel.teachers)
        groups = self._groups("train")
        if not groups:
            raise DataError(
                f"expected a datasets.Dataset for a teacher's cache, found a {type(self.train_dataset).__name__}; make "
                "one of it, or leave teacher_cache out"
            )
        found = []
        for group, raw in groups:
            columns = input_columns(group.dataset[0], self.reader)
            parts = {
                "teachers": digests,
                "orders": [teacher.orders for teacher in self.panel.teachers],
                "asked": {
                    name: [(self.panel.teachers.index(teacher), weight) for teacher, weight in self.panel.by_task[name]]
                    for name in group.tasks
                },
                "labels": {name: self._answered[name].labels for name in group.tasks},
                "states": list(self._their_states),
                "rows": input_digest(group.dataset, columns),
                "precision": self._cache_precision,
            }
            if foreign:
                # What such a teacher reads: the student's tokens do not tell it all.
                inputs = self._answered[group.tasks[0]].input_columns
                parts["raw"] = input_digest(raw, [column for column in inputs if column in raw.column_names])
                parts["student"] = None if self.reader is None else self.reader.digest()
            found.append((digest_of(parts), group, raw))
        return found

    def get_train_dataloader(self) -> Any:
        """As the Trainer's; cached answers come along with the rows."""
        loader = super().get_train_dataloader()  # type: ignore[misc]  # of the Trainer
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, MixedDataset) and isinstance(self.train_dataset, MixedDataset):
            dataset.signals = self.train_dataset.signals
        return loader

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]  # of the Trainer
        signature = getattr(self, "_signature_columns", None)
        if signature is not None:
            shown = [*(logits_name(name) for name in self._answered), *self._their_states]
            names = [f"{SIGNALS}{name}" for name in shown]
            signature += [name for name in names if name not in signature]


class _WithSignals(TorchDataset[dict[str, Any]]):
    """Rows of a stock student with what its teacher said of them."""

    def __init__(self, rows: Dataset, signals: CachedSignals) -> None:
        self._rows = rows
        self._table = signals

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        found = self._table.rows(indices)
        return [
            {**self._rows[index], **{f"{SIGNALS}{name}": values[place] for name, values in found.items()}}
            for place, index in enumerate(indices)
        ]


class _SignalCollator:
    """Any collator, with signals stacked beside what it makes."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        plain = [{key: value for key, value in row.items() if not key.startswith(SIGNALS)} for row in rows]
        batch = dict(self.collator(plain))
        mask = positions_of(batch)
        return {**batch, **stack_signals(rows, mask if mask.dim() == 2 else None)}


def _plain(collator: Any) -> Any:
    """The collator of the user, without what was put around it."""
    return collator.collator if isinstance(collator, _SignalCollator) else collator
