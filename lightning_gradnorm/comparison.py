"""``compare``: the same module with several methods, on the same seeds."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from lightning_gradnorm.balancers import (
    AdaptiveNormalizedLoss,
    CoVWeighting,
    DualBalancing,
    DynamicTaskPrioritization,
    DynamicWeightAverage,
    EqualWeights,
    GeometricLoss,
    GO4Align,
    GradNorm,
    GramianWeighting,
    LearningRateAnnealing,
    LossBalancer,
    LossRatioBalancing,
    RandomLossWeighting,
    ReLoBRaLo,
    ScalarizerBalancer,
    SoftAdapt,
    SoftOptimalUncertainty,
    UncertaintyWeighting,
)
from lightning_gradnorm.callbacks import LossBalancingCallback
from lightning_gradnorm.callbacks.lightning_api import Callback, LightningModule, Trainer
from lightning_gradnorm.report.comparison import Better, Comparison, Run

Make = Callable[[], tuple[Any, ...]]
MakeBalancer = Callable[[], LossBalancer]


def _torchjd() -> Any:
    try:
        import torchjd.aggregation
        import torchjd.scalarization
    except ImportError as error:
        raise ImportError("This method is TorchJD's. pip install 'lightning-gradnorm[torchjd]' brings it.") from error
    return torchjd


OF_TORCHJD: dict[str, MakeBalancer] = {
    "UPGrad": lambda: GramianWeighting(_torchjd().aggregation.UPGradWeighting()),
    "UPGrad (same step)": lambda: GramianWeighting(_torchjd().aggregation.UPGradWeighting(), when="same step"),
    "MGDA": lambda: GramianWeighting(_torchjd().aggregation.MGDAWeighting()),
    "PCGrad": lambda: GramianWeighting(_torchjd().aggregation.PCGradWeighting()),
    "GradVac": lambda: GramianWeighting(_torchjd().aggregation.GradVacWeighting()),
    "DualProj": lambda: GramianWeighting(_torchjd().aggregation.DualProjWeighting()),
    "IMTL-G": lambda: GramianWeighting(_torchjd().aggregation.IMTLGWeighting()),
    "Aligned-MTL": lambda: GramianWeighting(_torchjd().aggregation.AlignedMTLWeighting()),
    "STCH": lambda: ScalarizerBalancer(_torchjd().scalarization.STCH(mu=0.1)),
}
"""Those of ``METHODS`` that TorchJD has."""

METHODS: dict[str, MakeBalancer] = {
    "equal": EqualWeights,
    "GradNorm": GradNorm,
    "GradNorm paper": lambda: GradNorm(update="paper"),
    "loss ratio": LossRatioBalancing,
    "uncertainty": UncertaintyWeighting,
    "DWA": DynamicWeightAverage,
    "DTP": DynamicTaskPrioritization,
    "AMNL": AdaptiveNormalizedLoss,
    "annealing (norms)": lambda: LearningRateAnnealing(form="norm", update_every=10),
    "DB-MTL": DualBalancing,
    "UW-SO": SoftOptimalUncertainty,
    "GO4Align": GO4Align,
    "CoV": CoVWeighting,
    "random": RandomLossWeighting,
    "geometric": GeometricLoss,
    "ReLoBRaLo": ReLoBRaLo,
    "SoftAdapt": lambda: SoftAdapt(variant="normalized"),
    **OF_TORCHJD,
}
"""Name → the method with its own defaults; those that need no more than the module has."""


def compare(
    make: Make,
    measures: Mapping[str, Better],
    methods: Iterable[str] | Mapping[str, MakeBalancer] = ("equal", "GradNorm", "uncertainty", "DWA", "geometric", "random"),
    *,
    seeds: int | Sequence[int] = 5,
    trainer: Callable[..., Any],
    on_run: Callable[[Run], None] | None = None,
) -> Comparison:
    """Train one module with several methods, each from the same seeds, and compare what came of it.

    ``torch.manual_seed(seed)`` runs before each ``make()``, so every method starts from the same network and, if the loaders
    draw from torch's generator, sees the same batches. The first method is the baseline::

        comparison = compare(
            lambda: (Digits(), train_loader(), val_loader()),
            {"accuracy": "higher", "rmse": "lower"},
            ["equal", "GradNorm", "uncertainty"],
            trainer=lambda **settings: L.Trainer(max_epochs=20, **settings),
        )
        comparison.print()
        comparison.draw("comparison.png")

    Args:
        make: gives what ``Trainer.fit`` takes, made anew: module with ``MultiTaskMixin``, training loader, validation loader.
        measures: name of a logged metric → which way is better. Log held-out ones in ``validation_step``; the value of the
            last validation counts.
        methods: names out of ``METHODS``, or name → a function that gives the balancer; ``"all"``: those of ``METHODS`` that
            need nothing else, without TorchJD's where it is not installed.
        seeds: how many (0, 1, …), or which.
        trainer: gives the Trainer, made anew; called with ``callbacks=[…]`` and ``logger=False``, to be passed on.
        on_run: called after every fit.

    Raises:
        ValueError: for an unknown method or none; after the first fit, if a measure was not logged.
    """
    chosen = _chosen(methods)
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    if not measures or not list(seeds):
        raise ValueError(f"compare() needs a measure and a seed at least; got measures={dict(measures)}, seeds={list(seeds)}.")
    runs = []
    for seed in seeds:
        for name, balancer in chosen.items():
            run = _run(name, balancer(), seed, make, measures, trainer)
            runs.append(run)
            if on_run is not None:
                on_run(run)
    return Comparison(dict(measures), runs, next(iter(chosen)))


def everything() -> list[str]:
    """The names in ``METHODS`` of all that need no more than any module has, and that can be made here."""
    found = []
    for name, make in METHODS.items():
        with contextlib.suppress(ImportError):  # of TorchJD, or of what one of its methods needs besides
            method = make()
            if "kpis" not in method.needs and not method.acts_in_backward:  # not every module's tasks meet at one place
                found.append(name)
    return found


def _chosen(methods: Iterable[str] | Mapping[str, MakeBalancer]) -> dict[str, MakeBalancer]:
    if isinstance(methods, Mapping):
        chosen = dict(methods)
    else:
        names = [methods] if isinstance(methods, str) else list(methods)
        names = everything() if names == ["all"] else names
        unknown = [name for name in names if name not in METHODS]
        if unknown:
            raise ValueError(
                f"Unknown method {', '.join(map(repr, unknown))}. Known ones are {', '.join(map(repr, METHODS))}; or pass a "
                "dict of name → a function that gives a balancer."
            )
        chosen = {name: METHODS[name] for name in names}
    for make in chosen.values():
        make()  # what cannot be made is told before the first fit
    if not chosen:
        raise ValueError("compare() needs a method at least, such as 'equal' and 'GradNorm'.")
    return chosen


class StepTimes(Callback):
    """Seconds from the end of one batch to the end of the next, within an epoch; given to the Trainer last."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds: list[float] = []
        self._last: float | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    def median(self) -> float:
        """Of the last nine tenths, of means over twenty steps each, so that steps that ``update_every`` picks are counted.

        NaN if there were none.
        """
        later = self._seconds[len(self._seconds) // 10 :]
        blocks = [later[i : i + 20] for i in range(0, len(later), 20)]
        whole = [block for block in blocks if len(block) == 20] or blocks
        return statistics.median(map(statistics.fmean, whole)) if whole else float("nan")


def _run(
    name: str, balancer: LossBalancer, seed: int, make: Make, measures: Mapping[str, Better], trainer: Callable[..., Any]
) -> Run:
    torch.manual_seed(seed)
    module, *loaders = make()
    balancing = LossBalancingCallback(balancer, summary=False, pictures=False)
    times = StepTimes()
    fit = trainer(callbacks=[balancing, times], logger=False)
    fit.fit(module, *loaders)
    logged = fit.callback_metrics
    missing = [measure for measure in measures if measure not in logged]
    if missing:
        raise ValueError(
            f"The fit logged no {', '.join(map(repr, missing))}; it logged {', '.join(map(repr, logged)) or 'nothing'}. Log "
            "the measures in validation_step: self.log('accuracy', …)."
        )
    return Run(name, seed, {measure: float(logged[measure]) for measure in measures}, times.median(), balancing.weights)
