"""GradNorm's settings on Helmholtz: scale rule × α × W × form of the update, all else alike; a quarter of the published steps.

Σw = T with the network's β₂ = 0.99, which forgets large gradients ten times sooner, is the control for the scale rules.

    python -m benchmarks.experiments.helmholtz_settings        # three seeds, 10,000 steps: an hour and a half
    python -m benchmarks.experiments.helmholtz_settings --quick
"""

import itertools
from pathlib import Path

from _common import figure_style, plt

from benchmarks.experiments.command import Case, Experiment, main
from benchmarks.experiments.physics import ERROR, METHODS, PROBLEMS, Method, fit_once, gradnorm
from benchmarks.experiments.records import Problem, Record, Records

NAME = "Helmholtz"
SCALES = {"sum": "Σw = T", "reference": "residual 1", "gradient": "gradient kept"}
ALPHAS = (0.0, 1.5)
UPDATES = {"log": "log", "closed_form": "closed form", "paper": "paper"}


def setting(
    update: str, scale: str, alpha: float, everywhere: bool = False, also: str = "", beta2: float = 0.999, **more: float
) -> tuple[str, Method]:
    """Its name in the table, which ends with what else is particular to it, and the method."""
    name = f"{UPDATES[update]}, {SCALES[scale]}, α = {alpha:g}, {'all W' if everywhere else 'last W'}{also}"
    balancer = gradnorm(alpha, scale=scale, update=update, **more)
    return name, Method(balancer, "all" if everywhere else "last", beta2)


GRID = dict(
    setting(update, scale, alpha, everywhere)
    for update, alpha, everywhere, scale in itertools.product(("log", "closed_form"), ALPHAS, (False, True), SCALES)
)
PAPER = dict(setting("paper", scale, alpha) for scale, alpha in itertools.product(("sum", "reference"), ALPHAS))
SLOWER = dict(setting("log", "reference", 0.0, everywhere, ", lr 0.01", lr=0.01) for everywhere in (False, True)) | dict(
    setting("closed_form", "reference", 0.0, everywhere, ", β = 0.98, every 25th step", ema_decay=0.98, update_every=25)
    for everywhere in (False, True)
)
CONTROL = {"β₂ = 0.99, " + name: method for name, method in (setting("log", "sum", alpha, beta2=0.99) for alpha in ALPHAS)}
OTHERS = {name: METHODS[name] for name in ("equal", "annealing")}
ALL = OTHERS | GRID | PAPER | SLOWER | CONTROL


def fit(case: Case) -> Record:
    """One setting, one seed."""
    return fit_once(case, PROBLEMS[NAME], ALL[case.method])


def draw(records: Records, path: Path) -> None:
    """Each setting's errors, a dot per seed; the mean of equal weights as a line."""
    comparison = records.comparison(NAME, ERROR, ALL)
    if comparison is not None:
        with figure_style(), plt.rc_context({"axes.grid.axis": "x"}):
            comparison.draw(path)


EXPERIMENT = Experiment(
    name="helmholtz_settings",
    about=__doc__ or "",
    problems={NAME: Problem(tuple(ALL), ERROR)},
    fit=fit,
    draw=draw,
    steps=10_000,
    quick_steps=5,
    seeds=3,
)

if __name__ == "__main__":
    main(EXPERIMENT)
