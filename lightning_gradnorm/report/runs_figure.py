"""The figure of several runs: a column for each method, with its weights and loss ratios; below them the held-out metrics."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_gradnorm.report.dots import draw_dots
from lightning_gradnorm.report.history import Curve
from lightning_gradnorm.report.palette import Style, has_shades, styles
from lightning_gradnorm.report.panels import draw_curves, finish, is_positive, name_ends, scale
from lightning_gradnorm.report.recorded import RecordedRun
from lightning_gradnorm.report.sheet import BOTTOM, Picture, Sheet, cut, in_plain_style

MOST_COLUMNS, _MOST_METRICS = 6, 4
_KINDS = (("loss_weight", "loss weights"), ("loss_ratio", "loss ratios, L(t) / L(0)"), ("task_loss", "losses, unweighted"))
_NAMES, _LONG, _FEW = 7.5, 14, 20  # letters' points, and how many of a name; tasks that are named
_WIDE, _TALL, _LOW = 2.7, 2.5, 0.42  # inches: of a panel; of the metrics' per method


@in_plain_style()
def draw_groups(groups: Mapping[str, Sequence[RecordedRun]], metrics: Sequence[str], title: str) -> Picture:
    """Draw the runs side by side, on the same scales and in the same colours.

    Of runs that differ in their seed alone each is a thin line, and their mean a thick one. A method without curves of ours has
    its metrics alone.

    Args:
        groups: label → runs.
        metrics: held-out ones; the first four are drawn.
        title: a line above.
    """
    drawn = dict([(label, runs) for label, runs in groups.items() if any(run.history.tasks for run in runs)][:MOST_COLUMNS])
    known = [kind for kind in _KINDS if all(any(run.history.of(kind[0]) for run in runs) for runs in drawn.values())]
    kinds = known[:2] if drawn else []
    tasks = list(dict.fromkeys(task for runs in drawn.values() for run in runs for task in run.history.tasks))
    if has_shades(len(tasks)):
        tasks.sort(key=lambda task: _end(task, next(iter(drawn.values()))), reverse=True)
    looks = styles(tasks)
    names = {task: cut(task, _LONG) for task in tasks} if len(tasks) <= _FEW else {}
    shown = metrics[:_MOST_METRICS]

    sheet = Sheet()
    gutter = 0.35 + sheet.width_of(names.values(), _NAMES)
    labels = sheet.width_of(groups, 8.5)
    each = 0.62 + _WIDE + gutter
    below = len(groups) * _LOW + 0.25 if shown else 0.0
    across = max(len(drawn) * each, (labels + 0.2 + len(shown) * 3.0) if shown else 0.0, 5.0)
    curves_height = len(kinds) * (_TALL + 0.72)
    sheet.resize(0.1 + across, 0.68 + curves_height + (below + 0.45 + BOTTOM if shown else BOTTOM))
    top = sheet.height - 0.68
    for i, (kind, what) in enumerate(kinds):
        curves = {label: [run.history.of(kind) for run in runs] for label, runs in drawn.items()}
        every = [of_run for of_runs in curves.values() for of_run in of_runs]
        logarithmic = all(is_positive(of_run) for of_run in every if of_run)
        for k, (label, of_runs) in enumerate(curves.items()):
            axes = sheet.axes(0.62 + k * each, top - (i + 1) * (_TALL + 0.72) + 0.34, _WIDE, _TALL)
            _draw_column(axes, of_runs, every, looks, names, logarithmic=logarithmic, title=what)
            if i == 0:
                sheet.caption(cut(label, 44), 0.62 + k * each, top - 0.12)
    for k, metric in enumerate(shown):
        values = {label: [run.held_out[metric] for run in runs if metric in run.held_out] for label, runs in groups.items()}
        width = (across - labels - 0.3) / len(shown)
        axes = sheet.axes(labels + 0.3 + k * width, BOTTOM, width - 0.3, below)
        draw_dots(axes, dict(reversed(values.items())), cut(metric, 30))
        axes.tick_params(labelleft=k == 0)
    sheet.heading(title)
    return sheet.rendered()


def _draw_column(
    axes: Any,
    of_runs: Sequence[Mapping[str, Curve]],
    every: Sequence[Mapping[str, Curve]],
    looks: Mapping[str, Style],
    names: Mapping[str, str],
    *,
    logarithmic: bool,
    title: str,
) -> None:
    mean = of_runs[0] if len(of_runs) == 1 else _means(of_runs, in_logarithms=logarithmic)
    for curves in of_runs if len(of_runs) > 1 else ():
        draw_curves(axes, curves, looks, logarithmic=logarithmic, width=0.6, is_faint=True)
    ends = draw_curves(axes, mean, looks, logarithmic=logarithmic)
    scale(axes, every, logarithmic=logarithmic)
    finish(axes, title, [step for curves in every for curve in curves.values() for step in (curve.steps[0], curve.steps[-1])])
    if names:
        name_ends(axes, ends, names, looks, _NAMES)


def _means(of_runs: Sequence[Mapping[str, Curve]], *, in_logarithms: bool) -> dict[str, Curve]:
    """Task → mean over the runs that have it, at the steps that all of these have."""
    means = {}
    for task in dict.fromkeys(task for curves in of_runs for task in curves):
        points = [dict(zip(*curves[task], strict=True)) for curves in of_runs if task in curves]
        steps = sorted(set.intersection(*map(set, points)))
        if steps:
            rows = [[at[step] for at in points] for step in steps]
            means[task] = Curve(steps, [_mean(row, in_logarithms=in_logarithms) for row in rows])
    return means


def _mean(values: Sequence[float], *, in_logarithms: bool) -> float:
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.geometric_mean(values) if in_logarithms else statistics.fmean(values)


def _end(task: str, runs: Sequence[RecordedRun]) -> float:
    ends = [run.history.of("loss_weight")[task].values[-1] for run in runs if task in run.history.tasks]
    return ends[0] if ends and not math.isnan(ends[0]) else -math.inf
