"""How far each method is from the best of the references, on every problem and over all of them.

A ratio is of geometric means over the seeds that the method and all references have; the reference is the one that is best
on the problem at that share of the training. Its spread is the standard deviation, over the seeds, of the logarithm of the
ratio seed by seed, as a factor. An error that is no number counts as ten times the worst one of the problem.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.experiments.records import Record
from benchmarks.suite.members import MARKS
from benchmarks.suite.problem import Kind

MISSING = "–"


class Ratio(NamedTuple):
    """One method on one problem at one share of the training.

    Attributes:
        problem, kind, mark, method: which.
        seeds: how many.
        error: its geometric mean over the seeds.
        ratio: of that to the best reference's, below 1 if it is better.
        spread: a factor, 1 if all seeds have the same ratio.
        best: that reference.
    """

    problem: str
    kind: Kind
    mark: float
    method: str
    seeds: int
    error: float
    ratio: float
    spread: float
    best: str


class Overall(NamedTuple):
    """One method over all problems of a kind that have it.

    Attributes:
        kind, mark, method: which.
        problems: how many.
        mean: geometric, of the ratios.
        worst: of the ratios.
        worst_on: the problem.
        low, high: the geometric mean of each single seed, least and greatest.
    """

    kind: Kind
    mark: float
    method: str
    problems: int
    mean: float
    worst: float
    worst_on: str
    low: float
    high: float


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(statistics.fmean(map(math.log, values)))


class Summary:
    """The ratios, and what they come to.

    Args:
        records: all.
        problems: name → kind, and the steps whose records count.
        methods: those to be shown; ``None`` for all that the records have.
        references: the methods whose best is the measure.
    """

    def __init__(
        self,
        records: Sequence[Record],
        problems: Mapping[str, tuple[Kind, int]],
        methods: Sequence[str] | None,
        references: Sequence[str],
    ) -> None:
        self.problems, self.references = problems, list(references)
        mine = [r for r in records if r.problem in problems and r.steps == problems[r.problem][1]]
        self.errors = {(r.problem, r.method, r.seed): r.curves["error"] for r in mine}
        there = list(dict.fromkeys(r.method for r in mine))
        self.methods = [m for m in (methods or [*references, *there]) if m in there]
        self.methods = list(dict.fromkeys(self.methods))
        self.ratios = {(r.mark, r.problem, r.method): r for r in self._ratios()}

    def _of(self, problem: str, method: str, mark: int) -> dict[int, float]:
        """Seed → error."""
        whole = {seed: errors[mark] for (p, m, seed), errors in self.errors.items() if (p, m) == (problem, method)}
        at_mark = [errors[mark] for (p, _, _), errors in self.errors.items() if p == problem]
        worst = max((error for error in at_mark if math.isfinite(error)), default=1.0)
        return {seed: error if math.isfinite(error) else 10 * worst for seed, error in whole.items()}

    def _paired(self, problem: str, method: str, mark: int) -> tuple[str, dict[int, tuple[float, float]]]:
        """The best reference, and seed → the error and that reference's."""
        rivals = {rival: self._of(problem, rival, mark) for rival in self.references}
        mine = self._of(problem, method, mark)
        seeds = sorted(set(mine).intersection(*rivals.values()))
        if not seeds:
            return MISSING, {}
        best = min(rivals, key=lambda rival: geometric_mean(rivals[rival][seed] for seed in seeds))
        return best, {seed: (mine[seed], rivals[best][seed]) for seed in seeds}

    def _ratios(self) -> Iterator[Ratio]:
        for place, mark in enumerate(MARKS):
            for problem, (kind, _) in self.problems.items():
                for method in self.methods:
                    best, pairs = self._paired(problem, method, place)
                    if pairs:
                        logs = [math.log(mine / theirs) for mine, theirs in pairs.values()]
                        error = geometric_mean(mine for mine, _ in pairs.values())
                        ratio, spread = math.exp(statistics.fmean(logs)), math.exp(statistics.stdev(logs)) if logs[1:] else 1.0
                        yield Ratio(problem, kind, mark, method, len(pairs), error, ratio, spread, best)

    def overall(self) -> list[Overall]:
        """Per kind, share of the training and method, of the problems that have a ratio of it."""
        found = []
        for kind in dict.fromkeys(kind for kind, _ in self.problems.values()):
            for place, mark in enumerate(MARKS):
                for method in self.methods:
                    mine = [r for r in self.ratios.values() if (r.kind, r.mark, r.method) == (kind, mark, method)]
                    if not mine:
                        continue
                    worst = max(mine, key=lambda r: r.ratio)
                    mean = geometric_mean(r.ratio for r in mine)
                    low, high = self._range(method, place, [r.problem for r in mine])
                    found.append(Overall(kind, mark, method, len(mine), mean, worst.ratio, worst.problem, low, high))
        return found

    def _range(self, method: str, mark: int, problems: Sequence[str]) -> tuple[float, float]:
        pairs = [self._paired(problem, method, mark)[1] for problem in problems]
        seeds = set(pairs[0]).intersection(*pairs[1:])
        means = [geometric_mean(pair[seed][0] / pair[seed][1] for pair in pairs) for seed in seeds]
        return (min(means), max(means)) if means else (math.nan, math.nan)

    def text(self) -> str:
        """The summary over problems, then the ratios on each at the end of the training."""
        rows = [["kind", "of training", "method", "problems", "mean", "seeds' means", "worst", "on"]]
        for o in self.overall():
            spread = f"{o.low:.2f} to {o.high:.2f}"
            numbers = [str(o.problems), f"{o.mean:.2f}", spread, f"{o.worst:.2f}", o.worst_on]
            rows.append([o.kind, f"{o.mark:g}", o.method, *numbers])
        parts = [f"Error over the best of {', '.join(self.references)}: geometric mean over problems, and worst", aligned(rows)]
        for mark in MARKS:
            parts += [
                f"Ratios at {mark:g} of the training, ×/÷ spread over seeds; the best reference and its error",
                self.at(mark),
            ]
        return "\n\n".join(parts) + "\n"

    def at(self, mark: float) -> str:
        """A row per problem, a column per method."""
        rows = [["problem", "best", "error", *self.methods]]
        for problem in self.problems:
            found = {m: self.ratios[mark, problem, m] for m in self.methods if (mark, problem, m) in self.ratios}
            if found:
                one = next(iter(found.values()))
                cells = [f"{found[m].ratio:.2f} ×/÷ {found[m].spread:.2f}" if m in found else MISSING for m in self.methods]
                rows.append([problem, one.best, f"{one.error / one.ratio:.3g}", *cells])
        return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, in Markdown; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])
