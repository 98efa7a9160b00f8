"""Which settings should be GradNorm's defaults: scale rule × α, on problems of several kinds, all else alike.

python -m benchmarks.experiments.defaults --data DATA      # three seeds: forty minutes
python -m benchmarks.experiments.defaults --data DATA --quick
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from _common import figure_style, plt
from digits_problem import Digits, load
from torch.utils.data import DataLoader

from benchmarks.experiments.cmapss import BETTER as TURBOFANS
from benchmarks.experiments.cmapss import fit_turbofan
from benchmarks.experiments.command import Case, Experiment, main
from benchmarks.experiments.curves import GREY, SKY, VERMILION, add_legend
from benchmarks.experiments.fits import Fit
from benchmarks.experiments.records import Problem, Record, Records
from benchmarks.experiments.toy import BETTER as TOY
from benchmarks.experiments.toy import fit_toy
from lightning_gradnorm import EqualWeights, GradNorm, LossBalancer
from lightning_gradnorm.report.comparison import ARROWS, Better

SCALES = {"sum": "Σw = T", "gradient": "gradient kept"}
ALPHAS = (0.0, 0.5, 1.5)
DIGITS: Mapping[str, Better] = {"accuracy": "higher", "pixels RMSE": "lower", "ink RMSE": "lower"}


def fit_digits(case: Case, balancer: LossBalancer) -> Record:
    """The network of ``examples/digits.py``: class, pixels and amount of ink of a digit."""
    train, test = load()
    torch.manual_seed(case.seed)
    module, order = Digits(), torch.Generator().manual_seed(case.seed)
    fit = Fit(case, balancer)
    fit.run(module, DataLoader(train, 64, shuffle=True, generator=order), DataLoader(test, len(test)), limit_val_batches=0)
    (scores, pixels, ink), (images, labels) = module.eval()(test.tensors[0]), test.tensors
    measures = {
        "accuracy": (scores.argmax(1) == labels).float().mean().item(),
        "pixels RMSE": (pixels - images).square().mean().sqrt().item(),
        "ink RMSE": (ink - images.sum(1)).square().mean().sqrt().item(),
    }
    return fit.record(measures)


FITS: dict[str, tuple[Callable[[Case, LossBalancer], Record], Mapping[str, Better]]] = {
    "C-MAPSS FD001": (lambda case, balancer: fit_turbofan(case, "FD001", balancer), TURBOFANS),
    "digits": (fit_digits, DIGITS),
    "toy, T = 2": (lambda case, balancer: fit_toy(case, 2, balancer), TOY),
    "toy, T = 10": (lambda case, balancer: fit_toy(case, 10, balancer), TOY),
}
SETTINGS = {f"{SCALES[scale]}, α = {alpha:g}": (scale, alpha) for alpha, scale in itertools.product(ALPHAS, SCALES)}
METHODS = ("equal", *SETTINGS)


def fit(case: Case) -> Record:
    """One setting, one problem, one seed."""
    balancer: LossBalancer = EqualWeights()
    if case.method in SETTINGS:
        scale, alpha = SETTINGS[case.method]
        balancer = GradNorm(alpha=alpha, scale=scale)
    return FITS[case.problem][0](case, balancer)


def draw(records: Records, path: Path) -> None:
    """Per problem and measure: each scale rule's mean over α, its seeds as dots; equal weights as a line."""
    panels = [(name, measure) for name, (_, better) in FITS.items() if records.of(name, METHODS) for measure in better]
    if not panels:
        return
    columns = 4
    rows = -(-len(panels) // columns)
    places = range(len(ALPHAS))
    with figure_style():
        figure, grid = plt.subplots(rows, columns, figsize=(3 * columns, 2.4 * rows), squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (name, measure) in zip(grid.flat, panels, strict=False):
            found, better = records.of(name, METHODS), FITS[name][1]
            for (scale, words), colour in zip(SCALES.items(), (VERMILION, SKY), strict=True):
                settings = [f"{words}, α = {alpha:g}" for alpha in ALPHAS]
                values = [[fit.measures[measure] for fit in found.get(setting, [])] for setting in settings]
                if all(values):
                    axes.plot(places, [sum(v) / len(v) for v in values], color=colour, label=f'scale="{scale}"')
                for place, seeds in zip(places, values, strict=True):
                    axes.plot([place] * len(seeds), seeds, "o", color=colour, alpha=0.5, markersize=3)
            equal = [fit.measures[measure] for fit in found["equal"]]
            axes.axhline(sum(equal) / len(equal), color=GREY, linewidth=1.2, label="equal")
            axes.set_title(f"{name}: {measure} {ARROWS[better[measure]]}", fontsize=8)
            axes.set_xticks(places, [f"{alpha:g}" for alpha in ALPHAS])
            axes.set_xlabel("α")
        add_legend(grid[0][0], loc="best", fontsize=7)
        figure.savefig(path)
        plt.close(figure)


EXPERIMENT = Experiment(
    name="defaults",
    about=__doc__ or "",
    problems={name: Problem(METHODS, better) for name, (_, better) in FITS.items()},
    fit=fit,
    draw=draw,
    steps=1500,
    quick_steps=10,
    seeds=3,
    points=30,
    needs_data="cmapss",
)

if __name__ == "__main__":
    main(EXPERIMENT)
