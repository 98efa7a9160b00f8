"""The contract of a loss balancer: what every method promises, and what it may know."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_gradnorm.losses import check_task_names, weighted_sum
from lightning_gradnorm.measurement import Measurement, widest_float

_NORMS = (
    "each task's gradient on the shared layer, and the measurement has none. Read them with JointBackward, or use "
    "LossBalancingCallback."
)
_WAYS_TO = {  # field of a measurement → what is said where it is missing
    "gradient_norms": _NORMS,
    "gradient_maxima": _NORMS,
    "gradient_means": _NORMS,
    "kpis": "each task's key performance indicator, and the measurement has none. Pass them with the losses: "
    "self.total_loss(losses, kpis={'task': accuracy, …}).",
}


class Part(Protocol):
    """A piece of a method that learns: reset, saved and restored with it."""

    def reset(self) -> None:
        """Forget what was learnt."""

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as plain tensors, numbers, strings, lists and dicts."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``."""


class LossBalancer(ABC):
    """Weighs the losses of several tasks, and changes the weights from what each step measured.

    The total loss at step t depends only on the losses and on state from before t; ``update`` gives the weights of step
    t + 1. The first step uses weights of one, unless a method says otherwise. A balancer sees names and detached ``[T]``
    vectors, never a parameter or a graph of the model, so its own learning cannot leak into the network's gradients. It
    needs no Trainer.

    Tasks have names. They are learnt from the measurements, or declared. A task that is absent from a step keeps its
    weight; a new one starts at its first weight, one by default.

    A method declares what it needs and what it remembers as class attributes, and implements ``_update``; or it derives
    from ``RuleBalancer`` and implements one function of the measurement and the remembered vectors.

    Args:
        tasks: all tasks' names, if they are to be fixed from the start; any other name is then an error.
        update_every: the weights are updated on the first and every so-manieth optimiser step; the others measure nothing.

    Attributes:
        tasks: the names known so far, ``T`` of them; the order of every vector of state.
        steps: optimiser steps seen.
        skipped_updates: scalar int64 tensor; updates skipped because a loss or gradient was not finite.
        diagnostics: tag → what the last update computed, one entry per task of its measurement; for people to watch.
        frozen: while true, ``update`` measures and computes its diagnostics, and every weight stays as it is.
        needs: the fields of ``Measurement``, beside the losses, that the method cannot do without.
    """

    needs: tuple[str, ...] = ()
    needs_positive_losses: bool = False
    _remembers: tuple[tuple[str, float], ...] = ()  # name of a ``[T]`` vector of state → its entry for a new task
    _parts: Mapping[str, Part] = MappingProxyType({})  # name in the state → part; set before this constructor runs

    def __init__(self, *, tasks: Iterable[str] | None = None, update_every: int = 1) -> None:
        if isinstance(update_every, bool) or not isinstance(update_every, int) or update_every < 1:
            raise ValueError(f"update_every is a whole number of steps, 1 or more; got {update_every!r}.")
        if isinstance(tasks, str):
            raise TypeError(f"tasks is a list of names, got the string {tasks!r}. Write tasks=[{tasks!r}].")
        self._declared = None if tasks is None else tuple(tasks)
        check_task_names(self._declared or ())
        self.update_every = update_every
        self.frozen = False
        self._clear()

    def _clear(self) -> None:
        self.tasks: tuple[str, ...] = ()
        self.steps = 0
        self.skipped_updates = torch.zeros((), dtype=torch.int64)
        self.diagnostics: dict[str, Tensor] = {}
        self._weights = torch.ones(0, dtype=torch.float64)
        self._memory = {name: self._weights.clone() for name, _ in self._remembers}
        for part in self._parts.values():
            part.reset()

    @property
    def state_name(self) -> str:
        """Under which a checkpoint holds this method's state."""
        return type(self).__name__

    @property
    def weights(self) -> dict[str, float]:
        """Task → the weight that the next step will apply."""
        return dict(zip(self.tasks, self._weights.tolist(), strict=True))

    @property
    def known_tasks(self) -> tuple[str, ...]:
        """The tasks learnt so far, or else the declared ones."""
        return self.tasks or self._declared or ()

    @property
    def due(self) -> bool:
        """Whether the step to come needs a measurement: the first, and every ``update_every``-th."""
        return self.steps == 0 or (self.steps + 1) % self.update_every == 0

    @property
    def needs_gradients(self) -> bool:
        """Whether the method needs anything of the tasks' gradients on the shared layer."""
        return any(name.startswith("gradient_") for name in self.needs)

    def weights_at(self, losses: Mapping[str, Tensor]) -> Tensor:
        """∂total/∂L_i at these losses, shape ``[T]``, detached; for most methods they do not depend on the losses.

        Args:
            losses: task name → scalar loss.

        Raises:
            ValueError: if a name is not one of the declared tasks, or a loss is one that the method cannot weigh.
        """
        return self.weights_for(losses)

    def weights_for(self, tasks: Iterable[str]) -> Tensor:
        """The weights that the next step will apply to ``tasks``, shape ``[len(tasks)]``, detached; new ones included.

        Raises:
            ValueError: if a name is not one of the declared tasks.
        """
        tasks = tuple(tasks)
        if tasks == self.tasks:
            return self._weights.clone()
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
        return weighted_sum(self.weights_at(losses), losses)

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
            self._check_names(measurement.tasks)
            self._check(measurement)
            self._learn(measurement.tasks, measurement.losses.device)
            positions = [self.tasks.index(task) for task in measurement.tasks]
            before = self._weights.clone() if self.frozen else None
            self._update(
                measurement,
                None if positions == list(range(len(self.tasks))) else torch.tensor(positions, device=self._weights.device),
            )
            if before is not None:
                self._weights = before
        self.steps += 1

    def end_epoch(self) -> None:
        """A training epoch has ended; for methods that compare epochs."""

    def reset(self) -> None:
        """Forget all that was learnt: tasks, weights, initial losses, optimiser state. The next step starts anew."""
        self._clear()

    def settings(self) -> dict[str, Any]:
        """The method's settings as plain values, to be written beside its results."""
        return {"update_every": self.update_every}

    def state_dict(self) -> dict[str, Any]:
        """All that was learnt, as plain tensors, numbers, strings, lists and dicts."""
        return {
            "tasks": list(self.tasks),
            "steps": self.steps,
            "skipped_updates": self.skipped_updates.clone(),
            "weights": self._weights.clone(),
            "memory": {name: vector.clone() for name, vector in self._memory.items()},
            **{name: part.state_dict() for name, part in self._parts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``.

        Raises:
            ValueError: if it holds other tasks than the declared ones.
        """
        self._check_declared(state["tasks"])
        self._clear()
        self.tasks = tuple(state["tasks"])
        self.steps = int(state["steps"])
        self.skipped_updates = state["skipped_updates"].clone()
        self._weights = state["weights"].clone()
        self._memory = {name: state["memory"][name].clone() for name, _ in self._remembers}
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    def _check_names(self, tasks: Sequence[str]) -> None:
        if not tasks:
            raise ValueError(f"{type(self).__name__} weighs at least one task's loss, got none.")
        check_task_names((*self.known_tasks, *(task for task in tasks if task not in self.known_tasks)))
        self._check_declared(tasks)

    def _check_declared(self, tasks: Iterable[str]) -> None:
        unknown = [task for task in tasks if self._declared is not None and task not in self._declared]
        if unknown:
            raise ValueError(
                f"Unknown task{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}: {type(self).__name__} was "
                "given "
                f"tasks={list(self._declared or ())}. Add the name there, or leave tasks out to have the names learnt."
            )

    def _check_named(self, setting: str, names: Iterable[str], measurement: Measurement) -> None:
        """Refuse a setting that names what is no task."""
        known = {*self.known_tasks, *measurement.tasks, *(self._declared or ())}
        unknown = [task for task in names if task not in known]
        if unknown:
            raise ValueError(
                f"{setting} names {', '.join(map(repr, unknown))}, which is no task: the tasks are "
                f"{', '.join(map(repr, sorted(known)))}. "
                "Correct the name; if the task appears only in later batches, list all names with tasks=[…]."
            )

    def _learn(self, tasks: Iterable[str], device: torch.device) -> None:
        """Make room for new tasks, and move the state to where the measurements are."""
        wanted = self.known_tasks
        wanted = (*wanted, *(task for task in tasks if task not in wanted))
        if self._weights.device != device:
            self._move(device)
        if wanted != self.tasks:
            new = len(wanted) - len(self.tasks)
            self.tasks = wanted
            first = [self._first_weight(task) for task in wanted[-new:]]
            self._weights = torch.cat([self._weights, self._weights.new_tensor(first)])
            for name, entry in self._remembers:
                self._memory[name] = torch.cat([self._memory[name], self._weights.new_full((new,), entry)])

    def _move(self, device: torch.device) -> None:
        dtype = widest_float(device)
        self._weights = self._weights.to(device, dtype)
        self._memory = {name: vector.to(device, dtype) for name, vector in self._memory.items()}
        self.skipped_updates = self.skipped_updates.to(device)

    def _first_weight(self, task: str) -> float:
        """The weight that the task's first step applies."""
        return 1.0

    def _check(self, measurement: Measurement) -> None:
        """Raise on a measurement that the method cannot use, before any state changes."""
        for name in self.needs:
            if getattr(measurement, name) is None:
                raise ValueError(f"{type(self).__name__} needs {_WAYS_TO[name]}")
        # Elsewhere than on the CPU, asking would make the host wait; there it is asked until all tasks are known.
        asks = self.needs_positive_losses and (measurement.losses.device.type == "cpu" or self.tasks != measurement.tasks)
        if asks:
            self._check_not_negative(measurement.tasks, measurement.losses)

    def _check_not_negative(self, tasks: Iterable[str], losses: Tensor) -> None:
        for task, loss in zip(tasks, losses.tolist(), strict=True):
            if loss < 0:
                raise ValueError(
                    f"{type(self).__name__} compares losses by their ratios, so none may be negative; the loss of task "
                    f"{task!r} is {loss:g}. Add a constant to it, or choose a method that reads gradients, such as GradNorm "
                    "with initial_losses given."
                )

    @abstractmethod
    def _update(self, measurement: Measurement, positions: Tensor | None) -> None:
        """Change ``_weights`` in place.

        Args:
            measurement: of the tasks that took part.
            positions: where they stand in ``tasks``; ``None`` where they are all of them, in order.
        """
