"""Which tasks to show one by one where there are more than anybody reads."""

import math
from collections.abc import Mapping

MOST = 60


def extremes(weights: Mapping[str, float]) -> list[str]:
    """All tasks, in order; of more than 60 the half with the smallest and the half with the largest weights.

    Args:
        weights: task → weight at the end; NaN counts as the largest.
    """
    ranked = sorted(weights, key=lambda task: (math.isnan(weights[task]), weights[task]))
    shown = ranked if len(ranked) <= MOST else {*ranked[: MOST // 2], *ranked[-(MOST // 2) :]}
    return [task for task in weights if task in shown]
