"""What a way to weigh the points of one term is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class NotedPoints(NamedTuple):
    """What one batch had of a term.

    Attributes:
        losses: detached, one per point, shape ``[N]``.
        points: what identifies them, as it was given.
    """

    losses: Tensor
    points: Tensor | None


class PointWeighting(ABC):
    """Weighs the points of one term: its loss is the mean of m_i ℓ_i over the points.

    In a bare loop, ``term`` gives the scalar loss to put into the loss dict, and ``update`` is called once per step.
    """

    def term(self, losses: Tensor, points: Tensor | None = None, network: nn.Module | None = None) -> Tensor:
        """The mean of m_i ℓ_i, scalar; changes no state.

        Args:
            losses: ℓ, one per point, shape ``[N]``.
            points: what identifies the points; see the method.
            network: what the losses were computed with.

        Raises:
            ValueError: if the points are not what the method needs.
        """
        return (self.weights_for(losses, points, network).to(losses) * losses).mean()

    @abstractmethod
    def weights_for(self, losses: Tensor, points: Tensor | None = None, network: nn.Module | None = None) -> Tensor:
        """m_i of these points, shape ``[N]``, detached.

        Args:
            losses: one per point, ``[N]``.
            points: what identifies them: indices ``[N]`` or coordinates ``[N, …]``, as the method asks for.
            network: what is trained, for methods that look at it.

        Raises:
            ValueError: if the points are missing where they are needed, or do not fit.
        """

    def update(
        self,
        noted: Sequence[NotedPoints],
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Learn from an optimiser step's batches.

        Args:
            noted: the batches, none if the step had nothing of this term.
            all_reduce: sums a tensor over the ranks of a distributed run.
            device: where that works.
        """

    def reset(self) -> None:
        """Forget all that was learnt."""

    def settings(self) -> dict[str, Any]:
        """The method's settings as plain values."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that was learnt, as plain tensors, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``.

        Args:
            state: what it gave.
        """


class UniformPoints(PointWeighting):
    """m_i = 1: the plain mean, to compare with by one word."""

    def weights_for(self, losses: Tensor, points: Tensor | None = None, network: nn.Module | None = None) -> Tensor:
        return torch.ones_like(losses, requires_grad=False)
