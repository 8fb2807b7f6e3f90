"""How tasks get along while they are trained together: a small log of their gradients, and what it says in words.

Needs no torch: what is logged is the Gramian of a step as plain numbers.

Yu et al. 2020 ("Gradient Surgery for Multi-Task Learning") call two gradients in conflict where their cosine is
negative. Fifty et al. 2021 ("Efficiently Identifying Task Groupings for Multi-Task Learning") call affinity what a step
for one task does to the loss of another; here to first order, which the Gramian holds, and not by looking ahead.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

CONFLICT_COSINE = -0.1
"""At this mean cosine or below, two tasks pull apart."""
AGREEMENT_COSINE = 0.05
"""A task whose mean cosine with every other is below this agrees with none."""
DUPLICATE_COSINE = 0.9
"""From this mean cosine on, two tasks are near duplicates."""
CHANGED_COSINE = 0.2
"""A mean cosine that moved by this much from the first quarter of a run to the last is said to have changed."""
NORM_RATIO = 10.0
"""From this ratio of mean lengths on, one gradient drowns another."""
CHANCE_LOSS = 0.95
"""A task whose late loss, divided by that of an uninformed guess, is at least this has learnt nothing."""
FEW_STEPS = 10
"""Pairs that met in fewer steps are not judged."""


class GradientLog:
    """Sums over steps of cosines, conflicts and lengths of the tasks' gradients.

    Sums over time are kept in at most `buckets` buckets of steps, which double in width when they run out: a long run
    stays as small as a short one, and what happened early can still be told from what happened late.

    Args:
        tasks: names of all tasks, in the order of the report.
        buckets: at least 2.

    Raises:
        ValueError: no task, a name that stands twice, or fewer than 2 buckets.
    """

    def __init__(self, tasks: Sequence[str], buckets: int = 100) -> None:
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"expected names of tasks, each once, found {list(tasks)}")
        if buckets < 2:
            raise ValueError(f"expected at least 2 buckets, found {buckets}")
        self.tasks = list(tasks)
        self.buckets = buckets
        self.steps = 0
        """Steps that were added, those without finite numbers apart."""
        self.skipped = 0
        """Steps whose numbers were not finite, as mixed precision has them."""
        self._width = 1
        self._totals: dict[str, list[float]] = {}
        # Task: steps, sum of lengths. Pair: steps, cosines, conflicts, inner products, squared lengths of both.
        self._time: dict[int, dict[str, list[float]]] = {}
        # By bucket. Task: steps with a loss, sum of losses. Pair: steps, sum of cosines.

    def add(
        self,
        step: int,
        tasks: Sequence[str],
        gramian: Sequence[Sequence[float]],
        losses: Mapping[str, float] | None = None,
    ) -> None:
        """Add one step.

        Args:
            step: number of the optimizer step, at least 0.
            tasks: the tasks that had labels in it, in the order of `gramian`.
            gramian: (K, K) inner products of their gradients as they enter the sum, weights and normalisers included.
            losses: by task, divided by the loss of an uninformed guess (1 is "knows nothing"), weights left out.

        Raises:
            ValueError: an unknown task, or a Gramian of another size.
        """
        unknown = [name for name in [*tasks, *(losses or ())] if name not in self.tasks]
        if unknown:
            raise ValueError(f"expected tasks of this log {self.tasks}, found {unknown}; name all when it is made")
        if len(gramian) != len(tasks) or any(len(row) != len(tasks) for row in gramian):
            raise ValueError(
                f"expected a Gramian of {len(tasks)} x {len(tasks)} for {list(tasks)}, found rows of "
                f"{[len(row) for row in gramian]}; pass the tasks that are in it, and it as nested lists"
            )
        if not all(math.isfinite(value) for row in gramian for value in row):
            self.skipped += 1
            return
        self.steps += 1
        bucket = self._bucket(step)
        for i, name in enumerate(tasks):
            _add(self._totals, name, [1, math.sqrt(max(gramian[i][i], 0.0))])
        for name, loss in (losses or {}).items():
            if math.isfinite(loss):
                _add(bucket, name, [1, loss])
        for i, j in combinations(range(len(tasks)), 2):
            # A pair is kept under the order of the log, whatever the order of the step.
            if self.tasks.index(tasks[i]) > self.tasks.index(tasks[j]):
                i, j = j, i
            inner, first, second = gramian[i][j], gramian[i][i], gramian[j][j]
            if first <= 0 or second <= 0:
                continue  # a gradient that is zero points nowhere
            cosine = min(1.0, max(-1.0, inner / math.sqrt(first) / math.sqrt(second)))
            pair = f"{tasks[i]} {tasks[j]}"
            _add(self._totals, pair, [1, cosine, cosine < 0, inner, first, second])
            _add(bucket, pair, [1, cosine])

    def merge(self, other: "GradientLog") -> "GradientLog":
        """What both saw, as of several processes or of the pieces of a run; neither is changed.

        Raises:
            ValueError: logs of other tasks, or with another number of buckets.
        """
        if (self.tasks, self.buckets) != (other.tasks, other.buckets):
            raise ValueError(
                f"expected a log of the tasks {self.tasks} in {self.buckets} buckets, found {other.tasks} in "
                f"{other.buckets}"
            )
        merged = GradientLog(self.tasks, self.buckets)
        merged.steps = self.steps + other.steps
        merged.skipped = self.skipped + other.skipped
        merged._width = max(self._width, other._width)
        for log in (self, other):
            for key, values in log._totals.items():
                _add(merged._totals, key, values)
            for index, sums in log._time.items():
                place = merged._time.setdefault(index * log._width // merged._width, {})
                for key, values in sums.items():
                    _add(place, key, values)
        return merged

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it, for a checkpoint."""
        return {
            "tasks": list(self.tasks),
            "buckets": self.buckets,
            "steps": self.steps,
            "skipped": self.skipped,
            "width": self._width,
            "totals": {key: list(values) for key, values in self._totals.items()},
            "time": {
                str(index): {key: list(values) for key, values in sums.items()} for index, sums in self._time.items()
            },
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "GradientLog":
        """The log that `state_dict` was taken of, also after JSON."""
        log = cls(state["tasks"], state["buckets"])
        log.steps, log.skipped, log._width = state["steps"], state["skipped"], state["width"]
        log._totals = {key: list(values) for key, values in state["totals"].items()}
        log._time = {
            int(index): {key: list(values) for key, values in sums.items()} for index, sums in state["time"].items()
        }
        return log

    def total(self, key: str) -> list[float] | None:
        """Sums over all steps for a task, or for a pair `"a b"` in the order of the log; None where there are none.

        For a task: steps, lengths. For a pair: steps, cosines, conflicts, inner products, squared lengths of both.
        """
        return self._totals.get(key)

    def mean_over_time(self, key: str, part: Callable[[float], bool]) -> float | None:
        """Mean loss of a task, or mean cosine of a pair, over a part of the run.

        Args:
            key: a task, or a pair `"a b"` in the order of the log.
            part: of the middle of a bucket, from 0 (the first step that was added) to 1 (the last), whether it counts.
        """
        low, high = min(self._time, default=0), max(self._time, default=0) + 1
        count = total = 0.0
        for index, sums in self._time.items():
            if key in sums and part((index + 0.5 - low) / (high - low)):
                count += sums[key][0]
                total += sums[key][1]
        return total / count if count else None

    def _bucket(self, step: int) -> dict[str, list[float]]:
        while step // self._width >= self.buckets:
            self._width *= 2
            halves, self._time = self._time, {}
            for index, sums in halves.items():
                place = self._time.setdefault(index // 2, {})
                for key, values in sums.items():
                    _add(place, key, values)
        return self._time.setdefault(step // self._width, {})


def _add(sums: dict[str, list[float]], key: str, values: Sequence[float]) -> None:
    found = sums.setdefault(key, [0.0] * len(values))
    for index, value in enumerate(values):
        found[index] += value


def interference_report(log: GradientLog, scope: str | None = None, rows: str = "train") -> dict[str, Any]:
    """What a log says, in numbers and in words: the `interference` of a step's record.

    Args:
        log: what was logged.
        scope: with respect to what the gradients were taken, in words such as `the last layer of the encoder`.
        rows: `train` or `validation`, of which they were taken.

    Returns:
        `steps`, `skipped`, `scope` and `rows`; `tasks`, which name rows and columns of the matrices; `cosine` (mean
        over the steps in which both had labels), `conflict` (share of those with a negative cosine) and `affinity`
        (what a step along the row's gradient does to the column's loss, as a share of what a step along the column's
        own does), null where two tasks never met; `norms` (mean length) and `losses` (mean of the last quarter, divided
        by that of an uninformed guess) by task; `norm_ratio`, largest / smallest length; `pairs`, most conflicts first,
        with the mean cosines of the first and last quarter; `findings`, sentences; and the `thresholds` behind them.
    """
    names = log.tasks
    pairs = [pair for one, two in combinations(names, 2) if (pair := _pair(log, one, two)) is not None]
    pairs.sort(key=lambda pair: (-pair["conflict"], pair["cosine"]))
    norms = {name: _round(total[1] / total[0]) if (total := log.total(name)) else None for name in names}
    lengths = [norm for norm in norms.values() if norm]
    report = {
        "steps": log.steps,
        "skipped": log.skipped,
        "scope": scope,
        "rows": rows,
        "tasks": names,
        "cosine": _matrix(log, 1.0, lambda sums, _: sums[1] / sums[0]),
        "conflict": _matrix(log, 0.0, lambda sums, _: sums[2] / sums[0]),
        # A step along g_i changes the loss of j by g_i.g_j, one along g_j by g_j.g_j; sums, so that no step dominates.
        "affinity": _matrix(log, 1.0, lambda sums, column: sums[3] / sums[4 + column]),
        "norms": norms,
        "losses": {name: _round(log.mean_over_time(name, _late)) for name in names},
        "norm_ratio": _round(max(lengths) / min(lengths)) if len(lengths) > 1 else None,
        "pairs": pairs,
        "thresholds": {
            "conflict_cosine": CONFLICT_COSINE,
            "agreement_cosine": AGREEMENT_COSINE,
            "duplicate_cosine": DUPLICATE_COSINE,
            "norm_ratio": NORM_RATIO,
            "chance_loss": CHANCE_LOSS,
            "few_steps": FEW_STEPS,
        },
    }
    return report | {"findings": _findings(report)}


def _late(part: float) -> bool:
    return part >= 0.75


def _early(part: float) -> bool:
    return part < 0.25


def _pair(log: GradientLog, one: str, two: str) -> dict[str, Any] | None:
    sums = log.total(f"{one} {two}")
    if sums is None:
        return None
    return {
        "tasks": [one, two],
        "steps": int(sums[0]),
        "cosine": _round(sums[1] / sums[0]),
        "conflict": _round(sums[2] / sums[0]),
        "early": _round(log.mean_over_time(f"{one} {two}", _early)),
        "late": _round(log.mean_over_time(f"{one} {two}", _late)),
    }


def _matrix(log: GradientLog, diagonal: float, value: Callable[[list[float], int], float]) -> list[list[float | None]]:
    """Rows and columns by task; `value` gets a pair's sums, and whether the column is its first (0) or second task."""
    size = len(log.tasks)
    matrix: list[list[float | None]] = [[None] * size for _ in range(size)]
    for i, name in enumerate(log.tasks):
        total = log.total(name)
        matrix[i][i] = diagonal if total and total[1] > 0 else None
    for i, j in combinations(range(size), 2):
        sums = log.total(f"{log.tasks[i]} {log.tasks[j]}")
        if sums is not None:
            matrix[i][j], matrix[j][i] = _round(value(sums, 1)), _round(value(sums, 0))
    return matrix


def _findings(report: Mapping[str, Any]) -> list[str]:
    judged = [pair for pair in report["pairs"] if pair["steps"] >= FEW_STEPS]
    alone = _agreeing_with_none(report["tasks"], judged)
    findings = [
        f"{_names(pair['tasks'])} pull apart: mean cosine {pair['cosine']:.2f}, in conflict in "
        f"{100 * pair['conflict']:.0f} % of the steps{_change(pair)}."
        for pair in judged
        if pair["cosine"] <= CONFLICT_COSINE
    ]
    cosines = [pair["cosine"] for pair in judged]
    span = f"mean cosines from {min(cosines):.2f} to {max(cosines):.2f}" if cosines else ""
    if len(alone) == len(report["tasks"]):
        if not findings:  # where some pull apart that is said already, and worse
            findings.append(f"No two tasks agree: {span}. To first order they neither help nor hurt each other.")
    else:
        findings += [
            f"`{name}` agrees with no other task: its mean cosines go from {low:.2f} to {high:.2f}. "
            "Train without it and compare."
            for name, (low, high) in alone.items()
        ]
    findings += [
        f"`{name}` has learnt nothing: its loss is still {loss:.2f} of that of an uninformed guess. "
        "Labels at random look like this; check them."
        for name, loss in report["losses"].items()
        # On rows that were not trained on, the loss of a task that is sure of itself may rise while its scores stay.
        if report["rows"] == "train" and loss is not None and loss >= CHANCE_LOSS
    ]
    findings += [
        f"{_names(pair['tasks'])} are near duplicates: mean cosine {pair['cosine']:.2f}. One of them may be enough."
        for pair in judged
        if pair["cosine"] >= DUPLICATE_COSINE
    ]
    norms = {name: norm for name, norm in report["norms"].items() if norm}
    if (report["norm_ratio"] or 0) >= NORM_RATIO:
        large, small = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
        findings.append(
            f"`{large}`'s gradient is {report['norm_ratio']:.0f} times as large as `{small}`'s: lower its weight or "
            "normalise its loss."
        )
    findings += [
        f"`{name}` has no gradient in the shared part: check that its head reads it and that it has labels."
        for name, norm in report["norms"].items()
        if norm == 0
    ]
    if cosines and not findings:
        findings.append(f"The tasks get along: {span}.")
    few = [_names(pair["tasks"]) for pair in report["pairs"] if pair["steps"] < FEW_STEPS]
    if few:
        findings.append(f"Met in fewer than {FEW_STEPS} steps, too few to judge: {'; '.join(few)}.")
    met = [pair["tasks"] for pair in report["pairs"]]
    strangers = [_names(pair) for pair in combinations(report["tasks"], 2) if list(pair) not in met]
    if strangers:
        findings.append(f"Never in the same step, so nothing is known: {'; '.join(strangers)}.")
    return findings


def _agreeing_with_none(names: Sequence[str], judged: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Lowest and highest mean cosine of each task that is below the threshold with all others, if it met them all."""
    alone = {}
    for name in names:
        cosines = [pair["cosine"] for pair in judged if name in pair["tasks"]]
        if cosines and len(cosines) == len(names) - 1 and max(cosines) < AGREEMENT_COSINE:
            alone[name] = (min(cosines), max(cosines))
    return alone


def _change(pair: Mapping[str, Any]) -> str:
    early, late = pair["early"], pair["late"]
    if early is None or late is None or abs(late - early) < CHANGED_COSINE:
        return ""
    return f" ({early:.2f} in the first quarter, {late:.2f} in the last)"


def _names(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def _round(value: float | None) -> float | None:
    """Six significant digits: more is rounding of float32 and fills the record."""
    return None if value is None else float(f"{value:.6g}")
