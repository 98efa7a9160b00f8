"""One loss in other units: C-MAPSS FD001, both losses of like size at first, then one of them times 1e-4 or 1e4.

The measures are as ever in cycles and accuracy. With equal weights the larger loss is all that is learnt; a method that
balances gives what it gave without the factor.

    python -m benchmarks.experiments.rescue --data DATA        # five seeds: forty minutes
    python -m benchmarks.experiments.rescue --data DATA --quick
"""

from collections.abc import Callable

from benchmarks.experiments.cmapss import BETTER, fit_turbofan
from benchmarks.experiments.command import Case, Experiment, main
from benchmarks.experiments.records import Problem, Record
from benchmarks.experiments.turbofans import CAP
from lightning_gradnorm import EqualWeights, GradNorm, LossBalancer

SUBSET = "FD001"
PROBLEMS: dict[str, dict[str, float]] = {
    "as they are": {},
    "life × 1e-4": {"life": 1e-4},
    "life × 1e4": {"life": 1e4},
    "health × 1e-4": {"health": 1e-4},
    "health × 1e4": {"health": 1e4},
}
METHODS: dict[str, Callable[[], LossBalancer]] = {
    "equal": EqualWeights,
    "GradNorm": GradNorm,
    "GradNorm, Σw = T": lambda: GradNorm(scale="sum"),
}


def fit(case: Case) -> Record:
    """One method, one seed, one factor."""
    return fit_turbofan(case, SUBSET, METHODS[case.method](), CAP, PROBLEMS[case.problem])


EXPERIMENT = Experiment(
    name="rescue",
    about=__doc__ or "",
    problems=dict.fromkeys(PROBLEMS, Problem(tuple(METHODS), BETTER)),
    fit=fit,
    steps=3000,
    quick_steps=20,
    seeds=5,
    needs_data="cmapss",
)

if __name__ == "__main__":
    main(EXPERIMENT)
