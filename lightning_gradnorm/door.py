"""``total_loss``: where any code that has a step's losses in one place hands them over, whoever wrote the module."""

from collections.abc import Mapping
from contextvars import ContextVar, Token
from typing import Any, Protocol

from torch import Tensor

from lightning_gradnorm.losses import TaskLosses, check_losses, plain_sum


class AtWork(Protocol):
    """Whoever weighs the losses of the batch under way."""

    def total(
        self, losses: TaskLosses, kpis: Mapping[str, Any], points: Mapping[str, Tensor], *, differentiable: bool | None
    ) -> Tensor:
        """The total, scalar."""


_AT_WORK: ContextVar[AtWork | None] = ContextVar("lightning_gradnorm_at_work", default=None)


class Door:
    """Opens the way from ``total_loss`` to whoever weighs the losses, in this thread, and closes it."""

    def __init__(self) -> None:
        self._token: Token[AtWork | None] | None = None  # while it is open

    def open(self, to: AtWork) -> None:
        """From now on ``total_loss`` leads there."""
        self.close()
        self._token = _AT_WORK.set(to)

    def close(self) -> None:
        """``total_loss`` leads where it led before, if this door is open."""
        if self._token is None:
            return
        token, self._token = self._token, None
        try:
            _AT_WORK.reset(token)
        except ValueError:  # opened in another context: a thread's, or a task's
            _AT_WORK.set(None)


def total_loss(
    losses: TaskLosses, *, kpis: Mapping[str, Any] | None = None, points: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The loss to train on, scalar: Σ_i w_i L_i with the present weights of the Trainer at work; without one, Σ_i L_i.

    For code that has all losses of a step in one place and is no method of a module with ``MultiTaskMixin``: a criterion, a
    ``training_step`` of a module that you did not write, the place where a library adds its terms up::

        return total_loss({"energy": energy_loss, "forces": force_loss})  # in the place of energy_loss + force_loss

    It finds the balancing callback of the Trainer whose batch is under way in this thread. Outside training it is Σ_i L_i.

    Args:
        losses: task name → scalar loss; see ``MultiTaskMixin.total_loss``.
        kpis: task name → key performance indicator, for methods that prioritise by it.
        points: task name → what identifies the points of its per-point losses.

    Raises:
        TypeError, ValueError: for a loss dict that cannot be used; the message names the task and the way out.
    """
    at_work = _AT_WORK.get()
    if at_work is None:
        return plain_sum(check_losses(losses, differentiable=False))
    return at_work.total(losses, kpis or {}, points or {}, differentiable=None)
