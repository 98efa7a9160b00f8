"""Where losses come in: weighed and noted in training, as they are outside."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.door import Door
from lightning_gradnorm.losses import TaskLosses, check_losses, plain_sum
from lightning_gradnorm.plain import plain_name
from lightning_gradnorm.pointwise import PointWeighting
from lightning_gradnorm.session.link import TotalLink
from lightning_gradnorm.session.loop import Loop
from lightning_gradnorm.session.noted import NotedLosses, called_twice, multiplied_twice, not_handed_over, note, returned_twice
from lightning_gradnorm.session.shared import SharedReading
from lightning_gradnorm.session.telling import needs_total
from lightning_gradnorm.term_weight import TermWeight


class Totals:
    """Takes losses as a total, as a dict or one by one, and notes them for the backward that follows.

    The session's first half.

    Attributes:
        balancer: whose weights are applied.
        points: task → how the single points of its term are weighed.
        reading: keeps the layer's outputs in the forward passes that are to be read.
        noted: the losses whose backward has not come yet.
        totals: how many totals or terms this run has weighed so far.
        handed_out: the tasks whose weight was handed out.
        on_evaluation: called with losses outside training, task → detached scalar.
    """

    balancer: LossBalancer
    points: dict[str, PointWeighting]
    reading: SharedReading
    handed_out: set[str]
    _loop: Loop | None
    _in_backward: bool  # what is weighed now is a checkpointed forward, run again

    def _note_nothing(self) -> None:
        self.on_evaluation: Callable[[dict[str, Tensor]], None] | None = None
        self.totals: int = 0
        self.noted: list[NotedLosses] = []
        self._recording = False
        self._link: TotalLink | None = None

    def begin_batch(self) -> None:
        """Weigh and note losses from now on. Needed where batches and steps are not one to one."""
        self._recording = True
        self.noted.clear()
        if self._measures:
            self.reading.watch()

    def end_batch(self) -> None:
        """Weigh nothing until the next batch begins: a total is the plain sum, as in evaluation."""
        self._recording = False
        self.noted.clear()
        self.reading.stop_watching()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """One batch, forward and backward: while it lasts, in this thread, ``total_loss`` of any code leads here.

        After it and before the next, losses are what they are, as in evaluation. A batch that ends in an error is forgotten,
        with what the step under way had measured.

        Raises:
            RuntimeError: if no run is open.
        """
        loop, before = self._loop, self.totals
        if loop is None:
            raise RuntimeError("No run is open here: give BalancingSession the network, or open(Loop(network)) before a batch.")
        if self._link is None:
            self._link = TotalLink(self.total)
        self.begin_batch()
        door = Door()
        door.open(self._link)
        try:
            yield
        except BaseException:
            self.drop()
            raise
        else:
            if self.noted or self.totals == before:
                self.tell("not handed over", not_handed_over(self.noted, loop.name))
        finally:
            door.close()
            self.end_batch()

    def drop(self) -> None:
        """Forget the step under way."""
        raise NotImplementedError

    def tell(self, about: str, message: str) -> None:
        """Warn of something, once in a run."""
        raise NotImplementedError

    def total(
        self,
        losses: TaskLosses,
        *,
        kpis: Mapping[str, Any] | None = None,
        points: Mapping[str, Tensor] | None = None,
        differentiable: bool | None = None,
    ) -> Tensor:
        """The loss to train on, scalar: Σ_i w_i L_i with the present weights; outside training Σ_i L_i.

        Args:
            losses: task name → scalar loss, or one loss per point for a task of ``points``, and where the method needs it.
            kpis: task name → key performance indicator, for methods that need it.
            points: task name → what identifies the points of its losses.
            differentiable: whether a backward is to follow; by default where gradients are on and the network trains.

        Raises:
            TypeError, ValueError: for losses that cannot be used.
            RuntimeError: for a second total in a loop that allows one.
        """
        if differentiable is None:
            differentiable = torch.is_grad_enabled() and (self._loop is None or self._loop.network.training)
        checked = check_losses(losses, differentiable=differentiable, per_point=self.points, residuals_for=self._residuals_for)
        loop = self._weighing
        if loop is None:
            # A term is the plain mean of its points here: they are not those that have masks.
            scalars = {task: loss.mean() if loss.ndim else loss for task, loss in checked.items()}
            self._see_evaluated(scalars)
            return plain_sum(scalars)
        if loop.one_total and any(noted.is_total for noted in self.noted):
            raise RuntimeError(called_twice(self.noted[-1].losses, checked))
        if not checked:  # all tasks are absent: a batch without labels trains nothing
            self.totals += 1
            return plain_sum(checked)
        return self._note(loop, checked, kpis or {}, points or {}, as_one=True).total()

    def terms(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Task → w_i L_i, for a library that adds up by itself; outside training, and of absent tasks, the losses as they are.

        Args:
            losses: task name → scalar loss.

        Raises:
            TypeError, ValueError, RuntimeError: as ``total`` does.
        """
        loop = self._weighing
        checked = check_losses(losses, differentiable=loop is not None, residuals_for=self._residuals_for if loop else "")
        if loop is None:
            self._see_evaluated(checked)
            return dict(losses)
        if any(not noted.losses.keys().isdisjoint(checked) for noted in self.noted):
            raise RuntimeError(returned_twice(checked))
        weighed = self._note(loop, checked).terms() if checked else {}
        return {task: _shaped(weighed[task], loss) if task in weighed else loss for task, loss in losses.items()}

    def term(self, task: str, loss: Tensor) -> Tensor:
        """w_i L_i of one task, in the loss's own shape; outside training, or without a gradient, the loss as it is.

        Args:
            task: the term's name.
            loss: of one entry, shape ``[]`` or ``[1]``.

        Raises:
            ValueError: for a loss that cannot be used.
            RuntimeError: for a second loss of a task before the backward of its first.
        """
        loop, grad = self._weighing, torch.is_grad_enabled()
        if loop is None or not loss.requires_grad:
            if not grad and loss.shape in ((), (1,)):
                self._see_evaluated({task: loss.reshape(())})
            return loss
        if any(task in noted.losses for noted in self.noted):
            raise RuntimeError(multiplied_twice(task))
        noted = self._note(loop, check_losses({task: loss}, differentiable=True), is_total=False)
        return _shaped(noted.terms()[task], loss)

    def weight(self, task: str, factor: float = 1.0) -> TermWeight:
        """A stand-in for the number by which a library multiplies one of its losses; see ``TermWeight``.

        Args:
            task: the term's name.
            factor: the number that the library would have been given.

        Raises:
            TypeError, ValueError: for a name or a number that cannot be used, or a method that has to see all losses of a step
                together.
        """
        task = plain_name(task)
        self.balancer.weights_for((task,))  # refuses a name that cannot be used
        if why := needs_total(self.balancer, task in self.points):
            raise ValueError(
                f"weight({task!r}) stands for the number before one loss, and {why}. Where all losses are at hand, hand them "
                "over at once: total_loss({'task': loss, …}, kpis=…, points=…)."
            )
        weight = TermWeight(factor, task, self)
        self.handed_out.add(task)
        return weight

    def _note(
        self,
        loop: Loop,
        losses: Mapping[str, Tensor],
        kpis: Mapping[str, Any] | None = None,
        points: Mapping[str, Tensor] | None = None,
        *,
        is_total: bool = True,
        as_one: bool = False,
    ) -> NotedLosses:
        noted = note(
            self.balancer,
            self.points,
            losses,
            loop.network,
            kpis or {},
            points or {},
            tapped=self._measures,
            is_total=is_total,
            as_one=as_one,
        )
        if not self._in_backward:
            self.totals += 1
            self.noted.append(noted)
        return noted

    def _see_evaluated(self, losses: Mapping[str, Tensor]) -> None:
        if losses and self.on_evaluation is not None:
            self.on_evaluation({task: loss.detach().clone() for task, loss in losses.items()})

    @property
    def _weighing(self) -> Loop | None:
        """The loop that is in a batch of training, if it is."""
        return self._loop if self._recording and torch.is_grad_enabled() else None

    @property
    def _residuals_for(self) -> str:
        """The method, if it needs the losses per point."""
        return type(self.balancer).__name__ if self.balancer.needs_residuals else ""

    @property
    def _measures(self) -> bool:
        return self.balancer.due and self.balancer.needs_gradients


def _shaped(weighed: Tensor, loss: Tensor) -> Tensor:
    """The weighed loss in the shape of the loss, which may have been (1,)."""
    return weighed if weighed.shape == loss.shape else weighed.reshape(loss.shape)
