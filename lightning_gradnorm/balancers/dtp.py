"""Dynamic Task Prioritization (Guo, Haque, Huang, Yeung, Fei-Fei, ECCV 2018)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_per_task, check_range, is_per_task
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.balancers.scale import LEAST
from lightning_gradnorm.measurement import Measurement


def focal_weights(kpis: Tensor, gammas: Tensor | float) -> Tensor:
    """−(1 − κ_i)^{γ_i} log κ_i: large for a hard task, 0 for one that is done; shape ``[T]``."""
    return -((1 - kpis) ** gammas) * kpis.log()


class DynamicTaskPrioritization(RuleBalancer):
    """w_i = −(1 − κ̄_i)^{γ_i} log κ̄_i with κ̄_i a running mean of the task's key performance indicator in (0, 1].

    Hard tasks get more: the opposite sense of uncertainty weighting. The weights are not bound to a sum; as all tasks get
    better they go to 0, and the effective learning rate with them. Pass the indicators with the losses::

        self.total_loss({"digit": cross_entropy, "depth": l1}, kpis={"digit": self.accuracy, "depth": lambda: 1 / (1 + l1)})

    Deviations: an indicator below ``floor`` counts as the floor (at 0 the weight would be infinite), and weights end at
    1e-8 instead of 0. The step at t uses indicators from before t; the first uses weights of one.

    Source: Guo, Haque, Huang, Yeung, Fei-Fei, ECCV 2018.

    Args:
        gamma: γ ≥ 0, how sharply easy tasks are left alone; one for all, or per task (1 for those not named).
        smoothing: a of κ̄ ← a κ + (1 − a) κ̄, above 0 and at most 1.
        floor: least indicator.
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one is measured and updates the weights.

    Raises:
        ValueError: for a setting outside its range; at an update, for an indicator that is missing or not between 0 and 1.
    """

    needs: tuple[str, ...] = ("kpis",)
    _remembers = (("kpi", torch.nan),)

    def __init__(
        self,
        gamma: float | Mapping[str, float] = 1.0,
        *,
        smoothing: float = 0.1,
        floor: float = 1e-3,
        tasks: Iterable[str] | None = None,
        update_every: int = 1,
    ) -> None:
        per_task = check_per_task("gamma", gamma) if is_per_task(gamma) else {}
        self.gamma: float = check_range("gamma", 1.0 if is_per_task(gamma) else gamma, at_least=0)
        self.gammas: dict[str, float] = {
            task: check_range(f"gamma of task {task!r}", value, at_least=0) for task, value in per_task.items()
        }
        self.smoothing: float = check_range("smoothing", smoothing, above=0, at_most=1)
        self.floor: float = check_range("floor", floor, above=0, below=1)
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        gamma = dict(self.gammas) or self.gamma
        return super().settings() | {"gamma": gamma, "smoothing": self.smoothing, "floor": self.floor}

    def _check(self, measurement: Measurement) -> None:
        super()._check(measurement)
        self._check_named("gamma", self.gammas, measurement)
        assert measurement.kpis is not None, "the contract has checked it"
        for task, kpi in zip(measurement.tasks, measurement.kpis.tolist(), strict=True):
            if not 0 <= kpi <= 1:
                raise ValueError(
                    f"The key performance indicator of task {task!r} is {kpi:g}; it lies between 0 (hopeless) and 1 (done). "
                    "Take an accuracy, an IoU, or for an error e something like 1 / (1 + e)."
                )

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert measurement.kpis is not None, "the contract has checked it"
        kpis = measurement.kpis.to(state["kpi"]).clamp_min(self.floor)
        mean = torch.where(state["kpi"].isnan(), kpis, self.smoothing * kpis + (1 - self.smoothing) * state["kpi"])
        gammas = mean.new_tensor([self.gammas.get(task, self.gamma) for task in measurement.tasks])
        self.diagnostics: dict[str, Tensor] = {"kpi": mean}
        return {"weights": focal_weights(mean, gammas).clamp_min(LEAST), "kpi": mean}
