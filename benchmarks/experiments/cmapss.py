"""Remaining useful life and state of health of C-MAPSS turbofans (FD001, FD002), the life in cycles as it comes.

``hand-scaled`` has the life divided by 125, which makes the two losses alike: the one to reach. All others see cycles; ``fixed
1/125²`` is the control, which has the hand-scaled one's loss and a head that counts in cycles. ``from the mean``: the bias of
the life's head starts at the mean life of the training windows.

    python -m benchmarks.experiments.cmapss --data DATA        # five seeds: an hour and a quarter
    python -m benchmarks.experiments.cmapss --data DATA --quick
"""

import functools
from collections.abc import Callable, Mapping

import torch

from benchmarks.experiments.command import Case, Experiment, main
from benchmarks.experiments.fits import PAST, STATIC, Fit, Shuffled, balancer_of
from benchmarks.experiments.records import Problem, Record
from benchmarks.experiments.turbofans import CAP, Engines, Turbofan
from lightning_gradnorm import (
    AdaptiveNormalizedLoss,
    DynamicWeightAverage,
    EqualWeights,
    FixedWeights,
    GradNorm,
    LossBalancer,
    UncertaintyWeighting,
)
from lightning_gradnorm.report.comparison import Better

BALANCERS: dict[str, Callable[[], LossBalancer]] = {
    "equal": EqualWeights,
    "hand-scaled": EqualWeights,
    "uncertainty": UncertaintyWeighting,
    "DWA": DynamicWeightAverage,
    "AMNL": AdaptiveNormalizedLoss,
    "GradNorm": GradNorm,
    "fixed 1/125²": lambda: FixedWeights({"life": CAP**-2, "health": 1}),
}
FROM_MEAN = {method + ", from the mean": BALANCERS[method] for method in ("equal", "hand-scaled", "GradNorm")}
KEPT = (*PAST, PAST[0] + ", from the mean")
METHODS = (*BALANCERS, STATIC, *PAST, *FROM_MEAN, KEPT[-1])
SUBSETS = ("FD001", "FD002")
BETTER: Mapping[str, Better] = {"RMSE": "lower", "NASA score": "lower", "accuracy": "higher"}

read = functools.cache(Engines.read)


def fit_turbofan(
    case: Case,
    subset: str,
    balancer: LossBalancer,
    unit: float = 1.0,
    factors: dict[str, float] | None = None,
    *,
    from_mean: bool = False,
) -> Record:
    """One fit; all methods start from one network, but for the bias that ``from_mean`` sets, and see the same batches."""
    assert case.data is not None, "the experiment says that it needs them"
    engines = read(case.data / "cmapss", subset)
    torch.manual_seed(case.seed)
    start = engines.train[1].mean().item() if from_mean else None
    module, fit = Turbofan(case.steps, unit, factors, start), Fit(case, balancer)
    fit.run(module, Shuffled(engines.train, 128, case.seed))
    return fit.record(module.eval().measures(engines.test))


def fit(case: Case) -> Record:
    """One method, one seed, one subset."""
    balancer = balancer_of(case, BALANCERS | FROM_MEAN)
    unit = CAP if case.method.startswith("hand-scaled") else 1
    return fit_turbofan(case, case.problem, balancer, unit, from_mean=case.method in FROM_MEAN)


EXPERIMENT = Experiment(
    name="cmapss",
    about=__doc__ or "",
    problems=dict.fromkeys(SUBSETS, Problem(METHODS, BETTER, KEPT)),
    fit=fit,
    steps=3000,
    quick_steps=20,
    seeds=5,
    after={STATIC: "GradNorm"},
    needs_data="cmapss",
)

if __name__ == "__main__":
    main(EXPERIMENT)
