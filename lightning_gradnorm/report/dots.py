"""A panel of values: a row per method, each value a dot, their mean a bar."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_BASELINE, _OTHERS = "#D55E00", "#0072B2"
_FAR_APART = 20  # times: from there on the axis is logarithmic


def draw_dots(axes: Any, values: Mapping[str, Sequence[float]], title: str, baseline: str | None = None) -> None:
    """Draw them.

    Args:
        axes: matplotlib's.
        values: method → its values; the first at the bottom.
        title: above the panel.
        baseline: a method in another colour, with a dotted line through its mean.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    finite = {method: [value for value in of if math.isfinite(value)] for method, of in values.items()}
    for height, (method, of) in enumerate(finite.items()):
        colour = _BASELINE if method == baseline else _OTHERS
        if of:
            axes.plot(of, [height] * len(of), "o", color=colour, alpha=0.45, markersize=5, markeredgewidth=0)
            axes.plot([statistics.fmean(of)] * 2, [height - 0.32, height + 0.32], color=colour, linewidth=2.5)
    every = [value for of in finite.values() for value in of]
    if every and min(every) > 0 and max(every) > _FAR_APART * min(every):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    if baseline is not None and finite.get(baseline):
        axes.axvline(statistics.fmean(finite[baseline]), color=_BASELINE, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(-0.7, len(values) - 0.3)
    axes.set_title(title, loc="left", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
