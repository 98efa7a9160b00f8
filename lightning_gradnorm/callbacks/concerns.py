"""What a person should hear of while training: weights that stick, climb in vain, never move or slow it all, among others.

Rarely, and only where something is wrong. A weight that rises while its loss has yet to fall is at its work, in
physics-informed networks above all; so nothing is said of it while the loss moves either way, or the weight slows down.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_gradnorm.balancers import (
    DynamicTaskPrioritization,
    DynamicWeightAverage,
    EqualWeights,
    FixedWeights,
    GradNorm,
    LossBalancer,
    LossRatioBalancing,
)
from lightning_gradnorm.callbacks.lightning_api import Trainer, setting_of
from lightning_gradnorm.session import BalancedStep

_LONG = 500  # optimiser steps after which a state of things is worth a word
_FEW = 5  # observations that it takes at least
_SHRUNK = 0.05  # of the largest share of the plain sum's gradient so far, below which Adam is slow to follow
_STAYED = 0.95, 1.1  # of the first loss: between these it has neither fallen nor moved
_RUNS_UP = 1.5  # times as large as half as many steps ago, and then again: a weight that does not settle
_NEW = 0.3  # part that an observation has in a running mean
_WEIGHTED = "total_loss/weighted"


@dataclass
class _Seen:
    """One task's course: ``weight`` where it was first seen, and the weights after 1, 2, 4, … observations since."""

    step: int
    weight: float
    ratio: float = math.nan
    has_moved: bool = False
    observations: int = 0
    bound_since: int | None = None
    marks: list[tuple[int, float]] = field(default_factory=list)

    def ago(self, step: int) -> float:
        """The weight at that step or, of those that are remembered, next before; NaN before the first."""
        return max((mark for mark in self.marks if mark[0] <= step), default=(0, math.nan))[1]


class Concerns:
    """Looks at what is logged, on the steps that are written, and says what deserves a warning: (about, message) pairs."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._moved = False
        self._first_step: int | None = None
        self._observations = 0
        self._followed: dict[str, int] = {}
        self._share = self._largest_share = math.nan  # logarithms, running mean
        self._small = 0

    def of(self, trainer: Trainer, balancer: LossBalancer, step: BalancedStep, ratios: Tensor | None) -> list[tuple[str, str]]:
        """All that one written step gives reason to say.

        Args:
            trainer: whose optimisers, callbacks and schedulers are looked at.
            balancer: the method.
            step: what it was.
            ratios: L_i(t) / L_i(0) of its tasks as the balancer has them, shape ``[T]``; ``None`` where it has none.
        """
        measurement = step.measurement
        tasks, weights, losses = measurement.tasks, step.applied.tolist(), measurement.losses.tolist()
        found = list(
            self.of_step(
                balancer, tasks, weights, [math.nan] * len(tasks) if ratios is None else ratios.tolist(), balancer.steps
            )
        )
        keeps_size = isinstance(balancer, GradNorm) and balancer.update_rule == "average"
        is_first = balancer.steps - int(balancer.skipped_updates) <= 1  # weights of one are of no method's size
        if measurement.gradient_norms is not None and not (balancer.frozen or keeps_size or is_first):
            found += self.of_scale(trainer, tasks, weights, measurement.gradient_norms.tolist())
        weighted = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        return found + list(self.of_monitors(trainer, weighted, sum(losses)))

    def of_step(
        self, balancer: LossBalancer, tasks: Sequence[str], weights: Sequence[float], ratios: Sequence[float], step: int
    ) -> Iterator[tuple[str, str]]:
        """What one written step gives reason to say.

        Args:
            balancer: the method.
            tasks: those of the step.
            weights: that it applied.
            ratios: L_i(t) / L_i(0); NaN where they are not known.
            step: optimiser steps so far.
        """
        if balancer.frozen or isinstance(balancer, EqualWeights | FixedWeights):
            return
        self._observations += 1
        self._first_step = step if self._first_step is None else self._first_step
        for task, weight, ratio in zip(tasks, weights, ratios, strict=True):
            seen = self._seen.setdefault(task, _Seen(step, weight))
            self._moved |= abs(weight - seen.weight) > 1e-3 * abs(seen.weight)
            yield from self._at_bound(balancer, task, weight, seen, step)
            yield from self._in_vain(balancer, task, weight, ratio, seen, step)
        waited = step - self._first_step
        long = max(_LONG, self._first_step)  # a rate that falls as 1 / t moves a resumed run's weights as the steps double
        may_rest = len(tasks) == 1 or isinstance(balancer, DynamicWeightAverage | DynamicTaskPrioritization)  # by the epoch
        if not may_rest and not self._moved and waited >= long and self._observations >= _FEW:
            skipped = int(balancer.skipped_updates)
            why = (
                f"{skipped} updates were skipped, as a loss or gradient was not finite, or all gradients on the shared layer "
                "were zero: see balancer.skipped_updates."
                if skipped
                else "Is too little measured, or is a learning rate of the weights' own too small? See update_every and lr, if "
                "these were set."
            )
            yield "still", f"The loss weights have not moved in {waited} steps. {why}"

    def _at_bound(self, balancer: LossBalancer, task: str, weight: float, seen: _Seen, step: int) -> Iterator[tuple[str, str]]:
        lower, upper = getattr(balancer, "min_weight", -math.inf), getattr(balancer, "max_weight", math.inf)
        name = "min_weight" if weight <= 1.01 * lower else "max_weight" if weight >= 0.99 * upper else None
        if name is None:
            seen.bound_since = None
            return
        seen.bound_since = step if seen.bound_since is None else seen.bound_since
        if step - seen.bound_since >= _LONG:
            yield (
                f"bound {task}",
                f"The weight of task {task!r} has been at {name}={lower if name == 'min_weight' else upper:g} for "
                f"{step - seen.bound_since} steps, so its gradient is not where it should be. Loosen the bound, or scale the "
                "loss itself.",
            )

    def _in_vain(
        self, balancer: LossBalancer, task: str, weight: float, ratio: float, seen: _Seen, step: int
    ) -> Iterator[tuple[str, str]]:
        if not math.isfinite(ratio):
            return
        seen.ratio = ratio if math.isnan(seen.ratio) else seen.ratio + _NEW * (ratio - seen.ratio)  # single batches jump about
        seen.observations += 1
        if seen.observations & (seen.observations - 1) == 0:
            seen.marks.append((step, weight))
        if seen.observations < _FEW:
            return
        seen.has_moved |= not _STAYED[0] <= seen.ratio <= _STAYED[1]
        long = step - seen.step
        half, quarter = seen.ago(step - long // 2), seen.ago(step - 3 * long // 4)
        runs_up = quarter > 0 and weight >= _RUNS_UP * half and half >= _RUNS_UP * quarter
        if runs_up and not seen.has_moved and long >= 4 * _LONG:
            yield (
                f"vain {task}",
                f"The weight of task {task!r} keeps rising, from {quarter:.3g} to {half:.3g} and {weight:.3g} in {long} steps, "
                f"while its loss stays where it was ({seen.ratio:.3g} of the first). {_ways_out(balancer)}",
            )

    def of_scale(
        self, trainer: Trainer, tasks: Sequence[str], weights: Sequence[float], norms: Sequence[float]
    ) -> Iterator[tuple[str, str]]:
        """Whether the weights have shrunk the whole gradient under an optimiser that remembers larger ones.

        Args:
            trainer: whose optimisers are looked at.
            tasks: those of the step.
            weights: that it applied.
            norms: of the tasks' unweighted gradients on the shared layer.
        """
        whole = sum(norms)
        if not 0 < whole < math.inf:
            return
        now = math.log(max(sum(abs(weight) * norm for weight, norm in zip(weights, norms, strict=True)) / whole, 1e-300))
        self._share = now if math.isnan(self._share) else self._share + _NEW * (now - self._share)  # one batch proves nothing
        self._largest_share = self._share if math.isnan(self._largest_share) else max(self._largest_share, self._share)
        share, is_small = math.exp(self._share), self._share < self._largest_share + math.log(_SHRUNK)
        self._small = self._small + 1 if is_small else 0
        remembering = [o for o in trainer.optimizers if any("betas" in group for group in o.param_groups)]
        if self._small >= _FEW and remembering:
            weight, task = min(zip(weights, tasks, strict=True), key=lambda pair: abs(pair[0]))
            optimizer, beta = type(remembering[0]).__name__, remembering[0].param_groups[0]["betas"][1]
            yield (
                "shrunk",
                f"The weight of task {task!r} has come to {weight:.2g}, and with it the gradients on the shared layer have "
                f"shrunk to {share:.2g} of the plain sum's. {optimizer} (β₂ = {beta:g}) divides by the larger ones that it "
                "remembers, so training nearly stops until it has forgotten them. Keep the gradient's size: GradNorm does by "
                "default; with update='paper', which has the weights sum to T, it does not.",
            )

    def of_monitors(self, trainer: Trainer, weighted: float, unweighted: float) -> Iterator[tuple[str, str]]:
        """Who in this Trainer looks at the weighted total, which moves with the weights.

        Args:
            trainer: whose callbacks and schedulers are looked at.
            weighted: Σ w_i L_i of the step that is written.
            unweighted: Σ L_i.
        """
        telling = abs(weighted - unweighted) > 1e-3 * abs(unweighted)
        for who, metric in _monitors(trainer):
            value = setting_of(trainer, "callback_metrics").get(metric)
            same = telling and value is not None and math.isclose(float(value), weighted, rel_tol=1e-5)
            followed = self._followed[metric] = self._followed.get(metric, 0) + 1 if same else 0
            if metric.removesuffix("_step").removesuffix("_epoch") == _WEIGHTED or followed >= 3:
                yield (
                    f"monitor {who}",
                    f"{who} monitors {metric!r}, which is the weighted total: it moves with the weights, so it can fall while "
                    "every task gets worse. Monitor total_loss/unweighted, or a validation metric of the tasks.",
                )


def _ways_out(balancer: LossBalancer) -> str:
    favours = isinstance(balancer, GradNorm | LossRatioBalancing) and balancer.alpha > 0
    known = (
        ("check its labels and its head", True),
        ("lower alpha", favours),
        ("set max_weight", hasattr(balancer, "max_weight")),
    )
    cause = f"{type(balancer).__name__} keeps raising the weight of" if favours else "It may be"
    return f"{cause} a task that cannot be learnt: {', or '.join(way for way, there in known if there)}."


def _monitors(trainer: Trainer) -> Iterator[tuple[str, str]]:
    for callback in setting_of(trainer, "callbacks"):
        metric = getattr(callback, "monitor", None)
        if isinstance(metric, str):
            yield type(callback).__name__, metric
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        if config.reduce_on_plateau and isinstance(config.monitor, str):
            yield type(scheduler).__name__, config.monitor
