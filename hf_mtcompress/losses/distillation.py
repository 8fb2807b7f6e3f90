"""Criteria of distillation: how far a student is from its teacher. Sums and counts, so that windows can be split."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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


def binary_divergence_sum(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same for independent labels: mean over labels of the Bernoulli divergence, summed over rows."""
    soft = torch.sigmoid(teacher.float() / temperature)
    per_label = nn.functional.binary_cross_entropy_with_logits(student.float() / temperature, soft, reduction="none")
    entropy = nn.functional.binary_cross_entropy_with_logits(teacher.float() / temperature, soft, reduction="none")
    return (per_label - entropy).mean(-1).sum() * temperature**2


def squared_error_sum(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of (rows, 1) outputs, summed over rows: the logits criterion of a regression."""
    return ((student.float() - teacher.float()) ** 2).sum()


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
