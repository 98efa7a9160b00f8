"""The figure of ``scenes.py``: a few held-out rooms as they are and as two methods see them, the weights, the errors."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _common import BLACK, METHOD_COLOURS, SKY, VERMILION, by_task, draw_runs, figure_style, plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from scenes_problem import MEASURES
from scenes_renderer import Views
from torch import Tensor

TASK_COLOURS = {"segmentation": VERMILION, "depth": SKY, "normals": BLACK}
CLASS_COLOURS = ListedColormap(["#CDB99A", "#8FA3B8", "#EFEDE6", "#E4572E", "#2E86AB", "#F3B61F"])
NEAR, FAR = 1.0, 6.5  # metres, the ends of the depths' colours
TILE, ABOVE, BESIDE = 0.88, 0.44, 3.2  # inches: side of a picture, the titles' height, width of the curves


@dataclass
class Outcome:
    """What came of one fit.

    Attributes:
        measures: name → value on the held-out rooms at the end.
        weights: step → task → weight after it.
        answers: task → answers to the rooms that the figure shows; empty for fits whose answers it does not show.
    """

    measures: Mapping[str, float]
    weights: Mapping[int, Mapping[str, float]]
    answers: Mapping[str, Tensor] = field(default_factory=dict)


def draw(outcomes: Mapping[str, Sequence[Outcome]], rooms: Views, path: Path) -> None:
    """Rooms to the left, weights and errors to the right.

    Args:
        outcomes: method → its fits, one per seed, the baseline first; the first fits that have answers are shown.
        rooms: those that the answers are to.
        path: of the PNG.
    """
    columns = columns_of(outcomes, rooms)
    wide = TILE * (columns[-1].place + 1)
    with figure_style(), plt.rc_context({"font.size": 8.5, "axes.titlesize": 8.5}):
        figure = plt.figure(figsize=(wide + BESIDE, TILE * len(rooms) + ABOVE), dpi=150)
        left, right = figure.subfigures(1, 2, width_ratios=[wide, BESIDE])
        draw_rooms(left, columns)
        above, below = right.subfigures(2, 1, height_ratios=[0.9, 1])
        draw_weights(above.subplots(), [fit.weights for fit in outcomes["GradNorm"]])
        draw_errors(below.subplots(), {method: [fit.measures for fit in fits] for method, fits in outcomes.items()})
        figure.savefig(path)
        plt.close(figure)


class Column(NamedTuple):
    """Of pictures, a row per room.

    Attributes:
        place: from the left, in columns.
        task: whose answers they show; empty for the image.
        title: above it.
        pictures: ``[H, W, 3 or 4]`` each.
    """

    place: float
    task: str
    title: str
    pictures: Sequence[np.ndarray]


def columns_of(outcomes: Mapping[str, Sequence[Outcome]], rooms: Views) -> list[Column]:
    """The image, and for each task the truth and the methods' answers."""
    shown = {method: fits[0].answers for method, fits in outcomes.items() if fits[0].answers}
    truths = {"segmentation": rooms.classes, "depth": rooms.depth, "normals": rooms.normals}
    columns = [Column(0, "", "image", list(rooms.image.movedim(1, -1).numpy()))]
    for task, truth in truths.items():
        answers = {"truth": truth} | {method: some[task] for method, some in shown.items()}
        for title, answer in answers.items():
            gap = 0.12 if title == "truth" else 0
            columns.append(Column(columns[-1].place + 1 + gap, task, title, pictures(task, answer)))
    return columns


def pictures(task: str, answers: Tensor) -> list[np.ndarray]:
    """Colours ``[H, W, 3 or 4]`` of each of ``[N, …]`` answers: classes, depths or normals."""
    if task == "segmentation":
        return list(CLASS_COLOURS(answers.numpy()))
    if task == "depth":
        return list(plt.cm.magma(1 - ((answers - NEAR) / (FAR - NEAR)).clamp(0, 1).numpy()))
    return list(((answers + 1) / 2).clamp(0, 1).movedim(1, -1).numpy())


def draw_rooms(figure: Figure, columns: Sequence[Column]) -> None:
    """The pictures, each task's columns under its name."""
    rows, across = len(columns[0].pictures), columns[-1].place + 1
    inch = 1 / (TILE * rows + ABOVE)  # of the figure's height
    for place, task, title, column in columns:
        for row, picture in enumerate(column):
            corner = (place + 0.02) / across, TILE * inch * (rows - row - 0.98)
            axes = figure.add_axes((*corner, 0.96 / across, 0.96 * TILE * inch))
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
        middle, top = (place + 0.5) / across, TILE * rows * inch
        figure.text(middle, top + 0.05 * inch, title, ha="center", color=METHOD_COLOURS.get(title, "0.3"))
        if title == "truth":
            middle += sum(other.task == task for other in columns[1:]) / 2 / across - 0.5 / across
            figure.text(middle, top + 0.24 * inch, task, ha="center", weight="bold", color=TASK_COLOURS[task])


def draw_weights(axes: Axes, runs: Sequence[Mapping[int, Mapping[str, float]]]) -> None:
    """Mean and range over the seeds; the tasks' names at the ends of their lines."""
    steps = list(runs[0])
    for task, colour in TASK_COLOURS.items():
        values = [by_task(list(run.values()), task) for run in runs]
        draw_runs(axes, steps, values, color=colour)
        end = statistics.fmean(run[-1] for run in values)
        axes.annotate(task, (steps[-1], end), (4, 0), textcoords="offset points", va="center", color=colour)
    axes.set(title="GradNorm's loss weights", xlabel="step", yscale="log")
    axes.set_yticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0)


def draw_errors(axes: Axes, measures: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Per task and method, by how much the error differs from the baseline's of the same seed: a dot each, the mean a bar."""
    (_, baseline), *others = measures.items()
    for place, (name, _) in enumerate(MEASURES.values()):
        for shift, (method, fits) in enumerate(others):
            x = place + 0.25 * (shift - (len(others) - 1) / 2)
            changes = [100 * (ours[name] / theirs[name] - 1) for ours, theirs in zip(fits, baseline, strict=True)]
            colour = METHOD_COLOURS[method]
            axes.plot([x] * len(changes), changes, "o", color=colour, alpha=0.5, markersize=4, markeredgewidth=0)
            mean = statistics.fmean(changes)
            axes.plot([x - 0.09, x + 0.09], [mean, mean], color=colour, linewidth=2.5, label=None if place else method)
    axes.axhline(0, color=METHOD_COLOURS["equal"], linewidth=1.2, zorder=0)
    names = (f"{task}\n{name.removeprefix(task).strip()}" for task, (name, _) in MEASURES.items())
    axes.set_xticks(range(len(MEASURES)), names, fontsize=7.5)
    axes.yaxis.set_major_formatter("{x:+g} %")
    axes.set_title("Held-out errors against equal weights ↓", pad=18)
    looks = {"handlelength": 0.8, "handletextpad": 0.4, "columnspacing": 0.8, "borderpad": 0}
    axes.legend(fontsize=7.5, loc="lower left", bbox_to_anchor=(-0.08, 1.01), ncols=len(others), **looks)
    axes.grid(axis="x", visible=False)
