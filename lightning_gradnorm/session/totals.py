"""The total of a loss dict: weighed and noted in training, the plain sum outside."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.losses import TaskLosses, check_losses, plain_sum, weighted_sum
from lightning_gradnorm.pointwise import PointWeighting
from lightning_gradnorm.session.loop import Loop
from lightning_gradnorm.session.noted import NotedLosses, called_twice, note
from lightning_gradnorm.session.shared import SharedReading


class Totals:
    """Gives totals, and notes their losses for the backward that follows; the session's first half.

    Attributes:
        balancer: whose weights are applied.
        points: task → how the single points of its term are weighed.
        reading: keeps the layer's outputs in the forward passes that are to be read.
        noted: the totals whose backward has not come yet.
        totals: how many this run has weighed so far.
        on_evaluation: called with the losses of a total outside training, task → detached scalar.
    """

    balancer: LossBalancer
    points: dict[str, PointWeighting]
    reading: SharedReading
    _loop: Loop | None

    def _note_nothing(self) -> None:
        self.on_evaluation: Callable[[dict[str, Tensor]], None] | None = None
        self.totals = 0
        self.noted: list[NotedLosses] = []
        self._recording = False

    def begin_batch(self) -> None:
        """Weigh and note totals from now on. Needed where batches and steps are not one to one."""
        self._recording = True
        self.noted.clear()
        if self._measures:
            self.reading.watch()

    def end_batch(self) -> None:
        """Weigh nothing until the next batch begins: a total is the plain sum, as in evaluation."""
        self._recording = False
        self.noted.clear()
        self.reading.stop_watching()

    def total(
        self,
        losses: TaskLosses,
        *,
        kpis: Mapping[str, Any] | None = None,
        points: Mapping[str, Tensor] | None = None,
        differentiable: bool | None = None,
    ) -> Tensor:
        """The loss to train on, scalar: Σ_i w_i L_i with the present weights; outside training Σ_i L_i.

        Args:
            losses: task name → scalar loss, or one loss per point for a task of ``points``.
            kpis: task name → key performance indicator, for methods that need it.
            points: task name → what identifies the points of its losses.
            differentiable: whether a backward is to follow; by default where gradients are on and the network trains.

        Raises:
            TypeError, ValueError: for losses that cannot be used.
            RuntimeError: for a second total in a loop that allows one.
        """
        loop, grad = self._loop, torch.is_grad_enabled()
        if differentiable is None:
            differentiable = grad and (loop is None or loop.network.training)
        checked = check_losses(losses, differentiable=differentiable, per_point=self.points)
        if loop is None or not (self._recording and grad):
            return self._evaluate(checked)
        if self.noted and loop.one_total:
            raise RuntimeError(called_twice(self.noted[-1].losses, checked))
        self.totals += 1
        if not checked:  # all tasks are absent: a batch without labels trains nothing
            return plain_sum(checked)
        noted = note(self.balancer, self.points, checked, loop.network, kpis or {}, points or {}, tapped=self._measures)
        self.noted.append(noted)
        return weighted_sum(noted.weights, noted.losses)

    def _evaluate(self, losses: Mapping[str, Tensor]) -> Tensor:
        # A term is the plain mean of its points here: they are not those that have masks.
        scalars = {task: loss.mean() if loss.ndim else loss for task, loss in losses.items()}
        if scalars and self.on_evaluation is not None:
            self.on_evaluation({task: loss.detach() for task, loss in scalars.items()})
        return plain_sum(scalars)

    @property
    def _measures(self) -> bool:
        return self.balancer.due and self.balancer.needs_gradients
