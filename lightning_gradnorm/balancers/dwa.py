"""Dynamic Weight Average (Liu, Johns, Davison, CVPR 2019, arXiv 1803.10704, equation 7)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_range
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.balancers.scale import softmax_weights
from lightning_gradnorm.measurement import Measurement


def descent_rates(last: Tensor, previous: Tensor) -> Tensor:
    """ρ_k = L_k(t−1) / L_k(t−2) of two epochs' mean losses, shape ``[T]``; 1 where they are not known, or both 0."""
    return (last / previous).nan_to_num(nan=1.0, posinf=torch.finfo(last.dtype).max)


class DynamicWeightAverage(RuleBalancer):
    """w_k = T exp(ρ_k / τ) / Σ_i exp(ρ_i / τ), once an epoch; ρ_k is the ratio of the last two epochs' mean losses. Σ w = T.

    A task whose loss falls slowly gets more. For the first two epochs all weights are 1. It knows nothing of scales.

    Source: Liu, Johns, Davison, CVPR 2019, arXiv 1803.10704, equation 7.

    Args:
        temperature: τ > 0; the larger, the more even the weights (the paper: 2).
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one enters the epoch's means.

    Raises:
        ValueError: for a setting outside its range; for a negative loss.
    """

    needs_positive_losses = True
    _remembers = (("sum", 0.0), ("steps", 0.0), ("last_epoch", torch.nan), ("epoch_before", torch.nan))

    def __init__(self, temperature: float = 2.0, *, tasks: Iterable[str] | None = None, update_every: int = 1) -> None:
        self.temperature: float = check_range("temperature", temperature, above=0)
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"temperature": self.temperature}

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.diagnostics: dict[str, Tensor] = {"descent_rate": descent_rates(state["last_epoch"], state["epoch_before"])}
        return {"sum": state["sum"] + measurement.losses, "steps": state["steps"] + 1}

    @torch.no_grad()
    def end_epoch(self) -> None:
        memory = self._memory
        seen = memory["steps"] > 0
        if not self.tasks:
            return
        memory["epoch_before"] = torch.where(seen, memory["last_epoch"], memory["epoch_before"])
        memory["last_epoch"] = torch.where(seen, memory["sum"] / memory["steps"], memory["last_epoch"])
        memory["sum"], memory["steps"] = torch.zeros_like(memory["sum"]), torch.zeros_like(memory["steps"])
        rates = descent_rates(memory["last_epoch"], memory["epoch_before"])
        self._weights = softmax_weights(rates / self.temperature, len(self.tasks))
