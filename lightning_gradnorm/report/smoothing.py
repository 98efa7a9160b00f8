"""What is drawn of a curve: as many points as a panel has pixels for, and a smooth line over them."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from lightning_gradnorm.report.history import Curve

_MOST = 400  # points
_LEAST = 12  # points of a curve that is worth smoothing
_QUIET = 2.5
_WINDOW = 0.03  # of the curve, to either side


def thinned(curve: Curve) -> Curve:
    """At most four hundred points: the first, the last, and evenly between."""
    count = len(curve.steps)
    if count <= _MOST:
        return curve
    kept = [round(i * (count - 1) / (_MOST - 1)) for i in range(_MOST)]
    return Curve([curve.steps[i] for i in kept], [curve.values[i] for i in kept])


def smoothed(curve: Curve, *, in_logarithms: bool = False) -> Curve:
    """A moving mean over a sixteenth of the points; near the ends over those that there are. A quiet curve is left as it is.

    Args:
        curve: what is not finite is left out of the means, and stays where there is nothing else.
        in_logarithms: whether to take means of logarithms, for a logarithmic axis; of a curve of positive values alone.
    """
    return curve if _is_quiet(curve.values) else _moving_mean(curve, in_logarithms=in_logarithms)


def _moving_mean(curve: Curve, *, in_logarithms: bool) -> Curve:
    count = len(curve.steps)
    there: Callable[[float], float] = math.log if in_logarithms else float
    back: Callable[[float], float] = math.exp if in_logarithms else float
    found = [math.isfinite(value) for value in curve.values]
    sums = _running([there(value) if fine else 0.0 for value, fine in zip(curve.values, found, strict=True)])
    counts = _running([float(fine) for fine in found])
    half = max(2, round(_WINDOW * count))
    values = []
    for i, value in enumerate(curve.values):
        low, high = max(i - half, 0), min(i + half + 1, count)
        within = counts[high] - counts[low]
        values.append(back((sums[high] - sums[low]) / within) if within else value)
    return Curve(curve.steps, values)


def smoothed_together(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """All of them, or none if all are quiet: so what sums to one at every step does so afterwards.

    Args:
        curves: name → curve, on the same steps.
    """
    are_quiet = all(_is_quiet(curve.values) for curve in curves.values())
    return {name: curve if are_quiet else _moving_mean(curve, in_logarithms=False) for name, curve in curves.items()}


def _is_quiet(values: Sequence[float]) -> bool:
    """Whether it is short, or the way along it hardly longer than from its lowest to its highest point, as of most weights."""
    if len(values) < _LEAST:
        return True
    finite = [value for value in values if math.isfinite(value)]
    way = sum(abs(b - a) for a, b in itertools.pairwise(finite))
    return not finite or way <= _QUIET * (max(finite) - min(finite))


def _running(values: Sequence[float]) -> list[float]:
    return [0.0, *itertools.accumulate(values)]
