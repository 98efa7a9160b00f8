"""What a LightningModule mixes in: the tasks' losses, their total, the layer that the tasks share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.losses import TaskLosses, check_losses, plain_sum
from lightning_gradnorm.shared_layer import SharedLayerSpec


class MultiTaskMixin:
    """Gives a module with several losses one total, which a balancing callback can weigh.

    Put it before ``LightningModule`` in the bases, and write the module in either of two ways: return
    ``self.total_loss({...})`` from ``training_step``, or define ``task_losses`` and leave ``training_step`` out.

    Without a balancing callback the total is the plain sum of the losses, so an ablation is deleting one line.
    """

    _loss_balancing: Any = None  # put here by the callback while its Trainer is at work

    def shared_layer(self) -> SharedLayerSpec | None:
        """The layer that all tasks share, on whose parameters their gradients are compared (the paper's W).

        Override it to choose: return a module, a parameter, the dotted name of either, or an iterable of these. Each task
        needs to reach some of those parameters, not all: networks of several subdomains can be given together. ``None``
        has the layer found: the last weights on which every task has a gradient in the first training batch.
        """
        return None

    def task_losses(self, batch: Any, batch_idx: int) -> TaskLosses:
        """Task name → scalar loss of one batch; what the default ``training_step`` calls.

        Raises:
            NotImplementedError: where it is not overridden.
        """
        raise NotImplementedError(
            f"{type(self).__name__} defines neither training_step nor task_losses. Define task_losses(batch, batch_idx) to "
            "return a dict of task "
            "name → loss, or training_step to return self.total_loss(that dict)."
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Total loss of the batch, scalar."""
        return self.total_loss(self.task_losses(batch, batch_idx))

    def total_loss(
        self, losses: TaskLosses, *, kpis: Mapping[str, Any] | None = None, points: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The loss to train on, scalar: Σ_i w_i L_i with the callback's present weights; without a callback, Σ_i L_i.

        Call it once per training step, with all tasks that the batch has labels for; further terms can be added to what
        it returns. In validation it applies the present weights and changes nothing.

        Args:
            losses: task name → scalar loss. Names appear in the loggers' tags. A task named in the callback's ``points`` has
                one loss per point instead, shape ``[N]``.
            kpis: task name → key performance indicator between 0 and 1, for methods that prioritise by it: a number, a scalar
                tensor, a torchmetrics ``Metric`` or a callable without arguments; not looked at by other methods.
            points: task name → what identifies the points of its per-point losses: their indices ``[N]`` among fixed
                points (``SelfAdaptivePoints``; not needed where every batch has all of them), or their coordinates
                ``[N, …]`` (``GradientNormPoints``).

        Raises:
            TypeError, ValueError: for a loss dict that cannot be used; the message names the task and the way out.
        """
        balancing = self._loss_balancing
        differentiable = torch.is_grad_enabled() and bool(getattr(self, "training", True))
        checked = check_losses(losses, differentiable=differentiable, per_point=() if balancing is None else balancing.points)
        return plain_sum(checked) if balancing is None else balancing.total(checked, self, kpis or {}, points or {})
