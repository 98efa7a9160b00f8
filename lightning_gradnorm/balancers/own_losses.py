"""For methods whose weights depend on the losses of the step itself."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.measurement import Measurement, reading_is_free, stack_scalars


class OwnLosses(RuleBalancer):
    """A ``RuleBalancer`` that implements ``_weights_of`` alone, and none of whose losses may be negative.

    Under DDP and accumulation each batch has its own weights.
    """

    needs_positive_losses = True

    @torch.no_grad()
    def weights_at(self, losses: Mapping[str, Tensor]) -> Tensor:
        tasks = tuple(losses)
        self._check_names(tasks)
        stacked = stack_scalars(losses.values())
        if reading_is_free(stacked):
            self._check_not_negative(tasks, stacked)
        return self._weights_of(stacked, tasks)

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weights": self._weights_of(measurement.losses, measurement.tasks)}

    def _remembered(self, name: str, tasks: Sequence[str], like: Tensor) -> Tensor:
        """These tasks' entries of a remembered vector, shape ``[len(tasks)]``; a new task's is the one that it starts at.

        Args:
            name: of the vector, one of ``_remembers``.
            tasks: their names.
            like: a tensor of the device and the type that the entries are to have.
        """
        first = like.new_full((), dict(self._remembers)[name])
        known = dict(zip(self.tasks, self._memory[name].unbind(), strict=True))
        return torch.stack([known.get(task, first).to(like) for task in tasks])

    @abstractmethod
    def _weights_of(self, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        """∂total/∂L_i at these losses, shape ``[T]``.

        Args:
            losses: detached, shape ``[T]``.
            tasks: their names.
        """
