"""The tasks' shares of the gradient norms on the shared layer, before and after weighting."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from lightning_gradnorm.report.history import Curve, History


class Shares(NamedTuple):
    """Task → curve, on the same steps; at every step they sum to one.

    Attributes:
        before: n_i / Σ n_j, of the gradients as they are.
        after: w_i n_i / Σ w_j n_j, of the weighted ones.
    """

    before: dict[str, Curve]
    after: dict[str, Curve]


def shares_of(history: History) -> Shares:
    """Of the steps at which there is a norm of any task; one that has none there has no share of it."""
    norms, weights = history.of("grad_norm"), history.of("loss_weight")
    weighted = {task: _finite(curve) for task, curve in norms.items()}
    applied = {task: dict(zip(*curve, strict=True)) for task, curve in weights.items()}
    plain = {
        task: {step: norm / applied[task][step] for step, norm in points.items() if applied.get(task, {}).get(step, 0) > 0}
        for task, points in weighted.items()
    }
    return Shares(_parts(plain), _parts(weighted))


def _finite(curve: Curve) -> dict[int, float]:
    return {step: value for step, value in zip(*curve, strict=True) if math.isfinite(value) and value >= 0}


def _parts(norms: Mapping[str, Mapping[int, float]]) -> dict[str, Curve]:
    wholes: dict[int, float] = {}
    for points in norms.values():
        for step, norm in points.items():
            wholes[step] = wholes.get(step, 0.0) + norm
    steps = sorted(step for step, whole in wholes.items() if 0 < whole < math.inf)
    return {
        task: Curve(steps, [points.get(step, 0.0) / wholes[step] for step in steps]) for task, points in norms.items() if steps
    }
