"""Residual-based attention (Anagnostopoulos, Toscano, Stergiopulos, Karniadakis, CMAME 2024, arXiv 2307.00379)."""

from typing import Any

from torch import Tensor

from lightning_gradnorm.balancers.checks import check_range
from lightning_gradnorm.pointwise.fixed import FixedPoints


def attention(lambdas: Tensor, residuals: Tensor, decay: float, rate: float) -> Tensor:
    """λ_i ← γ λ_i + η ∣r_i∣ / max_j ∣r_j∣, shape ``[N]``: the paper's update, of points with these residuals."""
    return decay * lambdas + rate * residuals / residuals.max()


class ResidualAttentionPoints(FixedPoints):
    """Residual-based attention: m_i = λ_i² with λ_i ← γ λ_i + η ∣r_i∣ / max_j ∣r_j∣ per fixed point, without any training.

    The losses are squared residuals, r_i² = ℓ_i, so that the term is the mean of (λ_i r_i)². λ_i starts at 0, takes its share
    of a step's residuals before it weighs them, and is at most η / (1 − γ), 10 by default: the term is small
    at first and grows.

    A point that is not in a batch keeps its λ_i; the maximum is that of the batch, and when λ_i is remembered that of all the
    step's points, on all ranks. The source has all points in every step, where that is the same.

    Source: Anagnostopoulos, Toscano, Stergiopulos, Karniadakis, CMAME 2024, arXiv 2307.00379.

    Args:
        num_points: how many there are; learnt from the first batch if not given.
        decay: γ, at least 0 and below 1 (0.999 in the source).
        rate: η > 0 (the authors' code has 0.001, and λ_i at ∣r_i∣ / max_j ∣r_j∣ at first).

    Attributes:
        frozen: while true, ``update`` changes nothing.

    Raises:
        ValueError: for a setting outside its range; at a step, for points whose number or index does not fit.
    """

    _of_each = "weight"

    def __init__(self, num_points: int | None = None, *, decay: float = 0.999, rate: float = 0.01) -> None:
        self.decay: float = check_range("decay", decay, at_least=0, below=1)
        self.rate: float = check_range("rate", rate, above=0)
        super().__init__(num_points, 0.0)

    def settings(self) -> dict[str, Any]:
        return {"decay": self.decay, "rate": self.rate}

    def _weights(self, lambdas: Tensor, losses: Tensor) -> Tensor:
        return self._next(lambdas, losses.to(lambdas)).square()

    def _learn(self, mean: Tensor) -> None:
        self._lambdas = self._next(self._lambdas, mean)

    def _next(self, lambdas: Tensor, losses: Tensor) -> Tensor:
        usable = losses.isfinite() & (losses > 0).any()
        residuals = losses.where(usable, losses.new_zeros(())).sqrt()
        return attention(lambdas, residuals, self.decay, self.rate).where(usable, lambdas)
