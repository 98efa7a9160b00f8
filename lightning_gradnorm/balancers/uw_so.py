"""Soft optimal uncertainty weighting (UW-SO; Kirchdorfer et al., GCPR 2024, arXiv 2408.07985)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_range
from lightning_gradnorm.balancers.own_losses import OwnLosses

_LEAST_LOSS = 1e-30


def soft_optimal(losses: Tensor, temperature: float) -> Tensor:
    """softmax(1 / (τ L)), shape ``[T]``: at the best variance, σ_i² = L_i, an uncertainty weight is 1 / L_i; made soft."""
    return torch.softmax(1 / (temperature * losses.clamp_min(_LEAST_LOSS)), 0)


class SoftOptimalUncertainty(OwnLosses):
    """w = softmax(1 / (τ L)): what uncertainty weighting comes to in the end, at once; Σ w = 1.

    The weights depend on the losses of the step itself, are constants for its gradient, and are what is reported. The
    temperature has to suit the losses' units, and is all that is tuned: at a small one all weight is on the task with the
    smallest loss. Under DDP and accumulation each batch has its own weights.

    Source: Kirchdorfer et al., GCPR 2024, arXiv 2408.07985.

    Args:
        temperature: τ, above 0, in one over the losses' units.
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: as everywhere; only what is reported between steps depends on it.

    Raises:
        ValueError: for a setting outside its range; for a negative loss.
    """

    def __init__(self, temperature: float = 1.0, *, tasks: Iterable[str] | None = None, update_every: int = 1) -> None:
        self.temperature: float = check_range("temperature", temperature, above=0)
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"temperature": self.temperature}

    def _weights_of(self, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        return soft_optimal(losses, self.temperature)
