"""Laws of grouping tasks by affinity."""

from itertools import product

import numpy as np
import pytest

from hf_mtcompress.losses import grouping
from hf_mtcompress.losses.grouping import best_grouping, encoders_within, grouped_by_cost

PLANTED = [[1.0, 0.8, -0.5, -0.4], [0.7, 1.0, -0.6, -0.5], [-0.5, -0.4, 1.0, 0.9], [-0.3, -0.6, 0.6, 1.0]]


def test_planted_groups_are_found() -> None:
    found = best_grouping(["a", "b", "c", "d"], PLANTED, 2)
    assert found.groups == (("a", "b"), ("c", "d"))
    assert found.text == "a+b/c+d"
    assert found.affinity == pytest.approx({"a": 0.7, "b": 0.8, "c": 0.6, "d": 0.9})
    assert found.expected == pytest.approx(0.75)
    assert found.exact
    assert found.matrix == tuple(map(tuple, PLANTED))
    pairs = found.pairs()
    assert len(pairs) == 6
    assert pairs[0] in [(pytest.approx(0.75), "a", "b"), (pytest.approx(0.75), "c", "d")]
    assert pairs[-1] == (pytest.approx(-0.55), "b", "d")


def test_one_encoder_holds_all_and_more_encoders_never_expect_less() -> None:
    expected = [best_grouping(list("abcd"), PLANTED, count).expected for count in range(1, 5)]
    assert best_grouping(list("abcd"), PLANTED, 1).groups == (tuple("abcd"),)
    assert expected == sorted(expected)


def test_of_equal_groupings_that_with_fewest_encoders_is_taken() -> None:
    assert best_grouping(list("abc"), [[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]], 3).groups == (tuple("abc"),)


def test_a_task_that_hurts_all_is_alone() -> None:
    found = best_grouping(list("abc"), [[1, 0.4, -0.2], [0.4, 1, -0.1], [-0.3, -0.2, 1]], 2)
    assert found.groups == (("a", "b"), ("c",))
    assert found.affinity["c"] == 0.0


def test_all_groupings_are_tried_once() -> None:
    """Bell numbers, and Stirling numbers up to two groups."""
    assert [len(list(grouping._all(count, count))) for count in range(1, 8)] == [1, 2, 5, 15, 52, 203, 877]
    assert len(list(grouping._all(10, 2))) == 2**9


def test_groupings_are_counted_without_making_them() -> None:
    for tasks, encoders in product(range(1, 8), range(1, 9)):
        assert grouping._how_many(tasks, encoders) == len(list(grouping._all(tasks, encoders)))
    assert grouping._how_many(10, 10) == grouping.EXACT_UP_TO
    assert grouping._how_many(17, 2) <= grouping.EXACT_UP_TO < grouping._how_many(18, 2)


def test_exact_equals_brute_force() -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        helps = generator.normal(size=(5, 5)).tolist()
        wanted = max(grouping._expected(places, helps) for places in product(range(3), repeat=5))
        assert best_grouping(list("abcde"), helps, 3).expected == pytest.approx(wanted)


def test_the_search_for_many_tasks_finds_planted_groups() -> None:
    """Fifteen tasks in three families, in disorder."""
    generator = np.random.default_rng(1)
    families = generator.permutation([0, 1, 2] * 5)
    helps = np.where(families[:, None] == families, 0.3, -0.1) + 0.05 * generator.normal(size=(15, 15))
    names = [f"t{number}" for number in range(15)]
    found = best_grouping(names, helps.tolist(), 3)
    assert not found.exact
    wanted = {frozenset(name for name, family in zip(names, families, strict=True) if family == f) for f in range(3)}
    assert {frozenset(group) for group in found.groups} == wanted


def test_pairs_that_never_met_count_as_neutral() -> None:
    assert best_grouping(["a", "b"], [[1.0, None], [None, 1.0]], 2).groups == (("a", "b"),)


def test_encoders_within_a_number_of_parameters() -> None:
    assert encoders_within(50_000_000, 22_700_000) == 2
    with pytest.raises(ValueError, match="expected room for at least one encoder"):
        encoders_within(20_000_000, 22_700_000)


@pytest.mark.parametrize(("tasks", "matrix", "encoders"), [([], [], 1), (["a"], [[1.0, 0.0]], 1), (["a"], [[1.0]], 0)])
def test_bad_input_is_refused(tasks: list[str], matrix: list[list[float]], encoders: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        best_grouping(tasks, matrix, encoders)


COSTS = {"a": 0.027, "b": -0.037, "c": 0.026, "d": 0.011, "e": 0.0, "f": 0.022, "g": 0.011}


def test_tasks_that_lose_as_much_are_together() -> None:
    """What a task gains is no reason to set it apart, nor is the order that they come in."""
    assert grouped_by_cost(COSTS, 1) == (tuple(COSTS),)
    assert grouped_by_cost(COSTS, 2) == (("b", "d", "e", "g"), ("a", "c", "f"))
    assert grouped_by_cost(COSTS, 3) == (("b", "e"), ("d", "g"), ("a", "c", "f"))
    back = grouped_by_cost(dict(reversed(COSTS.items())), 2)
    assert back == (("g", "e", "d", "b"), ("f", "c", "a"))
    scaled = {name: 100 * cost for name, cost in COSTS.items()}
    assert grouped_by_cost(scaled, 2) == grouped_by_cost(COSTS, 2)


def test_equal_costs_make_fewer_groups() -> None:
    assert grouped_by_cost({"a": -0.2, "b": -0.1}, 2) == (("a", "b"),)
    assert grouped_by_cost({"a": 0.2, "b": -0.1}, 3) == (("b",), ("a",))
    assert grouped_by_cost({"a": 0.2}, 3) == (("a",),)


@pytest.mark.parametrize(("costs", "encoders"), [({}, 2), ({"a": 0.1}, 0)])
def test_nothing_to_group_by_cost(costs: dict[str, float], encoders: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1 task and 1 encoder"):
        grouped_by_cost(costs, encoders)
