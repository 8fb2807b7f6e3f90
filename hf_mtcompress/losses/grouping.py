"""Which tasks should share an encoder, under a number of encoders: by how gradients agree, or by what sharing cost.

Needs no torch: it works on the matrices of `interference_report`, and on scores.

References:
    Standley et al. 2020, "Which Tasks Should Be Learned Together in Multi-task Learning?"; Fifty et al. 2021,
    "Efficiently Identifying Task Groupings for Multi-Task Learning". Deviation: affinity is to first order (cosines of
    gradients), not by looking ahead, and every task is in one group only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from sklearn.cluster import KMeans

EXACT_UP_TO = 115_975
"""Groupings up to which all are tried: those of ten tasks into any number of encoders, or of 17 into two.

Above that, moves of single tasks are, from several starts."""

Matrix = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Grouping:
    """Tasks by encoder.

    Attributes:
        groups: names of the tasks of each encoder, in the order given, without `helpers`.
        affinity: by task: mean affinity of the others in its group to it; 0 for a task that is alone.
        expected: mean of these over all tasks.
        exact: whether all groupings were tried.
        matrix: how much each task (row) helps each (column), as it was given, in the order of `affinity`.
        looks: how many looks at the gradients the matrix is the mean of.
        helpers: auxiliary tasks, which help in every group.
    """

    groups: tuple[tuple[str, ...], ...]
    affinity: dict[str, float]
    expected: float
    exact: bool
    matrix: tuple[tuple[float, ...], ...]
    looks: int = 1
    helpers: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """As `compare-tasks --group NAME=...` takes it."""
        return "/".join("+".join((*group, *self.helpers)) for group in self.groups)

    def pairs(self) -> list[tuple[float, str, str]]:
        """Mean help of two tasks to each other, and their names, from the closest to those that are furthest apart."""
        names = list(self.affinity)
        found = [
            ((self.matrix[one][two] + self.matrix[two][one]) / 2, names[one], names[two])
            for one, two in combinations(range(len(names)), 2)
        ]
        return sorted(found, key=lambda pair: -pair[0])


def best_grouping(tasks: Sequence[str], affinity: Matrix, encoders: int, looks: int = 1) -> Grouping:
    """The grouping into at most `encoders` groups with the highest mean affinity, and among equals the fewest groups.

    Args:
        tasks: names.
        affinity: (K, K); row i, column j: how much training task i helps task j, at most 1; None counts as 0.
        encoders: at least 1.
        looks: how many looks at the gradients `affinity` is the mean of, to be told with the result.

    Raises:
        ValueError: no task, a matrix of another size, or no encoder.
    """
    if not tasks or len(affinity) != len(tasks) or any(len(row) != len(tasks) for row in affinity):
        raise ValueError(
            f"expected a matrix of {len(tasks)} x {len(tasks)} for at least one task, found rows of "
            f"{[len(row) for row in affinity]}"
        )
    if encoders < 1:
        raise ValueError(f"expected at least 1 encoder, found {encoders}")
    helps = [[float(value or 0.0) for value in row] for row in affinity]
    exact = _how_many(len(tasks), encoders) <= EXACT_UP_TO
    candidates = _all(len(tasks), encoders) if exact else _searched(helps, encoders)
    best = max(candidates, key=lambda places: (round(_expected(places, helps), 9), -len(set(places))))
    numbers = list(dict.fromkeys(best))
    groups = [[task for task, place in enumerate(best) if place == number] for number in numbers]
    by_task = {tasks[task]: _mean_help(task, group, helps) for group in groups for task in group}
    return Grouping(
        tuple(tuple(tasks[task] for task in group) for group in groups),
        {name: by_task[name] for name in tasks},
        _expected(best, helps),
        exact,
        tuple(map(tuple, helps)),
        looks,
    )


def grouped_by_cost(costs: Mapping[str, float], encoders: int) -> tuple[tuple[str, ...], ...]:
    """Tasks that lose much by sharing one encoder with all get another, with those that lose as much.

    A cosine of gradients says what a small step does to a loss; this goes by what whole trainings did to scores. Costs
    are clustered (k-means on a line), what a task gains counting as no cost.

    Args:
        costs: by task: score alone - score with all others; one scale for all.
        encoders: at most so many.

    Returns:
        Names of the tasks of each encoder, those that lose least first; fewer groups where costs are equal.

    Raises:
        ValueError: no task, or no encoder.
    """
    if not costs or encoders < 1:
        raise ValueError(f"expected at least 1 task and 1 encoder, found {len(costs)} and {encoders}")
    lost = np.maximum(np.array(list(costs.values()), dtype=float), 0.0)
    starts: Any = 20  # `n_init` takes numbers, though it is annotated as a str
    clusters = KMeans(min(encoders, len(np.unique(lost))), n_init=starts, random_state=0)
    places = clusters.fit_predict(lost[:, None]).tolist()
    order = np.argsort(clusters.cluster_centers_[:, 0]).tolist()
    return tuple(tuple(name for name, own in zip(costs, places, strict=True) if own == number) for number in order)


def encoders_within(parameters: int, per_encoder: int) -> int:
    """How many encoders a number of parameters allows.

    Raises:
        ValueError: not even one.
    """
    if parameters < per_encoder:
        raise ValueError(
            f"expected room for at least one encoder of {per_encoder:,} parameters, found {parameters:,}; allow more, "
            "or take a smaller encoder"
        )
    return parameters // per_encoder


def _mean_help(task: int, group: Sequence[int], helps: Sequence[Sequence[float]]) -> float:
    others = [helps[other][task] for other in group if other != task]
    return sum(others) / len(others) if others else 0.0


def _expected(places: Sequence[int], helps: Sequence[Sequence[float]]) -> float:
    groups = {place: [task for task, own in enumerate(places) if own == place] for place in set(places)}
    return sum(_mean_help(task, groups[place], helps) for task, place in enumerate(places)) / len(places)


def _how_many(tasks: int, encoders: int) -> int:
    """Groupings of so many tasks into at most so many encoders (Stirling numbers of the second kind, summed)."""
    counts = [1]
    for _ in range(1, tasks):
        one_more = [0, *counts]
        counts = [
            number * count + new for number, (count, new) in enumerate(zip([*counts, 0], one_more, strict=True), 1)
        ]
    return sum(counts[:encoders])


def _all(tasks: int, encoders: int) -> Iterator[list[int]]:
    """Every grouping once: task 0 is in group 0, a later one in a group that is there or in the next new one."""

    def extend(places: list[int]) -> Iterator[list[int]]:
        if len(places) == tasks:
            yield places
            return
        for place in range(min(max(places) + 2, encoders)):
            yield from extend([*places, place])

    return extend([0])


def _searched(helps: Sequence[Sequence[float]], encoders: int) -> Iterator[list[int]]:
    """From each pair of tasks as the seeds of two groups, and from one group: move single tasks while that helps."""
    count = len(helps)
    starts = [[0] * count] + [
        [int(helps[two][task] > helps[one][task]) if task != one else 0 for task in range(count)]
        for one, two in combinations(range(count), 2)
    ]
    for start in starts if encoders > 1 else starts[:1]:
        places, score = list(start), _expected(start, helps)
        better = True
        while better:
            better = False
            for task in range(count):
                for place in range(encoders):
                    moved = [*places[:task], place, *places[task + 1 :]]
                    if (found := _expected(moved, helps)) > score + 1e-12:
                        places, score, better = moved, found, True
        yield places
