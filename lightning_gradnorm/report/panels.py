"""Panels of the figure: curves with their names at their ends, and shares as bands."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_gradnorm.report.history import Curve
from lightning_gradnorm.report.palette import GREY, Style
from lightning_gradnorm.report.smoothing import smoothed, smoothed_together, thinned
from lightning_gradnorm.report.spreading import spread

LINE = 1.2  # heights of a letter from one name to the next
_LEAST_RANGE = 4.0  # of a logarithmic axis, from bottom to top: so that what hardly moves is seen to
_TEXT = "0.25"


def is_positive(curves: Mapping[str, Curve]) -> bool:
    """Whether a logarithmic axis shows all that is finite, and there is something."""
    values = [value for curve in curves.values() for value in curve.values if math.isfinite(value)]
    return bool(values) and min(values) > 0


def draw_curves(
    axes: Any,
    curves: Mapping[str, Curve],
    styles: Mapping[str, Style],
    *,
    logarithmic: bool,
    width: float = 1.8,
    is_faint: bool = False,
) -> dict[str, float]:
    """Smooth lines over faint raw ones, those that have no style in grey below; gives the height at which each one ends.

    Args:
        axes: matplotlib's.
        curves: task → curve.
        styles: task → style, of those that are named.
        logarithmic: whether the axis is.
        width: of a line, in points.
        is_faint: whether to draw the smooth lines alone, and these half transparent.
    """
    ends, faint = {}, 0.22 if len(styles) <= 5 else 0.12
    for task in sorted(curves, key=lambda task: task in styles):
        style, raw = styles.get(task, Style(GREY)), thinned(curves[task])
        smooth = smoothed(raw, in_logarithms=logarithmic)
        few: dict[str, Any] = {"marker": "o", "markersize": 4} if len(raw.steps) < 3 else {}
        if is_faint:
            few["alpha"] = 0.4
        if smooth is not raw and task in styles and not is_faint:
            axes.plot(*raw, color=style.colour, linewidth=0.8, alpha=faint, solid_joinstyle="round", label="_raw")
        thin = width if task in styles else 0.6
        axes.plot(*smooth, color=style.colour, linestyle=style.dash, linewidth=thin, solid_capstyle="round", label=task, **few)
        finite = [value for value in smooth.values if math.isfinite(value)]
        if finite and task in styles:
            ends[task] = finite[-1]
    scale(axes, [curves], logarithmic=logarithmic)
    return ends


def draw_shares(
    axes: Any,
    curves: Mapping[str, Curve],
    styles: Mapping[str, Style],
    others: str = "",
    targets: Mapping[str, Curve] | None = None,
) -> dict[str, float]:
    """Bands that fill the panel from 0 to 100 %, the first task on top; gives the height of each one's middle at the end.

    Args:
        axes: matplotlib's.
        curves: task → its share, on the same steps.
        styles: task → style; those that have none are one grey band at the bottom.
        others: what that band is called.
        targets: task → the share that it is to have: dashed lines where the bands are to end.
    """
    smooth = smoothed_together({task: thinned(curve) for task, curve in curves.items()})
    steps = next(iter(smooth.values())).steps
    named = [task for task in reversed(list(smooth)) if task in styles]
    rest = [smooth[task].values for task in smooth if task not in styles]
    bands = [([sum(column) for column in zip(*rest, strict=True)], GREY, others)] if rest else []
    bands += [(smooth[task].values, styles[task].colour, task) for task in named]
    if len(steps) == 1:
        steps, bands = [steps[0], steps[0] + 1], [(2 * values, colour, name) for values, colour, name in bands]
    below, middles = [0.0] * len(steps), {}
    for values, colour, name in bands:
        above = [a + b for a, b in zip(below, values, strict=True)]
        axes.fill_between(steps, below, above, color=colour, linewidth=0, alpha=0.85, label=name)
        axes.plot(steps, above, color="white", linewidth=min(0.6, 5 / len(bands)))
        middles[name] = (below[-1] + above[-1]) / 2
        below = above
    if targets and len(targets) == len(named):
        level = [0.0] * len(targets[named[0]].steps)
        for task in named[:-1]:
            level = [a + b for a, b in zip(level, targets[task].values, strict=True)]
            axes.plot(*smoothed(thinned(Curve(targets[task].steps, level))), color="0.1", linewidth=0.9, linestyle=(0, (4, 2)))
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlim(steps[0], steps[-1])
    return {name: middle for name, middle in middles.items() if name}


def finish(axes: Any, title: str, steps: Sequence[int]) -> None:
    """What all panels have: title, thin grid, steps below."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(title, loc="left", fontsize=10, color="0.1", pad=7)
    first, last = min(steps, default=0), max(steps, default=1)
    axes.set_xlim(first, last if last > first else first + 1)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.tick_params(labelsize=8, length=0, pad=4, labelcolor=_TEXT)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.75")


def name_ends(axes: Any, ends: Mapping[str, float], names: Mapping[str, str], styles: Mapping[str, Style], size: float) -> None:
    """Each curve's name to the right of where it ends, in its colour, with a thin line to it where it had to move.

    Args:
        axes: matplotlib's, with its limits set.
        ends: task → the height of its end.
        names: task → what to write.
        styles: task → style; grey where there is none.
        size: of the letters, in points; smaller where not all would fit.
    """
    from matplotlib.collections import LineCollection

    box = axes.get_window_extent()
    inch = axes.figure.dpi
    height, width = 72 * box.height / inch, 72 * box.width / inch  # in points
    size = min(size, height / LINE / max(len(ends), 1))
    to_axes = axes.transData + axes.transAxes.inverted()
    at = [min(max(float(to_axes.transform((axes.get_xlim()[1], end))[1]), 0.0), 1.0) for end in ends.values()]
    placed = spread(at, LINE * size / height, -0.01, 1.01)
    near, far = 1 + 3 / width, 1 + 13 / width
    lines = []
    for (task, _), end, label in zip(ends.items(), at, placed, strict=True):
        colour = styles[task].colour if task in styles else "0.45"
        axes.text(
            far + 3 / width, label, names.get(task, task), color=colour, fontsize=size, va="center_baseline",
            transform=axes.transAxes, parse_math=False, clip_on=False,
        )  # fmt: skip
        lines.append((((near, end), (far, label)), colour))
    segments, colours = [segment for segment, _ in lines], [colour for _, colour in lines]
    axes.add_collection(
        LineCollection(segments, colors=colours, linewidths=0.7, alpha=0.7, transform=axes.transAxes, clip_on=False),
        autolim=False,
    )


def scale(axes: Any, curves: Iterable[Mapping[str, Curve]], *, logarithmic: bool) -> None:
    """Limits around all finite values; round numbers on a logarithmic axis, of which there are at least three."""
    from matplotlib.ticker import LogLocator, NullLocator

    values = [value for by_task in curves for curve in by_task.values() for value in curve.values if math.isfinite(value)]
    if not values:
        return
    if not logarithmic:
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)
        return
    low, high = min(values), max(values)
    middle, reach = math.sqrt(low) * math.sqrt(high), max(math.sqrt(high / low) * 1.1, math.sqrt(_LEAST_RANGE))
    axes.set_yscale("log")
    axes.set_ylim(max(middle / reach, 1e-307), min(middle * reach, 1e307))
    if reach < 30:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if reach > 4 else (1, 1.5, 2, 3, 5, 7), numticks=12))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
