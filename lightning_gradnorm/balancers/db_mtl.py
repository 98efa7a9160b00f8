"""Dual-balancing (DB-MTL; Lin, Jiang, Ye, Zhang, Chen, Chen, Liu, Kwok 2023, arXiv 2308.12029)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_gradnorm.balancers.checks import check_range
from lightning_gradnorm.balancers.own_losses import OwnLosses
from lightning_gradnorm.measurement import Measurement

EPSILON = 1e-8  # beside losses and norms, as in the authors' code


def dual_balanced(norms: Tensor) -> Tensor:
    """α_i = max_j m_j / m_i, shape ``[T]``: all gradients of log-losses get the size of the largest.

    Args:
        norms: m_i, averaged norms of ∇_W log L_i, shape ``[T]``.
    """
    return norms.amax() / (norms + EPSILON)


class DualBalancing(OwnLosses):
    """Trains on Σ_i α_i log L_i, α_i = max_j m_j / m_i, m_i the averaged norm of ∇_W log L_i: losses and gradients of one size.

    The applied weight, ∂total/∂L_i = α_i / L_i, depends on the losses of the step itself, is what is reported, and is not bound
    to a sum. Under DDP and accumulation each batch has its own.

    Deviations: the authors average gradients, and put the averages together in the place of the step's gradients; here norms
    are averaged, of the last shared layer, and act in the next step. Their averages start at 0, here at a task's first norm, so
    that a task which comes late is not ten times too heavy. α of a task's first step is 1.

    Source: Lin et al. 2023, arXiv 2308.12029.

    Args:
        decay: β of the average m ← n + (β / k^σ) (m − n) in the k-th update, at least 0 and below 1.
        fading: σ, at least 0.
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one is measured and updates α.

    Raises:
        ValueError: for a setting outside its range; for a negative loss.
    """

    needs: tuple[str, ...] = ("gradient_norms",)
    _remembers = (("norm", 0.0), ("measured", 0.0), ("factor", 1.0))

    def __init__(
        self, decay: float = 0.9, fading: float = 0.5, *, tasks: Iterable[str] | None = None, update_every: int = 1
    ) -> None:
        self.decay: float = check_range("decay", decay, at_least=0, below=1)
        self.fading: float = check_range("fading", fading, at_least=0)
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"decay": self.decay, "fading": self.fading}

    def _weights_of(self, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        return self._remembered("factor", tasks, losses) / (losses + EPSILON)

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert measurement.gradient_norms is not None, "the contract has checked it"
        losses = measurement.losses + EPSILON
        norms, measured = measurement.gradient_norms.to(losses) / losses, state["measured"] + 1
        before = state["norm"].where(measured > 1, norms)
        average = norms + self.decay / measured**self.fading * (before - norms)
        factor = dual_balanced(average.where(norms > 0, 0))  # tasks that are there without a gradient are no measure
        return {"weights": factor / losses, "norm": average, "measured": measured, "factor": factor}
