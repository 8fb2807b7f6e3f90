"""The log of gradients adds up however it is cut, and the report says in words what was planted."""

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hf_mtcompress.losses.gradients import gramian
from hf_mtcompress.losses.interference import GradientLog, interference_report

Gramian = list[list[float]]


def gramian_of(*gradients: Sequence[float]) -> Gramian:
    return [[math.fsum(x * y for x, y in zip(one, two, strict=True)) for two in gradients] for one in gradients]


def random_steps(count: int, seed: int = 0) -> list[tuple[int, list[str], Gramian]]:
    """Steps in which each task is sometimes absent."""
    draw = random.Random(seed)
    steps = []
    for step in range(count):
        present = [name for name in ("a", "b", "c") if draw.random() < 0.8] or ["a"]
        draw.shuffle(present)
        steps.append((step, present, gramian_of(*([draw.gauss(0, 1) for _ in range(5)] for _ in present))))
    return steps


def logged(steps: Sequence[tuple[int, list[str], Gramian]], buckets: int = 8) -> GradientLog:
    log = GradientLog(["a", "b", "c"], buckets)
    for step, present, matrix in steps:
        log.add(step, present, matrix, dict.fromkeys(present, 0.5))
    return log


def same(one: GradientLog, two: GradientLog) -> bool:
    return _numbers(one.state_dict()) == pytest.approx(_numbers(two.state_dict()))


def _numbers(state: dict[str, object]) -> dict[str, float]:
    flat: dict[str, float] = {}

    def walk(path: str, value: object) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{path}/{key}", item)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                walk(f"{path}/{index}", item)
        elif isinstance(value, int | float):
            flat[path] = value
        else:
            flat[f"{path}={value}"] = 0

    walk("", state)
    return flat


def planted(*gradients: Sequence[float], steps: int = 20, names: Sequence[str] = "abcd") -> dict[str, Any]:
    log = GradientLog(names[: len(gradients)])
    for step in range(steps):
        log.add(step, names[: len(gradients)], gramian_of(*gradients))
    return interference_report(log)


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("cut", [0, 1, 37, 100])
def test_pieces_merge_to_the_whole(cut: int):
    """Of a run that was resumed, or of several processes, nothing may count twice or be lost."""
    steps = random_steps(100)
    whole, first, second = logged(steps), logged(steps[:cut]), logged(steps[cut:])
    assert same(first.merge(second), whole)
    assert same(second.merge(first), whole)


def test_checkpoint_goes_on_where_it_stopped():
    """A resumed run reports what an uninterrupted one does."""
    steps = random_steps(100)
    log = GradientLog.from_state_dict(json.loads(json.dumps(logged(steps[:61]).state_dict())))
    for step, present, matrix in steps[61:]:
        log.add(step, present, matrix, dict.fromkeys(present, 0.5))
    assert log.state_dict() == logged(steps).state_dict()
    assert interference_report(log) == interference_report(logged(steps))


def test_a_long_run_stays_small():
    """One row a step would make a checkpoint of a long run larger than its model."""
    log = GradientLog(["a", "b"])
    sizes = []
    for step in range(20_000):
        log.add(step, ["a", "b"], [[1.0, 0.5], [0.5, 1.0]])
        if step in (999, 19_999):
            sizes.append(len(json.dumps(log.state_dict())))
    assert len(log.state_dict()["time"]) <= 100
    assert sizes[1] < 2 * sizes[0]
    assert log.total("a b") == [20_000, 10_000, 0, 10_000, 20_000, 20_000]


def test_order_of_tasks_within_a_step_does_not_matter():
    """The order of a dict would decide which of two tasks is called large."""
    steps = random_steps(50)
    turned = [(step, present[::-1], [row[::-1] for row in matrix[::-1]]) for step, present, matrix in steps]
    assert same(logged(turned), logged(steps))


def test_report_is_json_and_complete():
    """The record is JSON: a report that is not ends a run of hours without its record."""
    report = interference_report(logged(random_steps(40)))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for name in ("cosine", "conflict", "affinity"):
        assert len(report[name]) == 3
        assert all(len(row) == 3 for row in report[name])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert report["cosine"][i][j] == report["cosine"][j][i]
        assert report["conflict"][i][j] == report["conflict"][j][i]
    shares = [pair["conflict"] for pair in report["pairs"]]
    assert shares == sorted(shares, reverse=True)


def test_numbers_against_a_plain_computation():
    """The means, by other means: over the steps in which both were there."""
    steps = random_steps(30)
    cosines, inner, own = [], 0.0, 0.0
    for _, present, matrix in steps:
        if {"a", "c"} <= set(present):
            i, j = present.index("a"), present.index("c")
            cosines.append(matrix[i][j] / math.sqrt(matrix[i][i] * matrix[j][j]))
            inner += matrix[i][j]
            own += matrix[j][j]
    report = interference_report(logged(steps))
    pair = next(pair for pair in report["pairs"] if pair["tasks"] == ["a", "c"])
    assert pair["steps"] == len(cosines)
    assert report["cosine"][0][2] == pair["cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-5)
    assert pair["conflict"] == pytest.approx(sum(cosine < 0 for cosine in cosines) / len(cosines), rel=1e-5)
    assert report["affinity"][0][2] == pytest.approx(inner / own, rel=1e-5)


# ---------------------------------------------------------------- planted


def test_opposite_tasks():
    report = planted([1.0, 2.0], [-1.0, -2.0])
    assert report["cosine"] == [[1, -1], [-1, 1]]
    assert report["conflict"] == [[0, 1], [1, 0]]
    assert report["affinity"] == [[1, -1], [-1, 1]]
    assert report["findings"][0] == "`a` and `b` pull apart: mean cosine -1.00, in conflict in 100 % of the steps."


def test_duplicate_tasks():
    report = planted([1.0, 2.0], [1.0, 2.0])
    assert report["cosine"] == report["affinity"] == [[1, 1], [1, 1]]
    assert report["conflict"] == [[0, 0], [0, 0]]
    assert report["findings"] == ["`a` and `b` are near duplicates: mean cosine 1.00. One of them may be enough."]


def test_orthogonal_tasks():
    """Neither in conflict nor in agreement: nothing alarming may be said of them, nor anything praising."""
    report = planted([1.0, 0.0], [0.0, 3.0])
    assert report["cosine"] == [[1, 0], [0, 1]]
    assert report["conflict"] == [[0, 0], [0, 0]]
    (finding,) = report["findings"]
    assert finding.startswith("No two tasks agree: mean cosines from 0.00 to 0.00.")


def test_one_task_that_agrees_with_none():
    report = planted([1.0, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], names=["intent", "slots", "noise"])
    (finding,) = report["findings"]
    assert finding.startswith("`noise` agrees with no other task: its mean cosines go from 0.00 to 0.00.")


def test_hundredfold_gradient():
    """Affinity shows who steers: a step for `a` does to `b` a hundred times what its own step does."""
    report = planted([100.0, 0.0], [1.0, 1.0])
    assert report["norms"] == {"a": 100.0, "b": pytest.approx(math.sqrt(2), rel=1e-5)}
    assert report["norm_ratio"] == pytest.approx(100 / math.sqrt(2), rel=1e-5)
    assert report["affinity"] == [[1, pytest.approx(50)], [pytest.approx(0.01), 1]]
    assert report["findings"] == [
        "`a`'s gradient is 71 times as large as `b`'s: lower its weight or normalise its loss."
    ]


def test_tasks_that_get_along():
    (finding,) = planted([1.0, 0.0], [1.0, 1.0])["findings"]
    assert finding == "The tasks get along: mean cosines from 0.71 to 0.71."


def test_conflict_that_comes_late():
    """The mean over a run hides that tasks parted half way."""
    log = GradientLog(["a", "b"])
    for step in range(400):
        log.add(step, ["a", "b"], gramian_of([1.0, 0.0], [0.6 if step < 100 else -0.6, 0.8]))
    (finding,) = interference_report(log)["findings"]
    assert finding == (
        "`a` and `b` pull apart: mean cosine -0.30, in conflict in 75 % of the steps "
        "(0.60 in the first quarter, -0.60 in the last)."
    )


def test_random_labels_beside_a_learnable_task():
    """The planted culprit, on a real model: cosines alone cannot tell which of two strangers is the noise."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 16, generator=draw)
    labels = {
        "learnable": (rows @ torch.randn(16, generator=draw) > 0).long(),
        "noise": torch.randint(0, 2, (512,), generator=draw),
    }
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh())
    heads = {name: torch.nn.Linear(32, 2) for name in labels}
    parameters = [*encoder.parameters(), *(p for head in heads.values() for p in head.parameters())]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    log = GradientLog(list(labels))
    for step in range(150):
        batch = torch.randint(0, 512, (64,), generator=draw)
        features = encoder(rows[batch])
        losses = {
            name: torch.nn.functional.cross_entropy(heads[name](features), target[batch]) / math.log(2)
            for name, target in labels.items()
        }
        gradients = {name: torch.autograd.grad(loss, features, retain_graph=True)[0] for name, loss in losses.items()}
        log.add(
            step,
            list(gradients),
            gramian(gradients).tolist(),
            {name: loss.item() for name, loss in losses.items()},
        )
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    report = interference_report(log)
    flagged = [finding for finding in report["findings"] if "has learnt nothing" in finding]
    assert len(flagged) == 1
    assert flagged[0].startswith("`noise` has learnt nothing: its loss is still ")
    # A loss on rows that were not trained on does not say so.
    of_others = interference_report(log, rows="validation")
    assert of_others["losses"] == report["losses"]
    assert not any("has learnt nothing" in finding for finding in of_others["findings"])
    assert any(finding.startswith("No two tasks agree") for finding in report["findings"])
    assert report["losses"]["learnable"] < 0.7
    assert abs(report["cosine"][0][1]) < 0.05


# ---------------------------------------------------------------- gaps and bad input


def test_tasks_that_never_met():
    """Batches of one task each say nothing of pairs; a zero there would read as "no conflict"."""
    log = GradientLog(["a", "b"])
    for step in range(40):
        log.add(step, ["ab"[step % 2]], [[4.0]])
    report = interference_report(log)
    assert report["cosine"] == [[1, None], [None, 1]]
    assert report["pairs"] == []
    assert report["norms"] == {"a": 2.0, "b": 2.0}
    assert report["findings"] == ["Never in the same step, so nothing is known: `a` and `b`."]


def test_few_steps_are_not_judged():
    """Three steps of noise would accuse a task."""
    report = planted([1.0, 2.0], [-1.0, -2.0], steps=3)
    assert report["findings"] == ["Met in fewer than 10 steps, too few to judge: `a` and `b`."]


def test_zero_gradient():
    report = planted([1.0, 0.0], [1.0, 0.5], [0.0, 0.0])
    assert report["cosine"][2] == [None, None, None]
    assert report["norms"]["c"] == 0
    assert any(finding.startswith("`c` has no gradient") for finding in report["findings"])


def test_nothing_logged():
    report = interference_report(GradientLog(["a", "b"]))
    assert report["steps"] == 0
    assert report["cosine"] == [[None, None], [None, None]]
    assert report["norm_ratio"] is None


def test_steps_without_finite_numbers_are_left_out():
    """One overflow of float16 would turn every mean into nan."""
    log = GradientLog(["a", "b"])
    log.add(0, ["a", "b"], [[math.inf, math.nan], [math.nan, 1.0]])
    log.add(1, ["a", "b"], [[1.0, 1.0], [1.0, 1.0]], {"a": math.nan})
    report = interference_report(log)
    assert (report["steps"], report["skipped"]) == (1, 1)
    assert report["cosine"][0][1] == 1
    assert report["losses"] == {"a": None, "b": None}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GradientLog([]), "names of tasks"),
        (lambda: GradientLog(["a", "a"]), "each once"),
        (lambda: GradientLog(["a"], buckets=1), "at least 2 buckets"),
        (lambda: GradientLog(["a"]).add(0, ["b"], [[1.0]]), r"found \['b'\]; name all"),
        (lambda: GradientLog(["a"]).add(0, ["a"], [[1.0]], {"b": 1.0}), r"found \['b'\]"),
        (lambda: GradientLog(["a", "b"]).add(0, ["a"], [[1.0, 0.0], [0.0, 1.0]]), r"Gramian of 1 x 1 .* \[2, 2\]"),
        (lambda: GradientLog(["a"]).merge(GradientLog(["b"])), r"tasks \['a'\] in 100 buckets, found \['b'\]"),
    ],
)
def test_bad_input(make: Callable[[], object], said: str):
    with pytest.raises(ValueError, match=said):
        make()
