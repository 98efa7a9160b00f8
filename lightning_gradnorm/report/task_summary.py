"""What a fit came to for one task."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskSummary:
    """One task's row at the end of fit.

    Attributes:
        task: its name.
        start: the weight of its first step.
        mean: mean of the weights that its steps applied.
        std: their standard deviation.
        final: the weight that a next step would apply.
        share_before: its part of Σ_i n_i at the first measured step in which it had a gradient, in [0, 1]; NaN if none was
            measured.
        share_after: its part of Σ_i w_i n_i, mean over the last epoch's steps in which it had a gradient; NaN likewise.
        loss_ratio: L_i(t) over its loss at that first step, mean over the same steps.
        mean_after_warmup: mean of the weights without the first steps (``RunSummary.warmup_steps``); NaN if there are none.
        std_after_warmup: their standard deviation.
        way: the weight over the steps, as a sparkline; empty where it is not known.
    """

    task: str
    start: float
    mean: float
    std: float
    final: float
    share_before: float
    share_after: float
    loss_ratio: float
    mean_after_warmup: float = math.nan
    std_after_warmup: float = math.nan
    way: str = ""

    def statistics(self) -> dict[str, float | str]:
        """All but the name, weights first."""
        return {name: getattr(self, name) for name in _STATISTICS} | ({"way": self.way} if self.way else {})

    @classmethod
    def of_statistics(cls, task: str, row: Mapping[str, float | str | None]) -> "TaskSummary":
        """What ``statistics`` gave; NaN for what is missing."""
        numbers = {name: math.nan if row.get(name) is None else float(row[name] or 0) for name in _STATISTICS}
        return cls(task, **numbers, way=str(row.get("way") or ""))


_STATISTICS = (
    "final",
    "mean",
    "std",
    "mean_after_warmup",
    "std_after_warmup",
    "start",
    "share_before",
    "share_after",
    "loss_ratio",
)
