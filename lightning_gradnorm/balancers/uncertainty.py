"""Uncertainty weighting (Kendall, Gal, Cipolla, CVPR 2018, arXiv 1705.07115)."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_gradnorm.balancers.arrays import Vector, as_tensor, exp, isfinite, like, on_host, placed, quiet, surely_all
from lightning_gradnorm.balancers.base import LossBalancer
from lightning_gradnorm.balancers.checks import check_choice, check_factory, check_per_task, check_range
from lightning_gradnorm.balancers.optimizer import OptimizerFactory, VectorOptimizer
from lightning_gradnorm.measurement import Measurement

Kind = Literal["regression", "classification"]
Form = Literal["original", "revised"]


def uncertainty_weights(log_variances: Vector, halves: Vector) -> Vector:
    """e^{−s} times ½ for a regression (equation 5), times 1 for a classification (equation 10); shape ``[T]``."""
    return halves * exp(-log_variances)


def log_variance_gradient(losses: Vector, log_variances: Vector, halves: Vector, form: Form = "original") -> Vector:
    """∂/∂s of w(s) L plus its regulariser: ½ s; in the revised form ln(1 + e^s) (Liebel and Körner 2018, equation 3)."""
    pull = 0.5 if form == "original" else 1 / (1 + exp(-log_variances))
    return pull - uncertainty_weights(log_variances, halves) * losses


class UncertaintyWeighting(LossBalancer):
    """Learns one variance σ_i² per task with the network: w_i = e^{−s_i}/2, or e^{−s_i} for a classification; s_i = ln σ_i².

    The weights are not bound to a sum: at rest a regression has w_i = 1/(2 L_i), so they grow as the losses fall, and with
    them the effective learning rate. The first weights are those of ``initial_log_variance``: ½ and 1.

    Deviation: the total is Σ w_i L_i without the regulariser ½ s_i, which is a constant for the network. (With it the
    published total can be negative.) s_i is trained on the same objective by an optimiser of its own, without weight decay.

    Source: Kendall, Gal, Cipolla, CVPR 2018, arXiv 1705.07115; Liebel, Körner 2018, arXiv 1805.06334, for
    ``form="revised"``.

    Args:
        kinds: task → ``"regression"`` or ``"classification"``; regression for tasks not named.
        lr: learning rate of s (the GradNorm paper gave it 0.025).
        form: ``"original"``; ``"revised"``: with the regulariser ln(1 + σ²), which does not pull s without bound.
        initial_log_variance: s_i at the start.
        optimizer: factory of the optimiser of s, called as ``optimizer([s], lr=lr)``.
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one is measured and updates the weights.

    Raises:
        ValueError: for a setting outside its range; at the first update, for a name in ``kinds`` that is no task.
    """

    def __init__(
        self,
        kinds: Mapping[str, Kind] | None = None,
        lr: float = 0.025,
        *,
        form: Form = "original",
        initial_log_variance: float = 0.0,
        optimizer: OptimizerFactory = torch.optim.Adam,
        tasks: Iterable[str] | None = None,
        update_every: int = 1,
    ) -> None:
        self.kinds: dict[str, Kind] = {
            task: check_choice(f"kind of task {task!r}", kind, get_args(Kind))
            for task, kind in check_per_task("kinds", kinds, "a dict of task name → kind").items()
        }
        self.lr: float = check_range("lr", lr, at_least=0)
        self.form: Form = check_choice("form", form, get_args(Form))
        self.initial_log_variance: float = check_range("initial_log_variance", initial_log_variance)
        check_factory("optimizer", optimizer)
        self._optimizer = VectorOptimizer(optimizer, self.lr)
        self._parts = {"optimizer": self._optimizer}
        self._remembers = (("log_variance", self.initial_log_variance),)
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "kinds": dict(self.kinds),
            "lr": self.lr,
            "form": self.form,
            "initial_log_variance": self.initial_log_variance,
            "optimizer": self._optimizer.name,
        }

    def _half(self, task: str) -> float:
        return 1.0 if self.kinds.get(task) == "classification" else 0.5

    def _first_weight(self, task: str) -> float:
        return float(uncertainty_weights(np.float64(self.initial_log_variance), self._half(task)))

    def _check(self, measurement: Measurement) -> None:
        super()._check(measurement)
        self._check_named("kinds", self.kinds, measurement)

    def _update(self, measurement: Measurement, positions: Tensor | None) -> None:
        whole, weights, losses = map(
            on_host, (self._memory["log_variance"], self._weights, measurement.losses.to(self._weights))
        )
        places = None if positions is None else on_host(positions)
        s = whole if places is None else whole[places]
        halves = like(s, [self._half(task) for task in measurement.tasks])
        with quiet():
            usable = isfinite(losses.sum())
            accept = None if surely_all(usable) else usable & (halves > 0)
            gradient = log_variance_gradient(losses, s, halves, self.form)
            s = self._optimizer.step(whole, gradient, accept, places)
            new = uncertainty_weights(s, halves)  # of a step that was refused: those that it had
        if accept is not None:
            self.skipped_updates.add_(as_tensor(~usable))
        self.diagnostics: dict[str, Tensor] = {"log_variance": as_tensor(s)}
        self._memory["log_variance"] = as_tensor(s if places is None else placed(whole, places, s))
        self._weights = as_tensor(new if places is None else placed(weights, places, new))
