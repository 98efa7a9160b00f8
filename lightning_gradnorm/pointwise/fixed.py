"""Fixed points: each has a number of its own, and is known by its index."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradnorm.balancers.checks import check_whole
from lightning_gradnorm.measurement import widest_float
from lightning_gradnorm.pointwise.weighting import NotedPoints, PointWeighting


class FixedPoints(PointWeighting):
    """Remembers one λ_i per fixed point, and learns from the mean of its losses in each step.

    Where every batch has all of them, in order, no index is needed; otherwise pass
    ``self.total_loss(losses, points={"residual": index})`` and give ``num_points``.

    Args:
        num_points: how many there are; learnt from the first batch if not given.
        initial: λ at the start.

    Attributes:
        frozen: while true, ``update`` changes nothing.

    Raises:
        ValueError: for a setting outside its range; at a step, for points whose number or index does not fit.
    """

    _of_each: str  # what each point has

    def __init__(self, num_points: int | None, initial: float) -> None:
        rule = "a whole number of points, 1 or more, or None"
        self._given = None if num_points is None else check_whole("num_points", num_points, rule, at_least=1)
        self.initial = initial
        self.frozen = False
        self.reset()

    def reset(self) -> None:
        self._lambdas = torch.full((self._given or 0,), self.initial, dtype=torch.float64)

    @property
    def num_points(self) -> int | None:
        """How many fixed points there are, once that is known."""
        return len(self._lambdas) or None

    def state_dict(self) -> dict[str, Any]:
        return {"lambdas": self._lambdas.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._given is not None and len(state["lambdas"]) not in (0, self._given):
            raise ValueError(
                f"The checkpoint has {self._of_each}s of {len(state['lambdas'])} points, and {type(self).__name__} was given "
                f"num_points={self._given}. They belong to fixed points: go on with the same ones."
            )
        self._lambdas = state["lambdas"].clone()

    @abstractmethod
    def _weights(self, lambdas: Tensor, losses: Tensor) -> Tensor:
        """m, of points with these λ and these losses, shape ``[N]`` each."""

    @abstractmethod
    def _learn(self, mean: Tensor) -> None:
        """Change ``_lambdas``.

        Args:
            mean: of each point's losses in the step, shape ``[num_points]``; NaN for a point that it did not have.
        """

    def _index(self, losses: Tensor, points: Tensor | None) -> Tensor | None:
        """Which points these are; ``None`` for all, in order."""
        known = self.num_points
        if points is None:
            if known not in (None, len(losses)):
                raise ValueError(
                    f"{type(self).__name__} has a {self._of_each} for each of {known} fixed points, and this batch has "
                    f"{len(losses)} losses and no index. Say which points they are: "
                    "total_loss(losses, points={'task': index})."
                )
            return None
        if points.shape != losses.shape or points.is_floating_point() or points.dtype == torch.bool:
            raise ValueError(
                f"The index of {len(losses)} fixed points is a tensor of whole numbers of shape ({len(losses)},); got "
                f"{points.dtype} of shape {tuple(points.shape)}."
            )
        if known is None:
            raise ValueError(f"{type(self).__name__} with an index needs to know how many points there are: give num_points=….")
        if points.device.type == "cpu" and len(points) and not 0 <= int(points.min()) <= int(points.max()) < known:
            raise ValueError(
                f"The index goes from {int(points.min())} to {int(points.max())}; the fixed points are 0 to {known - 1}."
            )
        return points

    @torch.no_grad()
    def weights_for(self, losses: Tensor, points: Tensor | None = None, network: nn.Module | None = None) -> Tensor:
        index = self._index(losses, points)
        if self.num_points is None:
            lambdas = losses.new_full((len(losses),), self.initial, dtype=widest_float(losses.device))
            return self._weights(lambdas, losses)
        lambdas = self._lambdas.to(losses.device)
        return self._weights(lambdas if index is None else lambdas[index], losses)

    @torch.no_grad()
    def update(
        self,
        noted: Sequence[NotedPoints],
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if self.frozen or (not noted and all_reduce is None):
            return
        if self.num_points is None:
            if all_reduce is not None:
                raise ValueError(f"In a distributed run {type(self).__name__} needs num_points=…, the same on every rank.")
            self._lambdas = torch.full((len(noted[0].losses),), self.initial, dtype=torch.float64)
        where = device if all_reduce is not None and device is not None else noted[0].losses.device
        self._lambdas = self._lambdas.to(where, widest_float(where))
        sums = self._lambdas.new_zeros(2, len(self._lambdas))  # of losses, and how many there were
        for losses, points in noted:
            index = self._index(losses, points)
            added = torch.stack([losses, torch.ones_like(losses)]).to(sums)
            sums = sums + added if index is None else sums.index_add(1, index.to(where), added)
        if all_reduce is not None:
            sums = all_reduce(sums)
        self._learn(sums[0] / sums[1])
