"""L_i(0): what a loss ratio is relative to."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_gradnorm.measurement import Measurement

InitialLosses = Literal["first"] | int | Mapping[str, float]


def _positive(task: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"The initial loss of task {task!r} is {value!r}; loss ratios L(t)/L(0) need a finite one above 0. Give it by "
            "hand, for example "
            f"initial_losses={{{task!r}: math.log(num_classes)}} for cross-entropy, or add a constant to the loss."
        )
    return float(value)


class InitialLossTracker:
    """L_i(0) per task: from the first measurement of the task, the mean of its first N, or given.

    Args:
        spec: ``"first"``; a number N of measurements to average; or a mapping of task name → L_i(0) in the loss's own units
            (the paper suggests log C for cross-entropy over C classes). Tasks that a mapping leaves out use their first.

    Raises:
        ValueError: if ``spec`` is none of these, or a given value is not above 0.
    """

    def __init__(self, spec: InitialLosses) -> None:
        self.given = dict(spec) if isinstance(spec, Mapping) else {}
        count = 1 if spec == "first" or isinstance(spec, Mapping) else spec
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"initial_losses is 'first', a number of steps to average, or a dict of task name → L(0); got {spec!r}."
            )
        self.given = {task: _positive(task, value) for task, value in self.given.items()}
        self.setting: str | int | dict[str, float] = dict(self.given) if isinstance(spec, Mapping) else spec
        self._window = count
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        # The last vector handed out, which the usual step asks for again.
        self._known_tasks: tuple[str, ...] = ()
        self._known = torch.zeros(0)

    def check(self, measurement: Measurement) -> None:
        """Refuse a measurement that would become L_i(0) and is not above 0; non-finite ones are not taken at all.

        It reads numbers from the device, only until all L_i(0) are known.

        Raises:
            ValueError: naming the task.
        """
        if measurement.tasks == self._known_tasks:
            return
        for task, loss in zip(measurement.tasks, measurement.losses, strict=True):
            if not self._complete(task) and math.isfinite(value := loss.item()):
                _positive(task, value)

    def observe(self, measurement: Measurement) -> Tensor | None:
        """Take a measurement towards L_i(0).

        Returns:
            L_i(0) of the measured tasks, shape ``[T]``; ``None`` while one is not known.
        """
        if measurement.tasks == self._known_tasks and measurement.losses.device == self._known.device:
            return self._known
        pending = [(task, loss) for task, loss in zip(*measurement[:2], strict=True) if not self._complete(task)]
        if pending and bool(measurement.losses.isfinite().all()):
            for task, loss in pending:
                self._sums[task] = self._sums.get(task, torch.zeros_like(loss)) + loss
                self._counts[task] = self._counts.get(task, 0) + 1
        if not all(self._complete(task) for task in measurement.tasks):
            return None
        self._known_tasks = measurement.tasks
        self._known = torch.stack([self._value(task, measurement.losses) for task in measurement.tasks])
        return self._known

    def _complete(self, task: str) -> bool:
        return task in self.given or self._counts.get(task, 0) >= self._window

    def _value(self, task: str, like: Tensor) -> Tensor:
        if task in self.given:
            return like.new_tensor(self.given[task])
        return self._sums[task].to(like.device, like.dtype) / self._counts[task]

    def reset(self) -> None:
        """Forget what was measured; what was given stays."""
        self._sums, self._counts = {}, {}
        self._known_tasks, self._known = (), torch.zeros(0)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset()
        self._sums = {task: value.clone() for task, value in state["sums"].items()}
        self._counts = dict(state["counts"])
