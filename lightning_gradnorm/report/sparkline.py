"""A weight's way through the run in ten letters."""

import math
from collections.abc import Mapping

from lightning_gradnorm.report.history import Curve

_BARS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-:=+*#"
_LETTERS = 10
_LEAST_RANGE = 4.0  # from the lowest to the highest letter: what hardly moves is flat
_IN_PLAIN = str.maketrans(_BARS + "→–…", _PLAIN + ">-~")


def sparklines(curves: Mapping[str, Curve]) -> dict[str, str]:
    """Task → its weight after each tenth of the steps, on one logarithmic scale for all of them.

    Args:
        curves: task → its weights over the steps; what is not positive or not finite is a blank. Of a run with less than two
            steps there is nothing to show.
    """
    steps = [step for curve in curves.values() for step in curve.steps]
    if not steps or min(steps) == max(steps):
        return {}
    first, last = min(steps), max(steps)
    marks = [first + (last - first) * i / (_LETTERS - 1) for i in range(_LETTERS)]
    ways = {task: [_at(curve, mark) for mark in marks] for task, curve in curves.items()}
    known = [value for way in ways.values() for value in way if value is not None]
    if not known:
        return {}
    middle, reach = (min(known) + max(known)) / 2, max(max(known) - min(known), math.log(_LEAST_RANGE))
    return {task: "".join(_bar(value, middle, reach) for value in way).rstrip() for task, way in ways.items()}


def in_plain_letters(text: str) -> str:
    """The same for a console that has ASCII alone: bars, arrows and dashes as the nearest of its letters."""
    return text.translate(_IN_PLAIN)


def _at(curve: Curve, mark: float) -> float | None:
    """The logarithm of the last value up to there."""
    found = [value for step, value in zip(*curve, strict=True) if step <= mark]
    return math.log(found[-1]) if found and 0 < found[-1] < math.inf else None


def _bar(value: float | None, middle: float, reach: float) -> str:
    if value is None:
        return " "
    place = 0.5 + (value - middle) / reach
    return _BARS[min(int(place * len(_BARS)), len(_BARS) - 1)]
