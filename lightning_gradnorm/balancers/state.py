"""What a balancer has learnt: kept for each task by its name, saved, restored, moved to where the measurements are."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers.names import NamedTasks
from lightning_gradnorm.balancers.part import Part
from lightning_gradnorm.measurement import widest_float
from lightning_gradnorm.plain import plain_names


class KeptState(NamedTasks):
    """The state of a balancer: weights and other ``[T]`` vectors, counts, and the parts that learn by themselves.

    Args:
        tasks: all tasks' names, if they are to be fixed from the start.

    Attributes:
        tasks: the names known so far, ``T`` of them; the order of every vector of state.
        steps: optimiser steps seen.
        skipped_updates: scalar int64 tensor; updates skipped because a loss or gradient was not finite, or no task had one.
        idle_steps: int64, shape ``[T]``; the measured steps in which the task was there and had no gradient.
        diagnostics: tag → what the last update computed, one entry per task of its measurement.
    """

    _remembers: tuple[tuple[str, float], ...] = ()  # name of a ``[T]`` vector of state → its entry for a new task
    _parts: Mapping[str, Part] = MappingProxyType({})  # name in the state → part; set before this constructor runs

    def __init__(self, tasks: Iterable[str] | None) -> None:
        super().__init__(tasks)
        self._clear()

    def _clear(self) -> None:
        self.tasks: tuple[str, ...] = ()
        self.steps: int = 0
        self.skipped_updates: Tensor = torch.zeros((), dtype=torch.int64)
        self.idle_steps: Tensor = torch.zeros(0, dtype=torch.int64)
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

    def reset(self) -> None:
        """Forget all that was learnt: tasks, weights, initial losses, optimiser state. The next step starts anew."""
        self._clear()

    def state_dict(self) -> dict[str, Any]:
        """All that was learnt, as plain tensors, numbers, strings, lists and dicts."""
        return {
            "tasks": list(self.tasks),
            "steps": self.steps,
            "method": self.state_name,
            "skipped_updates": self.skipped_updates.clone(),
            "idle_steps": self.idle_steps.clone(),
            "weights": self._weights.clone(),
            "memory": {name: vector.clone() for name, vector in self._memory.items()},
            **{name: part.state_dict() for name, part in self._parts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``.

        Args:
            state: what it gave; entries that are not of the method are left alone.

        Raises:
            ValueError: if it is of another method, or holds other tasks than the declared ones; no state changes.
        """
        self._check_method(state)
        tasks = plain_names(state["tasks"])
        self._check_declared(tasks)
        self._clear()
        self.tasks = tasks
        self.steps = int(state["steps"])
        self.skipped_updates = state["skipped_updates"].clone()
        wide = widest_float(state["weights"].device)  # a device may have had less
        self._weights = state["weights"].to(wide, copy=True)
        idle = state.get("idle_steps")  # not in the states of 0.1
        self.idle_steps = torch.zeros_like(self._weights, dtype=torch.int64) if idle is None else idle.clone()
        self._memory = {name: state["memory"][name].to(wide, copy=True) for name, _ in self._remembers}
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    def _check_method(self, state: Mapping[str, Any]) -> None:
        own = [cls.__name__ for cls in type(self).__mro__ if issubclass(cls, KeptState)]
        method = state.get("method", self.state_name)  # not in the states of 0.1
        lacking = {"tasks", "weights", *self._parts} - set(state)
        lacking |= {name for name, _ in self._remembers} - set(state.get("memory", ()))
        if lacking or method not in own:
            found = f"of {method}" if "method" in state else f"without {', '.join(map(repr, sorted(lacking)))}"
            raise ValueError(
                f"{self.state_name} takes up a state of its own, and this one is {found}. Load it into the method that it is "
                "from, or start anew without it."
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
            self.idle_steps = torch.cat([self.idle_steps, self.idle_steps.new_zeros(new)])
            for name, entry in self._remembers:
                self._memory[name] = torch.cat([self._memory[name], self._weights.new_full((new,), entry)])

    def _move(self, device: torch.device) -> None:
        dtype = widest_float(device)
        self._weights = self._weights.to(device, dtype)
        self._memory = {name: vector.to(device, dtype) for name, vector in self._memory.items()}
        self.skipped_updates, self.idle_steps = self.skipped_updates.to(device), self.idle_steps.to(device)

    def _first_weight(self, task: str) -> float:
        """The weight that the task's first step applies."""
        return 1.0
