"""Notices a training loop that goes past the callback: no ``total_loss``, or an optimiser that the Trainer does not see."""

from typing import Any

from lightning_gradnorm.callbacks.lightning_api import Trainer
from lightning_gradnorm.callbacks.refusals import never_called
from lightning_gradnorm.session import BalancingSession

_PATIENCE = 100  # optimiser steps of a manual loop, which may begin with something else than the tasks


class LoopWatch:
    """Looks at one fit, batch by batch, until it has seen what it should.

    Args:
        session: whose totals are waited for.
        name: of the callback, for the messages.
    """

    def __init__(self, session: BalancingSession, name: str) -> None:
        self._session, self._name = session, name
        self._backward = False
        self._steps = 0
        self._first_step: int | None = None
        self._versions: int | None = None

    def begin_batch(self, trainer: Trainer, module: Any) -> None:
        """A batch begins."""
        if self._first_step is None:
            self._first_step = trainer.global_step
        unmoved = not module.automatic_optimization and trainer.global_step == self._first_step
        self._versions = _versions(module) if unmoved else None

    def see_backward(self) -> None:
        """A loss of this fit goes backward."""
        self._backward = True

    def end_batch(self, number: int, module: Any) -> None:
        """A batch is over.

        Args:
            number: the Trainer's ``global_step`` by now.
            module: that is trained.

        Raises:
            RuntimeError: where the first step of an automatic loop is over, and no total was asked for.
        """
        stepped = number != self._first_step
        self._steps += stepped
        if self._session.totals:
            if self._versions is not None and not stepped and self._backward and _versions(module) != self._versions:
                self._tell_unseen()
        elif self._backward and stepped:
            if module.automatic_optimization:
                raise RuntimeError(self._never_called(module))
            if self._steps >= _PATIENCE:
                self._session.tell("never called", self._never_called(module))

    def end_epoch(self, trainer: Trainer, module: Any) -> None:
        """An epoch is over."""
        if module.automatic_optimization or not self._backward:
            return
        if not self._session.totals:
            self._session.tell("never called", self._never_called(module))
        elif trainer.global_step == self._first_step:
            self._tell_unseen()

    def _never_called(self, module: Any) -> str:
        return never_called(module, self._name, sorted(self._session.handed_out))

    def _tell_unseen(self) -> None:
        self._session.tell(
            "unseen optimizer",
            "The network's parameters are trained, and trainer.global_step does not move: the Trainer does not see the "
            f"optimizer's steps, so {self._name} updates no weight. Step the optimizer that self.optimizers() gives, not "
            "self.optimizers(use_pl_optimizer=False) or one of your own.",
        )


def _versions(module: Any) -> int:
    """A number that changes with the parameters; it costs no look at their values."""
    return sum(parameter._version for parameter in module.parameters())
