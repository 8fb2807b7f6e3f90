"""Laws of fusing objectives."""

import json
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from hf_mtcompress.errors import TaskError
from hf_mtcompress.losses.fusion import (
    DynamicWeightAverage,
    Famo,
    Fusion,
    FusionKind,
    GradientNorm,
    Product,
    RandomWeights,
    Uncertainty,
    WeightedSum,
    fusion_of,
)

KINDS = list(get_args(FusionKind))


def two(a: float, b: float) -> dict[str, Tensor]:
    return {"a": torch.tensor(a, requires_grad=True), "b": torch.tensor(b, requires_grad=True)}


def gradients(fusion: Fusion, losses: dict[str, Tensor]) -> list[float]:
    return [value.item() for value in torch.autograd.grad(fusion(losses), list(losses.values()))]


def descend(fusion: Fusion, scale: float = 1.0, steps: int = 40) -> Tensor:
    """Two quadratic tasks that disagree, the first one's loss multiplied by `scale`."""
    point = torch.tensor([3.0, -2.0], requires_grad=True)
    for step in range(steps):
        losses = {"a": scale * ((point - 1.0) ** 2).sum() + 0.1, "b": ((point + 1.0) ** 2).sum() + 0.1}
        if scale != 1.0:
            losses["a"] = scale * (((point - 1.0) ** 2).sum() + 0.1)
        fusion.start_window(step, steps)
        (slope,) = torch.autograd.grad(fusion(losses), point)
        fusion.observe({name: float(loss.detach()) for name, loss in losses.items()})
        point = (point - 0.02 * slope).detach().requires_grad_()
    return point.detach()


def train(fusion: Fusion, windows: range) -> None:
    """Feed windows of which some lack a task, and gradient norms where they are wanted."""
    for step in windows:
        if step % 5 == 0:
            fusion.start_epoch(step // 5)
        fusion.start_window(step, 20)
        losses = {"a": 2.0 / (step + 1), "b": 1.0 + 0.01 * step}
        if step % 3 == 1:
            del losses["a"]
        if fusion.wants_gradient_norms:
            fusion.observe_gradient_norms({name: 10 * loss for name, loss in losses.items()})
        fusion.observe(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(kind: str) -> None:
    whole, first, second = (fusion_of(kind, weights={"a": 1.0, "b": 0.5}) for _ in range(3))
    train(whole, range(20))
    train(first, range(11))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    train(second, range(11, 20))
    for fusion in (whole, second):
        fusion.start_window(20, 20)
    assert {name: second.weight(name) for name in "ab"} == {name: whole.weight(name) for name in "ab"}


@pytest.mark.parametrize("kind", KINDS)
def test_absent_tasks_are_left_out_and_weights_are_finite(kind: str) -> None:
    fusion = fusion_of(kind, weights={"a": 1.0, "b": 1.0})
    train(fusion, range(20))
    alone = {"b": torch.tensor(1.5, requires_grad=True)}
    assert gradients(fusion, alone) == [pytest.approx(fusion.weight("b"))]
    assert all(0 < fusion.weight(name) < 1e3 for name in "ab")


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_zero_stops_nothing(kind: str) -> None:
    """The logarithm of zero is a familiar way to lose a run."""
    fusion = fusion_of(kind, weights={"a": 1.0, "b": 1.0})
    for step in range(4):
        fusion.start_epoch(step)
        fusion.start_window(step, 4)
        fusion.observe({"a": 0.0, "b": 1.0})
        fusion.observe_gradient_norms({"a": 0.0, "b": 1.0})
    assert torch.isfinite(fusion(two(0.0, 1.0)))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_do_not_change_within_a_window(kind: str) -> None:
    """Otherwise splitting a window differently would change its gradient."""
    fusion = fusion_of(kind, weights={"a": 1.0, "b": 1.0})
    train(fusion, range(8))
    fusion.start_window(8, 20)
    whole = gradients(fusion, two(3.0, 1.0))
    assert gradients(fusion, two(1.0, 0.25)) == whole == gradients(fusion, two(2.0, 0.75))


@pytest.mark.parametrize(("kind", "invariant"), [("product", True), ("sum", False)])
def test_a_loss_times_a_hundred(kind: str, invariant: bool) -> None:
    """A product does not care about units; a sum is taken over by the larger one."""
    plain, scaled = descend(fusion_of(kind)), descend(fusion_of(kind), scale=100.0)
    if invariant:
        torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-6)
    else:
        assert (plain - scaled).abs().max() > 0.5


def test_the_product_goes_in_the_direction_of_the_geometric_mean() -> None:
    losses = two(4.0, 0.5)
    mean = (losses["a"] * losses["b"]).sqrt()
    wanted = [value.item() for value in torch.autograd.grad(mean, list(losses.values()))]
    found = gradients(Product(), losses)
    assert found[0] / found[1] == pytest.approx(wanted[0] / wanted[1])
    assert found == pytest.approx([1 / 4.0, 1 / 0.5])


def test_sum_by_hand() -> None:
    fusion = WeightedSum({"a": 0.5, "b": (1.0, 0.0)}, {"b": 4.0})
    assert fusion(two(2.0, 8.0)).item() == pytest.approx(0.5 * 2 + 8 / 4)
    fusion.start_window(5, 11)
    assert fusion(two(2.0, 8.0)).item() == pytest.approx(0.5 * 2 + 0.5 * 8 / 4)
    fusion.start_window(10, 11)
    assert fusion(two(2.0, 8.0)).item() == pytest.approx(1.0)
    assert fusion.static(two(2.0, 8.0)).item() == pytest.approx(3.0)


def test_uncertainty_by_hand() -> None:
    fusion = Uncertainty(rate=0.1)
    fusion.observe({"a": 3.0})
    assert fusion.log_variances == {"a": pytest.approx(0.2)}
    assert fusion.weight("a") == pytest.approx(0.8187308)
    for _ in range(2000):
        fusion.observe({"a": 3.0, "b": 0.5})
    assert fusion.weight("a") == pytest.approx(1 / 3.0, rel=1e-3), "settles where weight * loss is one"
    assert fusion.weight("b") == pytest.approx(2.0, rel=1e-3)


def test_dynamic_weight_average_by_hand() -> None:
    """The task that stands still gets more than the one that halves: 2 exp(1 / 2) and 2 exp(0.5 / 2), normalised."""
    fusion = DynamicWeightAverage()
    for epoch, losses in enumerate([{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.5}]):
        fusion.start_epoch(epoch)
        fusion.observe(losses)
        assert fusion.weight("a") == 1.0
    fusion.start_epoch(2)
    assert fusion.weight("a") == pytest.approx(1.1243530)
    assert fusion.weight("b") == pytest.approx(0.8756470)


def test_random_weights_depend_on_seed_and_step_alone() -> None:
    def at(seed: int, step: int) -> list[float]:
        fusion = RandomWeights({"a": 1.0, "b": 1.0}, seed=seed)
        fusion.start_window(step, 10)
        return [fusion.weight("a"), fusion.weight("b")]

    assert at(1, 3) == at(1, 3)
    assert at(1, 3) != at(1, 4)
    assert at(1, 3) != at(2, 3)
    assert sum(at(1, 3)) == pytest.approx(2.0)


def test_famo_moves_weight_to_the_task_that_stands_still() -> None:
    fusion = Famo()
    for step in range(50):
        fusion.observe({"a": 0.95**step, "b": 1.0})
    assert fusion.logits["b"] > 0 > fusion.logits["a"]


def test_gradient_norms_leave_weights_that_were_given_as_they_are() -> None:
    """A task of weight 3 is meant to count three times, and one that fades in to begin at 0."""
    fusion = GradientNorm({"a": 1.0, "b": 3.0, "c": (0.0, 1.0)}, share=0.1)
    fusion.start_window(0, 10)
    fusion.observe_gradient_norms({"a": 8.0, "b": 2.0, "c": 4.0})
    fusion.start_window(9, 10)
    assert 2.0 * fusion.weight("b") == pytest.approx(3 * 8.0 * fusion.weight("a"))
    assert 4.0 * fusion.weight("c") == pytest.approx(8.0 * fusion.weight("a"))


def test_gradient_norms_are_made_alike_and_then_fixed() -> None:
    fusion = GradientNorm({"a": 1.0, "b": 1.0}, share=0.2)
    for step in range(10):
        fusion.start_window(step, 10)
        assert fusion.wants_gradient_norms == (step < 2)
        if fusion.wants_gradient_norms:
            assert fusion.weight("a") == fusion.weight("b") == 1.0
            fusion.observe_gradient_norms({"a": 8.0, "b": 2.0})
    assert fusion.weight("a") == pytest.approx(0.5)
    assert fusion.weight("b") == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("summ", {}, "expected a fusion among"),
        ("product", {"rate": 0.1}, "has no option among .*rate"),
    ],
)
def test_unknown_names_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        fusion_of(kind, **options)
