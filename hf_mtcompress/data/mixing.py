"""Which rows come when: batches of one source of rows at a time, as a pure function of seed, epoch and step.

A source is a set of rows with one or several tasks on them; tasks that share rows share batches.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from hf_mtcompress.errors import DataError
from hf_mtcompress.tasks.base import UNLABELLED

Strategy = Literal["proportional", "temperature", "uniform", "round_robin"]
_BATCHES_IN_A_BLOCK = 50
"""As in transformers' own grouping by length."""

Index = tuple[int, int]
"""Source and row; -1 - row is the row without its labels, which then counts nowhere."""


class MixedDataset(TorchDataset[dict[str, Any]]):
    """Several data sets, indexed by (source, row)."""

    def __init__(self, sources: Sequence[Dataset]) -> None:
        self.sources = list(sources)

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def __getitem__(self, index: Index) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Index]) -> list[dict[str, Any]]:
        """Rows of one batch, read in one go; all of them are of one source."""
        columns = self.sources[indices[0][0]][[row if row >= 0 else -1 - row for _, row in indices]]
        rows = [{key: values[i] for key, values in columns.items()} for i in range(len(indices))]
        return [row if number >= 0 else _without_labels(row) for row, (_, number) in zip(rows, indices, strict=True)]


def _without_labels(row: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with every label marked as unlabelled."""

    def unlabelled(label: Any) -> Any:
        match label:
            case list() | tuple():
                return [UNLABELLED for _ in label]
            case float():
                return math.nan
            case _:
                return UNLABELLED

    return {key: unlabelled(value) if key.startswith("labels_") else value for key, value in row.items()}


def batch_shares(rows: Sequence[int], batch_size: int, strategy: Strategy, temperature: float) -> list[int]:
    """How many batches each source gets in an epoch.

    The epoch has as many batches as one pass over all rows. `proportional` gives each source its own rows once.
    `temperature` draws with probability proportional to rows ** (1 / temperature) (Devlin et al. 2018 smoothing, as
    multilingual BERT and T5 use it), `uniform` and `round_robin` alike. Every source gets at least one batch.

    Args:
        rows: rows of each source, at least 1.
        batch_size: rows a batch, over all processes.
        strategy: see above.
        temperature: above 0; 1 is proportional, large is uniform.

    Returns:
        Batches by source.
    """
    once = [math.ceil(count / batch_size) for count in rows]
    if strategy == "proportional":
        return once
    power = 1.0 / temperature if strategy == "temperature" else 0.0
    weights = np.asarray(rows, dtype=np.float64) ** power
    exact = weights / weights.sum() * sum(once)
    shares = np.maximum(np.floor(exact), 1).astype(int)
    # Largest remainder, so that the shares add up to the epoch; ties go to the earlier source.
    for index in np.argsort(-(exact - np.floor(exact)), kind="stable"):
        if shares.sum() >= sum(once):
            break
        shares[index] += 1
    return [int(share) for share in shares]


class MixingSampler(Sampler[list[Index]]):
    """Batches of one source each, in an order that depends on seed and epoch alone.

    With several processes it emits groups of `num_processes` batches of the same source, because accelerate deals
    consecutive batches to ranks: every rank then works on the same tasks in every step.

    Args:
        rows: rows of each source.
        batch_size: rows a batch and process.
        strategy: see `batch_shares`; `round_robin` also fixes the order.
        temperature: for strategy `temperature`.
        seed: of the order.
        num_processes: ranks that share the batches.
        lengths: tokens of each row, by source. When given, rows of like length share a batch, which saves padding: a
            shuffled source is cut into blocks, each sorted by length, and its batches are shuffled again.
    """

    def __init__(
        self,
        rows: Sequence[int],
        batch_size: int,
        *,
        strategy: Strategy = "proportional",
        temperature: float = 2.0,
        seed: int = 42,
        num_processes: int = 1,
        lengths: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not rows or min(rows) < 1:
            raise DataError(f"expected at least one row in every source, found {list(rows)}")
        self.rows = list(rows)
        # Not called batch_size: accelerate would hold back every group whose last batch is shorter than that.
        self.rows_per_batch = batch_size
        self.strategy: Strategy = strategy
        self.seed = seed
        self.num_processes = num_processes
        self.drop_last = False
        self.lengths = None if lengths is None else [np.asarray(source) for source in lengths]
        self.epoch = 0
        self.shares = batch_shares(rows, batch_size * num_processes, strategy, temperature)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.shares) * self.num_processes

    def __iter__(self) -> Iterator[list[Index]]:
        seen = [0] * len(self.rows)
        for source in self.order():
            rows = self._rows_of(source, seen[source])
            seen[source] += 1
            for rank in range(self.num_processes):
                part = rows[rank * self.rows_per_batch : (rank + 1) * self.rows_per_batch]
                # A short last group leaves ranks without rows: they run one that counts nowhere.
                yield [(source, row) for row in part] or [(source, -1 - rows[0])]

    def order(self) -> list[int]:
        """Sources of this epoch's groups, in order."""
        if self.strategy == "round_robin":
            left = list(self.shares)
            order = []
            while any(left):
                for source, count in enumerate(left):
                    if count:
                        order.append(source)
                        left[source] -= 1
            return order
        order = np.repeat(np.arange(len(self.rows)), self.shares)
        np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        return [int(source) for source in order]

    def _rows_of(self, source: int, group: int) -> list[int]:
        """Rows of a source's n-th group in this epoch."""
        size = self.rows_per_batch * self.num_processes
        count = self.rows[source]
        if self.strategy == "proportional":
            order = self._permutation(source, self.epoch)
            return [int(row) for row in order[group * size : (group + 1) * size]]
        # An endless row of permutations, cut into groups: no row comes twice before all others came once.
        start = (self.epoch * self.shares[source] + group) * size
        passes = {position // count for position in (start, start + size - 1)}
        passes |= set(range(min(passes), max(passes)))
        orders = {number: self._permutation(source, number) for number in passes}
        return [int(orders[position // count][position % count]) for position in range(start, start + size)]

    def _permutation(self, source: int, number: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, source, number, 1])
        order = generator.permutation(self.rows[source])
        if self.lengths is None:
            return order
        size = self.rows_per_batch * self.num_processes
        block = size * _BATCHES_IN_A_BLOCK
        blocks = [order[start : start + block] for start in range(0, len(order), block)]
        lengths = self.lengths[source]
        batches = [
            rows[start : start + size]
            for rows in (part[np.argsort(lengths[part], kind="stable")] for part in blocks)
            for start in range(0, len(rows), size)
        ]
        # The last batch may be short and stays last, so that the others keep their boundaries.
        shuffled = generator.permutation(len(batches) - 1)
        return np.concatenate([*(batches[index] for index in shuffled), batches[-1]])
