"""Gradients of several tasks: what the Gramian says, and what the combinations promise."""

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from hf_mtcompress.environment import EXTRAS
from hf_mtcompress.errors import MissingExtraError
from hf_mtcompress.losses.gradients import (
    CAGRAD_RADIUS,
    COMBINATIONS,
    combination,
    cosine_matrix,
    gramian,
    norms,
)

SURGERY = all(importlib.util.find_spec(name) for name in EXTRAS["surgery"])
needs_surgery = pytest.mark.skipif(not SURGERY, reason="needs the extra 'surgery'")
METHODS = [
    pytest.param(
        name,
        marks=[needs_surgery] * (name != "mean")
        + [pytest.mark.skipif(not importlib.util.find_spec("ecos"), reason="needs ecos")] * (name == "nash_mtl"),
    )
    for name in COMBINATIONS
]


def rows(matrix: Tensor) -> dict[str, Tensor]:
    return {f"task{index}": row for index, row in enumerate(matrix)}


def random_gradients(tasks: int, seed: int = 0) -> Tensor:
    return torch.randn(tasks, 12, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the Gramian


def test_gramian_of_blocks_adds_up():
    """A trainer that sums over parameters must get what it would get from all of them at once."""
    gradients = random_gradients(3)
    parts = gramian(rows(gradients[:, :5])) + gramian(rows(gradients[:, 5:]))
    torch.testing.assert_close(parts, gramian(rows(gradients)))
    torch.testing.assert_close(gramian(rows(gradients)), gradients @ gradients.T)


def test_gramian_is_float32_of_any_shape_and_detached():
    """Mixed precision: sums of squares in bfloat16 are off by per cents. A graph that is kept eats the memory."""
    gradient = torch.full((2, 50, 10), 1.0, dtype=torch.bfloat16, requires_grad=True)
    found = gramian({"a": gradient, "b": -gradient})
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found.tolist() == [[1000, -1000], [-1000, 1000]]


def test_cosines_do_not_depend_on_lengths():
    """Cosines that follow the size of a loss would call every large task a conflict."""
    gradients = random_gradients(4)
    cosines = cosine_matrix(gramian(rows(gradients)))
    scaled = gradients * torch.tensor([1e-12, 1.0, 100.0, 1e12])[:, None]
    torch.testing.assert_close(cosine_matrix(gramian(rows(scaled))), cosines)
    assert cosines.diagonal().tolist() == pytest.approx([1.0] * 4)
    assert float(cosines.abs().max()) <= 1
    torch.testing.assert_close(cosines, cosines.T)


@pytest.mark.parametrize(
    ("gradients", "cosines", "lengths"),
    [
        ([[3.0, 4.0], [-3.0, -4.0]], [[1, -1], [-1, 1]], [5, 5]),
        ([[1.0, 0.0], [0.0, 2.0]], [[1, 0], [0, 1]], [1, 2]),
        ([[1.0, 1.0], [1.0, 1.0]], [[1, 1], [1, 1]], [math.sqrt(2), math.sqrt(2)]),
        ([[0.0, 0.0], [0.0, 2.0]], [[0, 0], [0, 1]], [0, 2]),
        ([[3.0, 0.0], [4.0, 3.0]], [[1, 0.8], [0.8, 1]], [3, 5]),
    ],
    ids=["opposite", "orthogonal", "duplicate", "zero", "between"],
)
def test_exact_cosines_and_norms(gradients: list[list[float]], cosines: list[list[float]], lengths: list[float]):
    found = gramian(rows(torch.tensor(gradients)))
    torch.testing.assert_close(cosine_matrix(found), torch.tensor(cosines, dtype=torch.float32))
    torch.testing.assert_close(norms(found), torch.tensor(lengths, dtype=torch.float32))


# ---------------------------------------------------------------- laws of combinations


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
def test_size_of_the_losses_as_a_whole_does_not_matter(name: str, tasks: int):
    """Late in training gradients are small, and a solver's absolute tolerance would quietly turn surgery off."""
    matrix = gramian(rows(random_gradients(tasks)))
    weigh = combination(name)
    results = []
    for scale in (1.0, 1e-10, 1e6):
        torch.manual_seed(0)  # pcgrad draws an order
        results.append(weigh(matrix * scale))
    for result in results:
        assert result.shape == (tasks,)
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_carried_from_call_to_call(name: str):
    """A resumed run must see the weights of an uninterrupted one, and tasks come and go between steps."""
    matrix = gramian(rows(random_gradients(3)))
    weigh = combination(name)
    torch.manual_seed(0)
    first = weigh(matrix)
    weigh(gramian(rows(random_gradients(5, seed=1))))
    torch.manual_seed(0)
    assert torch.equal(weigh(matrix), first)


HARD = {
    "alone": torch.tensor([[1.0, 2.0]]),
    "opposite": torch.tensor([[1.0, 2.0], [-1.0, -2.0]]),
    "duplicate": torch.tensor([[1.0, 2.0], [1.0, 2.0]]),
    "three duplicates": torch.tensor([[1.0, 2.0]] * 3),
    "zero beside another": torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, -1.0]]),
    "all zero": torch.zeros(3, 2),
    "more tasks than directions": random_gradients(8)[:, :3],
    "hundredfold": torch.tensor([[100.0, 3.0], [-1.0, 2.0]]),
    "far apart": torch.tensor([[1e-9, 0.0], [1.0, 1.0], [-1e6, 1e6]]),
    "not a number": torch.tensor([[math.nan, 0.0], [1.0, 1.0]]),
    "infinite": torch.tensor([[math.inf, 0.0], [1.0, 1.0]]),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("gradients", HARD.values(), ids=HARD.keys())
def test_weights_are_finite(name: str, gradients: Tensor):
    """One weight that is not a number makes every shared parameter one, for good."""
    weights = combination(name)(gramian(rows(gradients)))
    assert torch.isfinite(weights).all()
    assert weights.shape == (len(gradients),)
    # Neither does every task stop, nor does one weight run away.
    assert 1e-4 < float(weights.abs().max()) < 1e4


@pytest.mark.parametrize("name", METHODS)
def test_one_task_is_left_alone(name: str):
    """With batches of one task each, surgery has nothing to do."""
    assert combination(name)(torch.tensor([[0.25]])).tolist() == [1.0]


@pytest.mark.parametrize("name", METHODS)
def test_zero_gradient_changes_nothing_for_the_others(name: str):
    """The min-norm combination with a zero gradient is zero: a task that has nothing to learn would stop all."""
    gradients = random_gradients(2)
    weigh = combination(name)
    torch.manual_seed(0)
    alone = weigh(gramian(rows(gradients)))
    torch.manual_seed(0)
    found = weigh(gramian(rows(torch.cat([gradients, torch.zeros(1, 12)]))))
    assert float(found[2]) == pytest.approx(1 / 3)
    if name != "mean":
        torch.testing.assert_close(found[:2], alone)


@pytest.mark.parametrize("name", METHODS)
def test_opposite_gradients_cancel(name: str):
    """Nothing helps both tasks here, so nothing may be done to the shared parameters."""
    gradients = torch.tensor([[3.0, 4.0, 0.0], [-3.0, -4.0, 0.0]])
    combined = combination(name)(gramian(rows(gradients))) @ gradients
    assert combined.tolist() == pytest.approx([0.0] * 3, abs=1e-3)


@needs_surgery
@pytest.mark.parametrize("seed", range(10))
def test_upgrad_raises_no_loss(seed: int):
    """Its promise: to first order no task loses. A sign that is turned round breaks it without a word."""
    gradients = random_gradients(4, seed)
    gradients[1] = -gradients[0] + 0.1 * gradients[1]
    gradients[2] *= 30
    weights = combination("upgrad")(gramian(rows(gradients)))
    changes = gradients @ (weights @ gradients)
    assert (changes >= -1e-3 * gradients.norm(dim=1) * (weights @ gradients).norm()).all()
    mean = gradients @ gradients.mean(0)
    assert float(mean.min()) < 0  # the plain mean would have


@needs_surgery
@pytest.mark.parametrize(("method", "raises_one"), [("upgrad", False), ("mean", True)])
def test_upgrad_does_not_increase_either_of_two_opposing_losses(method: str, raises_one: bool):
    """The planted conflict on real losses: (x - 1)^2 + y^2 and (x + 1)^2 + y^2 meet at the origin.

    On the way there the plain sum makes the smaller loss worse.
    """
    point = torch.tensor([0.2, 0.1], requires_grad=True)
    weigh = combination(method)
    raised = False
    for _ in range(100):
        losses = [(point[0] - 1) ** 2 + point[1] ** 2, (point[0] + 1) ** 2 + point[1] ** 2]
        gradients = [torch.autograd.grad(loss, point)[0] for loss in losses]
        weights = weigh(gramian({"a": gradients[0], "b": gradients[1]}))
        with torch.no_grad():
            point -= 0.02 * (weights[0] * gradients[0] + weights[1] * gradients[1])
            after = [(point[0] - 1) ** 2 + point[1] ** 2, (point[0] + 1) ** 2 + point[1] ** 2]
        raised = raised or any(new > old + 1e-4 for new, old in zip(after, losses, strict=True))
    assert raised == raises_one
    assert abs(float(point.detach()[1])) < 0.05


# ---------------------------------------------------------------- exact numbers


@needs_surgery
@pytest.mark.parametrize("seed", range(5))
def test_mgda_of_two_tasks_is_its_closed_form(seed: int):
    """Sener and Koltun 2018, eq. 4: the shortest point between two gradients has a formula."""
    one, two = random_gradients(2, seed) * torch.tensor([[1.0], [0.1 + seed]])
    expected = float(((two - one) @ two / (one - two).square().sum()).clamp(0, 1))
    weights = combination("mgda")(gramian({"a": one, "b": two}))
    assert weights.tolist() == pytest.approx([expected, 1 - expected], abs=1e-3)


@needs_surgery
def test_pcgrad_of_two_tasks_is_its_projection():
    """Yu et al. 2020, algorithm 1, by hand: each gradient loses its part along the other."""
    one, two = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0])
    weights = combination("pcgrad")(gramian({"a": one, "b": two}))
    # g1 - (g1.g2 / g2.g2) g2 = g1 + g2; g2 - (g1.g2 / g1.g1) g1 = g2 + g1 / 2
    assert weights.tolist() == pytest.approx([1.5, 2.0])


@needs_surgery
def test_imtl_g_has_equal_projections():
    """Liu et al. 2021: the combined gradient is as long along every task's direction."""
    gradients = random_gradients(3)
    combined = combination("imtl_g")(gramian(rows(gradients))) @ gradients
    along = gradients @ combined / gradients.norm(dim=1)
    assert along.tolist() == pytest.approx([float(along[0])] * 3, rel=1e-3)


@needs_surgery
@pytest.mark.parametrize(("method", "invariant"), [("imtl_g", True), ("mean", False)])
def test_the_direction_for_a_loss_times_a_hundred(method: str, invariant: bool):
    """Equal progress along every task's direction does not care about units; the plain sum is taken over."""
    gradients = random_gradients(2)
    directions = []
    for scale in (1.0, 100.0):
        scaled = gradients * torch.tensor([[1.0], [scale]])
        combined = combination(method)(gramian(rows(scaled))) @ scaled
        directions.append(combined / combined.norm())
    assert (float(directions[0] @ directions[1]) > 0.999) == invariant


@needs_surgery
@pytest.mark.skipif(not importlib.util.find_spec("ecos"), reason="needs ecos")
def test_nash_mtl_gives_every_task_the_same_gain():
    """Navon et al. 2022, claim 3.1: G w = 1 / w, up to scale."""
    matrix = gramian(rows(random_gradients(3)))
    weights = combination("nash_mtl")(matrix)
    gains = weights * (matrix @ weights)
    assert gains.tolist() == pytest.approx([float(gains[0])] * 3, rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_agrees_with_the_aggregator_of_torchjd(name: str):
    """What is published under a name is what we do: checked against the library's own way from gradients to result."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    aggregators = {
        "mean": aggregation.Mean,
        "pcgrad": aggregation.PCGrad,
        "mgda": aggregation.MGDA,
        "cagrad": lambda: aggregation.CAGrad(c=CAGRAD_RADIUS),
        "upgrad": aggregation.UPGrad,
        "aligned_mtl": aggregation.AlignedMTL,
        "imtl_g": aggregation.IMTLG,
        "nash_mtl": lambda: aggregation.NashMTL(n_tasks=4),
    }
    gradients = random_gradients(4)
    gradients[1] -= 0.8 * gradients[0]
    torch.manual_seed(3)
    combined = combination(name)(gramian(rows(gradients))) @ gradients
    torch.manual_seed(3)
    if name == "nash_mtl":
        with pytest.warns(UserWarning, match="not DPP"):
            expected = aggregators[name]()(gradients)
        # Theirs is cut to length 1, ours to the length of all gradients together.
        expected = expected * gradients.norm()
    else:
        expected = aggregators[name]()(gradients)
    torch.testing.assert_close(combined, expected, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- bad input


def test_unknown_name():
    with pytest.raises(ValueError, match=r"expected a combination of gradients among mean, pcgrad.*found 'pcgard'"):
        combination("pcgard")


def test_gradients_of_different_shapes():
    with pytest.raises(ValueError, match=r"'a': \(2,\), 'b': \(3,\).*same shared tensor"):
        gramian({"a": torch.ones(2), "b": torch.ones(3)})


def test_no_gradients():
    with pytest.raises(ValueError, match="at least one task"):
        gramian({})


@pytest.mark.parametrize("read", [norms, cosine_matrix, combination("mean")])
def test_a_matrix_that_is_no_gramian(read: object):
    assert callable(read)
    with pytest.raises(ValueError, match=r"square Gramian.*found shape \(2, 3\)"):
        read(torch.ones(2, 3))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch):
    """Norms, cosines and the mean need nothing; the rest says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    matrix = gramian({"a": torch.ones(2), "b": torch.ones(2)})
    assert norms(matrix).tolist() == pytest.approx([math.sqrt(2)] * 2)
    assert cosine_matrix(matrix).tolist() == [[pytest.approx(1.0)] * 2] * 2
    assert combination("mean")(matrix).tolist() == [0.5, 0.5]
    with pytest.raises(MissingExtraError, match=r'pip install "hf_mtcompress\[surgery\]"'):
        combination("upgrad")
