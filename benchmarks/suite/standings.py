"""How methods stand over several problems: errors over the plain sum's, ranks, and what the seeds cannot tell apart."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from benchmarks.suite.summary import geometric_mean

Errors = Mapping[tuple[str, str], Mapping[int, float]]  # (problem, method) → seed → error; lower is better, above 0


class Standing(NamedTuple):
    """One method on one problem.

    Attributes:
        errors: seed → error; one that is no number counts as ten times the worst of the problem.
        ratio: to the baseline's error, the geometric mean over the seeds that both have.
        rank: by that ratio, 1 for the best.
        level: whether it is the best, or the seeds cannot tell it from the best: the mean of log(error / the best's error) over
            the seeds that both have is no larger than its standard deviation.
    """

    errors: Mapping[int, float]
    ratio: float
    rank: int
    level: bool


def standings(errors: Errors, baseline: str) -> dict[tuple[str, str], Standing]:
    """(problem, method) → how it stands, where it shares a seed with the baseline."""
    found: dict[tuple[str, str], Standing] = {}
    for problem in dict.fromkeys(problem for problem, _ in errors):
        worst = max((e for (p, _), by in errors.items() if p == problem for e in by.values() if math.isfinite(e)), default=1.0)
        mine = {
            method: {seed: error if math.isfinite(error) else 10 * worst for seed, error in by.items()}
            for (name, method), by in errors.items()
            if name == problem
        }
        ratios = {method: math.exp(statistics.fmean(logs)) for method in mine if (logs := paired(mine, method, baseline))}
        order = sorted(ratios, key=ratios.__getitem__)
        for rank, method in enumerate(order, 1):
            logs = paired(mine, method, order[0])
            spread = statistics.stdev(logs) if len(logs) > 1 else 0.0
            level = method == order[0] or bool(logs and statistics.fmean(logs) <= spread)
            found[problem, method] = Standing(mine[method], ratios[method], rank, level)
    return found


def paired(errors: Mapping[str, Mapping[int, float]], method: str, other: str) -> list[float]:
    """log of the method's error over the other's, of each seed that both have."""
    theirs = errors.get(other, {})
    return [math.log(error / theirs[seed]) for seed, error in errors[method].items() if seed in theirs]


class Overall(NamedTuple):
    """One method over several problems.

    Attributes:
        ratio: the geometric mean of its ratios.
        rank: the mean of its ranks among these methods.
        worst: the largest of its ratios.
        worst_on: the problem of that.
        level: on how many problems the seeds cannot tell it from the best.
    """

    ratio: float
    rank: float
    worst: float
    worst_on: str
    level: int


def overall(found: Mapping[tuple[str, str], Standing], problems: Iterable[str]) -> dict[str, Overall]:
    """Method → how it stands over these problems, of the methods that have all of them; the best first."""
    problems = list(problems)
    methods = dict.fromkeys(method for _, method in found)
    whole = [method for method in methods if all((problem, method) in found for problem in problems)]
    places = {problem: sorted(whole, key=lambda method: found[problem, method].ratio) for problem in problems}
    rows = {}
    for method in whole:
        ones = {problem: found[problem, method] for problem in problems}
        worst = max(ones, key=lambda problem: ones[problem].ratio)
        rows[method] = Overall(
            geometric_mean(one.ratio for one in ones.values()),
            statistics.fmean(places[problem].index(method) + 1 for problem in problems),
            ones[worst].ratio,
            worst,
            sum(one.level for one in ones.values()),
        )
    return dict(sorted(rows.items(), key=lambda row: row[1].ratio))
