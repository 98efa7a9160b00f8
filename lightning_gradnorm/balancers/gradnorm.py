"""GradNorm (Chen, Badrinarayanan, Lee, Rabinovich, ICML 2018, arXiv 1711.02257); its equations are in a file of their own."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_gradnorm.balancers.arrays import Vector, as_tensor, isfinite, like, on_host, quiet, surely_all, where
from lightning_gradnorm.balancers.base import LossBalancer
from lightning_gradnorm.balancers.checks import (
    check_choice,
    check_factory,
    check_names,
    check_number,
    check_per_task,
    check_that,
    check_whole,
)
from lightning_gradnorm.balancers.gradnorm_average import SEEN, AveragedUpdate
from lightning_gradnorm.balancers.gradnorm_equations import (
    balanced_weights,
    gradnorm_gradient,
    gradnorm_loss,
    loss_ratios,
    relative_inverse_training_rates,
    sum_among,
    target_norms,
)
from lightning_gradnorm.balancers.gradnorm_scaled import ScaledUpdate, settings_of_0_1
from lightning_gradnorm.balancers.gradnorm_step import Step, UpdateRule
from lightning_gradnorm.balancers.initial_losses import InitialLosses, InitialLossTracker
from lightning_gradnorm.balancers.optimizer import OptimizerFactory, VectorOptimizer
from lightning_gradnorm.balancers.scale import ScaleRule
from lightning_gradnorm.balancers.schedule import widening
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.plain import plain_text

__all__ = [
    "GradNorm",
    "Update",
    "UpdateEvery",
    "balanced_weights",
    "gradnorm_gradient",
    "gradnorm_loss",
    "loss_ratios",
    "relative_inverse_training_rates",
    "target_norms",
]

Update = Literal["average", "paper", "log", "closed_form"]
UpdateEvery = int | Literal["auto"]


class GradNorm(LossBalancer):
    """GradNorm: weights under which the tasks' gradients on the shared layer have comparable norms.

    In a bare PyTorch loop, four lines more than a plain sum::

        gradnorm = GradNorm()
        for x, y in batches:
            losses = tap_losses({"a": loss_a(net(x), y), "b": loss_b(net(x), y)})
            total = gradnorm.total(losses)
            reader = JointBackward(total, losses, net.shared.parameters())
            total.backward()
            gradnorm.update(reader.measurement())
            optimizer.step()
            optimizer.zero_grad()

    Deviations from the paper, by default: the weights go to where L_grad is 0 by the steps of SGD on ½ ‖log w − log ŵ‖², whose
    rate falls as 2 / t, with ŵ_i ∝ r_i^α / n_i, and Σ ŵ_i n_i = Σ n_i. The printed rule, additive on w with a target that
    cannot be met, rests elsewhere, and cannot hold a weight much smaller than its step; a rate that does not fall has to be
    tuned to the problem. And the weights keep the size of the shared gradient, not their own sum: where one gradient is far
    larger than the others, Σ w_i = T makes its weight tiny, the whole gradient shrinks with it, and an optimiser like Adam,
    which remembers the large ones, nearly stops. ``update="paper"`` is Algorithm 1 as printed, with Σ w_i = T.

    Source: Chen, Badrinarayanan, Lee, Rabinovich, ICML 2018, arXiv 1711.02257.

    Args:
        alpha: α ≥ 0, the asymmetry: how strongly slow tasks are favoured. By default 0, all weighted norms alike; with
            ``update="paper"`` 0.12. The paper used 0.12 on its toy, 0.2 to 0.3 on facial landmarks, 1.5 on NYUv2. The more it
            is, the more L(0) matters: a loss that starts far above what a constant prediction would give counts as learnt at
            once, and its task is starved.
        lr: learning rate of the weights' own optimiser. By default it falls, as 2 / (t + 30) at the t-th step, or 1 / (t + 30)
            with ``residuals``; a number is the share of its way that a weight goes in every step at least, for trainings whose
            tasks change: with 0.01, what is some hundred steps old is forgotten. With ``update="paper"`` 0.025.
        residuals: the tasks that are residuals of equations, in physics-informed networks. They keep weight 1, and the
            conditions beside them are raised: ŵ_i = 5 √(n_r / n_i), averaged over the whole training.
        update: ``"average"``, the default; ``"paper"``, Algorithm 1 as printed, the gradient of L_grad on w and Σ w = T.
        optimizer: factory of the weights' optimiser, called as ``optimizer([weights], lr=lr)``. By default SGD with the rate
            that falls, and Adam with ``update="paper"``; another takes the same gradient at the rate ``lr``, by default 0.025.
        initial_losses: L_i(0): ``"first"`` measurement, the mean of the first N (an int; a task's weight stays as it is
            until then), or given per task, in the loss's units. With ``alpha=0`` no ratio is used, and nothing waits for it.
        update_every: the weights are updated on the first optimiser step and then on one in so many, at a place that moves
            so that tasks which take turns are all met; the others cost nothing. By default ``"auto"``: a long average hardly
            changes from step to step, so ever fewer are measured (``widening``: 430 of 10,000), with ``lr`` one in
            1 / (25 lr) at least; all of them, where none is taken, and until every L_i(0) is known that is asked for.
        min_weight: least weight, above 0 and at most 1. Bounds are of the weights that are applied.
        max_weight: greatest weight, at least 1; ``None`` for no bound.
        priorities: relative importance per task, above 0, a factor of the targets; 1 for tasks not named.
        tasks: all tasks' names, if they are to be fixed from the start.
        scale: deprecated; of version 0.1's updates.
        reference: deprecated: write ``residuals``.
        ema_decay: deprecated; of version 0.1's updates.

    Raises:
        ValueError: for a setting outside its range, or a name in ``initial_losses``, ``priorities`` or ``residuals`` that
            is no task (at the first update, when the names are known); with ``alpha`` above 0, for a loss below 0, or an L_i(0)
            that is not above 0.
    """

    needs: tuple[str, ...] = ("gradient_norms",)

    def __init__(
        self,
        alpha: float | None = None,
        lr: float | None = None,
        *,
        residuals: Iterable[str] | None = None,
        update: Update | None = None,
        optimizer: OptimizerFactory | None = None,
        initial_losses: InitialLosses = "first",
        update_every: UpdateEvery = "auto",
        min_weight: float = 1e-8,
        max_weight: float | None = 1e8,
        priorities: Mapping[str, float] | None = None,
        tasks: Iterable[str] | None = None,
        scale: ScaleRule | None = None,
        reference: str | None = None,
        ema_decay: float | None = None,
    ) -> None:
        is_of_0_1 = any(value is not None for value in (scale, reference, ema_decay))
        implied = "log" if is_of_0_1 else "average"
        self.update_rule: Update = check_choice("update", implied if update is None else update, get_args(Update))
        averaged = self.update_rule == "average"
        self._remembers = AveragedUpdate.remembers if averaged else ()
        falling = averaged and optimizer is None
        effects = "at least 0: at 0 all norms are pulled together, at 1.5 slow tasks are favoured"
        alpha = (0.0 if averaged else 0.12) if alpha is None else alpha
        self.alpha: float = check_number("alpha", alpha, lambda value: 0 <= value < math.inf, effects)
        self.lr: float = self._rate_of(lr, falling)
        bounds = _bounds(min_weight, max_weight)
        self.min_weight: float = bounds[0]
        self.max_weight: float = bounds[1]
        self.residuals: tuple[str, ...] = () if residuals is None else check_names("residuals", residuals)
        only_averaged = (
            "for update='average', the default, without scale, reference and ema_decay; to another update every task is alike"
        )
        check_that("residuals", residuals, averaged or not self.residuals, only_averaged)
        self.priorities: dict[str, float] = {
            task: check_number(
                f"priority of task {task!r}", value, lambda number: 0 < number < math.inf, "above 0; 1 is the usual importance"
            )
            for task, value in check_per_task("priorities", priorities).items()
        }
        self.needs_positive_losses: bool = self.alpha > 0
        self._initial_losses = InitialLossTracker(initial_losses)
        factory = optimizer or (torch.optim.SGD if averaged else torch.optim.Adam)
        check_factory("optimizer", factory)
        self._optimizer = VectorOptimizer(factory, 1.0 if falling else self.lr)
        self._parts = {"initial_losses": self._initial_losses, "optimizer": self._optimizer}
        self._of_0_1 = settings_of_0_1(self.update_rule, update is not None, scale, reference, ema_decay)
        self._rule: UpdateRule = (
            AveragedUpdate(self.residuals, self._optimizer, self.lr if falling else None, bounds)
            if self.update_rule == "average"
            else ScaledUpdate(self.update_rule, self.alpha, self._optimizer, bounds, self._of_0_1)
        )
        is_auto = plain_text(update_every) == "auto"
        rule = "a whole number of steps, 1 or more, or 'auto'"
        super().__init__(
            tasks=tasks, update_every=1 if is_auto else check_whole("update_every", update_every, rule, at_least=1)
        )
        self._falls = falling
        if is_auto:
            self.update_every: int | Literal["auto"] = "auto"

    @staticmethod
    def _rate_of(lr: float | None, falling: bool) -> float:
        if falling:
            return check_number("lr", 0.0 if lr is None else lr, lambda value: 0 <= value <= 1, "from 0 to 1: a rate's least")
        return check_number("lr", 0.025 if lr is None else lr, lambda value: 0 <= value < math.inf, "at least 0")

    @property
    def interval(self) -> int:
        """Of how many optimiser steps one is measured now."""
        if self.update_every != "auto":
            return self.update_every
        waits = self.alpha > 0 and not self._initial_losses.knows_all(self.tasks)
        return widening(self.steps, self.lr) if self._falls and not waits else 1

    def settings(self) -> dict[str, Any]:
        of_0_1 = {} if self.update_rule == "average" else self._of_0_1._asdict()
        return super().settings() | {
            "alpha": self.alpha,
            "lr": self.lr if self.lr > 0 or not self._falls else None,
            "residuals": list(self.residuals),
            "update": self.update_rule,
            "optimizer": None if self._falls else self._optimizer.name,
            "initial_losses": self._initial_losses.setting,
            "min_weight": self.min_weight,
            "max_weight": None if self.max_weight == math.inf else self.max_weight,
            "priorities": dict(self.priorities),
            **of_0_1,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"update": self.update_rule}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("update", self.update_rule) != self.update_rule and "weights" in state:
            # The memories of another update are of other quantities; its weights count as the average of the steps so far.
            memory = {name: torch.full_like(state["weights"], entry) for name, entry in AveragedUpdate.remembers}
            memory[SEEN] += state.get("steps", 0)
            state = {**state, "memory": memory, "optimizer": {"vector": state["weights"][:0], "state": {}}}
        super().load_state_dict(state)

    def _check(self, measurement: Measurement) -> None:
        super()._check(measurement)
        self._check_named("initial_losses", self._initial_losses.given, measurement)
        self._check_named("priorities", self.priorities, measurement)
        self._check_named("residuals", self.residuals, measurement)
        self._check_named("reference", (self._of_0_1.reference,) if self._of_0_1.reference else (), measurement)

    def _check_losses(self, measurement: Measurement, active: Tensor | None) -> None:
        if self.alpha > 0:
            self._initial_losses.check(measurement, active)
        super()._check_losses(measurement, active)

    def _is_settled(self, tasks: Sequence[str]) -> bool:
        return super()._is_settled(tasks) and self._initial_losses.knows_all(tasks)

    def _update(self, measurement: Measurement, positions: Tensor | None) -> None:
        with quiet():
            self._learn_from(measurement, positions)

    def _learn_from(self, measurement: Measurement, positions: Tensor | None) -> None:
        assert measurement.gradient_norms is not None, "the contract has checked it"
        norms = self._vector(measurement.gradient_norms.clone())  # they are remembered, and must not be the caller's
        losses, weights = self._vector(measurement.losses), on_host(self._weights)
        mask = self._mask(measurement)
        initial = self._vector(self._initial_losses.observe(measurement, mask))
        active = with_gradient = None if mask is None else on_host(mask)
        if self.alpha > 0:  # a ratio needs an L(0): until it is known, the task is as if absent
            known = self._initial_losses.known(measurement.tasks, self._weights)
            if known is not None:
                known = on_host(known)
                active = known if active is None else active & known
                if not known.any():
                    usable = isfinite(sum_among(losses + norms, with_gradient)) & (norms.sum() > 0)
                    self.skipped_updates.add_(as_tensor(~usable))
                    return
        ratios = loss_ratios(losses, initial)
        rates = relative_inverse_training_rates(ratios, active)
        priorities = like(norms, [self.priorities.get(task, 1.0) for task in measurement.tasks]) if self.priorities else None
        shares = norms**0 if priorities is None else priorities
        seen = losses + norms
        if self.alpha > 0:
            shares, seen = shares * ratios**self.alpha, seen + rates

        # A sum carries any NaN or infinity; where all norms are zero there is nothing to balance.
        seen = sum_among(seen + shares, active)
        if active is not with_gradient:
            seen = seen + sum_among(losses + norms, with_gradient)
        usable = isfinite(seen) & (sum_among(norms, active) > 0)
        if self.alpha > 0 and isinstance(usable, Tensor):  # elsewhere a negative loss was refused
            usable = usable & (sum_among(ratios.clip(max=0.0), active) == 0)
        certain = active is None and surely_all(usable)
        accept = None if certain else usable & (norms == norms) if active is None else usable & active
        memory = {name: on_host(vector) for name, vector in self._memory.items()}
        places = None if positions is None else on_host(positions)
        step = Step(
            measurement.tasks, self.tasks, places, weights, memory, norms, rates, priorities, shares, active, self.interval
        )
        targets, changes = self._rule.next(step, accept)
        found = {"grad_norm": step.weights * norms, "target_norm": targets, "loss_ratio": ratios, "inverse_rate": rates}
        if active is not None:
            found |= {tag: where(active, found[tag], math.nan) for tag in list(found)[1:]}
        self.diagnostics: dict[str, Tensor] = {tag: as_tensor(vector) for tag, vector in found.items()}
        if not certain:
            self.skipped_updates.add_(as_tensor(~usable))
        self._weights = as_tensor(changes.pop("weights"))
        if self.frozen:
            changes.pop(SEEN, None)  # weights that stay as they are have averaged nothing
        self._memory |= {name: as_tensor(vector) for name, vector in changes.items()}

    def _vector(self, measured: Tensor) -> Vector:
        return on_host(measured.to(self._weights))


def _bounds(least: float, greatest: float | None) -> tuple[float, float]:
    no_sum = "or no weights could sum to the number of tasks"
    lower = check_number("min_weight", least, lambda value: 0 < value <= 1, f"above 0 and at most 1, {no_sum}")
    upper = math.inf if greatest is None else greatest
    return lower, check_number("max_weight", upper, lambda value: value >= 1, f"at least 1, {no_sum}; None for no bound")
