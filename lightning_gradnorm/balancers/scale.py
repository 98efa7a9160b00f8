"""The scale rules: which multiple of the balanced ratios is applied.

GradNorm fixes the *ratios* of the weights; their common factor is a choice of its own, and under an adaptive optimiser of
the network it matters: where one gradient is huge, Σ w = T makes its weight tiny, and the whole gradient shrinks while
Adam's second moment still remembers the large one.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_gradnorm.balancers.arrays import Vector, as_tensor, on_host, surely_all

ScaleRule = Literal["sum", "reference", "gradient"]


Bound: TypeAlias = Vector | float  # shape ``[T]``, or one for all; of the lower and the upper, both alike


def scale_to_sum(weights: Vector, total: Vector | float, lower: Bound = 0.0, upper: Bound = float("inf")) -> Vector:
    """The multiple of ``weights``, cut off at the bounds, for which Σ w_i = ``total``: clamp(c·w, lower, upper).

    It is the projection in the Kullback-Leibler sense onto the sum and the bounds at once; where no bound binds, it is
    the paper's renormalisation w · T / Σ w.

    Args:
        weights: positive, shape ``[T]``.
        total: what they come to, a number or shape ``[]``; attainable within the bounds.
        lower: least weight.
        upper: greatest weight; where it is the least, the weight is given, and the others share what it leaves.
    """
    scaled = weights * (total / weights.sum())
    if surely_all((lower <= scaled) & (scaled <= upper)):
        return scaled  # the usual case
    if not isinstance(weights, Tensor):
        bounds = (as_tensor(bound) if getattr(bound, "shape", ()) else bound for bound in (lower, upper))
        return on_host(scale_to_sum(as_tensor(weights), float(total), *bounds))
    # Σ clamp(c·w) grows with c, linearly between the values of c at which a weight leaves or meets a bound.
    leaves, meets = lower / weights, upper / weights
    knots = torch.cat([leaves, meets]).sort().values
    at_knots = (knots.unsqueeze(1) * weights).clip(lower, upper).nan_to_num(posinf=torch.finfo(weights.dtype).max).sum(1)
    index = (at_knots < total).sum().clamp(1, len(knots) - 1)
    left, right = knots.gather(0, index - 1), knots.gather(0, index)
    at_upper, at_lower = meets <= left, leaves >= right
    free = ~(at_upper | at_lower)
    at_bounds = torch.where(at_lower, torch.zeros_like(weights) + lower, torch.zeros_like(weights) + upper)
    fixed = torch.where(free, 0.0, at_bounds).sum()
    c = (total - fixed) / torch.where(free, weights, 0.0).sum()
    return (torch.where(free.any(), c, left) * weights).clip(lower, upper)


def scale_to_reference(weights: Vector, reference: int, lower: Bound = 0.0, upper: Bound = float("inf")) -> Vector:
    """The multiple of ``weights``, shape ``[T]``, for which the reference task's weight is 1, cut off at the bounds."""
    return (weights / weights[reference]).clip(lower, upper)


def scale_towards_gradient(
    weights: Vector, norms: Vector, rate: float, lower: Bound = 0.0, upper: Bound = float("inf")
) -> Vector:
    """Towards Σ w_i n_i = Σ n_i, at once with a rate of 1: w (Σ n / Σ w n)^rate, cut off at the bounds.

    Args:
        weights: positive, shape ``[T]``.
        norms: n, non-negative, shape ``[T]``.
        rate: above 0, at most 1. The norms are those of one batch, and so is their noise.
        lower: least weight.
        upper: greatest weight.
    """
    factor = norms.sum() / (weights * norms).sum()
    return (weights * factor**rate).clip(lower, upper)


LEAST = 1e-8  # a weight of exactly 0 would have its task forgotten


def bearable(least: float, greatest: float) -> tuple[float, float]:
    """Least and greatest of weights on their way to the applied ones, which these bound: what any arithmetic can bear."""
    return min(least, LEAST), max(greatest, 1 / LEAST)


def softmax_weights(scores: Tensor, total: Tensor | float, factors: Tensor | None = None) -> Tensor:
    """``total`` · f_i exp(scores_i) / Σ_j f_j exp(scores_j), kept above 0 by ``LEAST``; shape ``[T]``.

    Args:
        scores: shape ``[T]``.
        total: what the weights sum to.
        factors: f, non-negative, shape ``[T]``; ones by default.
    """
    shares = torch.softmax(scores, 0)
    if factors is not None:
        shares = shares * factors / (shares * factors).sum()
    weights: Tensor = scale_to_sum(shares.clamp_min(LEAST), total, LEAST)
    return weights
