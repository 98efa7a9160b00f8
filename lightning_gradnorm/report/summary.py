"""Running statistics of a fit, per task, without keeping its history."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.measurement import Measurement, reading_is_free
from lightning_gradnorm.report.task_summary import TaskSummary

_FIRST = ("start", "share_before", "first_loss")
_SUMS = ("steps", "weight", "weight_squared", "epoch_steps", "epoch_share", "epoch_ratio")
_WEIGHTS = 3  # the first of them are the weights' own
_EPOCH = 3  # the sums from here on are over the last epoch that measured anything


def _mean_std(steps: float, total: float, squared: float) -> tuple[float, float]:
    mean = total / steps
    return mean, max(squared / steps - mean * mean, 0.0) ** 0.5


class RunSummary:
    """Adds up what each optimiser step applied and measured; plain tensors, so that it survives a checkpoint."""

    def __init__(self) -> None:
        self.tasks: tuple[str, ...] = ()
        self._first = torch.full((len(_FIRST), 0), torch.nan, dtype=torch.float64)
        self._sums = torch.zeros(len(_SUMS), 0, dtype=torch.float64)
        self._epoch = 0
        self._started: set[str] = set()
        # Sums of the weights after 1, 2, 4, … steps, to have the mean without a warm-up whose length nobody knew at its end.
        self._added = 0
        self._passed = 0
        self._marks: dict[int, Tensor] = {}

    def count_step(self) -> None:
        """One more optimiser step, measured or not."""
        self._passed += 1

    @torch.no_grad()
    def add(self, weights: Tensor, measurement: Measurement, epoch: int, interval: int = 1) -> None:
        """Take one measured optimiser step.

        Args:
            weights: the weights that it applied, of ``measurement.tasks``, shape ``[T]``.
            measurement: its losses and norms; a step with a non-finite loss or norm, or none above 0, is left out.
            epoch: its number; the first step of another epoch starts the epoch's sums anew.
            interval: of how many optimiser steps it is the measured one: it counts for all of them in the weights' means.
        """
        tasks, losses, norms = measurement[:3]
        self._make_room(tasks, losses)
        weights = weights.to(losses)
        usable = (losses if norms is None else losses + norms / norms.sum()).sum().isfinite()  # all norms 0 is no share
        norms = torch.full_like(losses, torch.nan) if norms is None else norms.to(losses)
        active = norms != 0  # a task without a gradient has no share of it, and its loss is none to compare with
        at = (
            slice(None)
            if tasks == self.tasks
            else torch.tensor([self.tasks.index(task) for task in tasks], device=losses.device)
        )
        if not self._started.issuperset(tasks):
            first = torch.stack([weights, *torch.where(active, torch.stack([norms / norms.sum(), losses]), torch.nan)])
            self._first[:, at] = torch.where(self._first[:, at].isnan() & usable, first, self._first[:, at])
            self._note_started(losses)
        if epoch != self._epoch:
            self._sums[_EPOCH:] = 0.0
            self._epoch = epoch
        one, weighted = torch.ones_like(losses), weights * norms
        added = torch.stack([one, weights, weights * weights, one, weighted / weighted.sum(), losses / self._first[2, at]])
        added[:_WEIGHTS] *= interval
        added[_EPOCH:] = torch.where(active, added[_EPOCH:], 0.0)
        self._sums[:, at] += torch.where(usable, added, 0.0)
        self._added += 1
        if self._added & (self._added - 1) == 0:
            self._marks[self._added] = self._sums[:_WEIGHTS].clone()

    def _note_started(self, like: Tensor) -> None:
        """Who has a first loss; elsewhere than on the CPU asked for after 1, 2, 4, … steps only, for the host has to wait."""
        if reading_is_free(like) or self._added & (self._added + 1) == 0:
            firsts = zip(self.tasks, self._first[2].tolist(), strict=True)
            self._started.update(task for task, first_loss in firsts if not math.isnan(first_loss))

    def rows(self, final: Mapping[str, float]) -> list[TaskSummary]:
        """One row per task that took part in a step; ``final``: task → weight of a next step."""
        rows = []
        later = self._after_warmup()
        for task, first, sums in zip(self.tasks, self._first.T.tolist(), self._sums.T.tolist(), strict=True):
            (start, share_before, _), (steps, weight, squared, epoch_steps, share, ratio) = first, sums
            if steps:
                mean, std = _mean_std(steps, weight, squared)
                after = (share / epoch_steps, ratio / epoch_steps) if epoch_steps else (math.nan, math.nan)
                end = final.get(task, mean)
                rows.append(
                    TaskSummary(
                        task, start, mean, std, end, share_before, after[0], after[1], *later.get(task, (math.nan, math.nan))
                    )
                )
        return rows

    def _after_warmup(self) -> dict[str, tuple[float, float]]:
        """Task → mean and deviation of its weights after the warm-up; of those that took part since."""
        mark, since = self._marks.get(self.warmup_steps), self._sums[:_WEIGHTS].clone()
        if mark is not None:
            since[:, : mark.shape[1]] -= mark.to(since)
        return {task: _mean_std(*sums) for task, sums in zip(self.tasks, since.T.tolist(), strict=True) if sums[0]}

    @property
    def warmup_steps(self) -> int:
        """The largest power of two up to a tenth of the measured steps; 0 for fewer than ten."""
        return max((mark for mark in self._marks if 10 * mark <= self._added), default=0)

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return max(self._passed, self._added)

    @property
    def measured(self) -> int:
        """How many of them were measured, also those that were not finite."""
        return self._added

    def state_dict(self) -> dict[str, Any]:
        return {
            "tasks": list(self.tasks),
            "started": sorted(self._started),
            "epoch": self._epoch,
            "first": self._first.clone(),
            "sums": self._sums.clone(),
            "added": self._added,
            "passed": self._passed,
            "marks": {str(step): sums.clone() for step, sums in self._marks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tasks, self._started, self._epoch = tuple(state["tasks"]), set(state["started"]), state["epoch"]
        self._first, self._sums = state["first"].clone(), state["sums"].clone()
        self._passed = state.get("passed", 0)
        self._added, self._marks = state["added"], {int(step): sums.clone() for step, sums in state["marks"].items()}

    def _make_room(self, tasks: Sequence[str], like: Tensor) -> None:
        new = tuple(task for task in tasks if task not in self.tasks)
        if new or self._sums.device != like.device:
            self.tasks += new
            self._first = torch.cat([self._first.to(like), like.new_full((len(_FIRST), len(new)), math.nan)], dim=1)
            self._sums = torch.cat([self._sums.to(like), like.new_zeros(len(_SUMS), len(new))], dim=1)
