"""Trimming: single weights of small magnitude become 0, and the matrices keep their shapes.

What that saves is room on disk (see `hf_mtcompress.model.sparse`). It saves no time: kernels for dense matrices
multiply by 0 like by any number. For speed, cut whole heads, neurons and layers with `prune`.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.adapters import refuse_adapters
from hf_mtcompress.model.matrices import encoder_matrices
from hf_mtcompress.model.modeling import MultiTaskModel

Scope = Literal["global", "layer"]
"""Whether weights are compared over all matrices or within each one."""

_PATTERN = re.compile(r"([0-9]+):([0-9]+)")


@dataclass(kw_only=True)
class TrimReport:
    """What a call of `trim_weights` did; plain data."""

    method: Literal["sparsity", "threshold", "pattern"]
    scope: Scope | None
    """None for a pattern, which holds in every group."""
    pattern: str | None
    threshold: float | None
    """What magnitudes were held against, where it is one number for all matrices: the one that was given, or the
    largest that was trimmed."""
    weights: int
    """Of all matrices that were looked at."""
    zeros_before: int
    zeros_after: int
    sparsity: float
    """zeros_after / weights."""
    matrices: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: `weights`, `zeros`, `sparsity`, and `threshold` likewise, or null for a pattern."""
    seconds: float = 0.0


def trim_weights(
    model: PreTrainedModel,
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    pattern: str | None = None,
    scope: Scope = "global",
    embeddings: bool = False,
) -> TrimReport:
    """Set the weights of smallest magnitude to 0, in place; exactly one of the three ways is given.

    Weights are those of the linear layers in the encoder's stack; heads, poolers, biases and norms stay. Weights that
    are 0 already count, so trimming again to the same sparsity changes nothing. Of equal magnitudes the first ones go.

    Args:
        model: a `MultiTaskModel` or a stock model, with float weights.
        sparsity: fraction of the weights that are 0 afterwards, at least 0 and below 1; met to one weight, over all
            matrices or in each of them as `scope` says.
        threshold: weights of smaller magnitude are trimmed; with scope `layer`, it is multiplied by the standard
            deviation of each matrix.
        pattern: N:M such as `2:4`: of every M weights next to each other in a row (along the input dimension) the N
            largest stay.
        scope: `global`: one ranking, or one threshold, for all matrices; `layer`: each matrix by itself.
        embeddings: trim the word embedding too.

    Returns:
        Zeros of each matrix and of all, and the thresholds.

    Raises:
        ValueError: none or several of the three ways, one out of its range, or a scope with a pattern.
        UnsupportedEncoderError: the encoder is built in another way, is quantized, has adapters, or rows that groups
            of the pattern do not fill.

    References:
        Han et al.: Learning both Weights and Connections for Efficient Neural Networks. NeurIPS 2015 (a threshold of
            some standard deviations for each layer: `threshold` with scope `layer`).
        Mishra et al.: Accelerating Sparse Deep Neural Networks. 2021 (2:4 by magnitude).
    """
    method = check_trimming(sparsity=sparsity, threshold=threshold, pattern=pattern, scope=scope)
    if isinstance(model, MultiTaskModel):
        refuse_adapters(model, "trimming weights")
    start = time.monotonic()
    matrices = encoder_matrices(model, embeddings=embeddings)
    if not matrices:
        raise UnsupportedEncoderError(
            f"{type(model).__name__}: expected linear layers in the encoder, found none; there is nothing to trim"
        )
    before = {name: zeros_of(matrix) for name, matrix in matrices.items()}
    thresholds: dict[str, float | None] = dict.fromkeys(matrices)
    overall: float | None = None
    with torch.no_grad():
        if sparsity is not None:
            overall = _trim_to(matrices, sparsity, scope, thresholds)
        elif threshold is not None:
            overall = threshold if scope == "global" else None
            for name, matrix in matrices.items():
                limit = thresholds[name] = threshold * (1.0 if scope == "global" else float(matrix.float().std()))
                matrix.masked_fill_(matrix.abs() < limit, 0.0)
        elif pattern is not None:
            _trim_groups(matrices, *parse_pattern(pattern))
    after = {name: zeros_of(matrix) for name, matrix in matrices.items()}
    weights = sum(matrix.numel() for matrix in matrices.values())
    return TrimReport(
        method=method,
        scope=None if pattern is not None else scope,
        pattern=pattern,
        threshold=overall,
        weights=weights,
        zeros_before=sum(before.values()),
        zeros_after=sum(after.values()),
        sparsity=sum(after.values()) / weights,
        matrices={
            name: {
                "weights": matrix.numel(),
                "zeros": after[name],
                "sparsity": after[name] / matrix.numel(),
                "threshold": thresholds[name],
            }
            for name, matrix in matrices.items()
        },
        seconds=time.monotonic() - start,
    )


def check_trimming(
    *, sparsity: float | None, threshold: float | None, pattern: str | None, scope: str
) -> Literal["sparsity", "threshold", "pattern"]:
    """Which of the three ways is meant.

    Raises:
        ValueError: none or several, one out of its range, or a scope that is unknown or makes no sense.
    """
    given = {"sparsity": sparsity, "threshold": threshold, "pattern": pattern}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            f"expected one of sparsity, threshold and pattern, found {' and '.join(named) or 'none of them'}; keep one"
        )
    if sparsity is not None and not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity: expected a fraction of at least 0 and below 1, found {sparsity}")
    if threshold is not None and not 0.0 <= threshold < float("inf"):
        raise ValueError(f"threshold: expected a finite magnitude of at least 0, found {threshold}")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope: expected 'global' or 'layer', found {scope!r}")
    if pattern is not None:
        parse_pattern(pattern)
        if scope != "global":
            raise ValueError("scope: a pattern holds in every group of every row; leave the scope out")
        return "pattern"
    return "sparsity" if sparsity is not None else "threshold"


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Kept weights and size of a group.

    Raises:
        ValueError: it is not N:M with N from 1 to M - 1.
    """
    found = _PATTERN.fullmatch(pattern)
    kept, group = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= kept < group:
        raise ValueError(
            f"pattern: expected N:M, of every M weights the N largest stay and N is from 1 to M - 1, such as 2:4, "
            f"found '{pattern}'"
        )
    return kept, group


def zeros_of(matrix: Tensor) -> int:
    """How many entries are 0."""
    return int(matrix.numel() - matrix.count_nonzero())


def _trim_to(
    matrices: Mapping[str, nn.Parameter], sparsity: float, scope: Scope, thresholds: dict[str, float | None]
) -> float | None:
    """Trim until a fraction is 0; notes the largest trimmed magnitude of each matrix and returns that of all."""
    magnitudes = {name: matrix.abs().flatten().float() for name, matrix in matrices.items()}
    if scope == "layer":
        chosen = {name: _smallest(values, round(sparsity * len(values))) for name, values in magnitudes.items()}
    else:
        devices = {values.device for values in magnitudes.values()}
        # A model may be spread over several processors; the ranking is one.
        together = torch.cat([values.cpu() if len(devices) > 1 else values for values in magnitudes.values()])
        whole = _smallest(together, round(sparsity * len(together)))
        sizes = [len(values) for values in magnitudes.values()]
        chosen = dict(zip(magnitudes, whole.split(sizes), strict=True))
    for name, matrix in matrices.items():
        mask = chosen[name].to(matrix.device)
        thresholds[name] = float(magnitudes[name][mask].max()) if bool(mask.any()) else 0.0
        # Not a product with the mask: that would leave zeros with a sign.
        matrix.masked_fill_(mask.view_as(matrix), 0.0)
    return (
        max((value for value in thresholds.values() if value is not None), default=0.0) if scope == "global" else None
    )


def _smallest(values: Tensor, count: int) -> Tensor:
    """A mask of the `count` smallest values, of equal ones the first."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    limit = values.kthvalue(count).values
    mask = values < limit
    ties = (values == limit).nonzero()[: count - int(mask.sum())]
    mask[ties] = True
    return mask


def _trim_groups(matrices: Mapping[str, nn.Parameter], kept: int, group: int) -> None:
    uneven = {name: matrix.shape[1] for name, matrix in matrices.items() if matrix.shape[1] % group}
    if uneven:
        name, width = next(iter(uneven.items()))
        raise UnsupportedEncoderError(
            f"pattern {kept}:{group}: expected rows of a multiple of {group} weights, found {width} in '{name}'"
            + (f" and others in {len(uneven) - 1} more matrices" if len(uneven) > 1 else "")
            + f"; prune to widths that are multiples of {group} (multiple_of), or trim by sparsity"
        )
    for matrix in matrices.values():
        groups = matrix.abs().reshape(-1, group)
        order = groups.argsort(dim=1, stable=True)
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, : group - kept], True)
        matrix.masked_fill_(mask.view_as(matrix), 0.0)
