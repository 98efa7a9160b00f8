"""The toy problem of the GradNorm paper (section 4): T regressions that differ in scale alone, and α from 0 to 3.

The measure is Σ_i L_i(t) / L_i(0) on held-out inputs, T at the start; at the end, the mean of the last eight evaluations.
σ = 1 and 100 for T = 2, those of public code for T = 10, and a geometric series from 1 to 100 for T = 40.

    python -m benchmarks.experiments.toy                       # ten seeds: an hour and a half
    python -m benchmarks.experiments.toy --quick
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from _common import draw_runs, figure_style, plt
from toy import LAST, SIGMAS, Batch, Evaluation, Toy, ToyData, inverse_squares

from benchmarks.experiments.command import Case, Experiment, main
from benchmarks.experiments.curves import COLOURS, add_legend, draw_curve
from benchmarks.experiments.fits import PAST, STATIC, Fit, balancer_of
from benchmarks.experiments.records import Problem, Record, Records
from lightning_gradnorm import (
    DynamicWeightAverage,
    EqualWeights,
    FixedWeights,
    GradNorm,
    LossBalancer,
    UncertaintyWeighting,
)
from lightning_gradnorm.report.comparison import Better

MEASURE = "Σ L(t)/L(0)"
METHODS = ("equal", "uncertainty", "DWA", "GradNorm", STATIC, *PAST, "fixed 1/σ²")
ALPHAS = (0, 0.12, 0.5, 1, 1.5, 2, 3)
ALL_SIGMAS = SIGMAS | {40: tuple(round(10 ** (2 * i / 39), 2) for i in range(40))}
EPOCH = 50  # steps whose mean losses dynamic weight average compares
OVER_ALPHA = ", over α"
BETTER: Mapping[str, Better] = {MEASURE: "lower"}
PROBLEMS = {f"T = {tasks}": Problem(METHODS, BETTER, PAST) for tasks in ALL_SIGMAS} | {
    f"T = {tasks}{OVER_ALPHA}": Problem(("equal", *(f"α = {alpha:g}" for alpha in ALPHAS)), BETTER) for tasks in SIGMAS
}


class Epochs:
    """A stream of batches, cut into epochs.

    Args:
        batches: the stream.
        length: of an epoch, in batches.
    """

    def __init__(self, batches: Iterator[Batch], length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(self.batches, self.length)


def method_of(case: Case, sigmas: tuple[float, ...]) -> LossBalancer:
    """The method; GradNorm at the α that is named, or the default's."""
    if case.method.startswith("α = "):
        return GradNorm(alpha=float(case.method.removeprefix("α = ")))
    makes: dict[str, Callable[[], LossBalancer]] = {
        "equal": EqualWeights,
        "uncertainty": UncertaintyWeighting,
        "DWA": DynamicWeightAverage,
        "GradNorm": GradNorm,
        "fixed 1/σ²": lambda: FixedWeights(inverse_squares(sigmas)),
    }
    return balancer_of(case, makes)


def fit(case: Case) -> Record:
    """One method on one seed's functions."""
    tasks = int(case.problem.removesuffix(OVER_ALPHA).removeprefix("T = "))
    return fit_toy(case, tasks, method_of(case, ALL_SIGMAS[tasks]))


def fit_toy(case: Case, tasks: int, balancer: LossBalancer) -> Record:
    """One fit; all methods start from one network and see the same batches."""
    sigmas, data = ALL_SIGMAS[tasks], ToyData(tasks, case.seed, case.steps)
    torch.manual_seed(case.seed)
    module = Toy(sigmas, lr=2e-3)
    fit = Fit(case, balancer)
    evaluation = Evaluation(data.held_out, case.every, fit.balancing)
    fit.run(module, Epochs(iter(data), min(EPOCH, case.steps)), callbacks=[evaluation])
    curves = {"step": [float(case.every * i) for i in range(len(evaluation.measures))], MEASURE: evaluation.measures}
    if case.method == "GradNorm":
        curves |= {f"weight {task}": [step[task] for step in evaluation.weights] for task in evaluation.weights[-1]}
    return fit.record({MEASURE: statistics.fmean(evaluation.measures[-LAST:])}, curves)


def draw(records: Records, path: Path) -> None:
    """As in the paper: a row per T with the measure and GradNorm's weights over the steps; below, the measure over α."""
    rows = [problem for problem in PROBLEMS if OVER_ALPHA not in problem and records.of(problem, PROBLEMS[problem].methods)]
    over_alpha = [problem for problem in PROBLEMS if OVER_ALPHA in problem and records.of(problem, PROBLEMS[problem].methods)]
    height = len(rows) + bool(over_alpha)
    if not height:
        return
    with figure_style():
        figure, grid = plt.subplots(height, 2, figsize=(10.5, 3.5 * height), squeeze=False)
        for (left, right), problem in zip(grid, rows, strict=False):
            found = records.of(problem, PROBLEMS[problem].methods)
            for method in (method for method in METHODS if method in found):
                draw_curve(left, found[method], MEASURE, color=COLOURS[method], label=method)
            left.set(title=f"{problem}: {MEASURE} ↓", xlabel="step")
            add_legend(left, loc="lower left")
            ours = "GradNorm" if "GradNorm" in found else PAST[0]
            fits = found.get(ours, [])
            curves = [name for name in (fits[0].curves if fits else ()) if name.startswith("weight ")]
            curves.sort(key=lambda name: float(name.partition("=")[2]))
            for rank, name in enumerate(curves):
                label = f"σ = {name.partition('=')[2]}" if len(curves) <= 10 or rank % 13 == 0 else None
                draw_curve(right, fits, name, color=plt.cm.viridis(0.9 * rank / (len(curves) - 1)), label=label)
            right.set(title=f"{ours}'s loss weights", xlabel="step", yscale="log")
            right.yaxis.set_major_formatter("{x:g}")
            add_legend(right, loc="center left", bbox_to_anchor=(1, 0.5))
        if over_alpha:
            for axes in grid[-1]:
                axes.set_visible(False)
        for axes, problem in zip(grid[-1], over_alpha, strict=False):
            found = records.of(problem, PROBLEMS[problem].methods)
            axes.set_visible(True)
            alphas = [alpha for alpha in ALPHAS if f"α = {alpha:g}" in found]
            seeds = range(len(found["equal"]))
            runs = [[found[f"α = {alpha:g}"][seed].measures[MEASURE] for alpha in alphas] for seed in seeds]
            draw_runs(axes, alphas, runs, color=COLOURS["GradNorm"], label="GradNorm", marker="o", markersize=4)
            equal = [[fit.measures[MEASURE]] * len(alphas) for fit in found["equal"]]
            draw_runs(axes, alphas, equal, color=COLOURS["equal"], label="equal")
            axes.set(title=f"{problem}: {MEASURE} at the end ↓", xlabel="α")
            add_legend(axes, loc="best")
        figure.savefig(path)
        plt.close(figure)


EXPERIMENT = Experiment(
    name="toy",
    about=__doc__ or "",
    problems=PROBLEMS,
    fit=fit,
    draw=draw,
    steps=1500,
    quick_steps=6,
    seeds=10,
    after={STATIC: "GradNorm"},
    points=30,
)

if __name__ == "__main__":
    main(EXPERIMENT)
