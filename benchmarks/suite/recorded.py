"""What a page can say of the suite's records."""

from collections.abc import Sequence

from benchmarks.experiments.records import Records
from benchmarks.suite.command import RESULTS, steps_of
from benchmarks.suite.members import MARKS
from benchmarks.suite.methods import REFERENCES
from benchmarks.suite.problem import Kind
from benchmarks.suite.registry import PROBLEMS
from benchmarks.suite.summary import Overall, Ratio, Summary
from lightning_gradnorm.report.table import markdown_rows

SHARES = {0.25: "a quarter", 0.5: "half", 1.0: "the whole"}


class Recorded:
    """The records in the repository, at the problems' usual lengths."""

    def __init__(self) -> None:
        problems = {name: (problem.kind, steps_of(problem, 1.0)) for name, problem in PROBLEMS.items()}
        self.summary = Summary(Records(RESULTS / "records.jsonl").all(), problems, None, REFERENCES)
        self._overalls = self.summary.overall()

    def _overall(self, kind: Kind) -> dict[tuple[str, float], Overall]:
        return {(one.method, one.mark): one for one in self._overalls if one.kind == kind}

    def table(self, kind: Kind, methods: Sequence[str] = ()) -> str:
        """Per method: mean and worst ratio over the problems of a kind, at each share of the training."""
        found = self._overall(kind)
        columns = ["", *(f"at {SHARES[mark]}: mean" if not n else "worst" for mark in MARKS for n in (0, 1)), "worst on"]
        rows = []
        for method in methods or dict.fromkeys(method for method, _ in found):
            ones = [found[method, mark] for mark in MARKS]
            numbers = [f"{value:.2f}" for one in ones for value in (one.mean, one.worst)]
            rows.append([method, *numbers, ones[-1].worst_on])
        return markdown_rows(columns, rows)

    def overall(self, method: str, kind: Kind, mark: float = 1.0) -> Overall:
        """One method at one share."""
        return self._overall(kind)[method, mark]

    def ratio(self, method: str, problem: str, mark: float = 1.0) -> Ratio:
        """One method on one problem."""
        return self.summary.ratios[mark, problem, method]

    def over(self, method: str, than: str, problem: str, mark: float = 1.0) -> float:
        """The method's error over another's."""
        return self.ratio(method, problem, mark).ratio / self.ratio(than, problem, mark).ratio

    def behind(self, method: str, kind: Kind, by: float = 1.25, mark: float = 1.0) -> str:
        """The problems on which it is behind the best reference by more than a factor: a row each, the worst first."""
        ratios = [
            r for r in self.summary.ratios.values() if (r.method, r.kind, r.mark) == (method, kind, mark) and r.ratio > by
        ]
        rows = [
            [r.problem, f"{r.ratio:.2f} ×/÷ {r.spread:.2f}", r.best, f"{self.over(method, 'plain', r.problem, mark):.2f}"]
            for r in sorted(ratios, key=lambda r: -r.ratio)
        ]
        return markdown_rows(["", "over the best", "the best", "over the plain sum"], rows)

    @property
    def figure(self) -> str:
        """Its path, as a page links it."""
        return "../benchmarks/results/suite/ratios.png"
