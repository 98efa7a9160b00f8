"""One optimiser step's measurement, out of its micro-batches and ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_gradnorm.gradients import TaskGradients, cosines
from lightning_gradnorm.measurement import Measurement, stack_scalars, widest_float


class MeasurementWindow:
    """Adds up the micro-batches of one optimiser step.

    The norm of a step is the norm of its *mean* gradient, as if the micro-batches were one batch; the mean of their norms
    would be another number. A task's mean is over the micro-batches that have it.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self._losses: dict[str, tuple[Tensor, int]] = {}
        self._only: TaskGradients | None = None  # while there is one micro-batch, its gradients as they came: no copy
        self._sums: dict[str, Tensor] = {}
        self._measured = False

    def __bool__(self) -> bool:
        return bool(self._losses)

    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Take the detached losses of one micro-batch."""
        for task, loss in losses.items():
            total, count = self._losses.get(task, (0.0, 0))
            self._losses[task] = loss.to(widest_float(loss.device)) + total, count + 1

    def add_gradients(self, gradients: TaskGradients) -> None:
        """Take the gradients of the micro-batch whose losses were added last."""
        if not self._measured:
            self._only, self._measured = gradients, True
            return
        if self._only is not None:
            self._add_flat(self._only)
            self._only = None
        self._add_flat(gradients)

    def _add_flat(self, gradients: TaskGradients) -> None:
        for task, gradient in zip(gradients.tasks, gradients.flat(), strict=True):
            self._sums[task] = gradient if task not in self._sums else self._sums[task] + gradient

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that took part so far."""
        return tuple(self._losses)

    def measurement(self) -> Measurement:
        """Mean losses, and norms of the mean gradients if there are any, of the tasks that took part."""
        losses = stack_scalars(total / count for total, count in self._losses.values())
        return Measurement(self.tasks, losses, self._norms() if self._measured else None)

    def cosines(self) -> Tensor | None:
        """Cosine between every two tasks' mean gradients, ``[T, T]``; ``None`` where no gradients were measured."""
        if not self._measured:
            return None
        return cosines(self._only.flat() if self._only is not None else torch.stack(list(self._sums.values())))

    def _norms(self) -> Tensor:
        if self._only is not None:
            return self._only.norms()
        means = [self._sums[task] / count for task, (_, count) in self._losses.items()]
        return torch.stack([torch.linalg.vector_norm(mean, dtype=widest_float(mean.device)) for mean in means])
