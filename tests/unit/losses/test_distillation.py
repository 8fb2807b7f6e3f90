"""Laws of the criteria of distillation, then exact small numbers computed with numpy and scipy."""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine, pdist
from scipy.special import expit, rel_entr, softmax
from scipy.stats import pearsonr, zscore
from torch import Tensor

from hf_mtcompress.losses import distillation
from hf_mtcompress.losses.distillation import (
    attention_map_distance_sum,
    binary_divergence_sum,
    correlation_distance_sum,
    cosine_distance_sum,
    decoupled_divergence_sum,
    hidden_error_sum,
    layer_map,
    match_labels,
    mean_pooled,
    relation_divergence_sum,
    relation_heads,
    relational_distance_sum,
    soft_cross_entropy_sum,
    squared_error_sum,
    standardized_divergence_sum,
)

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of student, teacher and mask."""

TARGETS = torch.tensor([0, 3, -100, 1, 4, -100, 2])

LOGITS: dict[str, Criterion] = {
    "soft": lambda s, t, m: soft_cross_entropy_sum(s, t, m, 2.0),
    "standardized": lambda s, t, m: standardized_divergence_sum(s, t, m, 2.0),
    "decoupled": lambda s, t, m: decoupled_divergence_sum(s, t, m, TARGETS[: len(s)], 2.0),
    "correlation": lambda s, t, m: correlation_distance_sum(s, t, m, 1.5, 2.0, 3.0),
    "correlation_of_items": lambda s, t, m: correlation_distance_sum(s, t, m, 1.5, gamma=0.0),
    "binary": lambda s, t, m: binary_divergence_sum(s[m], t[m], 2.0),
}
STATES: dict[str, Criterion] = {
    "hidden": hidden_error_sum,
    "cosine": cosine_distance_sum,
    "relations": lambda s, t, m: relation_divergence_sum(s, t, m, 2),
    "attention_map": lambda s, t, m: attention_map_distance_sum(s[m.any(1)], t[m.any(1)], 1, 1),
}
ROWS: dict[str, Criterion] = {
    "rows": cosine_distance_sum,
    "distances": relational_distance_sum,
    "squared": lambda s, t, m: squared_error_sum(s[m], t[m]),
}
ALL = {**LOGITS, **STATES, **ROWS}
WITHIN_A_BATCH = {"correlation", "distances"}
"""Criteria that compare the items of a batch with each other."""


def example(name: str, seed: int = 0) -> Tensor:
    """Inputs of a criterion, seven items or rows of them."""
    shape = (7, 5) if name in LOGITS else (7, 5, 8) if name in STATES else (7, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def mask_of(name: str) -> Tensor:
    if name not in STATES:
        return torch.tensor([True, True, False, True, True, False, True])
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 2, 5, 4, 0])[:, None]
    return mask if name != "attention_map" else mask.any(1, keepdim=True).expand(7, 5)


def gradient(criterion: Criterion, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(criterion(student, teacher, mask), student)
    return found


# ---- laws ----


def test_every_criterion_is_under_the_laws() -> None:
    """A new criterion that nobody lists here would have none of the laws."""
    names = {name for name, value in vars(distillation).items() if name.endswith("_sum") and inspect.isfunction(value)}
    source = Path(__file__).read_text()
    table = source[source.index("LOGITS:") : source.index("ALL =")]
    assert {name for name in names if name not in table} == set()


@pytest.mark.parametrize("name", ALL)
def test_a_copy_of_the_teacher_is_at_zero(name: str) -> None:
    teacher, mask = example(name), mask_of(name)
    found = ALL[name](teacher.clone(), teacher, mask)
    assert (found.dtype, found.shape) == (torch.float32, ())
    assert 0 <= float(found) < 1e-6
    assert ALL[name](example(name, 1), teacher, mask) > 0.05


@pytest.mark.parametrize("name", sorted(ALL.keys() - WITHIN_A_BATCH - {"decoupled"}))
def test_splitting_the_rows_adds_up(name: str) -> None:
    """Otherwise the loss depends on how a window is cut into batches."""
    student, teacher, mask = example(name, 1), example(name), mask_of(name)
    parts = [ALL[name](student[part], teacher[part], mask[part]) for part in (slice(0, 3), slice(3, 4), slice(4, 7))]
    torch.testing.assert_close(sum(parts), ALL[name](student, teacher, mask), rtol=1e-5, atol=1e-6)


def test_splitting_the_rows_adds_up_with_targets() -> None:
    student, teacher, mask = example("decoupled", 1), example("decoupled"), mask_of("decoupled")

    def found(part: slice) -> Tensor:
        return decoupled_divergence_sum(student[part], teacher[part], mask[part], TARGETS[part], 2.0)

    torch.testing.assert_close(found(slice(0, 4)) + found(slice(4, 7)), found(slice(0, 7)))


def test_a_criterion_within_the_batch_is_a_sum_over_items() -> None:
    """Items that come twice count twice, so the divisor is the number of items as everywhere."""
    student, teacher = example("correlation", 1), example("correlation")
    once = correlation_distance_sum(student, teacher, torch.ones(7, dtype=torch.bool))
    twice = correlation_distance_sum(student.repeat(2, 1), teacher.repeat(2, 1), torch.ones(14, dtype=torch.bool))
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("name", ALL)
def test_masked_items_do_not_count(name: str) -> None:
    """Whatever stands at them, numbers or not: padding is garbage in some attention kernels."""
    student, teacher, mask = example(name, 1), example(name), mask_of(name)
    spoilt = student.masked_fill(~mask[..., None], float("nan"))
    other = teacher.masked_fill(~mask[..., None], float("inf"))
    torch.testing.assert_close(ALL[name](spoilt, other, mask), ALL[name](student, teacher, mask))
    spoilt_gradient = gradient(ALL[name], spoilt, other, mask)
    torch.testing.assert_close(spoilt_gradient, gradient(ALL[name], student, teacher, mask))
    assert not spoilt_gradient[~mask].any()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kept", [0, 1])
def test_no_item_or_one(name: str, kept: int) -> None:
    """A batch without a single labelled token must add 0, not a mean over nothing."""
    student, teacher, mask = example(name, 1), example(name), mask_of(name)
    mask = mask & (torch.arange(7) < kept).view(-1, *[1] * (mask.dim() - 1))
    found = ALL[name](student, teacher, mask)
    assert bool(found.isfinite())
    assert (float(found) == 0) == (kept == 0 or name == "distances")
    assert gradient(ALL[name], student, teacher, mask).isfinite().all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("constant", ["student", "teacher", "both", "zero", "none"])
def test_gradients_are_finite(name: str, dtype: torch.dtype, constant: str) -> None:
    """One NaN among the gradients destroys every weight, and half precision reaches infinity at 65 504."""
    student, teacher, mask = example(name, 1).to(dtype), example(name).to(dtype), mask_of(name)
    if constant in ("student", "both"):
        student = torch.full_like(student, 1.1)
    if constant in ("teacher", "both"):
        teacher = torch.full_like(teacher, 0.3)
    if constant == "zero":
        student = torch.zeros_like(student)
    found = gradient(ALL[name], student, teacher, mask)
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert ALL[name](student, teacher, mask).dtype == torch.float32
    if constant == "none":
        assert found.abs().max() > 1e-3


@pytest.mark.parametrize("name", [*LOGITS, *STATES])
def test_large_half_precision_numbers(name: str) -> None:
    """Squares and products of activations above 256 are infinite in half precision."""
    student, teacher = (example(name, seed).half() * 300 for seed in (1, 0))
    assert bool(ALL[name](student, teacher, mask_of(name)).isfinite())
    assert gradient(ALL[name], student, teacher, mask_of(name)).isfinite().all()


@pytest.mark.parametrize("name", ["standardized", "correlation", "cosine", "rows", "relations", "distances", "soft"])
def test_gradients_are_those_of_the_value(name: str) -> None:
    """Central differences; a wrong detach or a wrong recomputation changes no value."""
    student, teacher, mask = example(name, 1), example(name), mask_of(name)
    found = gradient(ALL[name], student, teacher, mask)
    direction = torch.randn(student.shape, generator=torch.Generator().manual_seed(2))
    step = 1e-2
    slope = (
        ALL[name](student + step * direction, teacher, mask) - ALL[name](student - step * direction, teacher, mask)
    ) / (2 * step)
    assert float((found * direction).sum()) == pytest.approx(float(slope), rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("name", sorted(LOGITS.keys() - {"decoupled"}))
def test_permuting_both_label_orders_changes_nothing(name: str) -> None:
    student, teacher, order = example(name, 1), example(name), [3, 0, 4, 1, 2]
    permuted = LOGITS[name](student[:, order], teacher[:, order], mask_of(name))
    torch.testing.assert_close(permuted, LOGITS[name](student, teacher, mask_of(name)), rtol=1e-5, atol=1e-6)


def test_permuting_both_label_orders_with_targets() -> None:
    student, teacher, order = example("decoupled", 1), example("decoupled"), torch.tensor([3, 0, 4, 1, 2])
    targets = torch.where(TARGETS < 0, TARGETS, order.argsort()[TARGETS.clamp(min=0)])
    permuted = decoupled_divergence_sum(student[:, order], teacher[:, order], mask_of("decoupled"), targets, 2.0)
    torch.testing.assert_close(permuted, LOGITS["decoupled"](student, teacher, mask_of("decoupled")))


@pytest.mark.parametrize("name", ["standardized", "correlation"])
def test_offsets_and_what_each_criterion_ignores(name: str) -> None:
    student, teacher, mask = example(name, 1), example(name), mask_of(name)
    plain = LOGITS[name](student, teacher, mask)
    torch.testing.assert_close(LOGITS[name](student + 5.0, teacher, mask), plain, rtol=1e-4, atol=1e-5)
    scaled = LOGITS[name](student * 3.0, teacher, mask)
    assert (abs(float(scaled - plain)) < 1e-4) == (name == "standardized")


def test_relations_and_distances_ignore_a_rotation() -> None:
    """Widths may differ only because nothing but products and distances counts."""
    rotation = torch.linalg.qr(example("rows", 3)[:6, :6])[0]
    rows = example("distances")
    assert float(relational_distance_sum(rows @ rotation * 7, rows)) < 1e-4
    states = example("relations")
    assert float(relation_divergence_sum(states[..., [1, 0, 3, 2, 5, 4, 7, 6]], states, mask_of("relations"), 2)) < 1e-4


def test_relations_computed_part_by_part_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, mask = example("relations", 1), example("relations"), mask_of("relations")
    whole = relation_divergence_sum(student, teacher, mask, 4)
    slope = gradient(lambda s, t, m: relation_divergence_sum(s, t, m, 4), student, teacher, mask)
    monkeypatch.setattr(distillation, "_SCORES_AT_ONCE", 3 * 7 * 25)
    torch.testing.assert_close(relation_divergence_sum(student, teacher, mask, 4), whole)
    other = gradient(lambda s, t, m: relation_divergence_sum(s, t, m, 4), student, teacher, mask)
    torch.testing.assert_close(other, slope)


def test_gradient_of_relations_is_that_of_the_formula() -> None:
    """It is written out by hand: a slip would train students towards something else, without any sign of it."""
    student, teacher, mask = example("relations", 1), example("relations"), mask_of("relations")

    def plain(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        total = student.new_zeros(())
        for row in range(len(mask)):
            own, other = (
                states[row][mask[row]].unflatten(-1, (4, -1)).transpose(0, 1) for states in (student, teacher)
            )
            found, wanted = ((part @ part.mT / part.shape[-1] ** 0.5).log_softmax(-1) for part in (own, other))
            total = total + (wanted.exp() * (wanted - found)).sum() / 4
        return 3 * total

    def ours(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return 3 * relation_divergence_sum(student, teacher, mask, 4)

    torch.testing.assert_close(ours(student, teacher, mask), plain(student, teacher, mask))
    slope = gradient(ours, student, teacher, mask)
    assert slope.abs().max() > 0.1
    torch.testing.assert_close(slope, gradient(plain, student, teacher, mask))


def test_relations_keep_no_scores_for_the_backward_pass() -> None:
    """With them a batch of 32 x 512 tokens would hold gigabytes."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    states = torch.randn(1, 64, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        relation_divergence_sum(states, torch.randn(1, 64, 8), torch.ones(1, 64, dtype=torch.bool), 2)
    assert max(kept, default=0) < 64 * 64


def test_relations_in_mixed_precision() -> None:
    """Automatic mixed precision turns products into half precision, and a divergence of nearly equal rows to noise."""
    student, teacher, mask = example("relations", 1), example("relations"), mask_of("relations")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = relation_divergence_sum(student, teacher, mask, 2)
    torch.testing.assert_close(mixed, relation_divergence_sum(student, teacher, mask, 2))


# ---- exact numbers ----


def divergence(teacher: np.ndarray, student: np.ndarray) -> float:
    return float(rel_entr(teacher, student).sum())


def pair(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=shape) * 2, generator.normal(size=shape) * 2


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array).float() for array in arrays]


def test_standardized_divergence_in_numbers() -> None:
    student, teacher = pair((3, 4))
    expected = sum(
        9 * divergence(softmax(zscore(theirs) / 3), softmax(zscore(own) / 3))
        for own, theirs in zip(student, teacher, strict=True)
    )
    found = standardized_divergence_sum(*tensors(student, teacher), torch.ones(3, dtype=torch.bool), 3.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_decoupled_divergence_in_numbers() -> None:
    student, teacher = pair((3, 4))
    targets = [2, int(teacher[1].argmax()), 0]
    expected = 0.0
    for own, theirs, target in zip(student, teacher, targets, strict=True):
        p, q = softmax(own / 2), softmax(theirs / 2)
        others = [label for label in range(4) if label != target]
        first = divergence(np.array([q[target], 1 - q[target]]), np.array([p[target], 1 - p[target]]))
        second = divergence(q[others] / q[others].sum(), p[others] / p[others].sum())
        expected += 4 * (0.7 * first + 5 * second)
    labels = torch.tensor([2, -100, 0])
    mask = torch.ones(3, dtype=torch.bool)
    found = decoupled_divergence_sum(*tensors(student, teacher), mask, labels, 2.0, alpha=0.7, beta=5.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_decoupled_divergence_with_the_teachers_doubt_is_the_plain_one() -> None:
    """The identity that the paper starts from."""
    student, teacher = tensors(*pair((1, 4)))
    mask = torch.ones(1, dtype=torch.bool)
    doubt = float(1 - torch.softmax(teacher / 2, -1)[0, 1])
    found = decoupled_divergence_sum(student, teacher, mask, torch.tensor([1]), 2.0, beta=doubt)
    torch.testing.assert_close(found, soft_cross_entropy_sum(student, teacher, mask, 2.0), rtol=1e-5, atol=1e-6)


def test_correlation_distance_in_numbers() -> None:
    student, teacher = pair((5, 4))
    p, q = softmax(student / 1.5, axis=1), softmax(teacher / 1.5, axis=1)
    between_labels = sum(1 - pearsonr(p[row], q[row]).statistic for row in range(5))
    between_items = 5 * np.mean([1 - pearsonr(p[:, label], q[:, label]).statistic for label in range(4)])
    mask = torch.ones(5, dtype=torch.bool)
    found = correlation_distance_sum(*tensors(student, teacher), mask, 1.5, beta=2.0, gamma=3.0)
    assert float(found) == pytest.approx(2 * between_labels + 3 * between_items, rel=1e-4)


def test_binary_divergence_in_numbers() -> None:
    student, teacher = pair((3, 4))
    p, q = expit(student / 2), expit(teacher / 2)
    expected = 4 * (rel_entr(q, p) + rel_entr(1 - q, 1 - p)).mean(1).sum()
    assert float(binary_divergence_sum(*tensors(student, teacher), 2.0)) == pytest.approx(expected, rel=1e-4)


def test_hidden_error_in_numbers() -> None:
    student, teacher = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[1.0, 1.0], [3.0, 4.0]]])
    assert float(hidden_error_sum(student, teacher, torch.tensor([[True, True]]))) == pytest.approx(0.5 + 1)


def test_cosine_distance_in_numbers() -> None:
    student, teacher = pair((6, 5))
    expected = sum(cosine(own, theirs) for own, theirs in zip(student, teacher, strict=True))
    assert float(cosine_distance_sum(*tensors(student, teacher))) == pytest.approx(expected, rel=1e-5)
    in_batches = [array.reshape(2, 3, 5) for array in tensors(student, teacher)]
    assert float(cosine_distance_sum(*in_batches)) == pytest.approx(expected, rel=1e-5)


def test_relation_divergence_in_numbers() -> None:
    student, _ = pair((2, 4, 6))
    _, teacher = pair((2, 4, 9))
    lengths, heads, expected = [4, 2], 3, 0.0
    for row, length in enumerate(lengths):
        for head in range(heads):
            own, theirs = student[row, :length, head * 2 : head * 2 + 2], teacher[row, :length, head * 3 : head * 3 + 3]
            p, q = softmax(own @ own.T / 2**0.5, axis=1), softmax(theirs @ theirs.T / 3**0.5, axis=1)
            expected += divergence(q, p) / heads
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    found = relation_divergence_sum(*tensors(student, teacher), mask, heads)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_relational_distance_in_numbers() -> None:
    student, _ = pair((4, 3))
    _, teacher = pair((4, 6))
    student[0] *= 20
    own, theirs = (pdist(rows) / pdist(rows).mean() for rows in (student, teacher))
    error = np.abs(own - theirs)
    assert error.max() > 0.5, "both sides of Huber's loss"
    huber = np.where(error < 1, error**2 / 2, error - 0.5)
    found = relational_distance_sum(*tensors(student, teacher))
    assert float(found) == pytest.approx(4 * huber.mean(), rel=1e-4)


def test_attention_map_distance_in_numbers() -> None:
    student, _ = pair((2, 5, 3))
    _, teacher = pair((2, 6, 7))
    expected = 0.0
    for row in range(2):
        own, theirs = (student[row, 1:] ** 2).sum(1), (teacher[row, 2:] ** 2).sum(1)
        expected += ((own / np.linalg.norm(own) - theirs / np.linalg.norm(theirs)) ** 2).sum()
    found = attention_map_distance_sum(*tensors(student, teacher), 1, 2)
    assert float(found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_attention_maps_of_other_resolutions(larger: str) -> None:
    """Averaged over squares of the image, not over runs of neighbours in memory."""
    coarse, fine = tensors(pair((2, 5, 3))[0], pair((2, 17, 4))[1])
    squares = fine[:, 1:].square().sum(-1).reshape(2, 4, 4)
    averaged = squares.reshape(2, 2, 2, 2, 2).mean((2, 4)).reshape(2, 4)
    # One channel whose square is the averaged map.
    expected = attention_map_distance_sum(coarse[:, 1:], averaged.sqrt()[..., None])
    first, second = (fine, coarse) if larger == "student" else (coarse, fine)
    torch.testing.assert_close(attention_map_distance_sum(first, second, 1, 1), expected)
    # A side of 4 onto one of 3: windows overlap.
    odd = torch.ones(2, 9, 2)
    assert float(attention_map_distance_sum(torch.ones(2, 16, 3), odd)) == pytest.approx(0, abs=1e-6)


def test_mean_pooled() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [float("nan"), 9.0]], [[5.0, 5.0]] * 3]).half()
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert mean_pooled(hidden, mask).tolist() == [[2.0, 4.0], [0.0, 0.0]]
    long = mean_pooled(torch.full((1, 512, 1), 300.0).half(), torch.ones(1, 512, dtype=torch.bool))
    assert long.item() == 300.0


@pytest.mark.parametrize(
    ("student", "teacher", "wanted", "expected"),
    [
        (384, 384, None, 12),
        (384, 768, None, 12),
        (384, 768, 48, 48),
        (192, 1024, None, 8),
        (320, 768, None, 8),  # ten of twelve heads are left: 64 divides both, and 8 is its largest divisor up to 12
        (24, 32, 4, 4),
        (24, 32, None, 8),
        (7, 768, None, 1),
        (8, 8, 3, 2),
    ],
)
def test_relation_heads(student: int, teacher: int, wanted: int | None, expected: int) -> None:
    assert relation_heads(student, teacher, wanted) == relation_heads(teacher, student, wanted) == expected


def test_layer_map_and_labels() -> None:
    assert [layer_map(3, 6), layer_map(2, 6), layer_map(4, 4), layer_map(1, 12)] == [
        [1, 3, 5],
        [2, 5],
        [0, 1, 2, 3],
        [11],
    ]
    assert match_labels(["a", "b", "c"], ["c", "a", "b"]) == [1, 2, 0]


# ---- bad input ----


@pytest.mark.parametrize("name", ["standardized", "decoupled", "correlation", "cosine", "rows"])
def test_other_shapes_are_refused(name: str) -> None:
    """(items, 1) beside (items, labels) would be broadcast, and learned from, in silence."""
    with pytest.raises(ValueError, match=r"expected student and teacher of one shape, found .*, 1\)"):
        ALL[name](example(name), example(name)[..., :1], mask_of(name))


def test_widths_that_cannot_be_split() -> None:
    states, mask = torch.ones(1, 2, 6), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="multiples of 4 relation heads, found a student 6 wide and a teacher 8 wide"):
        relation_divergence_sum(states, torch.ones(1, 2, 8), mask, 4)
    with pytest.raises(ValueError, match="multiples of 0"):
        relation_divergence_sum(states, states, mask, 0)
    with pytest.raises(ValueError, match="rows and positions"):
        relation_divergence_sum(states, torch.ones(1, 3, 6), mask, 2)
    with pytest.raises(ValueError, match="rows and positions"):
        relation_divergence_sum(states, states, mask[0], 2)
    with pytest.raises(ValueError, match="attention heads left"):
        relation_heads(0, 32)
    with pytest.raises(ValueError, match="0 relation heads"):
        relation_heads(32, 32, 0)


def test_maps_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="found 5 positions in the student and 4"):
        attention_map_distance_sum(torch.ones(1, 5, 2), torch.ones(1, 4, 2))
    with pytest.raises(ValueError, match="same rows"):
        attention_map_distance_sum(torch.ones(2, 4, 2), torch.ones(1, 4, 2))
    with pytest.raises(ValueError, match="besides the special ones"):
        attention_map_distance_sum(torch.ones(1, 1, 2), torch.ones(1, 1, 2), 1, 1)


def test_rows_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="same rows"):
        relational_distance_sum(torch.ones(2, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="pool over positions first"):
        relational_distance_sum(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
