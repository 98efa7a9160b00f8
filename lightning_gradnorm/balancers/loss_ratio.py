"""GradNorm without gradients: training rates alone decide (known from public code as "GradNormSimple")."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_gradnorm.balancers.checks import check_range
from lightning_gradnorm.balancers.gradnorm_equations import loss_ratios, relative_inverse_training_rates
from lightning_gradnorm.balancers.initial_losses import InitialLosses, InitialLossTracker
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.balancers.scale import LEAST, scale_to_sum
from lightning_gradnorm.measurement import Measurement


class LossRatioBalancing(RuleBalancer):
    """w_i ∝ r_i^α with r_i = L̃_i / mean_j L̃_j and L̃_i = L_i(t) / L_i(0); Σ w = T.

    The target of GradNorm's equation 1 (Chen et al., ICML 2018) taken as the weight. It evens out training rates and
    knows nothing of scales: a task whose gradient is a thousand times larger stays so. It costs nothing.

    Source: public code, as "GradNormSimple".

    Args:
        alpha: α ≥ 0, how strongly slow tasks are favoured.
        initial_losses: L_i(0): ``"first"``, the mean of the first N (an int; a task's weight stays as it is until then), or
            given per task.
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one is measured and updates the weights.

    Raises:
        ValueError: for a setting outside its range; with ``alpha`` above 0, for a negative loss.
    """

    def __init__(
        self,
        alpha: float = 1.5,
        *,
        initial_losses: InitialLosses = "first",
        tasks: Iterable[str] | None = None,
        update_every: int = 1,
    ) -> None:
        self.alpha: float = check_range("alpha", alpha, at_least=0)
        self.needs_positive_losses: bool = self.alpha > 0
        self._initial_losses = InitialLossTracker(initial_losses)
        self._parts = {"initial_losses": self._initial_losses}
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"alpha": self.alpha, "initial_losses": self._initial_losses.setting}

    def _check(self, measurement: Measurement) -> None:
        super()._check(measurement)
        self._check_named("initial_losses", self._initial_losses.given, measurement)

    def _check_losses(self, measurement: Measurement, active: Tensor | None) -> None:
        super()._check_losses(measurement, active)
        if self.alpha > 0:
            self._initial_losses.check(measurement, active)

    def _is_settled(self, tasks: Sequence[str]) -> bool:
        return super()._is_settled(tasks) and self._initial_losses.knows_all(tasks)

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        initial, weights = self._initial_losses.observe(measurement), state["weights"]
        known = self._initial_losses.known(measurement.tasks, weights) if self.alpha > 0 else None
        if known is not None and not known.any():
            return {}
        ratios = loss_ratios(measurement.losses, initial.to(measurement.losses))
        rates = relative_inverse_training_rates(ratios, known)
        self.diagnostics: dict[str, Tensor] = {"loss_ratio": ratios, "inverse_rate": rates}
        powers = rates.clamp_min(LEAST) ** self.alpha
        if known is None:
            return {"weights": scale_to_sum(powers, weights.sum(), LEAST)}
        # A task whose L(0) is not known yet keeps its weight, and the others share the rest.
        bounds = weights.where(~known, LEAST), weights.where(~known, math.inf)
        return {"weights": scale_to_sum(powers.where(known, weights), weights.sum(), *bounds)}
