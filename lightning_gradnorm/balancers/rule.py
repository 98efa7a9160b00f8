"""For methods whose next weights are one function of the step's measurement and a few remembered vectors."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_gradnorm.balancers.arrays import Vector, as_tensor, isfinite, on_host, quiet, surely_all
from lightning_gradnorm.balancers.base import LossBalancer
from lightning_gradnorm.balancers.gradnorm_equations import where_active
from lightning_gradnorm.measurement import Measurement, widest_float


def _finite(vectors: Iterable[Tensor], active: Tensor | None) -> Vector:
    """Whether there is no NaN and no infinity in any of the entries that take part; a sum carries what it meets."""
    finite: Vector = True
    with quiet():
        for vector in vectors:
            finite = finite & isfinite(on_host(where_active(vector, active).to(widest_float(vector.device))).sum())
    return finite


class RuleBalancer(LossBalancer):
    """A ``LossBalancer`` that implements ``_next`` alone.

    The vectors that ``_next`` gets and gives are of the tasks that took part, in the measurement's order. A step on which
    anything that it needs, or anything that it gives, is not finite is skipped and counted, as is one on which no task has a
    gradient; nothing changes then.

    Args:
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one is measured and updates the weights.
    """

    @abstractmethod
    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rule.

        Args:
            measurement: of ``T`` tasks.
            state: ``"weights"`` and what the method remembers, shape ``[T]`` each.

        Returns:
            Those of them that change, shape ``[T]`` each.
        """

    def _update(self, measurement: Measurement, positions: Tensor | None) -> None:
        vectors = {"weights": self._weights, **self._memory}
        before = {name: vector if positions is None else vector[positions] for name, vector in vectors.items()}
        active = self._mask(measurement)
        measured = [measurement.losses, *(getattr(measurement, name) for name in self.needs)]
        usable = _finite(measured, active)
        usable = usable if active is None else usable & on_host(active).any()
        if not isinstance(usable, Tensor) and not usable:
            self.skipped_updates.add_(1)
            return
        losses = measurement.losses.to(self._weights, copy=True)  # what is remembered of it is not the caller's
        after = self._next(measurement._replace(losses=losses), before)
        usable = usable & _finite(after.values(), active)
        certain = active is None and surely_all(usable)
        if not certain:
            usable = as_tensor(usable)
            self.skipped_updates.add_(~usable)
        changes = usable if active is None else usable & active
        for name, vector in after.items():
            kept = vector if certain else torch.where(changes, vector, before[name])
            whole = kept if positions is None else vectors[name].index_copy(0, positions, kept)
            if name == "weights":
                self._weights = whole
            else:
                self._memory[name] = whole
