"""What a comparison of methods came to: ranked table, paired differences, figure."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lightning_gradnorm.report.dots import draw_dots
from lightning_gradnorm.report.sheet import in_plain_style
from lightning_gradnorm.report.table import markdown_rows, plain_rows, print_rows

Better = Literal["lower", "higher"]
ARROWS = {"lower": "↓", "higher": "↑"}


@dataclass(frozen=True)
class Run:
    """One fit.

    Attributes:
        method: its name.
        seed: that it started from.
        measures: name → value at the end of fit.
        step_seconds: median time of an optimiser step; ``None`` where it is not to be compared.
        weights: task → weight at the end.
    """

    method: str
    seed: int
    measures: dict[str, float]
    step_seconds: float | None
    weights: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """All fits of several methods on the same seeds.

    Attributes:
        better: measure → which way is better.
        runs: every method once per seed.
        baseline: the method that the differences and time ratios are to.
    """

    better: Mapping[str, Better]
    runs: Sequence[Run]
    baseline: str

    @property
    def methods(self) -> tuple[str, ...]:
        """Best first, by mean rank."""
        names = dict.fromkeys(run.method for run in self.runs)
        return tuple(sorted(names, key=self.mean_rank))

    @property
    def seeds(self) -> tuple[int, ...]:
        """In the order in which they were run."""
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    def values(self, method: str, measure: str) -> list[float]:
        """One per seed."""
        return [run.measures[measure] for run in self.runs if run.method == method]

    def differences(self, method: str, measure: str) -> list[float]:
        """Method minus baseline, seed by seed: what both owe to the seed cancels."""
        pairs = zip(self.values(method, measure), self.values(self.baseline, measure), strict=True)
        return [ours - theirs for ours, theirs in pairs]

    def mean_rank(self, method: str) -> float:
        """1 is best: the mean of the method's places over the measures and seeds; ties share their places' mean."""
        places = [
            self._place(method, measure, seed, sign)
            for measure, sign in ((name, 1 if way == "lower" else -1) for name, way in self.better.items())
            for seed in range(len(self.seeds))
        ]
        return statistics.fmean(places)

    def _place(self, method: str, measure: str, seed: int, sign: int) -> float:
        names = dict.fromkeys(run.method for run in self.runs)
        values = {name: sign * self.values(name, measure)[seed] for name in names}
        ours = values[method]
        if ours != ours:
            return float(len(values))  # it diverged
        ahead, level = sum(v < ours for v in values.values()), sum(v == ours for v in values.values())
        return ahead + (level + 1) / 2

    def time_ratio(self, method: str) -> float:
        """Median over the seeds of the step's time to the baseline's.

        Raises:
            ValueError: where a run has no time.
        """
        times = {run.seed: run.step_seconds for run in self.runs if run.method == self.baseline}
        pairs = [(run.step_seconds, times[run.seed]) for run in self.runs if run.method == method]
        known = [ours / theirs for ours, theirs in pairs if ours is not None and theirs is not None]
        if len(known) < len(pairs):
            raise ValueError(
                f"The time of a step is known on {len(known)} of {len(pairs)} seeds only, of {method!r} and {self.baseline!r}."
            )
        return statistics.median(known)

    @property
    def _timed(self) -> bool:
        return all(run.step_seconds is not None for run in self.runs)

    def columns(self) -> tuple[str, ...]:
        """Of the table of values; the time of a step where every run has one."""
        times = ("step time",) if self._timed else ()
        return ("method", *(f"{name} {ARROWS[way]}" for name, way in self.better.items()), "mean rank", *times)

    def rows(self) -> list[tuple[str, ...]]:
        """Best method first: mean and spread per measure, mean rank, time of a step to the baseline's."""
        return [
            (
                method,
                *(mean_std(self.values(method, m)) for m in self.better),
                f"{self.mean_rank(method):.2f}",
                *([f"{self.time_ratio(method):.2f}"] if self._timed else []),
            )
            for method in self.methods
        ]

    def difference_columns(self) -> tuple[str, ...]:
        """Of the table of paired differences."""
        return (f"minus {self.baseline}", *(f"{name} {ARROWS[way]}" for name, way in self.better.items()))

    def difference_rows(self) -> list[tuple[str, ...]]:
        """Every method but the baseline, best first."""
        others = [method for method in self.methods if method != self.baseline]
        return [(method, *(mean_std(self.differences(method, m), "+") for m in self.better)) for method in others]

    @property
    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]], str]]:
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        values = (self.columns(), self.rows(), f"Over {seeds}, mean ± standard deviation; best mean rank first")
        differences = (
            self.difference_columns(),
            self.difference_rows(),
            f"Paired differences to {self.baseline}, seed by seed",
        )
        return [values, differences] if self.difference_rows() else [values]

    def __str__(self) -> str:
        return "\n\n".join(plain_rows(*table) for table in self._tables)

    def print(self) -> None:
        """The ranked table and the differences to the console, drawn by rich where it is installed."""
        for table in self._tables:
            print_rows(*table)

    def markdown(self) -> str:
        """Both tables in Markdown."""
        return "".join(f"{title}:\n\n{markdown_rows(columns, rows)}\n\n" for columns, rows, title in self._tables)

    def write(self, path: str | Path) -> None:
        """All runs as JSON."""
        content = {"baseline": self.baseline, "better": dict(self.better), "runs": [asdict(run) for run in self.runs]}
        Path(path).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "Comparison":
        """What ``write`` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(content["better"], [Run(**run) for run in content["runs"]], content["baseline"])

    @in_plain_style()
    def draw(self, path: str | Path) -> None:
        """A panel per measure: each seed a dot, the mean a bar; best method on top. Needs matplotlib.

        Raises:
            ImportError: where matplotlib is not installed.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        methods = self.methods[::-1]
        names = max(1.6, 0.4 + 0.065 * max(map(len, methods)))  # inches: what the longest takes, beside panels of one width
        figure = Figure(figsize=(names + 2.8 * len(self.better), 1.0 + 0.34 * len(methods)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(self.better), sharey=True, squeeze=False)[0]
        for axes, (measure, way) in zip(panels, self.better.items(), strict=True):
            values = {method: self.values(method, measure) for method in methods}
            draw_dots(axes, values, f"{measure} ({way} is better)", self.baseline)
        figure.savefig(path)


def mean_std(values: Sequence[float], sign: str = "") -> str:
    """``mean ± standard deviation``; the mean alone of one value.

    To three figures of the larger one, or to two of the spread where that is finer, but to five of the mean at most.
    """
    mean = statistics.fmean(values)
    if not math.isfinite(mean):
        return f"{mean}"
    if len(values) == 1:
        return f"{mean:{sign}.4g}"
    spread = statistics.stdev(values)
    size = max(abs(mean), spread)
    if 0 < size < 1e-4:
        return f"{mean:{sign}.2e} ± {spread:.1e}"
    digits = max(0, 2 - _decade(size), min(1 - _decade(spread), 4 - _decade(size)))
    return f"{mean:{sign}.{digits}f} ± {spread:.{digits}f}"


def _decade(value: float) -> int:
    return math.floor(math.log10(value)) if value > 0 else 0
