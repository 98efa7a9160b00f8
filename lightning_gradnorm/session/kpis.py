"""The tasks' key performance indicators, as a module passes them to ``total_loss``."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor


def read_kpis(tasks: Iterable[str], kpis: Mapping[str, Any]) -> dict[str, Tensor]:
    """Task → its indicator now, scalar.

    Args:
        tasks: those of the batch.
        kpis: task → a number, a scalar tensor, a torchmetrics ``Metric``, or a callable that returns one of the first two.

    Raises:
        ValueError: if a task has none, or one that is no scalar, or a metric would talk to the other ranks.
    """
    tasks = list(tasks)
    missing = [task for task in tasks if task not in kpis]
    if missing:
        raise ValueError(
            f"No key performance indicator for task {', '.join(map(repr, missing))}. Pass one for every task of the batch: "
            f"self.total_loss(losses, kpis={{{missing[0]!r}: accuracy, …}})."
        )
    return {task: _read(task, kpis[task]) for task in tasks}


@torch.no_grad()
def _read(task: str, kpi: Any) -> Tensor:
    if callable(getattr(kpi, "compute", None)):  # a torchmetrics Metric, without the import
        if getattr(kpi, "sync_on_compute", False) and torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ValueError(
                f"The metric of task {task!r} would exchange its state with the other ranks in the middle of a step, where "
                "they need not be waiting. Build it with sync_on_compute=False; the indicators are averaged over the ranks."
            )
        kpi = kpi.compute()
    elif callable(kpi):
        kpi = kpi()
    value = torch.as_tensor(kpi).detach()
    if value.numel() != 1:
        raise ValueError(
            f"The key performance indicator of task {task!r} has shape {tuple(value.shape)}; it is one number between 0 and 1."
        )
    return value.reshape(()).clone()
