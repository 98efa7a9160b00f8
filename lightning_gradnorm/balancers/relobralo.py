"""ReLoBRaLo, relative loss balancing with random lookback (Bischof and Kraus 2021, arXiv 2110.09813)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_range
from lightning_gradnorm.balancers.random_weights import Draws
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.balancers.scale import softmax_weights
from lightning_gradnorm.measurement import Measurement

_TINY = 1e-12  # of the authors' code, against a division by a loss of 0


def balanced_by_progress(losses: Tensor, earlier: Tensor, temperature: float, total: Tensor | float) -> Tensor:
    """λ^bal_i(t, t') = T softmax_i(L_i(t) / (τ L_i(t'))): more for the losses that fell least since t'; shape ``[T]``."""
    return softmax_weights(losses / (temperature * earlier + _TINY), total)


class ReLoBRaLo(RuleBalancer):
    """λ(t) = α (ρ λ(t−1) + (1 − ρ) λ^bal(t, 0)) + (1 − α) λ^bal(t, t−1), with ρ drawn 0 or 1 at every step; Σ w = T.

    It knows nothing of scales, only of progress. Deviation: the paper weighs the losses of step t by λ(t), which is made of
    them; here the step applies λ(t − 1), like every other method. The first step uses weights of one.

    Source: Bischof and Kraus 2021, arXiv 2110.09813.

    Args:
        alpha: α, decay of the average, in [0, 1) (the authors' code: 0.999).
        temperature: τ > 0; the larger, the more even the weights (0.1).
        expected_rho: probability that ρ is 1, that is, of not looking back to the start (0.99).
        seed: of the draws, which are the method's own: the same on every rank, and going on after a resume.
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one is measured and updates the weights.

    Raises:
        ValueError: for a setting outside its range; for a negative loss.
    """

    needs_positive_losses = True
    _remembers = (("first_loss", torch.nan), ("last_loss", torch.nan))

    def __init__(
        self,
        alpha: float = 0.999,
        temperature: float = 0.1,
        expected_rho: float = 0.99,
        *,
        seed: int = 0,
        tasks: Iterable[str] | None = None,
        update_every: int = 1,
    ) -> None:
        self.alpha: float = check_range("alpha", alpha, at_least=0, below=1)
        self.temperature: float = check_range("temperature", temperature, above=0)
        self.expected_rho: float = check_range("expected_rho", expected_rho, at_least=0, at_most=1)
        self._draws = Draws(seed)
        self._parts = {"draws": self._draws}
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        own = {"alpha": self.alpha, "temperature": self.temperature, "expected_rho": self.expected_rho}
        return super().settings() | own | {"seed": self._draws.seed}

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses, weights, last = measurement.losses, state["weights"], state["last_loss"]
        first = torch.where(state["first_loss"].isnan(), losses, state["first_loss"])
        rho = float(torch.rand((), generator=self._draws.generator) < self.expected_rho)
        seen = ~last.isnan()
        since_start = balanced_by_progress(losses, first, self.temperature, weights.sum())
        since_last = balanced_by_progress(losses, torch.where(seen, last, losses), self.temperature, weights.sum())
        looked_back = rho * weights + (1 - rho) * since_start
        balanced = self.alpha * looked_back + (1 - self.alpha) * since_last
        self.diagnostics: dict[str, Tensor] = {"loss_ratio": losses / first}
        # With a task that is here for the first time there is no progress to compare yet.
        return {"weights": torch.where(seen.all(), balanced, weights), "first_loss": first, "last_loss": losses}
