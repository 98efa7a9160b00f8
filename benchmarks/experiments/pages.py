"""Writes docs/<page>.md from docs/<page>.md.jinja and the records under benchmarks/results: no number is typed by hand.

So are the README's parts between ``<!-- made from docs/parts/<part>.jinja -->`` and ``<!-- until here -->``.

python -m benchmarks.experiments.pages           # writes the pages, and the tables and figures beside the records
python -m benchmarks.experiments.pages --check   # exits with 1 if a page is not what the records say
"""

import copy
import dataclasses
import importlib
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from benchmarks.experiments.command import Experiment, write_report
from benchmarks.experiments.every_method import EveryMethod
from benchmarks.experiments.records import Record, Records
from benchmarks.experiments.scaling import Scaling
from benchmarks.suite.recorded import Recorded
from lightning_gradnorm.report.comparison import ARROWS, Comparison, mean_std
from lightning_gradnorm.report.table import markdown_rows

ROOT = Path(__file__).parents[2]
DOCS, RESULTS, README = ROOT / "docs", ROOT / "benchmarks" / "results", ROOT / "README.md"
PART = re.compile(r"(<!-- made from docs/(parts/[\w-]+\.jinja) -->).*?(<!-- until here -->)", re.DOTALL)
NAMES = ("toy", "helmholtz", "klein_gordon", "cmapss", "rescue", "tox21", "no_harm", "db_pinn", "scenes", "scenes_methods")
AMONG_THE_PAGES = {"scenes"}  # whose figures lie in docs/images, and not beside the records


def experiment(name: str) -> Experiment:
    """By its file's name."""
    module = importlib.import_module(f"benchmarks.experiments.{name}")
    assert isinstance(module.EXPERIMENT, Experiment)
    return module.EXPERIMENT


class Results:
    """What a page can say of one experiment.

    Args:
        name: of the experiment.
    """

    def __init__(self, name: str) -> None:
        self.experiment, self.records = experiment(name), Records(RESULTS / name / "records.jsonl")

    def only(self, *methods: str, from_seed: int = 0) -> "Results":
        """The same of some methods alone: on every seed that these have, whatever the others have.

        Args:
            methods: their names.
            from_seed: the first seed that counts.

        Raises:
            ValueError: for a method that no problem of the experiment has.
        """
        known = {method for problem in self.experiment.problems.values() for method in problem.methods}
        if unknown := [method for method in methods if method not in known]:
            raise ValueError(f"{self.experiment.name} has no method {unknown[0]!r}; it has {', '.join(sorted(known))}")
        chosen = {
            name: problem._replace(methods=[method for method in problem.methods if method in methods])
            for name, problem in self.experiment.problems.items()
        }
        results = copy.copy(self)
        results.experiment = dataclasses.replace(self.experiment, problems=chosen)
        results.records = self.records.since(from_seed)
        return results

    def __bool__(self) -> bool:
        return bool(self.records.all())

    def found(self, problem: str) -> dict[str, list[Record]]:
        """Method → its fits, one per seed that all methods have."""
        return self.records.of(problem, self.experiment.problems[problem].methods)

    def fits(self, problem: str, method: str) -> list[Record]:
        """One per seed that all methods of the problem have."""
        return self.found(problem)[method]

    def has(self, problem: str, *methods: str) -> bool:
        """Whether there is a seed that all of at least two methods have, these among them."""
        found = self.found(problem)
        return len(found) > 1 and all(method in found for method in methods)

    def seeds(self, problem: str) -> int:
        """How many."""
        return len(next(iter(self.found(problem).values())))

    def _comparison(self, problem: str, baseline: str | None = None) -> Comparison:
        comparison = self.experiment.comparison(self.records, problem, baseline)
        assert comparison is not None, f"no records of {problem}"
        return comparison

    def table(self, problem: str, measures: Sequence[str] = ()) -> str:
        """Methods as they are listed: mean ± standard deviation over the seeds of every measure."""
        comparison = self._comparison(problem)
        better = self.experiment.problems[problem].better
        measures = measures or tuple(better)
        columns = ["", *(f"{m} {ARROWS[better[m]]}" for m in measures)]
        rows = [[method, *(mean_std(comparison.values(method, m)) for m in measures)] for method in self.found(problem)]
        order = list(self.experiment.problems[problem].methods)
        return markdown_rows(columns, sorted(rows, key=lambda row: order.index(row[0])))

    def across(self, problems: Sequence[str], methods: Sequence[str], measure: str) -> str:
        """One measure, mean ± standard deviation over the seeds: a row per method, a column per problem."""
        columns = [measure, *(f"{problem}, {self.seeds(problem)} seeds" for problem in problems)]
        values = {problem: self._comparison(problem).values for problem in problems}
        rows = [[method, *(mean_std(values[problem](method, measure)) for problem in problems)] for method in methods]
        return markdown_rows(columns, rows)

    def differences(self, problem: str, measures: Sequence[str] = (), baseline: str = "equal") -> str:
        """Method minus baseline, seed by seed: mean ± standard deviation."""
        comparison = self._comparison(problem, baseline)
        measures = measures or tuple(self.experiment.problems[problem].better)
        rows = [
            [method, *(mean_std(comparison.differences(method, measure), "+") for measure in measures)]
            for method in self.experiment.problems[problem].methods
            if method != baseline and method in comparison.methods
        ]
        return markdown_rows([f"minus {baseline}", *measures], rows)

    def changes(self, reference: str, problems: Sequence[str], measures: Sequence[str]) -> str:
        """Of every method's means, from the reference problem's to the others', over the seeds that both have, in per cent."""
        rows, before = [], self.found(reference)
        for problem in problems:
            for method, fits in self.found(problem).items():
                by_seed = {fit.seed: fit.measures for fit in before.get(method, [])}
                pairs = [(fit.measures, by_seed[fit.seed]) for fit in fits if fit.seed in by_seed]
                if pairs:
                    ratios = [sum(after[m] for after, _ in pairs) / sum(first[m] for _, first in pairs) for m in measures]
                    rows.append([problem, method, *(f"{100 * (ratio - 1):+.1f} %" for ratio in ratios)])
        return markdown_rows(["", "", *measures], rows)

    def seed_by_seed(self, problem: str, measure: str, digits: int = 3, factor: float = 1) -> str:
        """Every fit's value, times a factor: a row per method, a column per seed."""
        found = self.found(problem)
        order = [method for method in self.experiment.problems[problem].methods if method in found]
        columns = ["", *(f"seed {fit.seed}" for fit in found[order[0]]), "mean ± std"]
        rows = []
        for method in order:
            values = [factor * fit.measures[measure] for fit in found[method]]
            rows.append([method, *(f"{value:.{digits}g}" for value in values), mean_std(values)])
        return markdown_rows(columns, rows)

    def by_measure(self, problem: str) -> str:
        """Those measures that the other tables leave out: a row each, a column per method."""
        found, shown = self.found(problem), self.experiment.problems[problem].better
        first = next(iter(found.values()))[0]
        rows = [
            [measure, *(mean_std([fit.measures[measure] for fit in fits]) for fits in found.values())]
            for measure in first.measures
            if measure not in shown
        ]
        return markdown_rows(["", *found], rows)

    def said(self, problem: str, extra: str) -> str:
        """The different values of an extra, each with the number of fits that have it."""
        values = [fit.extras[extra] for fits in self.found(problem).values() for fit in fits if extra in fit.extras]
        return ", ".join(f"“{value}” on {values.count(value)} of {len(values)} seeds" for value in dict.fromkeys(values))

    def mean(self, problem: str, method: str, measure: str) -> float:
        """Over the seeds."""
        return statistics.fmean(fit.measures[measure] for fit in self.fits(problem, method))

    def median(self, problem: str, method: str, measure: str) -> float:
        """Over the seeds."""
        return statistics.median(fit.measures[measure] for fit in self.fits(problem, method))

    def mean_difference(self, problem: str, method: str, measure: str, baseline: str) -> str:
        """Method minus baseline, seed by seed: mean ± standard deviation."""
        return mean_std(self._comparison(problem, baseline).differences(method, measure), "+")

    def better_on(self, problem: str, method: str, measure: str, than: str = "equal") -> int:
        """On how many seeds the method is ahead of another."""
        sign = 1 if self.experiment.problems[problem].better[measure] == "higher" else -1
        pairs = zip(self.fits(problem, method), self.fits(problem, than), strict=True)
        return sum(sign * (ours.measures[measure] - theirs.measures[measure]) > 0 for ours, theirs in pairs)

    def ratio(self, problem: str, method: str, task: str, to: str, at: float) -> float:
        """Of two tasks' weights at a share of the steps, the geometric mean over the seeds."""
        fits = self.fits(problem, method)
        point = round(at * (len(fits[0].curves["step"]) - 1))
        ratios = (fit.curves[f"weight {task}"][point] / fit.curves[f"weight {to}"][point] for fit in fits)
        return statistics.geometric_mean(ratios)

    @property
    def figure(self) -> str:
        """Its path, as a page links it."""
        if self.experiment.name in AMONG_THE_PAGES:
            return f"images/{self.experiment.name}.png"
        return f"../benchmarks/results/{self.experiment.name}/{self.experiment.name}.png"

    @property
    def provenance(self) -> str:
        """Commands, dates, versions, machine."""
        return self.experiment.provenance(self.records)


def rendered(template: str, names: Mapping[str, object]) -> str:
    """What a template, its path from docs on, says of what the names stand for."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(DOCS),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(names)


def pages() -> dict[Path, str]:
    """Every page that is made, or has a part that is, and what it says now."""
    names = {name: Results(name) for name in NAMES} | {"suite": Recorded(), "scale": Scaling(), "every": EveryMethod()}
    texts = {template.with_suffix(""): rendered(template.name, names) for template in sorted(DOCS.glob("*.md.jinja"))}
    readme = README.read_text(encoding="utf-8")
    return texts | {README: PART.sub(lambda found: found[1] + rendered(found[2], names) + found[3], readme)}


def main(arguments: Sequence[str]) -> int:
    """Write or check all pages; 0 if all is well."""
    if "--check" in arguments:
        stale = [path.name for path, text in pages().items() if path.read_text(encoding="utf-8") != text]
        print("\n".join(f"{name} is not what the records say" for name in stale) or "The pages are what the records say.")
        return int(bool(stale))
    for name in NAMES:
        records = Records(RESULTS / name / "records.jsonl")
        if records.all():
            write_report(experiment(name), records, RESULTS / name)
            if name in AMONG_THE_PAGES:
                (RESULTS / name / f"{name}.png").replace(DOCS / "images" / f"{name}.png")
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
