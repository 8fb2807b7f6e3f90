"""What the gradients of several tasks say of each other, and how they are combined when they disagree.

Everything stands on the Gramian of the tasks' gradients: a K x K matrix, however many parameters there are. Gramians of
blocks of parameters (or of pieces of an accumulation window) add up to that of the whole. Tasks without labels in a
step are simply not in it.

This is the one file that knows torchjd (Quinton and Rey 2024, "Jacobian Descent for Multi-Objective Optimization"),
which implements the methods. Its Gramian interface is used and not its autojac engine, which goes round the hooks of
DistributedDataParallel. Norms and cosines need no extra.
"""

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue] - made in C

from hf_mtcompress.environment import require_extra
from hf_mtcompress.errors import MissingExtraError

CombinationName = Literal["mean", "pcgrad", "mgda", "cagrad", "upgrad", "aligned_mtl", "imtl_g", "nash_mtl"]
COMBINATIONS: tuple[str, ...] = get_args(CombinationName)
"""Names of the combinations, as `combination` takes them."""

CAGRAD_RADIUS = 0.5
"""c of CAGrad, from 0 (the mean) up to 1: how far the result may go from the mean, relative to its length."""
NEGLIGIBLE = 1e-6
"""A gradient shorter than this, relative to the largest, is rounding and not a direction."""


def gramian(gradients: Mapping[str, Tensor]) -> Tensor:
    """Inner products of the tasks' gradients.

    Args:
        gradients: by task (at least one), tensors of any equal shape and dtype; only the tasks that are present.

    Returns:
        (K, K) float32, symmetric, on the gradients' device; rows in the order of `gradients`, squared norms on the
        diagonal.

    Raises:
        ValueError: no gradient, or gradients of different shapes.
    """
    shapes = {name: tuple(gradient.shape) for name, gradient in gradients.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(
            f"expected gradients of one shape for at least one task, found {shapes}; take them with respect to the "
            "same shared tensor"
        )
    # One inner product at a time: no stacked copy of all gradients, and no TF32, which rounds matrix products.
    rows = [gradient.detach().reshape(-1).float() for gradient in gradients.values()]
    matrix = rows[0].new_zeros(len(rows), len(rows))
    for i, row in enumerate(rows):
        for j in range(i + 1):
            matrix[i, j] = matrix[j, i] = torch.dot(row, rows[j])
    return matrix


def norms(gramian: Tensor) -> Tensor:
    """Euclidean lengths of the gradients, (K,), at least 0."""
    return _square(gramian).diagonal().clamp(min=0).sqrt()


def cosine_matrix(gramian: Tensor) -> Tensor:
    """Cosines between the gradients: below 0 where a step for one task undoes the other (Yu et al. 2020).

    Returns:
        (K, K) in -1 to 1; 0 in the row and column of a gradient that is zero, as it points nowhere.
    """
    length = norms(gramian)
    # Divided one after the other: the product of two small lengths may be too small for float32.
    cosines = gramian / length.clamp(min=torch.finfo(gramian.dtype).tiny)[:, None]
    cosines = cosines / length.clamp(min=torch.finfo(gramian.dtype).tiny)
    return cosines.clamp(-1, 1) * ((length > 0)[:, None] & (length > 0))


def combination(name: str) -> Callable[[Tensor], Tensor]:
    """A published way of combining gradients that may disagree, as a function from Gramian to weights.

    The combined gradient is the sum of weight * gradient over the tasks of the Gramian.

    | name | paper | weights |
    | --- | --- | --- |
    | `mean` | | 1 / K each |
    | `pcgrad` | Yu et al. 2020, "Gradient Surgery for Multi-Task Learning" | at least 1; draws from torch's generator |
    | `mgda` | Désidéri 2012; solver of Sener and Koltun 2018 | sum to 1: the shortest convex combination |
    | `cagrad` | Liu et al. 2021, "Conflict-Averse Gradient Descent"; c = `CAGRAD_RADIUS` | 1 / K and more |
    | `upgrad` | Quinton and Rey 2024 | at least 1 / K; to first order no loss rises |
    | `aligned_mtl` | Senushkin et al. 2023, "Independent Component Alignment" | shrink with the smallest eigenvalue |
    | `imtl_g` | Liu et al. 2021, "Towards Impartial Multi-task Learning" | sum to 1, some may be negative |
    | `nash_mtl` | Navon et al. 2022, "Multi-Task Learning as a Bargaining Game" | weight * gain is the same for all |

    Deviations from torchjd, all without effect on ordinary Gramians:

    - The Gramian is first scaled to a trace of 1, since torchjd takes small gradients for zero. For `nash_mtl`, whose
      weights depend on the scale, the combined gradient then has the length of all gradients taken together instead of
      at most 1; and nothing is carried from one call to the next, so that a resumed run sees the same weights.
    - `upgrad` is solved for gradients of length 1, the same problem, and with less regularisation: torchjd adds
      1e-4 of all squared lengths to each, and a gradient a hundredth as long as another would lose its protection.
    - A task whose gradient is zero, or `NEGLIGIBLE` beside the largest, takes no part and weighs 1 / K: its head can
      still learn. `mgda` would give it all the weight and stop the others, `pcgrad` a weight without bounds.
    - One task alone weighs 1. Where a method finds nothing (all weights 0, as where gradients are opposite) or its
      solver fails, the weights are those of `mean`. So they are where a Gramian is not finite, so that the gradients
      that are not finite reach the checks that look for them.

    Args:
        name: one of `COMBINATIONS`.

    Returns:
        A function from a (K, K) Gramian to (K,) finite weights of its dtype, on its device.

    Raises:
        ValueError: an unknown name.
        MissingExtraError: the extra `surgery` is not installed; `mean` needs none.
    """
    if name not in COMBINATIONS:
        raise ValueError(f"expected a combination of gradients among {', '.join(COMBINATIONS)}, found '{name}'")
    if name == "mean":
        return _mean
    require_extra("surgery")
    if name == "nash_mtl" and importlib.util.find_spec("ecos") is None:
        raise MissingExtraError(
            "expected ecos for nash_mtl, but it cannot be imported; install it with: pip install ecos (the extra "
            "'surgery' leaves it out where it has no wheel), or take another combination such as upgrad"
        )
    solve = _solver(name)

    def weights(gramian: Tensor) -> Tensor:
        result = _mean(gramian)
        moving = gramian.diagonal() > gramian.diagonal().max() * NEGLIGIBLE**2
        inner = gramian.detach()[moving][:, moving].float().cpu()
        if len(inner) == 0 or not torch.isfinite(gramian).all():
            return result
        found = solve(inner / inner.trace()) if len(inner) > 1 else torch.ones(1)
        if found is not None and torch.isfinite(found).all() and found.abs().max() > 1e-6:
            result[moving] = found.to(result)
        return result

    return weights


def _mean(gramian: Tensor) -> Tensor:
    tasks = len(_square(gramian))
    return gramian.new_full((tasks,), 1 / tasks)


def _solver(name: str) -> Callable[[Tensor], Tensor | None]:
    """The method on a Gramian of at least two gradients other than zero, with a trace of 1; None where it fails."""
    from cvxpy.error import SolverError  # optional: the extra `surgery`
    from torchjd import aggregation
    from torchjd.linalg import QuadprogProjector

    def bargain(gramian: Tensor) -> Tensor:
        # It wants gradients and not their Gramian: any with the same inner products do.
        eigenvalues, eigenvectors = torch.linalg.eigh(gramian.double())
        gradients = eigenvectors * eigenvalues.clamp(min=0).sqrt()
        return aggregation.NashMTL(n_tasks=len(gramian)).weighting(gradients)

    def impartial(gramian: Tensor) -> Tensor:
        # Opposite or equal gradients leave it 0 / 0, which rounding would decide; a little on the diagonal does.
        return aggregation.IMTLGWeighting()(gramian + 1e-6 * torch.eye(len(gramian)))

    def unconflicting(gramian: Tensor) -> Tensor:
        length = norms(gramian)
        method = aggregation.UPGradWeighting(length / len(length), projector=QuadprogProjector(reg_eps=1e-5))
        return method(cosine_matrix(gramian)) / length

    methods: dict[str, Callable[[Tensor], Tensor]] = {
        "pcgrad": aggregation.PCGradWeighting(),
        "mgda": aggregation.MGDAWeighting(),
        "cagrad": aggregation.CAGradWeighting(c=CAGRAD_RADIUS),
        "upgrad": unconflicting,
        "aligned_mtl": aggregation.AlignedMTLWeighting(),
        "imtl_g": impartial,
        "nash_mtl": bargain,
    }

    def solve(gramian: Tensor) -> Tensor | None:
        with warnings.catch_warnings():
            # The solvers remark on every hard Gramian, and on every call of `nash_mtl`; what they find is checked.
            warnings.simplefilter("ignore")
            try:
                return methods[name](gramian)
            except (ValueError, ArithmeticError, LinAlgError, SolverError):
                return None

    return solve


def _square(gramian: Tensor) -> Tensor:
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not len(gramian):
        raise ValueError(
            f"expected a square Gramian of at least one task, found shape {tuple(gramian.shape)}; pass what "
            "`gramian` returns"
        )
    return gramian
