"""The Helmholtz equation as Wang, Teng, Perdikaris (2021) train it, by each of their methods and GradNorm.

python -m benchmarks.experiments.helmholtz                 # three seeds, 40,000 steps: an hour and a half
python -m benchmarks.experiments.helmholtz --quick
"""

from functools import partial

from benchmarks.experiments.command import Case, Experiment, Problem, main
from benchmarks.experiments.physics import ERROR, METHODS, PROBLEMS, draw_problem, fit_once
from benchmarks.experiments.records import Record

NAME = "Helmholtz"


def fit(case: Case) -> Record:
    """One method, one seed."""
    return fit_once(case, PROBLEMS[NAME], METHODS[case.method])


EXPERIMENT = Experiment(
    name="helmholtz",
    about=__doc__ or "",
    problems={NAME: Problem(tuple(METHODS), ERROR)},
    fit=fit,
    draw=partial(draw_problem, NAME, tuple(METHODS)),
    steps=40_000,
    quick_steps=10,
    seeds=3,
)

if __name__ == "__main__":
    main(EXPERIMENT)
