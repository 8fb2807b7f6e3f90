"""Which rows come when, as a pure function of seed, epoch and step (and of what a reactive strategy was told).

A source is a set of rows with one or several tasks on them; tasks that share rows share batches.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from hf_mtcompress.errors import DataError
from hf_mtcompress.tasks.base import UNLABELLED

logger = logging.getLogger(__name__)

Strategy = Literal["proportional", "temperature", "annealed", "uniform", "round_robin", "weights", "loss", "score_gap"]
REACTIVE: tuple[Strategy, ...] = ("loss", "score_gap")
"""Strategies that draw by what training showed so far."""
_ANNEALED_BY = 0.8
"""How far `annealed` lowers the exponent of the rows from the first to the last epoch."""
_BATCHES_IN_A_BLOCK = 50
"""As in transformers' own grouping by length."""

SIGNALS = "__teacher__"
"""Beginning of the names of a row's signals."""
UNCOUNTED = "uncounted"
"""Key of a row, and of a batch, that says which rows count nowhere."""

Index = tuple[int, int]
"""Source and row; -1 - row is the row without its labels, which then counts nowhere."""


class SignalTable(Protocol):
    """What was said of the rows of a source, such as a teacher's answers."""

    def rows(self, indices: Sequence[int]) -> dict[str, list[np.ndarray]]:
        """Arrays of some rows, by name."""
        ...


class MixedDataset(TorchDataset[dict[str, Any]]):
    """Several data sets, indexed by (source, row), or by one number as if they stood one after the other.

    Attributes:
        sources: the data sets.
        signals: for each source what comes along with its rows under names that begin with `SIGNALS`; or nothing.
    """

    def __init__(self, sources: Sequence[Dataset]) -> None:
        self.sources = list(sources)
        self.signals: Sequence[SignalTable] = ()

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def __getitem__(self, index: Index | int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def _place(self, index: Index | int) -> Index:
        if isinstance(index, tuple):
            return index
        for source, rows in enumerate(self.sources):
            if index < len(rows):
                return source, index
            index -= len(rows)
        raise IndexError(f"expected a row below {len(self)}, found one of {index} behind them")

    def __getitems__(self, places: Sequence[Index | int]) -> list[dict[str, Any]]:
        """Rows of one batch, those of one source read in one go."""
        indices = [self._place(place) for place in places]
        found: dict[int, dict[str, Any]] = {}
        for source in dict.fromkeys(source for source, _ in indices):
            places = [place for place, index in enumerate(indices) if index[0] == source]
            numbers = [indices[place][1] for place in places]
            rows = [number if number >= 0 else -1 - number for number in numbers]
            columns = dict(self.sources[source][rows])
            if self.signals:
                columns |= {f"{SIGNALS}{name}": arrays for name, arrays in self.signals[source].rows(rows).items()}
            for position, (place, number) in enumerate(zip(places, numbers, strict=True)):
                row = {key: values[position] for key, values in columns.items()}
                found[place] = row if number >= 0 else _without_labels(row)
        return [found[place] for place in range(len(indices))]


def _without_labels(row: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with every label marked as unlabelled, and the row as one that counts nowhere."""

    def unlabelled(label: Any) -> Any:
        match label:
            case list() | tuple():
                return [UNLABELLED for _ in label]
            case float():
                return math.nan
            case _:
                return UNLABELLED

    blank = {key: unlabelled(value) if key.startswith("labels_") else value for key, value in row.items()}
    return {**blank, UNCOUNTED: True}


def batch_shares(weights: Sequence[float], total: int) -> list[int]:
    """Split a number of batches or rows by weights: largest remainders, at least one for each weight above 0.

    Args:
        weights: of each source, at least 0, not all 0.
        total: in all, at least one for each source.

    Returns:
        Shares by source; they add up to `total`.
    """
    exact = np.asarray(weights, dtype=np.float64)
    exact = exact / exact.sum() * total
    shares = np.maximum(np.floor(exact), exact > 0).astype(int)
    # Ties go to the earlier source.
    for index in np.argsort(-(exact - np.floor(exact)), kind="stable"):
        if shares.sum() >= total:
            break
        shares[index] += 1
    while shares.sum() > total:  # many sources that are owed less than one batch
        shares[np.argmax(shares)] -= 1
    return [int(share) for share in shares]


@dataclass(frozen=True)
class _Joint:
    """An epoch that was begun in groups of another size.

    Attributes:
        epoch: its number.
        groups: in the present size, that stand for those that were drawn.
        taken: rows of each source that were drawn in this epoch.
        drawn: rows of each source that were drawn in all.
        once: whether every row comes once in this epoch.
    """

    epoch: int
    groups: int
    taken: list[int]
    drawn: list[int]
    once: bool


class MixingSampler(Sampler[list[Index]]):
    """Batches of one source each (or of rows of several), in an order that depends on seed and epoch alone.

    An epoch has as many batches as one pass over all rows, or, with `mixed`, as many rows. With `proportional` every
    row comes once an epoch. The other strategies walk through each source's rows at a pace of its own, and no row comes
    twice before all others of its source came once:

    - `temperature`: by rows ** (1 / temperature) (multilingual BERT and T5);
    - `annealed`: by rows ** a, with a going from 1 to 0.2 over the epochs (Stickland and Murray 2019, "BERT and PALs");
    - `uniform`, and `round_robin`, which also fixes the order;
    - `weights`: as given; a source of weight 0 is never drawn;
    - `loss`, `score_gap`: by what `react` was told before the epoch; the first one is proportional.

    With several processes it emits groups of `num_processes` batches of the same source, because accelerate deals
    consecutive batches to ranks: every rank then works on the same tasks in every step.

    Args:
        rows: rows of each source.
        batch_size: rows a batch and process.
        strategy: see above.
        temperature: for strategy `temperature`, above 0; 1 is proportional, large is uniform.
        cap: rows of a source beyond this number do not count for its pace (Raffel et al. 2020, T5).
        weights: of each source, for strategy `weights`.
        epochs: of the training, for strategy `annealed`.
        mixed: whether a batch holds rows of several sources.
        shuffle: whether rows come in random order; else as they stand, and one source after the other.
        drop_last: whether rows that do not fill the last batch of a source (with `mixed`: of all) are left out.
        seed: of the order.
        num_processes: ranks that share the batches.
        lengths: tokens of each row, by source. When given, rows of like length share a batch, which saves padding:
            shuffled rows (of one source, or of all with `mixed`) are cut into blocks, each sorted by length, and the
            batches are shuffled again.

    Raises:
        DataError: a source is empty, or settings exclude each other.
    """

    def __init__(
        self,
        rows: Sequence[int],
        batch_size: int,
        *,
        strategy: Strategy = "proportional",
        temperature: float = 2.0,
        cap: int | None = None,
        weights: Sequence[float] | None = None,
        epochs: int = 1,
        mixed: bool = False,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 42,
        num_processes: int = 1,
        lengths: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not rows or min(rows) < 1:
            raise DataError(f"expected at least one row in every source, found {list(rows)}")
        if strategy not in get_args(Strategy):
            raise DataError(f"expected a mixing strategy among {list(get_args(Strategy))}, found '{strategy}'")
        if strategy == "weights" and (weights is None or min(weights) < 0 or sum(weights) <= 0):
            raise DataError(
                f"expected weights of at least 0, not all 0, with mixing strategy 'weights', found {weights}"
            )
        if mixed and strategy == "round_robin":
            raise DataError("expected batches of one source with round_robin, found mixed ones; use one of both")
        self.rows = list(rows)
        # Not called batch_size: accelerate would hold back every group whose last batch is shorter than that.
        self.rows_per_batch = batch_size
        self.strategy: Strategy = strategy
        self.temperature = temperature
        self.cap = cap
        self.weights = weights
        self.epochs = epochs
        self.mixed = mixed
        self.shuffle = shuffle
        self.seed = seed
        self.num_processes = num_processes
        self.drop_last = drop_last
        short = [count for count in ([sum(rows)] if mixed else self._counted) if count < self.group_size]
        if drop_last and short:
            raise DataError(
                f"dataloader_drop_last: expected sources of at least {self.group_size} rows, the batches of all "
                f"processes, found {short}, which would never be drawn; leave it out, or take smaller batches"
            )
        self.lengths = None if lengths is None else [np.asarray(source) for source in lengths]
        self.pulls: list[float] | None = None
        self.excluded: set[int] = set()
        """Sources that are left out of epochs that were not planned yet."""
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self.history: list[list[int]] = []
        """Groups of each source, or rows with `mixed`, by epoch; see `_joint` for one that was begun otherwise."""
        self._sorted_size = self.group_size
        """Rows that are put into a group by length."""
        self._joint: _Joint | None = None
        self.set_epoch(0)

    @property
    def group_size(self) -> int:
        """Rows that all processes take together."""
        return self.rows_per_batch * self.num_processes

    @property
    def shares(self) -> list[int]:
        """Groups of each source in this epoch; rows with `mixed`."""
        return self.history[self.epoch]

    @property
    def _unit(self) -> int:
        """Rows that shares are counted in. Groups of one source would round many small sources away."""
        return 1 if self.mixed else self.group_size

    @property
    def _counted(self) -> list[int]:
        return [count if self.cap is None else min(count, self.cap) for count in self.rows]

    def react(self, pulls: Sequence[float]) -> None:
        """Tell the reactive strategies how strongly each source is wanted in epochs that were not planned yet."""
        self.pulls = [max(pull, 1e-3) for pull in pulls]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch
        while len(self.history) <= epoch:
            self.history.append(self._plan(len(self.history)))

    def _plan(self, epoch: int) -> list[int]:
        counted = self._counted
        once = [self._units(count) for count in counted]
        match self.strategy:
            case "proportional":
                if not self.excluded:
                    return once
                weights: list[float] = [float(count) for count in counted]
            case "temperature":
                weights = [count ** (1 / self.temperature) for count in counted]
            case "annealed":
                progress = min(epoch / max(self.epochs - 1, 1), 1.0)
                weights = [count ** (1 - _ANNEALED_BY * progress) for count in counted]
            case "uniform" | "round_robin":
                weights = [1.0] * len(counted)
            case "weights":
                weights = list(self.weights or ())
            case "loss" | "score_gap":
                weights = self.pulls or [float(count) for count in counted]
        kept = [source for source in range(len(once)) if source not in self.excluded]
        if not any(weights[source] for source in kept):
            weights = [1.0] * len(once)
        # Epochs keep their length: what is left out makes room for the others.
        shares = batch_shares([weights[source] for source in kept], sum(once))
        return [shares[kept.index(source)] if source in kept else 0 for source in range(len(once))]

    def _units(self, rows: int) -> int:
        return rows // self._unit if self.drop_last else math.ceil(rows / self._unit)

    def __len__(self) -> int:
        return self.groups * self.num_processes

    @property
    def groups(self) -> int:
        """Groups of an epoch, which are batches of each process."""
        units = sum(self._units(count) for count in self._counted)
        if not self.mixed:
            return units
        return units // self.group_size if self.drop_last else math.ceil(units / self.group_size)

    # ---- a training that goes on ----

    def state_dict(self, groups: int) -> dict[str, Any]:
        """What a resumed run must know after so many groups of the present epoch, in batches of any size."""
        return {
            "history": self.history,
            "group_size": self.group_size,
            "sorted_size": self._sorted_size,
            "joint": None if self._joint is None else asdict(self._joint),
            "epoch": self.epoch,
            "once": self._draws_once,
            "taken": [] if self.mixed else self._taken(groups),
            "before": [self._drawn_before(source) - self._offset(source) for source in range(len(self.rows))],
        }

    def load_state_dict(self, saved: Mapping[str, Any], epoch: int, groups: int) -> None:
        """Go on where another sampler of the same sources stopped, which may have made groups of another size.

        Args:
            saved: its `state_dict`.
            epoch: where the run goes on.
            groups: of that epoch, in the size of this sampler, that the run takes as done and skips.
        """
        self.history = [list(shares) for shares in saved["history"]]
        self._sorted_size = saved["sorted_size"]
        self._joint = None if saved["joint"] is None else _Joint(**saved["joint"])
        if self.mixed or saved["group_size"] == self.group_size:
            return
        # Groups of another size are counted anew, in rows.
        size = saved["group_size"]
        self.history = [[math.ceil(share * size / self.group_size) for share in shares] for shares in self.history]
        self.history = self.history[:epoch]
        while len(self.history) < epoch:
            self.history.append(self._plan(len(self.history)))
        begun = epoch == saved["epoch"] and groups > 0
        drawn = [rows + taken for rows, taken in zip(saved["before"], saved["taken"], strict=True)]
        if not begun:
            self._joint = _Joint(epoch, 0, [0] * len(self.rows), drawn, False)
            return
        planned = self.rows
        if not saved["once"]:
            offset = [0] * len(self.rows)
            if saved["joint"] is not None and saved["joint"]["epoch"] == epoch:
                offset = saved["joint"]["taken"]
            planned = [done + share * size for done, share in zip(offset, saved["history"][epoch], strict=True)]
        left = [max(rows - taken, 0) for rows, taken in zip(planned, saved["taken"], strict=True)]
        wanted = self.groups - groups
        shares = [self._units(rows) for rows in left]
        if sum(shares) != wanted:
            shares = batch_shares([float(rows) for rows in left] if any(left) else [1.0] * len(left), wanted)
            lost = sum(max(rows - share * self._unit, 0) for rows, share in zip(left, shares, strict=True))
            if lost:
                logger.warning(
                    "epoch %d goes on in batches of another size: %d of its rows fill no batch of one source, and are "
                    "left out of this epoch",
                    epoch,
                    lost,
                )
        self.history.append(shares)
        self._joint = _Joint(epoch, groups, list(saved["taken"]), drawn, saved["once"])

    @property
    def _draws_once(self) -> bool:
        """Whether every row comes once in the present epoch."""
        if self._joint is not None and self._joint.epoch == self.epoch and self._joint.groups:
            return self._joint.once
        return self.strategy == "proportional" and self.cap is None and all(self.shares)

    def _drawn_before(self, source: int) -> int:
        """Rows of a source that were drawn before the present epoch, or before the rest of one that was begun."""
        first = 0 if self._joint is None else self._joint.epoch
        earlier = 0 if self._joint is None else self._joint.drawn[source]
        return earlier + sum(shares[source] for shares in self.history[first : self.epoch]) * self._unit

    def _offset(self, source: int) -> int:
        joint = self._joint
        return joint.taken[source] if joint is not None and joint.epoch == self.epoch else 0

    def _taken(self, groups: int) -> list[int]:
        """Rows of each source in the first groups of the present epoch."""
        skipped = self._joint.groups if self._joint is not None and self._joint.epoch == self.epoch else 0
        counts = np.bincount(self.order()[: max(groups - skipped, 0)], minlength=len(self.rows))
        rows = [self._offset(source) + int(count) * self._unit for source, count in enumerate(counts)]
        return [min(taken, count) for taken, count in zip(rows, self.rows, strict=True)] if self._draws_once else rows

    def __iter__(self) -> Iterator[list[Index]]:
        for group in self._mixed_groups() if self.mixed else self._pure_groups():
            for rank in range(self.num_processes):
                part = group[rank * self.rows_per_batch : (rank + 1) * self.rows_per_batch]
                # A short last group leaves ranks without rows: they run one that counts nowhere.
                yield part or [(group[0][0], -1 - group[0][1])]

    def _pure_groups(self) -> Iterator[list[Index]]:
        seen = [0] * len(self.rows)
        if self._joint is not None and self._joint.epoch == self.epoch:
            # They stand for groups of another size, and are skipped.
            yield from ([(0, 0)] for _ in range(self._joint.groups))
        for source in self.order():
            yield [(source, row) for row in self._rows_of(source, seen[source], seen[source] + 1)]
            seen[source] += 1

    def _mixed_groups(self) -> Iterator[list[Index]]:
        rows = [(source, row) for source, share in enumerate(self.shares) for row in self._rows_of(source, 0, share)]
        generator = np.random.default_rng([self.seed, self.epoch, 2])
        order = generator.permutation(len(rows)) if self.shuffle else np.arange(len(rows))
        if self.lengths is not None:
            lengths = np.asarray([self.lengths[source][row] for source, row in rows])
            order = self._by_length(order, lengths, generator)
        end = len(rows) - (len(rows) % self.group_size if self.drop_last else 0)
        for start in range(0, end, self.group_size):
            yield [rows[place] for place in order[start : start + self.group_size]]

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
        if not self.shuffle:
            return [int(source) for source in order]
        np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        return [int(source) for source in order]

    def _rows_of(self, source: int, first: int, last: int) -> list[int]:
        """Rows of a source's groups (rows with `mixed`) from the n-th up to another in this epoch."""
        count, unit = self.rows[source], self._unit
        if self._draws_once:
            order = self._permutation(source, self.epoch)
            start, stop = self._offset(source) + first * unit, self._offset(source) + last * unit
            # Where groups of another size leave room for one more, it begins again.
            return [int(row) for row in (order[start:stop] if start < count else order[np.arange(start, stop) % count])]
        # An endless row of permutations, cut into groups: no row comes twice before all others came once.
        before = self._drawn_before(source)
        places = range(before + first * unit, before + last * unit)
        return [int(self._permutation(source, place // count)[place % count]) for place in places]

    def _permutation(self, source: int, number: int) -> np.ndarray:
        """Order of a source's rows in its n-th pass, the last few kept."""
        if (source, number) not in self._orders:
            for old in [key for key in self._orders if key[0] == source and key[1] < number - 1]:
                del self._orders[old]
            self._orders[source, number] = self._new_permutation(source, number)
        return self._orders[source, number]

    def _new_permutation(self, source: int, number: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, source, number, 1])
        order = generator.permutation(self.rows[source]) if self.shuffle else np.arange(self.rows[source])
        if self.lengths is None or self.mixed:
            return order
        return self._by_length(order, self.lengths[source], generator)

    def _by_length(self, order: np.ndarray, lengths: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The same rows in groups of like length, the groups in random order."""
        size = self._sorted_size
        block = size * _BATCHES_IN_A_BLOCK
        blocks = [order[start : start + block] for start in range(0, len(order), block)]
        batches = [
            rows[start : start + size]
            for rows in (part[np.argsort(lengths[part], kind="stable")] for part in blocks)
            for start in range(0, len(rows), size)
        ]
        # The last batch may be short and stays last, so that the others keep their boundaries.
        shuffled = generator.permutation(len(batches) - 1)
        return np.concatenate([*(batches[index] for index in shuffled), batches[-1]])
