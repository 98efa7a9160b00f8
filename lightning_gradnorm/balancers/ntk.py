"""Weights from the neural tangent kernel (Wang, Yu, Perdikaris, JCP 2022, arXiv 2007.14527)."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_gradnorm.balancers.checks import check_range
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.measurement import Measurement


def sum_over_trace(traces: Tensor, others: Tensor | float = 0.0) -> Tensor:
    """λ_i = Σ_j tr K_j / tr K_i, shape ``[T]``: Algorithm 1 of the paper; all terms then fall at one rate, on average.

    Args:
        traces: tr K_i, shape ``[T]``.
        others: what further terms add to the sum, scalar.
    """
    return (traces.sum() + others) / traces


class NTKWeighting(RuleBalancer):
    """w_i = Σ_j tr K_j / tr K_i, with K_i the tangent kernel of term i's residuals: the stiffer a term, the less it weighs.

    A term's loss is the mean of its points' squared residuals r², and is given per point, so that the residuals can be seen::

        self.total_loss({"pde": pde.square(), "boundary": boundary.square()})  # shape [N] each, no .mean()

    tr K_i is here the mean over the points of ‖∇_W r‖², as in the authors' later code (jaxpi), since losses are means: the sum,
    which the paper has, would make a term with more points weigh less. A term with several residuals at each point gives them
    all, as ``[N, K]`` or one after the other, times their number if they are to be added up: of Σ_k r_k² as one entry, the
    kernel would be that of its root.

    The traces are estimated, in each measured step from one draw of random signs, by one vector-Jacobian product per term
    (``lightning_gradnorm.traces``), and averaged: over all measurements at first, from 1 / (1 − β) on exponentially. jaxpi
    averages weights instead, of exact traces every 1000 steps. At the first step weights are one.

    A term that is absent from a step counts in the sum with its last trace.

    As in the paper, W is all that is trained, unless ``shared_layer()`` names less: unknown coefficients of an equation too,
    which its residual depends on.

    Residuals have to reach W through a graph that can be walked twice: regions compiled by ``torch.compile`` above W, and
    reentrant checkpoints, are refused. The weights are 1 at least and not bound to a sum.

    Source: Wang, Yu, Perdikaris, JCP 2022, arXiv 2007.14527.

    Args:
        decay: β of the average of the traces, at least 0 and below 1.
        update_every: of how many optimiser steps one is measured and updates the weights.
        tasks: all tasks' names, if they are to be fixed from the start.

    Raises:
        ValueError: for a setting outside its range; at a step, for a loss that is a scalar.
    """

    needs: tuple[str, ...] = ("ntk_traces",)
    of_all_parameters = True
    _remembers = (("trace", 0.0), ("measured", 0.0))

    def __init__(self, *, decay: float = 0.99, update_every: int = 10, tasks: Iterable[str] | None = None) -> None:
        self.decay: float = check_range("decay", decay, at_least=0, below=1)
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"decay": self.decay}

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert measurement.ntk_traces is not None, "the contract has checked it"
        traces, measured = measurement.ntk_traces.to(state["trace"]), state["measured"] + 1
        share = (1 / measured).clamp_min(1 - self.decay)
        mean = state["trace"] + share * (traces - state["trace"])
        mean = mean.where(traces > 0, state["trace"])  # the others have no gradient here: they count as absent ones do
        absent = self._memory["trace"].sum() - state["trace"].sum()
        return {"weights": sum_over_trace(mean, absent), "trace": mean, "measured": measured}
