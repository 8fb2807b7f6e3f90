"""Mixing sources that are read as streams: endless, in groups of rows of one source, without a length."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from hf_mtcompress.data.mixing import batch_shares
from hf_mtcompress.errors import DataError

STREAM_STRATEGIES = ("uniform", "round_robin", "weights")
"""Strategies of mixing that need no number of rows."""
_GROUPS_IN_A_BLOCK = 10
"""Of each source, on average, at least."""
_LONGEST_BLOCK = 1000
"""Groups of each source, on average, at most; a weight below one group of such a block counts as one."""


class MixedStream(TorchIterableDataset[dict[str, Any]]):
    """Rows of several streams, `batch_size * num_processes` of one source at a time, for ever.

    accelerate deals rows of a stream to processes in pieces of `batch_size`, so all of them work on the same source in
    every step; each process reads the whole stream and leaves out what belongs to others. The order is a function of
    the seed, and a stream that ends begins again with its next epoch (`set_epoch`: shuffled anew where it is shuffled).
    A resumed run reads past the rows that were trained on, and so sees the same rows as an uninterrupted one.

    Args:
        sources: streams of encoded rows.
        batch_size: rows a batch and process.
        strategy: `uniform`, `round_robin` or `weights`; the others need numbers of rows.
        weights: of each source, for `weights`.
        seed: of the order.
        num_processes: ranks that share the batches.

    Raises:
        DataError: a strategy that needs a number of rows.
    """

    def __init__(
        self,
        sources: Sequence[IterableDataset],
        batch_size: int,
        *,
        strategy: str = "uniform",
        weights: Sequence[float] | None = None,
        seed: int = 42,
        num_processes: int = 1,
    ) -> None:
        if strategy not in STREAM_STRATEGIES:
            raise DataError(
                f"expected a mixing strategy among {list(STREAM_STRATEGIES)} for streams, found '{strategy}', which "
                "needs the number of rows; choose one of these, or load the data without streaming"
            )
        self.sources = list(sources)
        self.strategy = strategy
        self.group_size = batch_size * num_processes
        self.seed = seed
        given = [1.0] * len(self.sources) if strategy != "weights" else list(weights or ())
        # As many as the smallest weight needs to come once.
        needed = sum(given) / min((weight for weight in given if weight > 0), default=1.0)
        groups = min(max(_GROUPS_IN_A_BLOCK * len(given), round(needed)), _LONGEST_BLOCK * len(given))
        self.shares = batch_shares(given, groups)
        """Groups of each source in a block of the order."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = [self._endless(source) for source in self.sources]
        block = 0
        while True:
            for source in self._order(block):
                for _ in range(self.group_size):
                    yield next(rows[source])
            block += 1

    def _order(self, block: int) -> list[int]:
        if self.strategy == "round_robin":
            return list(range(len(self.sources)))
        order = np.repeat(np.arange(len(self.sources)), self.shares)
        np.random.default_rng([self.seed, block]).shuffle(order)
        return [int(source) for source in order]

    @staticmethod
    def _endless(source: IterableDataset) -> Iterator[dict[str, Any]]:
        epoch = 0
        while True:
            source.set_epoch(epoch)
            empty = True
            for row in source:
                empty = False
                yield row
            if empty:
                raise DataError("expected rows in every stream, found one that ends at once; check its filters")
            epoch += 1
