"""What the weights' updates computed last, for steps that are written and not measured."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class LastUpdate:
    """Tag → what the last update that had a task computed of it; held by reference, so that holding costs nothing."""

    def __init__(self) -> None:
        self._tasks: tuple[str, ...] = ()
        self._newest: Mapping[str, Tensor] = {}
        self._older: dict[str, dict[str, Tensor]] = {}  # task → tag → scalar, of tasks that the newest may not have

    def take(self, tasks: tuple[str, ...], diagnostics: Mapping[str, Tensor]) -> None:
        """An update has been made.

        Args:
            tasks: of the step.
            diagnostics: tag → what it computed, shape ``[T]``.
        """
        if tasks != self._tasks:
            self._older |= self._by_task()
        self._tasks, self._newest = tasks, diagnostics

    def has(self, task: str) -> bool:
        """Whether an update has had the task."""
        return task in self._tasks or task in self._older

    def of(self, tasks: Sequence[str]) -> Mapping[str, Tensor]:
        """Tag → shape ``[len(tasks)]``; NaN for a task of which no update has computed it."""
        if tuple(tasks) == self._tasks or not self._newest:
            return self._newest
        nothing = next(iter(self._newest.values())).new_tensor(torch.nan)
        known = self._older | self._by_task()
        return {tag: torch.stack([known.get(task, {}).get(tag, nothing) for task in tasks]) for tag in self._newest}

    def _by_task(self) -> dict[str, dict[str, Tensor]]:
        return {task: {tag: vector[k] for tag, vector in self._newest.items()} for k, task in enumerate(self._tasks)}
