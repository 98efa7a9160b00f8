"""Several runs against each other: one table, one figure."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from lightning_gradnorm.folders import Folder
from lightning_gradnorm.report.comparison import mean_std
from lightning_gradnorm.report.recorded import RecordedRun, groups_of
from lightning_gradnorm.report.runs_figure import draw_groups
from lightning_gradnorm.report.table import plain_rows, print_line, print_rows

FILE_NAME = "runs.png"
_MOST_TASKS = 6  # that have a column each for their weights
_MOST_METRICS = 6


class RunsReport:
    """What several runs came to; runs that differ in their seed alone stand together.

    Args:
        runs: in the order of the table.
        folder: where they are.
    """

    def __init__(self, runs: Sequence[RecordedRun], folder: str | Path) -> None:
        self.groups: dict[str, list[RecordedRun]] = groups_of(runs)
        spread = ", mean ± standard deviation" if len(runs) > len(self.groups) else ""
        self.heading: str = f"{len(runs)} runs in {folder}{spread}"
        self._tasks = list(dict.fromkeys(task for run in runs for task in run.history.tasks))
        self.metrics: list[str] = list(dict.fromkeys(name for run in runs for name in run.held_out))

    def columns(self) -> tuple[str, ...]:
        """Of the table: method and what its runs differ in, held-out metrics, weights at the end."""
        return ("run", "runs", *self.metrics[:_MOST_METRICS], *self._weights_columns())

    def _weights_columns(self) -> list[str]:
        if len(self._tasks) <= _MOST_TASKS:
            return [f"w {task}" for task in self._tasks]
        return ["smallest w", "largest w"]

    def rows(self) -> list[tuple[str, ...]]:
        """One per group."""
        return [
            (
                label,
                f"{len(runs)}",
                *(_mean([run.held_out[name] for run in runs if name in run.held_out]) for name in self.metrics[:_MOST_METRICS]),
                *self._weights_cells(runs),
            )
            for label, runs in self.groups.items()
        ]

    def _weights_cells(self, runs: Sequence[RecordedRun]) -> list[str]:
        ends = [{task: curve.values[-1] for task, curve in run.history.of("loss_weight").items()} for run in runs]
        means = {task: _geometric_mean([end[task] for end in ends if task in end]) for task in self._tasks}
        known = {task: mean for task, mean in means.items() if not math.isnan(mean)}
        if len(self._tasks) <= _MOST_TASKS:
            return [f"{known[task]:.3g}" if task in known else "–" for task in self._tasks]
        ranked = sorted(known, key=known.__getitem__)
        return [f"{known[task]:.3g} ({task})" for task in (ranked[0], ranked[-1])] if ranked else ["–", "–"]

    @property
    def _notes(self) -> list[str]:
        more = self.metrics[_MOST_METRICS:]
        weights = "w: weight at the end, geometric mean over the runs." if self._tasks else ""
        return [*filter(None, (f"Left out: {', '.join(more)}." if more else "", weights))]

    def __str__(self) -> str:
        return "\n".join((plain_rows(self.columns(), self.rows(), self.heading), *self._notes))

    def print(self) -> None:
        """The table to the console, drawn by rich where it is installed."""
        print_rows(self.columns(), self.rows(), self.heading)
        for note in self._notes:
            print_line(note)

    def draw(self, folder: str | Path) -> str | Path:
        """Write the figure into a folder, also behind a URL; returns its path. Needs matplotlib."""
        return Folder(folder).write(FILE_NAME, draw_groups(self.groups, self.metrics, self.heading).png)


def _mean(values: Sequence[float]) -> str:
    return mean_std(values) if values else "–"


def _geometric_mean(values: Sequence[float]) -> float:
    positive = [value for value in values if 0 < value < math.inf]
    return statistics.geometric_mean(positive) if positive else math.nan
