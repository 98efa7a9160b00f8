"""Weights that do not move: equal ones, and given ones (GradNorm static, Chen et al., ICML 2018, sections 5.2 and 5.3)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_gradnorm.balancers.checks import check_choice, check_per_task, check_range, check_that, is_per_task
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.weights_file import read_weights

Statistic = Literal["mean", "mean_after_warmup", "final"]


class EqualWeights(RuleBalancer):
    """w_i = 1: the plain sum, measured and logged like any other method. Σ w = T.

    Args:
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: as everywhere; nothing is updated.
    """

    def __init__(self, *, tasks: Iterable[str] | None = None, update_every: int = 1) -> None:
        super().__init__(tasks=tasks, update_every=update_every)

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}


class FixedWeights(RuleBalancer):
    """The weights given, for the whole of training; Σ w is what it is.

    With the time averages of a GradNorm run this is the paper's static retraining: as good, it reports, as the run itself,
    at the cost of a plain sum::

        LossBalancingCallback(FixedWeights.from_file("lightning_logs/version_0/loss_weights.yaml"))

    Source: Chen et al., ICML 2018, sections 5.2 and 5.3.

    Args:
        weights: task → weight, above 0; all tasks.
        update_every: as everywhere; nothing is updated.

    Raises:
        ValueError: for a weight that is not above 0, or at the first step with a task that has none.
    """

    def __init__(self, weights: Mapping[str, float], *, update_every: int = 1) -> None:
        rule = "a dict of task name → weight, with every task in it"
        check_that("weights", weights, is_per_task(weights) and len(weights) > 0, rule)
        self.given: dict[str, float] = {
            task: check_range(f"The weight of task {task!r}", weight, above=0)
            for task, weight in check_per_task("weights", weights, rule).items()
        }
        super().__init__(tasks=self.given, update_every=update_every)

    @classmethod
    def from_file(cls, path: str | Path, statistic: Statistic = "mean") -> "FixedWeights":
        """The weights of an earlier run.

        Args:
            path: its ``loss_weights.yaml``.
            statistic: ``"mean"`` over all its steps (the paper's), ``"mean_after_warmup"`` (without the first steps, up to a
                tenth; the file says how many), or the ``"final"`` weights.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it does not hold what such a file holds; the message says what is missing.
        """
        return cls(read_weights(path, check_choice("statistic", statistic, get_args(Statistic))))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"weights": dict(self.given)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._weights = self._weights.new_tensor([self.given[task] for task in self.tasks])  # those given here and now

    def _first_weight(self, task: str) -> float:
        return self.given[task]

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}
