"""Between the module, which has the losses, and the callback, which needs them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.callbacks.kpis import read_kpis
from lightning_gradnorm.gradients import tap_losses
from lightning_gradnorm.losses import plain_sum, weighted_sum
from lightning_gradnorm.pointwise import NotedPoints, PointWeighting


@dataclass(frozen=True)
class NotedLosses:
    """What one ``total_loss`` call left behind for the backward that follows.

    Attributes:
        losses: task name → the tapped loss, with its graph; the plain one where no gradients are to be read.
        tapped: whether they are tapped.
        weights: those that the total applied, shape ``[T]``.
        kpis: task name → scalar, where the method needs them.
        points: task name → its points, where they are weighed one by one.
    """

    losses: dict[str, Tensor]
    tapped: bool
    weights: Tensor
    kpis: dict[str, Tensor]
    points: dict[str, NotedPoints]


class BalancingLink:
    """Put on the module while a Trainer is at work: gives ``total_loss`` its weights and notes the losses.

    Noted losses hold the graph of a step, so a deep copy of the module gets a link without them (to the same weights),
    and a pickled one gets none.
    """

    def __init__(self, balancer: LossBalancer, points: Mapping[str, PointWeighting]) -> None:
        self.balancer, self.points = balancer, points
        self.recording = False
        self.reads_gradients = False
        self.once_per_step = True
        self.noted: list[NotedLosses] = []
        self.evaluated: list[dict[str, Tensor]] | None = None  # the losses of an evaluation batch, while there is one
        disable: Any = torch.compiler.disable
        self._outside_compiled_code: Callable[..., Tensor] = disable(self._total)

    def total(
        self, losses: Mapping[str, Tensor], network: Any, kpis: Mapping[str, Any], points: Mapping[str, Tensor]
    ) -> Tensor:
        """The weighted total, scalar, of checked losses; a compiled ``training_step`` breaks its graph here."""
        return self._outside_compiled_code(losses, network, kpis, points)

    def _total(
        self, losses: Mapping[str, Tensor], network: Any, kpis: Mapping[str, Any], points: Mapping[str, Tensor]
    ) -> Tensor:
        if not (self.recording and torch.is_grad_enabled()):
            # Outside training a term is the plain mean of its points: they are not those that have masks.
            terms = {task: loss.mean() if loss.ndim else loss for task, loss in losses.items()}
            if self.evaluated is not None:
                self.evaluated.append({task: loss.detach() for task, loss in terms.items()})
            return plain_sum(terms)
        if self.noted and self.once_per_step:
            raise RuntimeError(
                f"total_loss() was called twice in one step: first for the tasks {list(self.noted[-1].losses)}, now for "
                f"{list(losses)}. "
                "Call it once with the losses of all tasks; add terms that are not to be balanced to what it returns."
            )
        indicators = read_kpis(losses, kpis) if "kpis" in self.balancer.needs else {}
        weighed = {task: NotedPoints(losses[task].detach(), points.get(task)) for task in losses if task in self.points}
        terms = {
            task: self.points[task].term(loss, points.get(task), network) if task in weighed else loss
            for task, loss in losses.items()
        }
        total_of = tap_losses(terms) if self.reads_gradients else terms
        weights = self.balancer.weights_at(total_of)
        self.noted.append(NotedLosses(total_of, self.reads_gradients, weights, indicators, weighed))
        return weighted_sum(weights, total_of)

    def start(self, *, reads_gradients: bool, once_per_step: bool) -> None:
        """Note losses from now on."""
        self.noted.clear()
        self.recording, self.reads_gradients, self.once_per_step = True, reads_gradients, once_per_step

    def stop(self) -> None:
        """Note nothing more, and let go of what was noted."""
        self.noted.clear()
        self.recording = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "BalancingLink":
        return BalancingLink(self.balancer, self.points)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return (type(None), ())
