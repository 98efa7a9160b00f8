"""The command line: ``run`` makes the trainings that are not in the records yet, ``table`` sums up those that are."""

import argparse
import datetime
import json
import math
import multiprocessing
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

import lightning_gradnorm
from benchmarks.experiments.records import Record, Records
from benchmarks.suite import data_files
from benchmarks.suite.members import MARKS, Member, train
from benchmarks.suite.methods import METHODS, REFERENCES, Spec, by_kind, member, obstacle
from benchmarks.suite.problem import Kind, Problem
from benchmarks.suite.registry import PROBLEMS
from benchmarks.suite.summary import Summary
from benchmarks.suite.writing import write

RESULTS = Path(__file__).parents[1] / "results" / "suite"
AT_ONCE = 24  # trainings in one stack
GIVEN = "given"  # among --methods: those of --method and --methods-file
METHODS_HELP = f"names, or {GIVEN!r} for those given here; default: these and {', '.join(METHODS)}"


class Group(NamedTuple):
    """Trainings of one problem that are made at once: (method, its settings, seed) each."""

    problem: str
    steps: int
    trainings: tuple[tuple[str, Spec, int], ...]


def steps_of(problem: type[Problem], budget: float) -> int:
    """Of the whole training, at a share of the usual."""
    return max(round(problem.steps * budget), len(MARKS))


def alone() -> None:
    """One thread, and numbers too small to matter are zero: both are faster on networks as small as these."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def make(group: Group) -> list[Record]:
    """Train a group; a method that wants a package which is not there is left out."""
    problem = PROBLEMS[group.problem]
    members: list[tuple[Member, Spec]] = []
    for name, spec, seed in group.trainings:
        try:
            members.append((member(name, spec, problem(seed), group.steps), spec))
        except ImportError as missing:
            print(f"{group.problem}, {name}: left out, {missing}", flush=True)
    seconds = train(problem, [one for one, _ in members], group.steps) if members else math.nan
    return [record(group, one, spec, seconds) for one, spec in members]


def attempt(group: Group) -> list[Record] | str:
    """The records, or why there are none: the other groups go on."""
    try:
        return make(group)
    except Exception as wrong:
        return f"{type(wrong).__name__}: {wrong}"


def record(group: Group, one: Member, spec: Spec, seconds: float) -> Record:
    """What came of one training."""
    steps = [float(round(mark * group.steps)) for mark in MARKS]
    tasks = PROBLEMS[group.problem].tasks
    weights = {f"weight {task}": [noted.get(task, 1.0) for noted in one.weights] for task in tasks}
    curves = {"step": steps, "error": one.errors, **weights}
    made = {
        "versions": f"lightning-gradnorm {lightning_gradnorm.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}",
        "date": datetime.date.today().isoformat(),
    }
    return Record(
        group.problem,
        one.method,
        one.seed,
        group.steps,
        {"error": one.errors[-1]},
        seconds,
        one.weights[-1],
        curves=curves,
        extras={"settings": dict(spec)},
        made=made,
    )


def groups(options: argparse.Namespace, methods: Mapping[str, Mapping[Kind, Spec]], records: Records) -> Iterator[Group]:
    """What is missing; the longest first."""
    found = {(r.problem, r.method, r.seed, r.steps): r.extras.get("settings") for r in records.all()}
    for name in options.problems:
        problem = PROBLEMS[name]
        steps, wanted = steps_of(problem, options.budget), []
        for seed in options.seeds:
            for method in options.methods:
                if problem.kind not in methods[method] or obstacle(methods[method][problem.kind], problem):
                    continue
                spec = methods[method][problem.kind]
                there = found.get((name, method, seed, steps), spec)
                if there != spec:
                    raise SystemExit(f"The records have {method!r} with other settings, {there}: give these another name.")
                if (name, method, seed, steps) not in found:
                    wanted.append((method, spec, seed))
        parts = max(-(-len(wanted) // options.at_once), 1)
        size = -(-len(wanted) // parts)
        for first in range(0, len(wanted), max(size, 1)):
            yield Group(name, steps, tuple(wanted[first : first + size]))


def left_out(options: argparse.Namespace, methods: Mapping[str, Mapping[Kind, Spec]]) -> Iterator[tuple[str, str]]:
    """Each method that is given for a problem and not tried on it, with the reason and the problems."""
    found: dict[tuple[str, str], list[str]] = {}
    for method in options.methods:
        for name in options.problems:
            problem = PROBLEMS[name]
            if problem.kind in methods[method] and (why := obstacle(methods[method][problem.kind], problem)):
                found.setdefault((method, why), []).append(name)
    yield from ((method, f"{why}: not tried on {', '.join(names)}") for (method, why), names in found.items())


def run(options: argparse.Namespace, methods: Mapping[str, Mapping[Kind, Spec]], records: Records) -> None:
    """Make what is missing, in as many processes as were asked for.

    Raises:
        SystemExit: at the end, if some could not be made.
    """
    for name, why in left_out(options, methods):
        print(f"{name}: {why}", flush=True)
    todo = sorted(groups(options, methods, records), key=lambda group: -group.steps * len(group.trainings))
    done, began = 0, time.monotonic()

    def keep(group: Group, made: Sequence[Record]) -> None:
        nonlocal done
        done += len(made)
        for one in made:
            records.add(one)
        total, minutes = sum(len(each.trainings) for each in todo), (time.monotonic() - began) / 60
        print(
            f"{group.problem}: {len(made)} trainings of {group.steps} steps; {done} of {total}, {minutes:.1f} min", flush=True
        )

    failed = []
    for group, found in results(todo, options.jobs):
        if isinstance(found, str):
            failed.append(f"{group.problem}: {found}")
            print(failed[-1], flush=True)
        else:
            keep(group, found)
    if failed:
        raise SystemExit("\n".join(["Not made:", *failed]))


def results(todo: Sequence[Group], jobs: int) -> Iterator[tuple[Group, list[Record] | str]]:
    """Each group with what came of it, as they are ready; one alone in this process, several in processes of their own."""
    if jobs == 1:
        yield from ((group, attempt(group)) for group in todo)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=alone) as pool:
        working = {pool.submit(attempt, group): group for group in todo}
        yield from ((working[future], future.result()) for future in as_completed(working))


def given_methods(options: argparse.Namespace) -> dict[str, dict[Kind, Spec]]:
    """Name → settings, of the registry and of the command line."""
    given: dict[str, Spec] = {}
    for file in options.methods_file:
        given |= yaml.safe_load(file.read_text(encoding="utf-8"))
    for text in options.method:
        name, _, settings = text.partition("=")
        given[name] = json.loads(settings)
    try:
        return {name: by_kind(name, spec) for name, spec in given.items()}
    except ValueError as wrong:
        raise SystemExit(str(wrong)) from None


def parser() -> argparse.ArgumentParser:
    """The options."""
    whole = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    whole.add_argument("action", choices=("run", "table"))
    whole.add_argument("--problems", nargs="+", metavar="NAME", help="names, 'equations' or 'data'; default: all")
    whole.add_argument("--methods", nargs="+", metavar="NAME", help=METHODS_HELP)
    whole.add_argument("--method", action="append", default=[], metavar="NAME=JSON", help="one more, by its settings")
    whole.add_argument("--methods-file", action="append", default=[], type=Path, metavar="YAML", help="name → settings")
    whole.add_argument("--seeds", type=int, nargs="+", default=[3], help="one number: how many; several: which; default 3")
    whole.add_argument("--budget", type=float, default=1.0, help="share of the usual steps; default 1")
    whole.add_argument("--jobs", type=int, default=1, help="processes; default 1")
    whole.add_argument("--at-once", type=int, default=AT_ONCE, help="trainings in one stack; default %(default)s")
    whole.add_argument("--against", nargs="+", default=list(REFERENCES), metavar="NAME", help="whose best is the measure")
    whole.add_argument("--out", type=Path, default=RESULTS, help="folder of records, table and figure; default %(default)s")
    return whole


def main(arguments: Sequence[str] | None = None) -> Summary:
    """Run or sum up.

    Raises:
        SystemExit: for a command line that cannot be used.
    """
    options = parser().parse_args(arguments)
    given = given_methods(options)
    methods = METHODS | given
    if options.methods and GIVEN in options.methods:
        options.methods = list(dict.fromkeys([*(name for name in options.methods if name != GIVEN), *given]))
    kinds: dict[str, Kind] = {"equations": "equation", "data": "data"}
    asked = options.problems or list(PROBLEMS)
    options.problems = [n for n, p in PROBLEMS.items() if n in asked or any(kinds.get(a) == p.kind for a in asked)]
    unknown = [name for name in asked if name not in PROBLEMS and name not in kinds]
    if unknown:
        raise SystemExit(f"No problem {unknown[0]!r}; there are {', '.join(PROBLEMS)}.")
    if data_files.folder() is None:
        left = [name for name in options.problems if issubclass(PROBLEMS[name], data_files.NEED_FILES)]
        options.problems = [name for name in options.problems if name not in left]
        print(f"Left out, for ${data_files.NEEDS_FILES} names no folder: {', '.join(left)}" if left else "")
    options.seeds = list(range(options.seeds[0])) if len(options.seeds) == 1 else options.seeds
    records = Records(options.out / "records.jsonl")
    if options.action == "run":
        options.methods = options.methods or list(methods)
        if any(method not in methods for method in options.methods):
            raise SystemExit(f"Unknown method; there are {', '.join(methods)}.")
        options.out.mkdir(parents=True, exist_ok=True)
        run(options, methods, records)
    problems = {name: (PROBLEMS[name].kind, steps_of(PROBLEMS[name], options.budget)) for name in options.problems}
    summary = Summary(records.all(), problems, options.methods, options.against)
    print(summary.text())
    options.out.mkdir(parents=True, exist_ok=True)
    for path in write(summary, options.out):
        print(path)
    return summary
