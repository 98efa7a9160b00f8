"""The report of a run: table, ``loss_weights.yaml`` and figure, at the end of fit or from a log folder later on."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lightning_gradnorm.folders import Folder
from lightning_gradnorm.report import figure
from lightning_gradnorm.report.extremes import extremes
from lightning_gradnorm.report.history import Curve, History, read_history
from lightning_gradnorm.report.palette import has_shades, styles
from lightning_gradnorm.report.sparkline import sparklines
from lightning_gradnorm.report.table import LEGEND, plain_table, print_line, print_table
from lightning_gradnorm.report.task_summary import TaskSummary
from lightning_gradnorm.task_names import task_tag
from lightning_gradnorm.weights_file import FILE_NAME, read_file, write_weights

_STEADY = 0.1  # of a weight's mean: what it may vary by, and still pass for fixed


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
        held_out: metric of the last validation → its value.
    """

    method: str
    rows: Sequence[TaskSummary]
    steps: int
    warmup: int
    settings: Mapping[str, Any]
    logged_only: bool = False
    measured: int | None = None
    held_out: Mapping[str, float] = MappingProxyType({})

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
        """Whether fixed weights would do, and what to do about it, in a sentence; of weights that never moved nothing."""
        wandering = {row.task: row.std_after_warmup / row.mean_after_warmup for row in self.rows if row.mean_after_warmup > 0}
        wandering = {task: share for task, share in wandering.items() if math.isfinite(share)}
        if not any(row.std > 0 for row in self.rows) or not wandering:
            return ""
        task, most = max(wandering.items(), key=lambda item: item[1])
        kind = "logged steps" if self.logged_only else "measured steps" if self._is_partly_measured else "steps"
        since = f"After the first {self.warmup} {kind}" if self.warmup else "From the first step on"
        if most <= _STEADY:
            return (
                f"{since} every weight stayed within {most:.0%} of its mean: fixed weights would do. To train with them: "
                f"LossBalancingCallback(FixedWeights.from_file({FILE_NAME!r}))."
            )
        return (
            f"{since} the weight of {task!r} moved by {most:.0%} of its mean: leave the balancing on. Whether fixed weights do "
            f"as well, a run with FixedWeights.from_file({FILE_NAME!r}) says."
        )

    def __str__(self) -> str:
        return "\n".join((plain_table(self._shown, self.heading), *self._notes))

    @property
    def _notes(self) -> list[str]:
        """What stands below the table."""
        return [*filter(None, (self._left_out, LEGEND, self.verdict))]

    def print(self) -> None:
        """The table and the verdict to the console, drawn by rich where it is installed."""
        named = sorted(self._shown, key=lambda row: -row.final) if has_shades(len(self._shown)) else self._shown
        print_table(self._shown, self.heading, {task: style.colour for task, style in styles([r.task for r in named]).items()})
        for line in self._notes:
            print_line(line)

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
            held_out=self.held_out,
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
    measured, held_out = content.get("measured_steps"), content.get("held_out") or {}
    return RunReport(content.get("method", ""), rows, *counts, settings, measured=measured, held_out=held_out), history


def with_ways(rows: Sequence[TaskSummary], history: History) -> list[TaskSummary]:
    """The rows, with the weights' way through the run, from the first step on whether that was logged or not."""
    starts, curves = {task_tag(row.task): row.start for row in rows}, history.of("loss_weight")
    ways = sparklines(
        {task: Curve([steps[0] - 1, *steps], [starts.get(task, math.nan), *values]) for task, (steps, values) in curves.items()}
    )
    return [dataclasses.replace(row, way=ways.get(task_tag(row.task), "")) for row in rows]


def draw(history: History, folder: str | Path, title: str = "") -> str | Path:
    """Write the figure into a folder, also behind a URL; returns its path."""
    return Folder(folder).write(figure.FILE_NAME, figure.picture_of(history, title).png)


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
    rows = with_ways(rows, history)
    return RunReport("The run", rows, steps, steps // 10, {}, logged_only=True)


def _shares(norms: Mapping[str, float]) -> dict[str, float]:
    whole = sum(norms.values())
    return {task: norm / whole for task, norm in norms.items()} if whole else {}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan


def _deviation(values: Sequence[float]) -> float:
    return statistics.pstdev(values) if all(map(math.isfinite, values)) else math.nan
