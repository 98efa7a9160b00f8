"""What ``docs/every-method.md`` can say of every method on several problems: errors, ranks, cost."""

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.experiments import scenes
from benchmarks.experiments.records import Record, Records
from benchmarks.suite.command import steps_of
from benchmarks.suite.every_method import ASKING_NOTHING, SPECS
from benchmarks.suite.registry import PROBLEMS
from benchmarks.suite.standings import Standing, overall, standings
from benchmarks.suite.summary import MISSING, geometric_mean
from lightning_gradnorm.report.comparison import mean_std
from lightning_gradnorm.report.table import markdown_rows

RESULTS = Path(__file__).parents[1] / "results"
FOLDER = RESULTS / "every_method"
BASELINE, SCENES = "equal", scenes.NAME
SUITE = ("digits", "pairs of digits", "Tox21", "FD001", "Helmholtz", "Klein–Gordon")
DATA = [name for name in SUITE if PROBLEMS[name].kind == "data"]
EQUATIONS = [name for name in SUITE if PROBLEMS[name].kind == "equation"]


def error_of(record: Record) -> float:
    """The one error of a record, the geometric mean where there are several."""
    values = list(record.measures.values())
    return geometric_mean(values) if all(map(math.isfinite, values)) else math.nan


def read(folder: Path, rooms: Path) -> dict[tuple[str, str], dict[int, float]]:
    """(problem, method) → seed → error, of whole trainings."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for record in [*Records(folder / "records.jsonl").all(), *Records(rooms / "records.jsonl").all()]:
        if record.problem == SCENES or (record.problem in SUITE and record.steps == steps_of(PROBLEMS[record.problem], 1.0)):
            found.setdefault((record.problem, record.method), {})[record.seed] = error_of(record)
    return {key: found[key] for problem in (*SUITE, SCENES) for key in found if key[0] == problem}


def short(ratio: float) -> str:
    """To two decimals; a small one to two figures, a large one to the whole number."""
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.2f}" if ratio >= 0.0995 else f"{ratio:.2g}"


def marked(one: Standing) -> str:
    """The ratio, with a ring where the seeds cannot tell the method from the best."""
    return f"{short(one.ratio)} °" if one.level else short(one.ratio)


def written(value: object) -> str:
    """A setting's value as one writes it in Python; a word that stands for what the problem has, without its sign."""
    if isinstance(value, Mapping) and "class" in value:
        return called(value)
    return value[1:] if isinstance(value, str) and value.startswith("$") else repr(value)


def called(spec: Mapping[str, Any]) -> str:
    """The call that makes a method of these settings; the first argument of a method that is all about it has no name."""
    name = str(spec["class"]).rpartition(".")[2]
    given = {key: value for key, value in spec.items() if key not in ("class", "norms_on")}
    first = [written(v) for v in given.values() if isinstance(v, Mapping)]
    named = [f"{k}={written(v)}" for k, v in given.items() if not isinstance(v, Mapping)]
    return f"{name}({', '.join([*first, *named])})"


class EveryMethod:
    """The records, summed up.

    Args:
        folder: of the suite's records and the costs.
        rooms: of the rendered rooms' records.
    """

    def __init__(self, folder: Path = FOLDER, rooms: Path = RESULTS / "scenes_methods") -> None:
        errors = read(folder, rooms)
        self.records = Records(folder / "records.jsonl")
        self.all_found = standings(errors, BASELINE)
        self.found = standings({key: by for key, by in errors.items() if key[1] in ASKING_NOTHING}, BASELINE)
        self.costs: dict[str, Any] = json.loads((folder / "costs.json").read_text(encoding="utf-8"))
        self.time = {(row["method"], row["workload"]): row for row in self.costs["rows"]}
        self.whole, self.on_data, self.on_equations = (overall(self.found, those) for those in (SUITE, DATA, EQUATIONS))
        self.problems = [*SUITE, *([SCENES] if any(problem == SCENES for problem, _ in self.found) else [])]

    def one(self, method: str, problem: str) -> Standing:
        """A method on a problem."""
        return self.found[problem, method]

    def cell(self, method: str, problem: str) -> str:
        """Its ratio: bold where no other method is better, with a ring where the seeds cannot tell it from that one."""
        one = self.found.get((problem, method))
        return MISSING if one is None else f"**{short(one.ratio)}**" if one.rank == 1 else marked(one)

    def cost(self, method: str, workload: str) -> str:
        """Time of a measured step over the plain sum's, with its quartiles."""
        row = self.time.get((method, workload))
        return MISSING if row is None else f"{row['time']:.2f} [{row['low']:.2f}–{row['high']:.2f}]"

    def average_cost(self, method: str, workload: str) -> float:
        """Over the training whose measured steps were counted, where the others cost what the plain sum costs in a session."""
        row, idle = self.time[method, workload], self.time[BASELINE, workload]["time"]
        return float(idle + row["measured"] * (row["time"] - idle)) if row["measured"] else float(row["time"])

    def table(self) -> str:
        """A row per method: those that were tried on all problems of the suite, the best first, and then the others."""
        sums = ["mean, data", "mean, equations", "worst", "cost, conv", "cost, pinn"]
        columns = ["", "mean", "mean rank", *self.problems, *sums]
        rows = []
        for method in self.order:
            ratios = [self.cell(method, problem) for problem in self.problems]
            means = [short(of[method].ratio) if method in of else MISSING for of in (self.on_data, self.on_equations)]
            one = self.whole.get(method)
            summed_up = [MISSING] * 2 if one is None else [short(one.ratio), f"{one.rank:.1f}"]
            worst = MISSING if one is None else short(one.worst)
            costs = [f"{self.average_cost(method, w):.2f}" if (method, w) in self.time else MISSING for w in ("conv", "pinn")]
            rows.append([method, *summed_up, *ratios, *means, worst, *costs])
        level = ["methods level with the best", "", "", *(f"{self.level(p)} of {self.methods(p)}" for p in self.problems)]
        return markdown_rows(columns, [*rows, [*level, *[""] * (len(columns) - len(level))]])

    @property
    def order(self) -> list[str]:
        """The methods of the table: by the mean over all problems, then those that lack a problem."""
        there = {method for _, method in self.found}
        return [*self.whole, *(method for method in ASKING_NOTHING if method in there and method not in self.whole)]

    def particular(self) -> str:
        """Those that ask for something of the problem: their ratios where they were tried."""
        rows = []
        for method in (name for name in SPECS if name not in ASKING_NOTHING):
            ones = [self.all_found.get((problem, method)) for problem in SUITE]
            if any(ones):
                rows.append([method, *(MISSING if one is None else short(one.ratio) for one in ones)])
        best = [short(min(one.ratio for (name, _), one in self.found.items() if name == problem)) for problem in SUITE]
        return markdown_rows(["", *SUITE], [*rows, ["the best above", *best]])

    def errors(self) -> str:
        """Mean ± standard deviation over the seeds, of every method on every problem."""
        rows = []
        for method in [*self.order, *(name for name in SPECS if name not in ASKING_NOTHING)]:
            there = [self.all_found.get((problem, method)) for problem in self.problems]
            if any(there):
                rows.append([method, *(MISSING if one is None else mean_std(list(one.errors.values())) for one in there)])
        return markdown_rows(["", *self.problems], rows)

    def costs_table(self) -> str:
        """Time of a measured step, with quartiles, and how many steps are measured."""
        workloads = list(dict.fromkeys(row["workload"] for row in self.costs["rows"]))
        rows = []
        for method in (name for name in ASKING_NOTHING if (name, workloads[0]) in self.time):
            measured = self.time[method, workloads[0]]["measured"]
            rows.append([method, *(self.cost(method, workload) for workload in workloads), f"{measured:.0%}"])
        return markdown_rows(["", *workloads, "steps that read gradients"], rows)

    def calls(self) -> str:
        """What to write for each method."""
        return markdown_rows(["", "to write"], [[name, f"`{called(SPECS[name])}`"] for name in SPECS if name in ASKING_NOTHING])

    def methods(self, problem: str) -> int:
        """How many methods were tried on it, without those that ask for something."""
        return sum(name == problem for name, _ in self.found)

    def level(self, problem: str) -> int:
        """How many of these are the best on it, or cannot be told from the best."""
        return sum(one.level for (name, _), one in self.found.items() if name == problem)

    def seeds(self, problem: str) -> int:
        """How many seeds the plain sum has."""
        return len(self.found[problem, BASELINE].errors)

    def place(self, method: str) -> int:
        """Its place by the mean ratio, 1 for the best."""
        return list(self.whole).index(method) + 1

    def ahead_of(self, method: str) -> list[str]:
        """The methods whose mean ratio is smaller."""
        return list(self.whole)[: self.place(method) - 1]

    def error(self, method: str, problem: str) -> str:
        """Its mean over the seeds."""
        return f"{statistics.fmean(self.one(method, problem).errors.values()):.1f}"

    def best_other(self, method: str, problem: str) -> str:
        """The best of the other methods on a problem, with its ratio."""
        others = {name: one for (there, name), one in self.found.items() if there == problem and name != method}
        best = min(others, key=lambda name: others[name].ratio)
        return f"{best}, {short(others[best].ratio)}"

    def near(self, problem: str, share: float) -> int:
        """How many methods have a ratio on it of 1 to within a share; the plain sum is one of them."""
        return sum(name == problem and abs(one.ratio - 1) <= share for (name, _), one in self.found.items())

    def harmful(self, ratio: float) -> list[str]:
        """The methods that have a larger ratio on some problem of the suite."""
        return [method for method, one in self.whole.items() if one.worst > ratio]

    def harmless(self, ratio: float) -> list[str]:
        """The methods that have none so large, and are not the plain sum."""
        return [method for method, one in self.whole.items() if one.worst <= ratio and method != BASELINE]

    def level_on(self, method: str) -> str:
        """On which problems of the suite the seeds cannot tell it from the best."""
        mine = [problem for problem in SUITE if self.one(method, problem).level]
        return f"level with the best on {', '.join(mine)}" if mine else "level with the best on no problem"

    @property
    def provenance(self) -> str:
        """Versions and dates of the suite's records."""
        made = [record.made for record in self.records.all()]
        versions = "; ".join(dict.fromkeys(how["versions"] for how in made))
        return f"{versions}; {', '.join(sorted({how['date'] for how in made}))}."

    @property
    def figure(self) -> str:
        """Its path, as a page links it."""
        return "../benchmarks/results/every_method/every_method.png"
