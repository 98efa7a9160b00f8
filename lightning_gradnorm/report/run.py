"""The report of a run: table, ``loss_weights.yaml`` and figure, at the end of fit or from a log folder later on."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_gradnorm.folders import Folder
from lightning_gradnorm.report import figure
from lightning_gradnorm.report.extremes import extremes
from lightning_gradnorm.report.history import Curve, History, read_history
from lightning_gradnorm.report.table import plain_table, print_table
from lightning_gradnorm.report.task_summary import TaskSummary
from lightning_gradnorm.task_names import task_tag
from lightning_gradnorm.weights_file import FILE_NAME, read_file, write_weights


class RunReport(NamedTuple):
    """A run's statistics.

    Attributes:
        method: the balancer's name.
        rows: one per task.
        steps: optimiser steps of the run.
        warmup: how many of the measured ones the means after warm-up leave out.
        settings: of the method, as plain values.
        logged_only: whether they are over the steps that were logged, instead of all that were measured.
        measured: how many of the steps were measured; ``None`` for all.
    """

    method: str
    rows: Sequence[TaskSummary]
    steps: int
    warmup: int
    settings: Mapping[str, Any]
    logged_only: bool = False
    measured: int | None = None

    @property
    def _is_partly_measured(self) -> bool:
        return self.measured is not None and self.measured < self.steps

    @property
    def heading(self) -> str:
        """Of the figure."""
        measured = f", {self.measured} of them measured" if self._is_partly_measured else ""
        return f"{self.method} after " + (
            f"the {self.steps} logged steps" if self.logged_only else f"{self.steps} steps{measured}"
        )

    @property
    def title(self) -> str:
        """Of the table."""
        return f"{self.heading} (w: weight; before, after: share of the gradient norms on the shared layer)"

    @property
    def _shown(self) -> Sequence[TaskSummary]:
        """All rows, or of very many those with the smallest and the largest weights."""
        names = set(extremes({row.task: row.final for row in self.rows}))
        return [row for row in self.rows if row.task in names]

    @property
    def _left_out(self) -> str:
        others = len(self.rows) - len(self._shown)
        return f"Left out: {others} tasks whose weights end between these; {FILE_NAME} has all." if others else ""

    @property
    def verdict(self) -> str:
        """Whether fixed weights would do, in a sentence."""
        wandering = {row.task: row.std_after_warmup / row.mean_after_warmup for row in self.rows if row.mean_after_warmup > 0}
        wandering = {task: share for task, share in wandering.items() if math.isfinite(share)}
        if not wandering:
            return ""
        task, most = max(wandering.items(), key=lambda item: item[1])
        kind = "logged steps" if self.logged_only else "measured steps" if self._is_partly_measured else "steps"
        since = f"After the first {self.warmup} {kind}" if self.warmup else "From the first step on"
        if most <= 0.1:
            return f"{since} every weight stayed within {most:.0%} of its mean: fixed weights would do."
        return (
            f"{since} the weight of {task!r} varied by {most:.0%} of its mean: fixed weights are another thing than this run."
        )

    def __str__(self) -> str:
        return "\n".join(filter(None, (plain_table(self._shown, self.title), self._left_out, self.verdict)))

    def print(self) -> None:
        """The table and the verdict to the console, drawn by rich where it is installed."""
        print_table(self._shown, self.title)
        for line in filter(None, (self._left_out, self.verdict)):
            print(line)

    def write(self, folder: str | Path) -> str | Path:
        """Write ``loss_weights.yaml`` into a folder, also behind a URL; ``report_of`` reads it. Returns its path."""
        return write_weights(
            folder,
            {row.task: row.statistics() for row in self.rows},
            method=self.method,
            settings=self.settings,
            steps=self.steps,
            warmup=self.warmup,
            measured=self.measured,
            note=self.verdict,
        )


def report_of(folder: str | Path) -> tuple[RunReport, History]:
    """The report of an earlier run, out of its log folder.

    The table is that of the end of fit where ``loss_weights.yaml`` is there; else it is over the steps that were logged. Beside
    that file the folder may be without logs that can be read here, as those of W&B and MLflow: the history is empty then.

    Raises:
        FileNotFoundError, ValueError: as ``read_history`` does, and for a weights file that is something else.
    """
    place = Folder(folder)
    if not place.has(FILE_NAME):
        history = read_history(folder)
        return _of_history(history), history
    try:
        history = read_history(folder)
    except (FileNotFoundError, ValueError) as error:
        history = History({}, (f"No curves, so no figure: {error}",))
    content = read_file(place.path(FILE_NAME))
    rows = [TaskSummary.of_statistics(task, row) for task, row in content["tasks"].items()]
    history = history.in_order_of([task_tag(row.task) for row in rows])
    settings = content.get("settings") or {}
    counts = content.get("steps", 0), content.get("warmup_steps", 0)
    return RunReport(content.get("method", ""), rows, *counts, settings, measured=content.get("measured_steps")), history


def draw(history: History, folder: str | Path, title: str = "") -> str | Path:
    """Write the figure into a folder, also behind a URL; returns its path."""
    return Folder(folder).write(figure.FILE_NAME, figure.drawn(history, title))


def _of_history(history: History) -> RunReport:
    weights, losses = history.of("loss_weight"), history.of("task_loss")
    steps = max(len(curve.steps) for curve in weights.values())
    last = max(steps // 10, 1)
    measured = {task: list(filter(math.isfinite, curve.values)) for task, curve in history.of("grad_norm").items()}
    norms = {task: values for task, values in measured.items() if values and task in weights}
    before = _shares({task: values[0] / (weights[task].values[0] or math.inf) for task, values in norms.items()})
    after = _shares({task: statistics.fmean(values[-last:]) for task, values in norms.items()})
    rows = []
    for task, curve in weights.items():
        loss = losses.get(task, Curve([], []))
        finite = [value for value in loss.values if math.isfinite(value)]
        ratio = statistics.fmean(finite[-last:]) / finite[0] if finite and finite[0] else math.nan
        later = curve.values[steps // 10 :] or curve.values
        rows.append(
            TaskSummary(
                task=task,
                start=curve.values[0],
                mean=_mean(curve.values),
                std=_deviation(curve.values),
                final=curve.values[-1],
                share_before=before.get(task, math.nan),
                share_after=after.get(task, math.nan),
                loss_ratio=ratio,
                mean_after_warmup=_mean(later),
                std_after_warmup=_deviation(later),
            )
        )
    return RunReport("The run", rows, steps, steps // 10, {}, logged_only=True)


def _shares(norms: Mapping[str, float]) -> dict[str, float]:
    whole = sum(norms.values())
    return {task: norm / whole for task, norm in norms.items()} if whole else {}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan


def _deviation(values: Sequence[float]) -> float:
    return statistics.pstdev(values) if all(map(math.isfinite, values)) else math.nan
