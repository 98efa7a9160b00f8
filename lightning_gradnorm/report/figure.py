"""The figure of a run: weights, gradient norms as shares before and after weighting, loss ratios and losses over the steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lightning_gradnorm.report.extremes import extremes
from lightning_gradnorm.report.history import Curve, History
from lightning_gradnorm.report.palette import Style, has_shades, styles
from lightning_gradnorm.report.panels import LINE, draw_curves, draw_shares, finish, is_positive, name_ends
from lightning_gradnorm.report.shares import shares_of
from lightning_gradnorm.report.sheet import BOTTOM, LEFT, Picture, Sheet, can_draw, cut, in_plain_style

__all__ = ["FILE_NAME", "Picture", "can_draw", "draw_history", "picture_of"]

FILE_NAME = "loss_balancing.png"
_NAMES, _SMALL_NAMES = 8.5, 7.5  # points: the letters of the tasks' names
_LONG, _SHORT = 32, 14  # characters: of a name beside the weights, and beside the smaller panels
_FEW = 20  # tasks whose names stand beside every panel
_DIFFER = 1.02  # targets that differ by more than this factor are drawn


class _Panel(NamedTuple):
    """What is drawn in one; ``draw`` gives task → where its curve ends."""

    title: str
    steps: Sequence[int]
    draw: Callable[[Any], Mapping[str, float]]


def draw_history(history: History, path: str | Path | BinaryIO, title: str = "") -> None:
    """Draw a run as a PNG; see ``picture_of``.

    Args:
        history: its curves.
        path: of the file, or a stream to write it to.
        title: a line above the panels.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    png = picture_of(history, title).png
    if isinstance(path, str | Path):
        Path(path).write_bytes(png)
    else:
        path.write(png)


@in_plain_style()
def picture_of(history: History, title: str = "") -> Picture:
    """Draw a run.

    Of more than sixty tasks those with the smallest and the largest weights are named, the others grey.

    Args:
        history: its curves.
        title: a line above the panels.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    weights = history.of("loss_weight")
    named = extremes({task: curve.values[-1] for task, curve in weights.items()})
    if has_shades(len(named)):  # the colour says then where a task's weight has come to
        named.sort(key=lambda task: _rank(weights[task]), reverse=True)
    looks = styles(named)
    others = len(history.tasks) - len(named)
    large = _Panel(
        "loss weights", _steps(weights), lambda axes: draw_curves(axes, weights, looks, logarithmic=is_positive(weights))
    )
    small = _small_panels(history, looks, f"{others} others" if others > 0 else "")
    return _laid_out(large, small, named, looks, title).rendered()


def _rank(curve: Curve) -> float:
    return -math.inf if math.isnan(curve.values[-1]) else curve.values[-1]


def _steps(curves: Mapping[str, Curve]) -> list[int]:
    return [step for curve in curves.values() for step in (curve.steps[0], curve.steps[-1])]


def _small_panels(history: History, looks: Mapping[str, Style], others: str) -> list[list[_Panel]]:
    """Rows of panels, left to right."""
    rows = []
    before, after = ({task: curves[task] for task in (*looks, *curves) if task in curves} for curves in shares_of(history))
    if before and after:
        targets = shares_of_targets(history)
        rows.append(
            [
                _Panel("gradient shares, unweighted", _steps(before), lambda axes: draw_shares(axes, before, looks, others)),
                _Panel(
                    "gradient shares, weighted" + (" (dashed: targets)" if targets else ""),
                    _steps(after),
                    lambda axes: draw_shares(axes, after, looks, others, targets),
                ),
            ]
        )
    kinds = (("loss_ratio", "loss ratios, L(t) / L(0)"), ("task_loss", "losses, unweighted"))
    lower = [_curves_panel(title, history.of(kind), looks) for kind, title in kinds if history.of(kind)]
    if rows or len(lower) < 2:
        return [row for row in (*rows, lower) if row]
    return [[panel] for panel in lower]


def _curves_panel(title: str, curves: Mapping[str, Curve], looks: Mapping[str, Style]) -> _Panel:
    far_apart = is_positive(curves) and _spread(curves) > 5
    return _Panel(title, _steps(curves), lambda axes: draw_curves(axes, curves, looks, logarithmic=far_apart, width=1.4))


def _spread(curves: Mapping[str, Curve]) -> float:
    values = [value for curve in curves.values() for value in curve.values if math.isfinite(value)]
    return max(values) / min(values)


def shares_of_targets(history: History) -> dict[str, Curve]:
    """Task → its share of the norms that GradNorm aims at; empty where all are to be alike, which needs no line."""
    targets = history.of("target_norm")
    as_norms = History({f"grad_norm/{task}": dict(zip(*curve, strict=True)) for task, curve in targets.items()})
    shares = shares_of(as_norms).after
    last = [curve.values[-1] for curve in shares.values()]
    return shares if last and max(last) > _DIFFER * min(last) else {}


def _laid_out(
    large: _Panel, small: Sequence[Sequence[_Panel]], named: Sequence[str], looks: Mapping[str, Style], title: str
) -> Sheet:
    """The weights over the whole height on the left, with all names; the smaller panels in rows beside them. In inches."""
    sheet = Sheet()
    long, short = ({task: cut(task, most) for task in named} for most in (_LONG, _SHORT))
    beside_all = len(named) <= _FEW
    gutter = 0.4 + sheet.width_of(long.values(), _NAMES)
    narrow = (0.35 + sheet.width_of(short.values(), _SMALL_NAMES)) if beside_all else 0.45
    top, between = 0.42 + (0.32 if title else 0), 0.68
    columns = max((len(row) for row in small), default=0)
    height = max(4.9, len(named) * LINE * _NAMES / 72)
    wide, less = 4.1, 2.75
    sheet.resize(LEFT + wide + gutter + columns * (0.55 + less + narrow), height + top + BOTTOM)
    _fill(sheet.axes(LEFT, BOTTOM, wide, height), large, long, looks, _NAMES)
    each = (height - between * (len(small) - 1)) / max(len(small), 1)
    for i, row in enumerate(small):
        for k, panel in enumerate(row):
            x = LEFT + wide + gutter + 0.55 + k * (0.55 + less + narrow)
            axes = sheet.axes(x, BOTTOM + (len(small) - 1 - i) * (each + between), less, each)
            _fill(axes, panel, short if beside_all else {}, looks, _SMALL_NAMES)
    sheet.heading(title)
    shades = "; dark: the largest weights, light: the smallest" if has_shades(len(named)) else ""
    sheet.note(f"step{shades}")
    return sheet


def _fill(axes: Any, panel: _Panel, names: Mapping[str, str], looks: Mapping[str, Style], size: float) -> None:
    ends = panel.draw(axes)
    finish(axes, panel.title, panel.steps)
    if names:
        name_ends(axes, ends, names, looks, size)
