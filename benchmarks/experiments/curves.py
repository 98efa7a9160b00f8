"""What the experiments' figures share: a colour per method, the mean and range of several seeds' curves."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from _common import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, draw_runs, figure_style, plt
from matplotlib.axes import Axes

from benchmarks.experiments.records import Problem, Record, Records
from lightning_gradnorm.report.comparison import ARROWS

GREY = "#777777"
COLOURS = {
    "equal": ORANGE,
    "GradNorm": BLUE,
    "GradNorm static": PURPLE,
    "GradNorm 0.1": SKY,
    "GradNorm 0.1 static": GREY,
    "GradNorm 0.1, from the mean": SKY,
    "GradNorm 0.1, five settings": SKY,
    "GradNorm, in a stack": BLUE,
    "GradNorm 0.1, five settings, in a stack": SKY,
    "annealing": GREEN,
    "annealing, in a stack": GREEN,
    "self-adaptive": GREY,
    "uncertainty": GREEN,
    "DWA": VERMILION,
    "AMNL": GREY,
    "fixed 1/σ²": BLACK,
    "hand-scaled": BLACK,
    "equal, from the mean": ORANGE,
    "hand-scaled, from the mean": BLACK,
    "GradNorm, from the mean": BLUE,
    "fixed 1/125²": BLACK,
    "plain": ORANGE,
    "gradient-weighted": GREEN,
    "DB-PINN": VERMILION,
}


def draw_curve(axes: Axes, fits: Sequence[Record], values: str | Sequence[Sequence[float]], **line: object) -> None:
    """Mean over the seeds as a line, their range as a band, of a curve of the records or of values given for each."""
    runs = [fit.curves[values] for fit in fits] if isinstance(values, str) else values
    draw_runs(axes, fits[0].curves["step"], runs, **line)


def draw_measures(records: Records, problems: Mapping[str, Problem], path: Path) -> None:
    """A row per problem and a panel per measure, on one scale down the rows: each seed a dot, the mean a bar."""
    rows = {problem: found for problem, (methods, *_) in problems.items() if (found := records.of(problem, methods))}
    if not rows:
        return
    columns = max(len(problems[problem].better) for problem in rows)
    lowest: dict[str, Axes] = {}  # measure → the panel that has the numbers of its scale
    with figure_style():
        height = sum(0.8 + 0.25 * len(found) for found in rows.values())
        figure, grid = plt.subplots(len(rows), columns, figsize=(2.4 + 2.9 * columns, height), squeeze=False, sharey="row")
        for panels, (problem, found) in zip(grid, rows.items(), strict=True):
            order = [method for method in problems[problem].methods if method in found][::-1]
            for axes in panels[len(problems[problem].better) :]:
                axes.set_visible(False)
            for axes, (measure, way) in zip(panels, problems[problem].better.items(), strict=False):
                if measure in lowest:
                    axes.sharex(lowest[measure])
                    lowest[measure].tick_params(labelbottom=False)
                lowest[measure] = axes
                for place, method in enumerate(order):
                    values = [fit.measures[measure] for fit in found[method]]
                    colour = COLOURS.get(method, GREY)
                    axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.5, markersize=5, markeredgewidth=0)
                    axes.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2.5)
                every = [fit.measures[measure] for fits in found.values() for fit in fits]
                if min(every) > 0 and max(every) > 20 * min(every):
                    axes.set_xscale("log")
                axes.set_title(f"{problem}: {measure} {ARROWS[way]}", fontsize=9)
                axes.grid(axis="y", visible=False)
            panels[0].set_yticks(range(len(order)), order, fontsize=8)
        figure.savefig(path)
        plt.close(figure)


def add_legend(axes: Axes, **looks: object) -> None:
    """If there is anything to tell apart: a figure may be of some of the methods only."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**({"loc": "best", "fontsize": 8} | looks))
