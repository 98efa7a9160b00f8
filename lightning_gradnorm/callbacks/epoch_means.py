"""Mean losses of an epoch, in training and in evaluation: added up on the device, read once at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.losses import StackedLosses
from lightning_gradnorm.measurement import stack_scalars, widest_float

Gather = Callable[[Any], list[Any]]
_AT_A_TIME = 32  # batches


@dataclass(frozen=True)
class MeanLosses:
    """Of one epoch.

    Attributes:
        total: Σ_i L_i, the mean over the batches.
        tasks: task → L_i, the mean over the batches that have it.
    """

    total: float
    tasks: dict[str, float]


class EpochMeans:
    """Adds up batches, each by its size: what ``self.log(…, on_epoch=True)`` would make of the same losses.

    Batches are added up some at a time: most of them cost no operation on the device, and none waits for it.

    Attributes:
        epoch: that the sums are of; ``None`` before the first.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        # by the tasks that a batch has, so that nothing is looked up on the device: Σ size · L_i, Σ size
        self._sums: dict[tuple[str, ...], tuple[Tensor, float]] = {}
        self._waiting: list[tuple[tuple[str, ...], Tensor, int]] = []  # tasks, L_i, size of batches to be added

    def __bool__(self) -> bool:
        return bool(self._sums or self._waiting)

    def begin(self, epoch: int) -> None:
        """An epoch begins, or goes on after a resume in its middle."""
        if epoch != self.epoch:
            self.reset()
            self.epoch = epoch

    def reset(self) -> None:
        """Forget all batches."""
        self._sums.clear()
        self._waiting.clear()
        self.epoch = None

    def add(self, losses: Mapping[str, Tensor], batch_size: int = 1) -> None:
        """Take one batch.

        Args:
            losses: of the tasks that it has, task → L_i, unweighted and detached, scalar.
            batch_size: what it counts in the means.
        """
        vector = losses.vector if isinstance(losses, StackedLosses) else stack_scalars(losses.values())
        self._waiting.append((tuple(losses), vector, batch_size))
        if len(self._waiting) >= _AT_A_TIME:
            self._add_up()

    def _add_up(self) -> None:
        batches: dict[tuple[tuple[str, ...], int, torch.device], list[Tensor]] = {}
        for tasks, losses, size in self._waiting:
            batches.setdefault((tasks, size, losses.device), []).append(losses)
        self._waiting.clear()
        for (tasks, size, device), rows in batches.items():
            added = torch.stack(rows).sum(0, dtype=widest_float(device))
            sums, before = self._sums.get(tasks, (torch.zeros_like(added), 0.0))
            self._sums[tasks] = sums.to(device).add_(added, alpha=size), before + size * len(rows)

    def means(self, gather: Gather | None = None) -> MeanLosses | None:
        """The means so far, over all ranks; ``None`` where no rank has had a batch. Waits for the device.

        Args:
            gather: gives what every rank hands it; called once by each rank, whatever it has seen.
        """
        self._add_up()
        here = [(key, sums.tolist(), size) for key, (sums, size) in self._sums.items()]
        total, batches = 0.0, 0.0
        sums_of: dict[str, float] = {}
        size_of: dict[str, float] = {}
        for tasks, sums, size in (group for rank in (gather(here) if gather else [here]) for group in rank):
            total, batches = total + sum(sums), batches + size
            for task, value in zip(tasks, sums, strict=True):
                sums_of[task] = sums_of.get(task, 0.0) + value
                size_of[task] = size_of.get(task, 0.0) + size
        if not batches:
            return None
        return MeanLosses(total / batches, {task: value / size_of[task] for task, value in sums_of.items() if size_of[task]})

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings, lists and dicts."""
        self._add_up()
        groups = [{"tasks": list(key), "sums": sums.clone(), "size": size} for key, (sums, size) in self._sums.items()]
        return {"epoch": self.epoch if groups else None, "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``."""
        self._waiting.clear()
        self.epoch = state["epoch"]
        self._sums = {tuple(group["tasks"]): (group["sums"].clone(), group["size"]) for group in state["groups"]}


def batch_size_of(batch: Any) -> int:
    """Rows of the first tensor in a batch, which is what Lightning takes too; 1 where there is none."""
    sizes = _sizes(batch)
    return next(sizes, None) or 1


def _sizes(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        yield len(batch) if batch.ndim else 1
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _sizes(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _sizes(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for entry in fields(batch):
            yield from _sizes(getattr(batch, entry.name, None))
