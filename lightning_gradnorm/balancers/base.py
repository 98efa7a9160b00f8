"""The contract of a loss balancer: what every method promises, and what it may know."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_whole
from lightning_gradnorm.balancers.idle import mask_of, spread, without_idle
from lightning_gradnorm.balancers.schedule import is_measured
from lightning_gradnorm.balancers.state import KeptState
from lightning_gradnorm.losses import weighted_sum
from lightning_gradnorm.measurement import Measurement, is_of_gradients, reading_is_free
from lightning_gradnorm.plain import plain_names

_NORMS = (
    "each task's gradient on the shared layer, and the measurement has none. Read them with JointBackward, or use "
    "LossBalancingCallback."
)
_WAYS_TO = {  # field of a measurement → what is said where it is missing
    "gradient_norms": _NORMS,
    "gradient_maxima": _NORMS,
    "gradient_means": _NORMS,
    "gramian": _NORMS,
    "kpis": "each task's key performance indicator, and the measurement has none. Pass them with the losses: "
    "self.total_loss(losses, kpis={'task': accuracy, …}).",
    "ntk_traces": "each task's residuals, for the trace of their tangent kernel, and the measurement has none. Use "
    "LossBalancingCallback or BalancingSession, and give each task's loss per point: residual.square() without .mean().",
}


class LossBalancer(KeptState, ABC):
    """Weighs the losses of several tasks, and changes the weights from what each step measured.

    The total loss at step t depends only on the losses and on state from before t; ``update`` gives the weights of step
    t + 1. The first step uses weights of one, unless a method says otherwise. A balancer sees names and detached ``[T]``
    vectors, never a parameter or a graph of the model, so its own learning cannot leak into the network's gradients. It
    needs no Trainer.

    Tasks have names. They are learnt from the measurements, or declared. A task that is absent from a step keeps its
    weight; a new one starts at its first weight, one by default. To a method that reads gradients a task whose gradient is
    exactly zero is absent: it has nothing to learn from the step.

    A method declares what it needs and what it remembers as class attributes, and implements ``_update``; or it derives
    from ``RuleBalancer`` and implements one function of the measurement and the remembered vectors.

    Args:
        tasks: all tasks' names, if they are to be fixed from the start; any other name is then an error.
        update_every: the weights are updated on the first optimiser step and then on one in so many, at a place that moves
            so that tasks which take turns are all met (``is_measured``); the others measure nothing.

    Attributes:
        tasks: the names known so far, ``T`` of them; the order of every vector of state.
        steps: optimiser steps seen.
        skipped_updates: scalar int64 tensor; updates skipped because a loss or gradient was not finite, or no task had one.
        idle_steps: int64, shape ``[T]``; for methods that read gradients, the measured steps in which the task was there and
            had none.
        diagnostics: tag → what the last update computed, one entry per task of its measurement, for people to watch; NaN for
            a task that did not take part, except for its norm of 0.
        frozen: while true, ``update`` measures and computes its diagnostics, and every weight stays as it is.
        needs: the fields of ``Measurement``, beside the losses, that the method cannot do without.
        of_all_parameters: whether all that is trained is the shared layer for it, where the user names none.
    """

    needs: tuple[str, ...] = ()
    needs_positive_losses: bool = False
    of_all_parameters: bool = False
    steps: int
    diagnostics: dict[str, Tensor]

    def __init__(self, *, tasks: Iterable[str] | None = None, update_every: int = 1) -> None:
        whole = check_whole("update_every", update_every, "a whole number of steps, 1 or more", at_least=1)
        self.update_every: int | Literal["auto"] = whole
        super().__init__(tasks)
        self.frozen = False

    @property
    def interval(self) -> int:
        """Of how many optimiser steps one is measured now."""
        return int(self.update_every)

    @property
    def due(self) -> bool:
        """Whether the step to come needs a measurement; see ``is_measured``."""
        return is_measured(self.steps, self.interval)

    @property
    def needs_gradients(self) -> bool:
        """Whether the method needs anything of the tasks' gradients on the shared layer."""
        return any(map(is_of_gradients, self.needs))

    @property
    def needs_residuals(self) -> bool:
        """Whether the method needs each task's loss as squared residuals, one for each point, whose mean it is."""
        return "ntk_traces" in self.needs

    @property
    def needs_all_losses(self) -> bool:
        """Whether a task's weight in a step depends on the losses of that step, so that they have to come together."""
        return type(self).weights_at is not LossBalancer.weights_at

    @property
    def acts_in_backward(self) -> bool:
        """Whether the total is the plain sum, and ``weigh`` weighs the shared parameters' gradients in its backward."""
        return False

    def weigh(self, measurement: Measurement) -> Tensor:
        """The weights of these very gradients, shape ``[T]``, on the CPU; of methods that act in the backward.

        Args:
            measurement: of one batch, of all ranks, as far as its backward has come.
        """
        raise NotImplementedError

    def drop_step(self) -> None:
        """Forget what ``weigh`` gave in a step that will have no ``update``."""

    def weights_at(self, losses: Mapping[str, Tensor]) -> Tensor:
        """∂total/∂L_i at these losses, shape ``[T]``, detached; for most methods they do not depend on the losses.

        Args:
            losses: task name → scalar loss.

        Raises:
            ValueError: if a name is not one of the declared tasks, or a loss is one that the method cannot weigh.
        """
        return self.weights_for(losses)

    def applied_at(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weights that a step with these losses applies, shape ``[T]``, detached: ``weights_at``; frozen, those it has.

        Args:
            losses: task name → scalar loss.

        Raises:
            ValueError: if a name is not one of the declared tasks, or a loss is one that the method cannot weigh.
        """
        if self.acts_in_backward:
            return torch.ones_like(self.weights_for(losses))
        return self.weights_for(losses) if self.frozen else self.weights_at(losses)

    def weights_for(self, tasks: Iterable[str]) -> Tensor:
        """The weights that the next step will apply to ``tasks``, shape ``[len(tasks)]``, detached; new ones included.

        Args:
            tasks: their names, in the order of the vector.

        Raises:
            ValueError: if a name is not one of the declared tasks.
        """
        tasks = tuple(tasks)
        if tasks == self.tasks:
            return self._weights.clone()
        tasks = plain_names(tasks)
        self._check_names(tasks)
        new = [task for task in tasks if task not in self.tasks]
        weights = torch.cat([self._weights, self._weights.new_tensor([self._first_weight(task) for task in new])])
        positions = [new.index(task) + len(self.tasks) if task in new else self.tasks.index(task) for task in tasks]
        return weights.index_select(0, torch.tensor(positions, device=weights.device))

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Σ_i w_i L_i, scalar, with the weights as constants; changes no state.

        Args:
            losses: task name → scalar loss.

        Raises:
            ValueError: if a name is not one of the declared tasks, or a loss is one that the method cannot weigh.
        """
        return weighted_sum(self.applied_at(losses), losses)

    @torch.no_grad()
    def update(self, measurement: Measurement | None) -> None:
        """Take what the step measured; once per optimiser step, after the backward.

        Args:
            measurement: the step's losses and gradient norms, or ``None`` where nothing was measured.

        Raises:
            ValueError: if the measurement lacks what the method needs, or holds what it cannot use; no state changes.
        """
        self.diagnostics = {}
        if measurement is not None and measurement.tasks:
            plain = plain_names(measurement.tasks)
            self._take(measurement if plain is measurement.tasks else measurement._replace(tasks=plain))
        self.steps += 1

    def _take(self, measurement: Measurement) -> None:
        self._check_names(measurement.tasks)
        self._check(measurement)
        active, taking_part = self._mask(measurement), measurement
        if self._may_read(measurement):
            self._check_losses(measurement, active)
            taking_part = without_idle(measurement, active)
        self._learn(measurement.tasks, measurement.losses.device)
        if active is not None:
            positions = self._positions(measurement.tasks)
            self.idle_steps[slice(None) if positions is None else positions] += ~active
        before = self._weights.clone() if self.frozen else None
        self._update(taking_part, self._positions(taking_part.tasks))
        if taking_part is not measurement:
            self.diagnostics = {tag: spread(tag, vector, active) for tag, vector in self.diagnostics.items()}
        if before is not None:
            self._weights = before

    def _positions(self, tasks: Sequence[str]) -> Tensor | None:
        """Where these stand in ``tasks``; ``None`` where they are all of them, in order."""
        positions = [self.tasks.index(task) for task in tasks]
        return None if positions == list(range(len(self.tasks))) else torch.tensor(positions, device=self._weights.device)

    def _may_read(self, measurement: Measurement) -> bool:
        """Whether numbers may be asked for: elsewhere than on the CPU the host would wait, so only until all is settled."""
        return reading_is_free(measurement.losses) or not self._is_settled(measurement.tasks)

    def _is_settled(self, tasks: Sequence[str]) -> bool:
        """Whether nothing is learnt of these tasks once and for all any more."""
        return set(tasks) <= set(self.tasks)

    def _mask(self, measurement: Measurement) -> Tensor | None:
        """Which tasks have a gradient, boolean, shape ``[T]``; ``None`` where all have, or the method reads none."""
        return mask_of(measurement, self.needs)

    def end_epoch(self) -> None:
        """A training epoch has ended; for methods that compare epochs."""

    def settings(self) -> dict[str, Any]:
        """The method's settings as plain values, to be written beside its results."""
        return {"update_every": self.update_every}

    def _check(self, measurement: Measurement) -> None:
        """Raise on a measurement that the method cannot use, before any state changes."""
        for name in self.needs:
            if getattr(measurement, name) is None:
                raise ValueError(f"{type(self).__name__} needs {_WAYS_TO[name]}")

    def _check_losses(self, measurement: Measurement, active: Tensor | None) -> None:
        """Raise on a loss that the method cannot use, before any state changes.

        Args:
            measurement: read only where that is free, and elsewhere until all its tasks are settled.
            active: which tasks have a gradient, boolean, shape ``[T]``; ``None`` for all.
        """
        if self.needs_positive_losses:
            self._check_not_negative(measurement.tasks, measurement.losses)

    def _check_not_negative(self, tasks: Iterable[str], losses: Tensor) -> None:
        values = losses.tolist()
        if not min(values) < 0:
            return
        for task, loss in zip(tasks, values, strict=True):
            if -math.inf < loss < 0:  # what is not finite has the step skipped
                raise ValueError(
                    f"{type(self).__name__} compares losses by their ratios, so none may be negative; the loss of task "
                    f"{task!r} is {loss:g}. Add a constant to it, or take a method that needs no ratios, such as "
                    "GradNorm(alpha=0)."
                )

    @abstractmethod
    def _update(self, measurement: Measurement, positions: Tensor | None) -> None:
        """Change ``_weights`` in place.

        Args:
            measurement: of the tasks that took part.
            positions: where they stand in ``tasks``; ``None`` where they are all of them, in order.

        Tasks without a gradient are left out where it costs nothing to know them. Elsewhere, and where no task has any, they
        are among the others: ``_mask`` tells which take part.
        """
