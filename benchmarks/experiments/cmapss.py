"""Remaining useful life and state of health of C-MAPSS turbofans (FD001, FD002), the life in cycles as it comes.

``hand-scaled`` has the life divided by 125, which makes the two losses alike: the one to reach. All others see cycles.

    python -m benchmarks.experiments.cmapss --data DATA        # five seeds: an hour
    python -m benchmarks.experiments.cmapss --data DATA --quick
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from _common import quiet_trainer

from benchmarks.experiments.command import Case, Experiment, Problem, main
from benchmarks.experiments.curves import draw_measures
from benchmarks.experiments.records import Record, Records
from benchmarks.experiments.turbofans import CAP, Batches, Engines, Turbofan
from lightning_gradnorm import (
    AdaptiveNormalizedLoss,
    DynamicWeightAverage,
    EqualWeights,
    FixedWeights,
    GradNorm,
    LossBalancer,
    LossBalancingCallback,
    UncertaintyWeighting,
)
from lightning_gradnorm.comparison import StepTimes
from lightning_gradnorm.report.comparison import Better

BALANCERS: dict[str, Callable[[], LossBalancer]] = {
    "equal": EqualWeights,
    "hand-scaled": EqualWeights,
    "uncertainty": UncertaintyWeighting,
    "DWA": DynamicWeightAverage,
    "AMNL": AdaptiveNormalizedLoss,
    "GradNorm": GradNorm,
    "GradNorm, every 10th step": lambda: GradNorm(update_every=10),
    "GradNorm, Σw = T": lambda: GradNorm(scale="sum"),
}
METHODS = (*BALANCERS, "GradNorm static")
SUBSETS = ("FD001", "FD002")
BETTER: Mapping[str, Better] = {"RMSE": "lower", "NASA score": "lower", "accuracy": "higher"}

read = functools.cache(Engines.read)


def fit_turbofan(case: Case, subset: str, balancer: LossBalancer, unit: float, factors: dict[str, float]) -> Record:
    """One fit; all methods start from one network and see the same batches."""
    assert case.data is not None, "the experiment says that it needs them"
    engines = read(case.data / "cmapss", subset)
    torch.manual_seed(case.seed)
    module = Turbofan(case.steps, unit, factors)
    balancing, times = LossBalancingCallback(balancer, summary=False), StepTimes()
    trainer = quiet_trainer([case.progress, balancing, times], max_steps=case.steps, max_epochs=-1)
    trainer.fit(module, Batches(engines.train, 128, case.seed))
    measures = module.eval().measures(engines.test)
    weights = balancing.weights, balancing.mean_weights
    return Record(case.problem, case.method, case.seed, case.steps, measures, times.median(), *weights)


def fit(case: Case) -> Record:
    """One method, one seed, one subset."""
    if case.method == "GradNorm static":
        assert case.before is not None, "the experiment says that it follows GradNorm"
        balancer: LossBalancer = FixedWeights(case.before.mean_weights)
    else:
        balancer = BALANCERS[case.method]()
    return fit_turbofan(case, case.problem, balancer, CAP if case.method == "hand-scaled" else 1, {})


def draw(records: Records, path: Path) -> None:
    """A row per subset: each measure, a dot per seed."""
    draw_measures(records, dict.fromkeys(SUBSETS, METHODS), BETTER, path)


EXPERIMENT = Experiment(
    name="cmapss",
    about=__doc__ or "",
    problems=dict.fromkeys(SUBSETS, Problem(METHODS, BETTER)),
    fit=fit,
    draw=draw,
    steps=3000,
    quick_steps=20,
    seeds=5,
    after={"GradNorm static": "GradNorm"},
    needs_data="cmapss",
)

if __name__ == "__main__":
    main(EXPERIMENT)
