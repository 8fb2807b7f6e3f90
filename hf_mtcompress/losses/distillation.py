"""Criteria of distillation: how far a student is from its teacher.

Every criterion is a sum over items (tokens, rows), a float32 scalar that is 0 where the student equals the teacher. The
caller divides by counts, so that a window of batches can be split; where a criterion compares the items of a batch with
each other, its docstring says that it cannot be. Inputs may be in half precision: everything is computed in float32.

Arguments of criteria on logits are (items, labels), both in one label order, with a mask (items,) of items that count.
Those of criteria on hidden states are (batch, tokens, width), with a mask (batch, tokens) of positions that count.
Masks are bool.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SCORES_AT_ONCE = 2**24
"""Relations between positions computed together: 64 MiB in float32."""

DEFAULT_RELATION_HEADS = 12
"""Heads of the base-sized encoders that MiniLMv2 starts from."""

# ---- logits ----


def soft_cross_entropy_sum(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened distributions, summed over items (Hinton et al. 2015).

    Scaled by the squared temperature, so that its gradients keep their size when the temperature changes.

    Args:
        student: (items, labels) logits.
        teacher: (items, labels) logits, labels in the student's order.
        mask: (items,) bool, items that count.
        temperature: above 0.

    Returns:
        A scalar; 0 where student and teacher agree.
    """
    log_student = nn.functional.log_softmax(student.float()[mask] / temperature, dim=-1)
    log_teacher = nn.functional.log_softmax(teacher.float()[mask] / temperature, dim=-1)
    divergence = nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return divergence * temperature**2


def standardized_divergence_sum(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Divergence of softened distributions after standardizing each item's logits, summed over items.

    The student must find the teacher's order and spacing of the labels, and is free in mean and spread of its logits:
    T^2 KL(softmax(z(teacher) / T) || softmax(z(student) / T)), with z(x) = (x - mean(x)) / std(x) over labels.

    Args:
        student: (items, labels) logits.
        teacher: (items, labels) logits, labels in the student's order.
        mask: (items,) bool, items that count.
        temperature: above 0.

    Returns:
        A scalar; 0 where student and teacher agree up to offset and scale.

    References:
        Sun et al. 2024, "Logit Standardization in Knowledge Distillation", CVPR. The standard deviation is that of the
        population.

    Deviation: an item whose logits are all equal is standardized to zeros and gives the student no gradient.
    """
    _expect_same_shape(student, teacher)
    scale = math.sqrt(student.shape[-1])
    # A standardized vector has length sqrt(labels).
    own, wanted = (_centred_direction(logits.float()[mask], -1) * scale for logits in (student, teacher))
    return soft_cross_entropy_sum(own, wanted, torch.ones_like(own[:, 0], dtype=torch.bool), temperature)


def decoupled_divergence_sum(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    targets: Tensor,
    temperature: float,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Divergence in two parts with weights of their own, summed over items.

    T^2 (alpha KL(b_teacher || b_student) + beta KL(q_teacher || q_student)), where b is the probability of the target
    against that of all other labels, and q the distribution among the other labels. Plain divergence has as beta
    the teacher's doubt, 1 - p(target), which fades where the teacher is sure. With two labels the second part is 0.

    Args:
        student: (items, labels) logits.
        teacher: (items, labels) logits, labels in the student's order.
        mask: (items,) bool, items that count.
        targets: (items,) label indices; negative where unlabelled.
        temperature: above 0.
        alpha: weight of the target part, at least 0.
        beta: weight of the part of the other labels, at least 0. The paper's best values reach from 0.5 (ImageNet) to
            8 (CIFAR-100), and grow with the teacher's certainty.

    References:
        Zhao et al. 2022, "Decoupled Knowledge Distillation", CVPR, eq. 7, with the squared temperature of plain
        distillation.

    Deviation: where the target is unlabelled the teacher's own answer stands in for it.
    """
    _expect_same_shape(student, teacher)
    student, teacher, targets = student.float()[mask], teacher.float()[mask], targets[mask]
    targets = torch.where(targets < 0, teacher.argmax(-1), targets)
    is_target = nn.functional.one_hot(targets, student.shape[-1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_all = nn.functional.log_softmax(logits / temperature, dim=-1)
        # Not minus infinity: 0 * infinity is not a number, in the divergence and in its gradient.
        others = log_all.masked_fill(is_target, torch.finfo(log_all.dtype).min)
        binary = torch.stack([log_all[is_target], others.logsumexp(-1)], dim=-1)
        return binary, nn.functional.log_softmax(others, dim=-1)

    own, wanted = parts(student), parts(teacher)
    target_part, other_part = (
        nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        for log_student, log_teacher in zip(own, wanted, strict=True)
    )
    return (alpha * target_part + beta * other_part) * temperature**2


def correlation_distance_sum(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """Pearson distance of probabilities, between labels and between items, summed over items (DIST).

    beta sum_i d(p_student[i, :], p_teacher[i, :]) + gamma items mean_j d(p_student[:, j], p_teacher[:, j]), with
    d = 1 - Pearson's correlation. The second part compares the items of the batch with each other: it depends on the
    batch, and a window cannot be split unless gamma is 0; with one item it is 0. With two labels the first part knows
    only which is larger, and has no gradient.

    Args:
        student: (items, labels) logits.
        teacher: (items, labels) logits, labels in the student's order.
        mask: (items,) bool, items that count.
        temperature: above 0; the paper's is 1 for ImageNet and 4 for CIFAR-100.
        beta: weight of the part between labels, at least 0.
        gamma: weight of the part between items, at least 0.

    References:
        Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", NeurIPS (DIST).

    Deviations: a sum over items in place of a mean, in both parts. Not multiplied by the squared temperature: unlike a
    divergence, a correlation does not fade when its distributions soften. Where one side does not vary the distance is
    1/2, where neither does it is 0; both without gradient by the side that does not vary.
    """
    _expect_same_shape(student, teacher)
    own, wanted = (torch.softmax(logits.float()[mask] / temperature, dim=-1) for logits in (student, teacher))
    total = own.new_zeros(())
    if beta:
        total = total + beta * _pearson_distance(own, wanted, -1).sum()
    if gamma:
        total = total + gamma * len(own) * _pearson_distance(own, wanted, 0).mean()
    return total


def binary_divergence_sum(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same for independent labels: mean over labels of the Bernoulli divergence, summed over rows."""
    soft = torch.sigmoid(teacher.float() / temperature)
    per_label = nn.functional.binary_cross_entropy_with_logits(student.float() / temperature, soft, reduction="none")
    entropy = nn.functional.binary_cross_entropy_with_logits(teacher.float() / temperature, soft, reduction="none")
    return (per_label - entropy).mean(-1).sum() * temperature**2


def squared_error_sum(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of (rows, 1) outputs, summed over rows: the logits criterion of a regression."""
    return ((student.float() - teacher.float()) ** 2).sum()


# ---- hidden states and embeddings ----


def hidden_error_sum(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared error between hidden states, relative to the teacher's squared length, summed over positions.

    Mean squared error as in TinyBERT (Jiao et al. 2020, eq. 8). Deviation: each position is divided by the teacher's
    own squared length, so that one weight suits every encoder and layer and batches can be split freely.

    Args:
        student: (batch, tokens, hidden), projected to the teacher's width.
        teacher: (batch, tokens, hidden).
        mask: (batch, tokens) bool, positions that count.
    """
    student, teacher = student.float()[mask], teacher.float()[mask]
    length = teacher.pow(2).sum(-1).clamp(min=1e-6)
    return ((student - teacher).pow(2).sum(-1) / length).sum()


def cosine_distance_sum(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """One minus the cosine between the vectors of student and teacher, summed over positions or rows.

    Args:
        student: (..., width), hidden states or embeddings, projected to the teacher's width.
        teacher: (..., width).
        mask: (...) bool, vectors that count; default: all.

    Returns:
        A scalar; each vector adds 0 (same direction) to 2 (opposite).

    References:
        Sanh et al. 2019, "DistilBERT", section 2, on the last hidden state.

    Deviation: a vector shorter than 1e-4 has no direction and no gradient; its distance is 1/2, or 0 where the
    teacher's has none either.
    """
    _expect_same_shape(student, teacher)
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    own, wanted = (_direction(vectors.float(), -1, 1e-4) for vectors in (student, teacher))
    return _half_square(own, wanted, -1).sum()


def relation_heads(student_width: int, teacher_width: int, wanted: int | None = None) -> int:
    """Into how many relation heads the projections of student and teacher can both be split.

    Relation heads need not be the attention's own: more of them, each narrower, transfer more detail.

    Args:
        student_width: of query, key or value: heads times head size; at least 1.
        teacher_width: the same of the teacher.
        wanted: at least 1; default: 12.

    Returns:
        `wanted` where it divides both widths, else the largest number below it that does. Never less than 1.

    Raises:
        ValueError: a number below 1.
    """
    limit = DEFAULT_RELATION_HEADS if wanted is None else wanted
    if min(student_width, teacher_width, limit) < 1:
        raise ValueError(
            f"expected widths and a number of relation heads from 1, found a student {student_width} wide, a teacher "
            f"{teacher_width} wide and {limit} relation heads; choose a layer that has attention heads left"
        )
    common = math.gcd(student_width, teacher_width)
    return next(heads for heads in range(min(limit, common), 0, -1) if common % heads == 0)


def relation_divergence_sum(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Divergence of the relations between the positions of a row, for one of query, key and value.

    With A split into relation heads A_1 ... A_heads of width d: R_a = softmax(A_a A_a^T / sqrt(d)) over the row's
    positions, and 1/heads sum_a sum_positions KL(R_a of the teacher || R_a of the student). The relations are square
    in positions whatever the widths, so the student may be narrower and may have lost heads.

    Scores are never kept for the backward pass: the gradient is computed beside the loss, some heads at a time, and
    memory grows with (batch, tokens, width) as that of the states themselves. There is no second derivative.

    Args:
        student: (batch, tokens, width), the outputs of one projection of one layer.
        teacher: (batch, tokens, other width), of the same projection.
        mask: (batch, tokens) bool, positions that count, as queries and as keys.
        heads: relation heads; divides both widths (see `relation_heads`).

    Raises:
        ValueError: rows or positions differ, or a width cannot be split.

    References:
        Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
        Transformers", Findings of ACL, eq. 3 to 5.

    Deviations: a sum over positions in place of a mean over all, so that windows can be split. The three relations are
    weighted by the caller.
    """
    if student.shape[:-1] != teacher.shape[:-1] or mask.shape != student.shape[:-1]:
        raise ValueError(
            f"expected rows and positions of student, teacher and mask to be the same, found shapes "
            f"{tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(mask.shape)}; give both the same inputs"
        )
    if heads < 1 or student.shape[-1] % heads or teacher.shape[-1] % heads:
        raise ValueError(
            f"expected widths that are multiples of {heads} relation heads, found a student {student.shape[-1]} wide "
            f"and a teacher {teacher.shape[-1]} wide; take the number that `relation_heads` gives"
        )
    own, wanted = (_split_heads(states, mask, heads) for states in (student, teacher.detach()))
    total: Any = _RelationDivergence.apply(own, wanted, mask)
    return total / heads


def relational_distance_sum(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far the distances between the rows of a batch are from those of the teacher, summed over rows.

    sum_i mean_{j != i} huber(|s_i - s_j| / m_s - |t_i - t_j| / m_t), where m is the mean distance between two rows of
    that side, and huber turns linear at 1. Only distances are compared, so widths may differ. The sum depends on the
    batch: a window cannot be split, and a batch of one row adds 0.

    Args:
        student: (rows, width) embeddings.
        teacher: (rows, other width) embeddings.
        mask: (rows,) bool, rows that count; default: all.

    Raises:
        ValueError: the numbers of rows differ.

    References:
        Park et al. 2019, "Relational Knowledge Distillation", CVPR, the distance-wise loss.

    Deviations: scaled to a sum over rows, in place of a sum over pairs. A side whose rows are all the same has
    distances of 0 and no gradient.
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        raise ValueError(
            f"expected (rows, width) of student and teacher with the same rows, found shapes {tuple(student.shape)} "
            f"and {tuple(teacher.shape)}; pool over positions first, and give both the same inputs"
        )
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    rows = len(student)
    if rows < 2:
        # Zero, but part of the graph: every rank takes part in the backward pass.
        return student.float().sum() * 0.0
    own, wanted = (_relative_distances(vectors.float()) for vectors in (student, teacher))
    return rows * nn.functional.huber_loss(own, wanted, reduction="mean")


def attention_map_distance_sum(
    student: Tensor, teacher: Tensor, student_special: int = 0, teacher_special: int = 0
) -> Tensor:
    """Squared distance of spatial attention maps, summed over rows: where activations are strong in an image.

    A map is F = sum over channels of squared activations, by position; the distance is |F_s / |F_s| - F_t / |F_t||^2.
    Widths may differ. Where the numbers of positions differ both must be square grids; the finer map is averaged down
    to the coarser grid.

    Args:
        student: (batch, positions, width).
        teacher: (batch, other positions, other width).
        student_special: leading positions that are no part of the image (class token, registers), left out.
        teacher_special: the same of the teacher.

    Returns:
        A scalar; each row adds 0 to 2.

    Raises:
        ValueError: rows differ, or positions differ and are no square grids.

    References:
        Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", ICLR, activation-based, with p = 2.

    Deviations: the distance is squared, as in the authors' code, and the factor of a half is left to the caller's
    weight. The paper's students have the teacher's resolution.
    """
    if student.dim() != 3 or teacher.dim() != 3 or len(student) != len(teacher):
        raise ValueError(
            f"expected (batch, positions, width) of student and teacher with the same rows, found shapes "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; give both the same images"
        )
    own = student[:, student_special:].float().square().sum(-1)
    wanted = teacher[:, teacher_special:].float().square().sum(-1)
    if not own.shape[1] or not wanted.shape[1]:
        raise ValueError(
            f"expected positions besides the special ones, found {student.shape[1]} with {student_special} special in "
            f"the student and {teacher.shape[1]} with {teacher_special} special in the teacher; give fewer special ones"
        )
    if own.shape != wanted.shape:
        own, wanted = _to_one_grid(own, wanted)
    # Squares of activations: far smaller numbers than activations are still a map.
    return 2 * _half_square(_direction(own, -1, 1e-8), _direction(wanted, -1, 1e-8), -1).sum()


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions that count; zeros for a row without any.

    Args:
        hidden: (batch, tokens, width).
        mask: (batch, tokens) bool.

    Returns:
        (batch, width) in float32.
    """
    kept = hidden.float().masked_fill(~mask[..., None], 0.0)
    return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


# ---- what belongs to whom ----


def layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """Which teacher layer each student layer follows: evenly spaced, the last one for the last (counted from 0).

    Raises:
        ValueError: the student has more layers than the teacher.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(f"expected 1 to {teacher_layers} student layers, found {student_layers}")
    return [(index + 1) * teacher_layers // student_layers - 1 for index in range(student_layers)]


def match_labels(student: Sequence[str], teacher: Sequence[str]) -> list[int]:
    """Columns of the teacher's logits in the order of the student's labels, matched by name.

    Raises:
        ValueError: the names differ; the message lists them.
    """
    missing = [label for label in student if label not in teacher]
    surplus = [label for label in teacher if label not in student]
    if missing or surplus:
        raise ValueError(
            f"expected the teacher's labels to be the student's by name; only the student has {missing[:8]}, "
            f"only the teacher has {surplus[:8]}; rename the teacher's id2label or the task's labels"
        )
    return [list(teacher).index(label) for label in student]


# ---- parts of the formulas ----


def _expect_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Tensors of other shapes would be broadcast in silence."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"expected student and teacher of one shape, found {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "bring labels into one order, or project the student to the teacher's width"
        )


def _direction(vectors: Tensor, dim: int, smallest: Tensor | float) -> Tensor:
    """Vectors scaled to length 1; zeros without gradient where the length is at most `smallest`."""
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    usable = length > smallest
    return torch.where(usable, vectors, 0.0) / torch.where(usable, length, 1.0)


def _centred_direction(values: Tensor, dim: int) -> Tensor:
    """Values less their mean, scaled to length 1; zeros where they do not vary by more than rounding."""
    rounding = 1e-6 * torch.linalg.vector_norm(values.detach(), dim=dim, keepdim=True)
    return _direction(values - values.mean(dim, keepdim=True), dim, rounding)


def _half_square(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """One minus the cosine of unit vectors, exact where they are equal, as 1 - cos is not in floating point."""
    return (first - second).square().sum(dim) / 2


def _pearson_distance(first: Tensor, second: Tensor, dim: int) -> Tensor:
    if not first.numel():
        return first.sum(dim)
    return _half_square(_centred_direction(first, dim), _centred_direction(second, dim), dim)


def _split_heads(states: Tensor, mask: Tensor, heads: int) -> Tensor:
    """(batch, tokens, width) to (batch, heads, tokens, size); zeros at masked positions, whatever stands there."""
    return states.float().masked_fill(~mask[..., None], 0.0).unflatten(-1, (heads, -1)).transpose(1, 2)


class _RelationDivergence(torch.autograd.Function):
    """Sum over heads and positions that count; states are (batch, heads, tokens, size)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        batch, tokens = mask.shape
        at_once = max(1, _SCORES_AT_ONCE // max(1, batch * tokens**2))
        total, gradients = student.new_zeros(()), []
        # Mixed precision would turn the products into half precision again.
        with torch.autocast(student.device.type, enabled=False):
            for some, other in zip(student.split(at_once, 1), teacher.split(at_once, 1), strict=True):
                own, wanted = _log_relations(some, mask), _log_relations(other, mask)
                weights = wanted.exp()
                # Masked positions are zeros on both sides: as queries their relations are equal, and count nothing.
                total += wanted.sub_(own).mul_(weights).sum()
                if ctx.needs_input_grad[0]:
                    # Of scores that are symmetric: each state counts once as a query and once as a key.
                    change = own.exp_().sub_(weights)
                    gradients.append((change + change.mT) @ (some / math.sqrt(some.shape[-1])))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients, 1))
        return total

    @staticmethod
    @once_differentiable  # whose type has no names of arguments, which the base class has
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0], None, None


def _log_relations(states: Tensor, mask: Tensor) -> Tensor:
    scores = (states / math.sqrt(states.shape[-1])) @ states.mT
    # Not minus infinity: a row of padding alone, and 0 * infinity in the divergence, would not be numbers.
    scores.masked_fill_(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    return nn.functional.log_softmax(scores, dim=-1)


def _relative_distances(vectors: Tensor) -> Tensor:
    """Distances of all pairs of rows divided by their mean."""
    distances = nn.functional.pdist(vectors)
    mean = distances.mean()
    return distances / torch.where(mean > 1e-6, mean, 1.0)


def _to_one_grid(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, positions) maps, the finer one averaged down to the grid of the coarser."""
    sides = [math.isqrt(grid.shape[1]) for grid in (first, second)]
    if any(side**2 != grid.shape[1] for side, grid in zip(sides, (first, second), strict=True)):
        raise ValueError(
            f"expected maps of one size, or square ones, found {first.shape[1]} positions in the student and "
            f"{second.shape[1]} in the teacher; say how many leading positions are special, or use square images"
        )
    side = min(sides)
    smaller = (
        nn.functional.adaptive_avg_pool2d(grid.unflatten(1, (own, own)), side).flatten(1)
        for grid, own in zip((first, second), sides, strict=True)
    )
    return next(smaller), next(smaller)
