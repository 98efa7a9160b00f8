"""The command line that all experiments have: which fits, one after the other, resumed where a run was stopped."""

import argparse
import datetime
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning
import torch
from _common import Progress, quiet_lightning

import lightning_gradnorm
from benchmarks.experiments.curves import draw_measures
from benchmarks.experiments.records import Problem, Record, Records
from lightning_gradnorm.report.comparison import Comparison


@dataclass(frozen=True)
class Case:
    """One fit to be made.

    Attributes:
        problem, method, seed, steps: which.
        every: steps from one point of a curve to the next.
        progress: a callback for the Trainer.
        data: folder of the data files, for problems that have some.
        before: the record of the fit that this one starts from, ``"GradNorm"``'s for ``"GradNorm static"``.
    """

    problem: str
    method: str
    seed: int
    steps: int
    every: int
    progress: Progress
    data: Path | None
    before: Record | None


@dataclass(frozen=True)
class Experiment:
    """What one file says of itself.

    Attributes:
        name: of the folder for its results.
        about: first line of the help.
        problems: name → what is compared on it.
        fit: makes one fit; gives the record without ``made``.
        steps, quick_steps: optimiser steps of a fit.
        lengths: problem → its share of those steps, where that is not all of them.
        seeds: how many.
        after: method → the method whose record it starts from.
        needs_data: the folder under ``--data`` that it reads, if any.
        draw: the figure; by default a row per problem and a panel per measure.
        points: of a curve.
    """

    name: str
    about: str
    problems: Mapping[str, Problem]
    fit: Callable[[Case], Record]
    steps: int
    quick_steps: int
    seeds: int
    after: Mapping[str, str] = field(default_factory=dict)
    needs_data: str | None = None
    draw: Callable[[Records, Path], None] | None = None
    points: int = 50
    lengths: Mapping[str, float] = field(default_factory=dict)

    def steps_on(self, problem: str, steps: int) -> int:
        """Of a fit on this problem, where the longest problem's has so many."""
        return max(round(steps * self.lengths.get(problem, 1)), 1)

    def comparison(self, records: Records, problem: str, baseline: str | None = None) -> Comparison | None:
        """The methods on one problem; ``None`` if there is nothing to compare yet.

        Args:
            records: of the experiment.
            problem: its name.
            baseline: that the differences are to; by default the first method.
        """
        methods, better, _ = self.problems[problem]
        order = [*([baseline] if baseline else []), *(method for method in methods if method != baseline)]
        return records.comparison(problem, better, order)

    def tables(self, records: Records) -> str:
        """Of every problem with a seed that all its methods have, in Markdown."""
        parts = []
        for problem, (methods, *_) in self.problems.items():
            comparison = self.comparison(records, problem)
            if comparison is not None:
                steps = records.of(problem, methods)[comparison.baseline][0].steps
                parts.append(f"## {problem}, {steps:,} steps\n\n{comparison.markdown()}")
        return "\n".join(parts)

    def provenance(self, records: Records) -> str:
        """The commands that made the records, in Markdown, each with its dates, versions and machine."""
        made: dict[tuple[str, ...], set[str]] = {}
        for record in records.all():
            how = {key: value for key, value in record.made.items() if key != "date"}
            made.setdefault(tuple(how.values()), set()).add(record.made["date"])
        lines = [f"- `{how[0]}`: {', '.join(sorted(dates))}; {'; '.join(how[1:])}" for how, dates in made.items()]
        return "\n".join(["Made by:", "", *lines]) + "\n"


def folder_of(experiment: Experiment, options: argparse.Namespace) -> Path:
    """For the results; quick ones are kept apart."""
    return options.out or Path("runs") / "experiments" / (experiment.name + ("-quick" if options.quick else ""))


def read_options(experiment: Experiment, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    methods = list(dict.fromkeys(method for problem in experiment.problems.values() for method in problem.made))
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.experiments.{experiment.name}",
        description=experiment.about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"methods: {', '.join(map(repr, methods))}",
    )
    parser.add_argument("--problems", nargs="+", choices=experiment.problems, default=list(experiment.problems), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, metavar="NAME", help="default: all")
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help=f"one number: how many; several: which; default {experiment.seeds}"
    )
    parser.add_argument("--steps", type=int, help=f"of every fit; default {experiment.steps}")
    parser.add_argument("--data", type=Path, help="folder with the data files, for the problems that read some")
    parser.add_argument("--out", type=Path, help="folder for records, tables and figure; fits that are in it are not repeated")
    parser.add_argument("--quick", action="store_true", help=f"one seed, {experiment.quick_steps} steps: to see that it runs")
    options = parser.parse_args(arguments)
    seeds = options.seeds or ([1] if options.quick else [experiment.seeds])
    options.seeds = list(range(seeds[0])) if len(seeds) == 1 else seeds
    options.steps = options.steps or (experiment.quick_steps if options.quick else experiment.steps)
    if experiment.needs_data and (options.data is None or not (options.data / experiment.needs_data).is_dir()):
        parser.error(
            f"--data is the folder that holds {experiment.needs_data}/ with its files; got {options.data}. "
            "benchmarks/results/README.md says where the data come from."
        )
    return options


def how_made(experiment: Experiment, arguments: Sequence[str] | None) -> dict[str, str]:
    """Command, date, versions, machine."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for option, stands_for in (("--data", "DATA"), ("--out", "OUT")):
        if option in words:
            words[words.index(option) + 1] = stands_for  # where they lay does not matter
    quoted = [repr(word) if " " in word else word for word in words]
    return {
        "command": " ".join(["python -m", f"benchmarks.experiments.{experiment.name}", *quoted]),
        "versions": f"lightning-gradnorm {lightning_gradnorm.__version__}, torch {torch.__version__}, lightning "
        f"{lightning.__version__}, Python {platform.python_version()}",
        "machine": f"{platform.machine()} {platform.system()}, one thread",
        "date": datetime.date.today().isoformat(),
    }


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> Records:
    """Make the fits that are not in the records yet; then tables and figure from all that are.

    Raises:
        SystemExit: for a command line that cannot be used.
    """
    options = read_options(experiment, arguments)
    torch.set_num_threads(1)  # networks as small as these are slower on several
    out = folder_of(experiment, options)
    out.mkdir(parents=True, exist_ok=True)
    records, made = Records(out / "records.jsonl"), how_made(experiment, arguments)
    wanted = [
        (problem, method, seed, steps)
        for seed in options.seeds
        for problem in options.problems
        for steps in [experiment.steps_on(problem, options.steps)]
        for method in experiment.problems[problem].made
        if method in options.methods and records.find(problem, method, seed, steps) is None
    ]
    progress = Progress(sum(steps for *_, steps in wanted))
    with quiet_lightning():
        for problem, method, seed, steps in wanted:
            progress.name(f"{problem}, seed {seed}, {method}")
            first = experiment.after.get(method)
            before = records.find(problem, first, seed, steps) if first else None
            if first and before is None:
                raise SystemExit(f"{method!r} starts from the weights of {first!r}: add it to --methods.")
            case = Case(
                problem,
                method,
                seed,
                steps,
                max(steps // experiment.points, 1),
                progress,
                options.data,
                before,
            )
            record = experiment.fit(case)
            records.add(Record(**(vars(record) | {"made": made})))
    report(experiment, records, out)
    return records


def report(experiment: Experiment, records: Records, out: Path) -> None:
    """Tables to the console and the folder, and the figure."""
    for problem in experiment.problems:
        comparison = experiment.comparison(records, problem)
        if comparison is not None:
            print(f"\n{problem}")
            comparison.print()
    table, figure = write_report(experiment, records, out)
    print(f"\nTables: {table}\nFigure: {figure}\nRecords: {records.path}")


def write_report(experiment: Experiment, records: Records, out: Path) -> tuple[Path, Path]:
    """Tables and figure into the folder."""
    table, figure = out / "table.md", out / f"{experiment.name}.png"
    title = experiment.about.splitlines()[0]
    table.write_text(f"# {title}\n\n{experiment.tables(records)}{experiment.provenance(records)}", encoding="utf-8")
    if experiment.draw is None:
        draw_measures(records, experiment.problems, figure)
    else:
        experiment.draw(records, figure)
    return table, figure
