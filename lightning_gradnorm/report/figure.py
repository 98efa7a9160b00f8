"""The figure of a run: weights, gradient norms, loss ratios and losses over the steps."""

import importlib.util
import io
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lightning_gradnorm.report.extremes import extremes
from lightning_gradnorm.report.history import Curve, History

# Colours of Okabe and Ito, which people with any kind of colour vision tell apart; with four dashes, 28 tasks.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_GREY = "0.8"  # of tasks that are not named
_PANELS = {
    "loss_weight": "loss weights",
    "grad_norm": "weighted gradient norms (thin: their targets)",
    "loss_ratio": "loss ratios L(t) / L(0)",
    "task_loss": "task losses, unweighted",
}
_HALF_NAME = 16  # characters: what the legend shows of either end of a long name
FILE_NAME = "loss_balancing.png"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def drawn(history: History, title: str = "") -> bytes:
    """A run as the content of a PNG file; see ``draw_history``."""
    content = io.BytesIO()
    draw_history(history, content, title)
    return content.getvalue()


def draw_history(history: History, path: str | Path | BinaryIO, title: str = "") -> None:
    """Draw a run as a PNG.

    Args:
        history: its curves.
        path: of the file, or a stream to write it to.
        title: a line above the panels.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [kind for kind in _PANELS if history.of(kind)]
    rows = -(-len(panels) // 2)
    shown = extremes({task: curve.values[-1] for task, curve in history.of("loss_weight").items()})
    names = {task: task if len(task) <= 2 * _HALF_NAME else f"{task[:_HALF_NAME]}…{task[-_HALF_NAME:]}" for task in shown}
    columns = 1 + (len(names) - 1) // (12 * rows)
    beside = columns * (0.5 + 0.085 * max(map(len, names.values()), default=0))  # inches, of the legend
    figure = Figure(figsize=(9 + beside, 3.1 * rows + 0.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    others = [task for task in history.tasks if task not in names]
    styles = {task: _style(i) for i, task in enumerate(names)}
    axes_of = figure.subplots(rows, 2, squeeze=False, sharex=True).flat
    for axes, kind in zip(axes_of, panels, strict=False):
        _draw(axes, history.of(kind), styles, others)
        if kind == "grad_norm":
            _draw(axes, history.of("target_norm"), styles, linewidth=0.7, alpha=0.7)
        axes.set_title(_PANELS[kind], loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_tick_params(labelbottom=True)
    for axes in itertools.islice(figure.axes, len(panels), None):
        axes.set_axis_off()
    handles = [figure.axes[0].plot([], [], **style, linewidth=2)[0] for style in styles.values()]
    labels = list(names.values())
    if others:
        handles.append(figure.axes[0].plot([], [], color=_GREY, linewidth=2)[0])
        labels.append(f"{len(others)} others, between these")
    numbers = list(map(str, range(len(labels))))  # in place of the names: older matplotlib leaves out "_a"
    legend = figure.legend(handles, numbers, loc="outside right upper", frameon=False, fontsize=9, ncols=columns)
    for text, name in zip(legend.get_texts(), labels, strict=True):
        text.set_text(name)
        text.set_parse_math(False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in a script that the font has not: boxes
        figure.savefig(path)


def _style(number: int) -> dict[str, Any]:
    dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": dash}


def _draw(
    axes: Any,
    curves: dict[str, Curve],
    styles: dict[str, dict[str, Any]],
    others: Sequence[str] = (),
    linewidth: float = 1.5,
    **line: Any,
) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import LogLocator, NullLocator

    axes.add_collection(LineCollection([[*zip(*curves[task], strict=True)] for task in others if task in curves], colors=_GREY))
    for task, curve in ((task, curve) for task, curve in curves.items() if task in styles):
        marker = {"marker": "o", "markersize": 3} if len(curve.steps) < 3 else {}
        axes.plot(curve.steps, curve.values, **styles[task], **marker, linewidth=linewidth, **line)
    values = [value for curve in curves.values() for value in curve.values if value == value]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        if max(values) < 1000 * min(values):
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=9)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
