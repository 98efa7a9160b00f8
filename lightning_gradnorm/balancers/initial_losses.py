"""L_i(0): what a loss ratio is relative to."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_per_task, check_that, is_per_task
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.plain import plain_keys, plain_number, plain_text

InitialLosses = Literal["first"] | int | Mapping[str, float]


def _positive(task: str, value: object) -> float:
    number = plain_number(value)
    if number is None or not math.isfinite(number) or number <= 0:
        raise ValueError(
            f"The initial loss of task {task!r} is {value!r}; loss ratios L(t)/L(0) need a finite one above 0. Give it by "
            f"hand, for example initial_losses={{{task!r}: math.log(num_classes)}} for cross-entropy, add a constant to the "
            "loss, or take GradNorm(alpha=0), which needs no ratios."
        )
    return float(number)


class InitialLossTracker:
    """L_i(0) per task: from the first measurement of the task, the mean of its first N, or given.

    Args:
        spec: ``"first"``; a number N of measurements to average; or a mapping of task name → L_i(0) in the loss's own units
            (the paper suggests log C for cross-entropy over C classes). Tasks that a mapping leaves out use their first.

    Raises:
        ValueError: if ``spec`` is none of these, or a given value is not above 0.
    """

    def __init__(self, spec: InitialLosses) -> None:
        given = is_per_task(spec)
        first = plain_text(spec) == "first"
        count = 1 if given or first else plain_number(spec)
        rule = "'first', a number of steps to average, or a dict of task name → L(0)"
        check_that("initial_losses", spec, count is not None and count >= 1 and count % 1 == 0, rule)
        values = check_per_task("initial_losses", spec) if given else {}
        self.given: dict[str, float] = {task: _positive(task, value) for task, value in values.items()}
        self._window = int(count or 1)
        self.setting: str | int | dict[str, float] = dict(self.given) if given else "first" if first else self._window
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        # The last vector handed out, which the usual step asks for again.
        self._known_tasks: tuple[str, ...] = ()
        self._known = torch.zeros(0)

    def check(self, measurement: Measurement, active: Tensor | None = None) -> None:
        """Refuse a measurement that would become L_i(0) and is not above 0; non-finite ones are not taken at all.

        A loss of 0 without a gradient is not taken either. It reads numbers from the device, only until all L_i(0) are known.

        Args:
            measurement: of ``T`` tasks.
            active: which of them have a gradient, boolean, shape ``[T]``; ``None`` for all.

        Raises:
            ValueError: naming the task.
        """
        tasks, losses = measurement[:2]
        if self.knows_all(tasks):
            return
        taken = [True] * len(tasks) if active is None else active.tolist()
        for task, loss, is_taken in zip(tasks, losses.tolist(), taken, strict=True):
            if not self._complete(task) and math.isfinite(loss) and (is_taken or loss < 0):
                _positive(task, loss)

    def observe(self, measurement: Measurement, active: Tensor | None = None) -> Tensor:
        """Take a measurement towards L_i(0); it reads numbers from the device, only until all L_i(0) are known.

        Args:
            measurement: of ``T`` tasks.
            active: which of them take part, boolean, shape ``[T]``; ``None`` for all.

        Returns:
            L_i(0) of the measured tasks, shape ``[T]``; NaN where it is not known, or not above 0.
        """
        tasks, losses = measurement[:2]
        if tasks == self._known_tasks and losses.device == self._known.device:
            return self._known
        pending = [position for position, task in enumerate(tasks) if not self._complete(task)]
        if pending and bool(losses.isfinite().all()):
            for position in pending:
                if active is None or bool(active[position]):
                    task, loss = tasks[position], losses[position]
                    self._sums[task] = self._sums.get(task, torch.zeros_like(loss)) + loss
                    self._counts[task] = self._counts.get(task, 0) + 1
        known = torch.stack([self._value(task, losses) for task in tasks])
        known = torch.where(known > 0, known, torch.nan)
        if all(map(self._complete, tasks)):
            self._known_tasks, self._known = tasks, known
        return known

    def knows_all(self, tasks: Sequence[str]) -> bool:
        """Whether L_i(0) of all these is known."""
        return tasks == self._known_tasks or all(map(self._complete, tasks))

    def known(self, tasks: Sequence[str], like: Tensor) -> Tensor | None:
        """Whose L_i(0) is known, boolean, shape ``[T]``; ``None`` where all are."""
        return None if self.knows_all(tasks) else torch.tensor([self._complete(task) for task in tasks], device=like.device)

    def _complete(self, task: str) -> bool:
        return task in self.given or self._counts.get(task, 0) >= self._window

    def _value(self, task: str, like: Tensor) -> Tensor:
        if task in self.given:
            return like.new_tensor(self.given[task])
        if not self._complete(task):
            return like.new_tensor(torch.nan)
        return self._sums[task].to(like.device, like.dtype) / self._counts[task]

    def reset(self) -> None:
        """Forget what was measured; what was given stays."""
        self._sums, self._counts = {}, {}
        self._known_tasks, self._known = (), torch.zeros(0)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset()
        self._sums = {task: value.clone() for task, value in plain_keys(state["sums"]).items()}
        self._counts = plain_keys(state["counts"])
