"""What fits came to, one line of JSON each, so that a run that was stopped goes on where it was."""

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lightning_gradnorm.report.comparison import Better, Comparison, Run

FIGURES = 5  # significant figures that curves keep


class Problem(NamedTuple):
    """What is compared on one problem.

    Attributes:
        methods: the baseline first.
        better: measure → which way is better.
        past: those of the methods whose records are kept and that are no longer made.
    """

    methods: Sequence[str]
    better: Mapping[str, Better]
    past: Sequence[str] = ()

    @property
    def made(self) -> list[str]:
        """The methods without those of the past."""
        return [method for method in self.methods if method not in self.past]


@dataclass(frozen=True)
class Record:
    """One fit.

    Attributes:
        problem, method, seed, steps: which.
        measures: name → value at the end.
        step_seconds: median time of an optimiser step.
        weights: task → weight at the end.
        mean_weights: task → weight on average over the fit; empty without a balancing callback.
        curves: name → values, one per entry of ``curves["step"]``.
        extras: whatever else the experiment's figure draws.
        made: how: command, date, versions, machine.
    """

    problem: str
    method: str
    seed: int
    steps: int
    measures: dict[str, float]
    step_seconds: float
    weights: dict[str, float] = field(default_factory=dict)
    mean_weights: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)


def rounded(values: Any) -> Any:
    """The same with floats to ``FIGURES`` significant figures, in lists and dicts too."""
    if isinstance(values, float):
        return float(f"{values:.{FIGURES}g}")
    if isinstance(values, Mapping):
        return {key: rounded(value) for key, value in values.items()}
    return [rounded(value) for value in values] if isinstance(values, Sequence) and not isinstance(values, str) else values


class Records:
    """The fits of one experiment, in a file that two processes may add to.

    Args:
        path: of the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._first_seed = 0
        self._read: tuple[int, list[Record]] = (0, [])  # how long the file was, and what it held: it only grows

    def since(self, seed: int) -> "Records":
        """The same file without the records of smaller seeds."""
        later = copy.copy(self)
        later._first_seed = seed
        return later

    def all(self) -> list[Record]:
        """In the order in which they were made; a line that an interruption cut short is left out."""
        length = self.path.stat().st_size if self.path.exists() else 0
        if length != self._read[0]:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            self._read = length, [Record(**json.loads(line)) for line in lines if line.endswith("\n") and line.strip()]
        return [record for record in self._read[1] if record.seed >= self._first_seed]

    def find(self, problem: str, method: str, seed: int, steps: int) -> Record | None:
        """The last one of these, if there is one."""
        wanted = (problem, method, seed, steps)
        fits = [record for record in self.all() if (record.problem, record.method, record.seed, record.steps) == wanted]
        return fits[-1] if fits else None

    def add(self, record: Record) -> None:
        """One more line, written in one piece."""
        values = asdict(record) | {"curves": rounded(record.curves), "extras": rounded(record.extras)}
        line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
        if self.path.exists() and not (whole := self.path.read_bytes()).endswith(b"\n"):
            os.truncate(self.path, whole.rfind(b"\n") + 1)  # an interruption cut the last line short
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def of(self, problem: str, methods: Iterable[str]) -> dict[str, list[Record]]:
        """Method → its records of a problem, by seed: the seeds that every one of the methods has, of the longest fits.

        A method without any record is left out, and so is what the records hold of others.
        """
        methods = list(methods)
        mine = [record for record in self.all() if record.problem == problem and record.method in methods]
        steps = max((record.steps for record in mine), default=0)
        latest = {(record.method, record.seed): record for record in mine if record.steps == steps}
        there = [method for method in methods if any(method == name for name, _ in latest)]
        seeds = [seed for seed in sorted({seed for _, seed in latest}) if all((m, seed) in latest for m in there)]
        return {method: [latest[method, seed] for seed in seeds] for method in there if seeds}

    def comparison(self, problem: str, better: Mapping[str, Better], methods: Iterable[str]) -> Comparison | None:
        """The methods on one problem, the first being the baseline; ``None`` if there is nothing to compare yet."""
        found = self.of(problem, methods)
        # Fits that were made hours apart, beside who knows what: their step times are not compared.
        runs = [Run(fit.method, fit.seed, fit.measures, None, fit.weights) for fits in found.values() for fit in fits]
        return Comparison(dict(better), runs, next(iter(found))) if runs else None
