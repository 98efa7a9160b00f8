"""One optimiser step's measurement, out of its micro-batches and ranks."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_gradnorm.gradients import TaskGradients, cosines
from lightning_gradnorm.measurement import Measurement, stack_scalars, widest_float

AllReduceSum = Callable[[Tensor], Tensor]


class MeasurementWindow:
    """Adds up the micro-batches of one optimiser step, and then the ranks.

    The norm of a step is the norm of its *mean* gradient, as if the micro-batches of all ranks were one batch; the mean of
    their norms would be another number. A task's mean is over the micro-batches that have it.

    Args:
        of_features: whether the gradients are of features, each micro-batch having its own, instead of parameters: their
            squared norms add up then.
    """

    def __init__(self, *, of_features: bool = False) -> None:
        self._of_features = of_features
        self._losses: dict[str, Tensor] = {}
        self._counts: dict[str, int | Tensor] = {}
        self._only: TaskGradients | None = None  # while there is one micro-batch, its gradients as they came: no copy
        self._sums: dict[str, Tensor] = {}
        self._measured = False

    def __bool__(self) -> bool:
        return bool(self._losses)

    @property
    def entries(self) -> int:
        """Numbers per task that the ranks exchange: |W|, 1 for features; 0 before any gradient was measured."""
        if self._of_features or not self._measured:
            return int(self._measured)
        if self._only is not None:
            return sum(parameter.numel() for parameter in self._only.parameters)
        return next(iter(self._sums.values())).numel()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that took part."""
        return tuple(self._losses)

    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Take the detached losses of one micro-batch."""
        for task, loss in losses.items():
            loss = loss.to(widest_float(loss.device))
            self._losses[task] = loss if task not in self._losses else self._losses[task] + loss
            self._counts[task] = self._counts.get(task, 0) + 1

    def add_gradients(self, gradients: TaskGradients) -> None:
        """Take the gradients of the micro-batch whose losses were added last."""
        if not self._measured:
            self._only, self._measured = gradients, True
            return
        self._spread_out()
        self._add_flat(gradients)

    def _spread_out(self) -> None:
        if self._only is not None:
            self._add_flat(self._only)
            self._only = None

    def _add_flat(self, gradients: TaskGradients) -> None:
        rows = gradients.norms().square().unsqueeze(1) if self._of_features else gradients.flat()
        for task, gradient in zip(gradients.tasks, rows, strict=True):
            self._sums[task] = gradient if task not in self._sums else self._sums[task] + gradient

    def reduce(self, all_reduce: AllReduceSum, tasks: Sequence[str], entries: int, device: torch.device) -> None:
        """Take in what the other ranks measured, with one collective, whatever this one has seen.

        Args:
            all_reduce: sums a vector over the ranks.
            tasks: all tasks, in the order that the ranks have agreed on.
            entries: |W|, or 0 where no gradients are measured.
            device: where the collective works.
        """
        self._spread_out()
        dtype = torch.promote_types(torch.float32, next(iter(self._sums.values())).dtype) if self._sums else torch.float32
        zero = torch.zeros(entries + 2, dtype=dtype, device=device)
        rows = []
        for task in tasks:
            if task not in self._losses:
                rows.append(zero)
                continue
            gradient = [self._sums[task].to(device, dtype)] if entries else []
            scalars = torch.stack([self._losses[task].to(device, dtype), zero.new_tensor(self._counts[task])])
            rows.append(torch.cat([*gradient, scalars]))
        reduced = all_reduce(torch.cat(rows)).view(len(tasks), entries + 2)
        here = set(self._losses)
        # What this rank had is present; of what it had not, it asks.
        present = [k for k, task in enumerate(tasks) if task in here or bool(reduced[k, -1] > 0)]
        self._losses = {tasks[k]: reduced[k, -2].to(widest_float(device)) for k in present}
        self._counts = {tasks[k]: reduced[k, -1] for k in present}
        self._sums = {tasks[k]: reduced[k, :entries] for k in present} if entries else {}
        self._measured = bool(self._sums)

    def measurement(self) -> Measurement | None:
        """Mean losses, and norms of the mean gradients if there are any, of the tasks that took part; ``None`` if none did."""
        if not self._losses:
            return None
        losses = stack_scalars(loss / self._counts[task] for task, loss in self._losses.items())
        return Measurement(self.tasks, losses, self._norms() if self._measured else None)

    def cosines(self) -> Tensor | None:
        """Cosine between every two tasks' mean gradients, ``[T, T]``; ``None`` where they cannot be had."""
        if not self._measured or (self._of_features and self._only is None):
            return None
        return cosines(self._only.flat() if self._only is not None else torch.stack(list(self._sums.values())))

    def _norms(self) -> Tensor:
        if self._only is not None:
            return self._only.norms()
        if self._of_features:
            return torch.stack([self._sums[task].sum().sqrt() / count for task, count in self._counts.items()])
        means = [self._sums[task] / count for task, count in self._counts.items()]
        return torch.stack([torch.linalg.vector_norm(mean, dtype=widest_float(mean.device)) for mean in means])
