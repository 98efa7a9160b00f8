"""Learning-rate annealing for physics-informed networks (Wang, Teng, Perdikaris, SISC 2021, arXiv 2001.04536)."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_choice, check_range
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.balancers.scale import LEAST
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.plain import plain_name

Form = Literal["max_mean", "norm"]


def max_over_mean(maximum: Tensor, means: Tensor, weights: Tensor) -> Tensor:
    """λ̂_i = max_θ ∣∇_θ L_r∣ / mean_θ ∣∇_θ λ_i L_i∣, shape ``[T]``; ``maximum`` is of the reference task, scalar."""
    return maximum / (weights * means)


def sum_over_norm(norms: Tensor) -> Tensor:
    """λ̂_i = Σ_j ‖∇_θ L_j‖ / ‖∇_θ L_i‖, shape ``[T]`` (Wang, Sankaran, Wang, Perdikaris 2023, arXiv 2308.08468)."""
    return norms.sum() / norms


class LearningRateAnnealing(RuleBalancer):
    """λ_i ← β λ_i + (1 − β) λ̂_i, from statistics of the gradients on all weights: let ``shared_layer()`` return those.

    ``form="max_mean"`` has λ̂_i = max ∣∇ L_r∣ / mean ∣∇ λ_i L_i∣ with the reference task r, the PDE residual, at weight 1.
    The denominator holds the weighted loss, as in the journal's text and the authors' code; the preprint leaves λ_i out, and
    that drives the weights up without bound. At rest λ_i is then √(max ∣∇ L_r∣ / mean ∣∇ L_i∣). The sources take weight
    matrices and no biases.

    ``form="norm"`` has λ̂_i = Σ_j ‖∇ L_j‖ / ‖∇ L_i‖ for every task: GradNorm with α = 0 in closed form, up to a factor.

    The weights are not bound to a sum. A gradient of exactly zero leaves its task's weight as it is.

    Source: Wang, Teng, Perdikaris, SISC 2021, arXiv 2001.04536; Wang, Sankaran, Wang, Perdikaris 2023, arXiv 2308.08468,
    for ``form="norm"``.

    Args:
        reference: the task that keeps weight 1, for ``"max_mean"``.
        form: ``"max_mean"`` or ``"norm"``.
        decay: β, at least 0 and below 1 (0.9 in both sources).
        update_every: of how many optimiser steps one is measured and updates the weights; 10 in the paper for ``"max_mean"``
            (the default), 1000 in the later source for ``"norm"``.
        tasks: all tasks' names, if they are to be fixed from the start.

    Raises:
        ValueError: for a setting outside its range; at the first update, if ``reference`` is no task.
    """

    def __init__(
        self,
        reference: str | None = None,
        *,
        form: Form = "max_mean",
        decay: float = 0.9,
        update_every: int = 10,
        tasks: Iterable[str] | None = None,
    ) -> None:
        self.form: Form = check_choice("form", form, get_args(Form))
        self.reference: str | None = None if reference is None else plain_name(reference)
        if (self.form == "max_mean") != (self.reference is not None):
            raise ValueError(
                "form='max_mean' goes with reference='task', the residual's name, and form='norm' without: got "
                f"form={self.form!r} with reference={self.reference!r}."
            )
        self.decay: float = check_range("decay", decay, at_least=0, below=1)
        self.needs: tuple[str, ...] = ("gradient_maxima", "gradient_means") if self.form == "max_mean" else ("gradient_norms",)
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"reference": self.reference, "form": self.form, "decay": self.decay}

    def _check(self, measurement: Measurement) -> None:
        super()._check(measurement)
        self._check_named("reference", (self.reference,) if self.reference else (), measurement)

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        maxima, means, norms, weights = (*measurement[3:5], measurement.gradient_norms, state["weights"])
        if self.form == "norm":
            assert norms is not None, "the contract has checked it"
            sizes, wanted = norms.to(weights), sum_over_norm(norms.to(weights))
        else:
            assert maxima is not None and means is not None, "the contract has checked it"
            if self.reference not in measurement.tasks:
                return {}  # nothing to compare with in this step
            sizes = means.to(weights)
            wanted = max_over_mean(maxima.to(weights)[measurement.tasks.index(self.reference)], sizes, weights)
        moves = (sizes > 0) & (wanted > 0)
        if self.reference is not None:
            moves = moves & torch.tensor([task != self.reference for task in measurement.tasks], device=weights.device)
        averaged = self.decay * weights + (1 - self.decay) * torch.where(moves, wanted, weights)
        return {"weights": torch.where(moves, averaged.clamp_min(LEAST), weights)}
