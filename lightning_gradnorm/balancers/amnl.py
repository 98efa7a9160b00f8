"""AMNL, adaptive multi-task normalised loss: each loss over a running mean of itself.

Known from course material on remaining useful life; there is no paper to cite. Its per-sample part, an error that grows
towards failure, belongs to that problem's loss and not here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_range
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.measurement import Measurement, stack_scalars


class AdaptiveNormalizedLoss(RuleBalancer):
    """w_i = 1 / (T μ_i), with μ_i a bias-corrected exponential average of L_i: the total is Σ_i (1/T) L_i / μ_i, near 1.

    The weights are not bound to a sum: they carry the losses' units and grow as the losses fall. A task's first step is
    weighted by its own loss, w_i = 1 / (T L_i), or one step at the losses' scale would stay in the memory of an optimiser
    like Adam.

    Source: course material on remaining useful life; there is no paper to cite.

    Args:
        decay: β of the average, at least 0 and below 1.
        floor: least μ_i, above 0, in the losses' units.
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one enters the averages.

    Raises:
        ValueError: for a setting outside its range; for a negative loss.
    """

    needs_positive_losses = True
    _remembers = (("average", 0.0), ("correction", 0.0))

    def __init__(
        self, decay: float = 0.99, *, floor: float = 1e-8, tasks: Iterable[str] | None = None, update_every: int = 1
    ) -> None:
        self.decay: float = check_range("decay", decay, at_least=0, below=1)
        self.floor: float = check_range("floor", floor, above=0)
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"decay": self.decay, "floor": self.floor}

    @torch.no_grad()
    def weights_at(self, losses: Mapping[str, Tensor]) -> Tensor:
        weights = self.weights_for(losses)
        if all(task in self.tasks for task in losses):
            return weights
        tasks = len({*self.known_tasks, *losses})
        own = self._of(stack_scalars(losses.values()).to(weights), tasks)
        known = torch.tensor([task in self.tasks for task in losses], device=weights.device)
        return torch.where(known | ~own.isfinite(), weights, own)

    def _of(self, means: Tensor, tasks: int) -> Tensor:
        return 1 / (tasks * means.clamp_min(self.floor))

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        average = self.decay * state["average"] + (1 - self.decay) * measurement.losses
        correction = self.decay * state["correction"] + (1 - self.decay)
        means = average / correction
        self.diagnostics: dict[str, Tensor] = {"mean_loss": means}
        return {"weights": self._of(means, len(self.tasks)), "average": average, "correction": correction}
