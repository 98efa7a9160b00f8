"""One loss in other units: both of like size at first, then one of them times 1e-4 or 1e4; the measures are as ever.

With equal weights the larger loss is all that the trunk learns; a method that balances gives what it gave without the factor.
On C-MAPSS FD001, where one task's features serve the other too, and on pairs of digits, where they do not.

    python -m benchmarks.experiments.rescue --data DATA        # five seeds: fifty minutes
    python -m benchmarks.experiments.rescue --data DATA --quick
"""

from collections.abc import Callable

from benchmarks.experiments import cmapss, no_harm
from benchmarks.experiments.cmapss import fit_turbofan
from benchmarks.experiments.command import Case, Experiment, main
from benchmarks.experiments.fits import PAST
from benchmarks.experiments.no_harm import fit_pairs
from benchmarks.experiments.records import Problem, Record
from benchmarks.experiments.turbofans import CAP
from lightning_gradnorm import EqualWeights, GradNorm, LossBalancer

SUBSET = "FD001"
Factors = dict[str, float]
TURBOFANS: dict[str, Factors] = {
    "as they are": {},
    "life × 1e-4": {"life": 1e-4},
    "life × 1e4": {"life": 1e4},
    "health × 1e-4": {"health": 1e-4},
    "health × 1e4": {"health": 1e4},
}
DIGITS: dict[str, Factors] = {"digits as they are": {}, "left × 1e-4": {"left": 1e-4}, "left × 1e4": {"left": 1e4}}
METHODS: dict[str, Callable[[], LossBalancer]] = {
    "equal": EqualWeights,
    "GradNorm": GradNorm,
}
SHOWN = (*METHODS, PAST[0])


def fit(case: Case) -> Record:
    """One method, one seed, one factor."""
    balancer = METHODS[case.method]()
    if case.problem in DIGITS:
        return fit_pairs(case, balancer, DIGITS[case.problem])
    return fit_turbofan(case, SUBSET, balancer, CAP, TURBOFANS[case.problem])


EXPERIMENT = Experiment(
    name="rescue",
    about=__doc__ or "",
    problems={
        **dict.fromkeys(TURBOFANS, Problem(SHOWN, cmapss.BETTER, PAST)),
        **dict.fromkeys(DIGITS, Problem(SHOWN, no_harm.BETTER, PAST)),
    },
    fit=fit,
    steps=3000,
    quick_steps=20,
    seeds=5,
    needs_data="cmapss",
)

if __name__ == "__main__":
    main(EXPERIMENT)
