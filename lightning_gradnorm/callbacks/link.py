"""Between the module, which has the losses, and the callback, which needs them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.gradients import tap_losses


@dataclass(frozen=True)
class NotedLosses:
    """What one ``total_loss`` call left behind for the backward that follows.

    Attributes:
        losses: task name → the tapped loss, with its graph; the plain one where no gradients are to be read.
        tapped: whether they are tapped.
    """

    losses: dict[str, Tensor]
    tapped: bool


class BalancingLink:
    """Put on the module while a Trainer is at work: gives ``total_loss`` its weights and notes the losses.

    Noted losses hold the graph of a step, so a deep copy of the module gets a link without them (to the same weights),
    and a pickled one gets none.
    """

    def __init__(self, balancer: LossBalancer) -> None:
        self.balancer = balancer
        self.recording = False
        self.reads_gradients = False
        self.once_per_step = True
        self.noted: list[NotedLosses] = []
        disable: Any = torch.compiler.disable
        self._outside_compiled_code: Callable[[Mapping[str, Tensor]], Tensor] = disable(self._total)

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted total, scalar, of checked losses; a compiled ``training_step`` breaks its graph here."""
        return self._outside_compiled_code(losses)

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        if not (self.recording and torch.is_grad_enabled()):
            return self.balancer.total(losses)
        if self.noted and self.once_per_step:
            raise RuntimeError(
                f"total_loss() was called twice in one step: first for the tasks {list(self.noted[-1].losses)}, now for "
                f"{list(losses)}. "
                "Call it once with the losses of all tasks; add terms that are not to be balanced to what it returns."
            )
        total_of = tap_losses(losses) if self.reads_gradients else dict(losses)
        total = self.balancer.total(total_of)
        self.noted.append(NotedLosses(total_of, self.reads_gradients))
        return total

    def start(self, *, reads_gradients: bool, once_per_step: bool) -> None:
        """Note losses from now on."""
        self.noted.clear()
        self.recording, self.reads_gradients, self.once_per_step = True, reads_gradients, once_per_step

    def stop(self) -> None:
        """Note nothing more, and let go of what was noted."""
        self.noted.clear()
        self.recording = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "BalancingLink":
        return BalancingLink(self.balancer)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return (type(None), ())
