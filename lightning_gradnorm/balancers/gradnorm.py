"""GradNorm (Chen, Badrinarayanan, Lee, Rabinovich, ICML 2018, arXiv 1711.02257); its equations are in a file of their own."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_gradnorm.balancers.base import LossBalancer
from lightning_gradnorm.balancers.checks import check_choice, check_factory, check_number, check_per_task
from lightning_gradnorm.balancers.gradnorm_equations import (
    balanced_weights,
    gradnorm_gradient,
    gradnorm_loss,
    loss_ratios,
    mean_among,
    relative_inverse_training_rates,
    sum_among,
    target_norms,
    where_active,
)
from lightning_gradnorm.balancers.initial_losses import InitialLosses, InitialLossTracker
from lightning_gradnorm.balancers.optimizer import OptimizerFactory, VectorOptimizer
from lightning_gradnorm.balancers.scale import (
    LEAST,
    Bound,
    ScaleRule,
    scale_to_reference,
    scale_to_sum,
    scale_towards_gradient,
)
from lightning_gradnorm.measurement import Measurement, reading_is_free
from lightning_gradnorm.plain import plain_name

__all__ = [
    "GradNorm",
    "Update",
    "balanced_weights",
    "gradnorm_gradient",
    "gradnorm_loss",
    "loss_ratios",
    "relative_inverse_training_rates",
    "target_norms",
]

Update = Literal["log", "paper", "closed_form"]


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

    Deviations from the paper, by default: the update is of L_grad / Ḡ on log w, and the target is the feasible one. The
    printed rule, additive on w with a target that cannot be met, rests elsewhere than at w_i ∝ r_i^α / n_i, and cannot
    hold a weight much smaller than its step. And the weights keep the size of the shared gradient, not their own sum: where
    one gradient is far larger than the others, Σ w_i = T makes its weight tiny, the whole gradient shrinks with it, and an
    optimiser like Adam, which remembers the large ones, nearly stops. ``update="paper"``
    is Algorithm 1 as printed, with Σ w_i = T.

    Args:
        alpha: α ≥ 0, the asymmetry: how strongly slow tasks are favoured. The paper used 0.12 on its toy, 0.2 to 0.3 on facial
            landmarks, 1.5 on NYUv2. The more it is, the more L(0) matters: a loss that starts far above what a constant
            prediction would give counts as learnt at once, and its task is starved.
        lr: learning rate of the weights' own optimiser (the paper: 0.025); with ``update="log"`` and Adam, about the
            relative change of a weight in one step. Not used by ``"closed_form"``.
        update: ``"log"``, the gradient of L_grad / Ḡ applied to log w; ``"paper"``, Algorithm 1 as printed; ``"closed_form"``,
            w_i ∝ r_i^α / n_i in an exponential average of log w.
        optimizer: factory of the weights' optimiser, called as ``optimizer([weights], lr=lr)``.
        initial_losses: L_i(0): ``"first"`` measurement, the mean of the first N (an int; a task's weight stays as it is
            until then), or given per task, in the loss's units. With ``alpha=0`` no ratio is used, and nothing waits for it.
        scale: the common factor of the weights. ``"gradient"``, the default: Σ w_i n_i = Σ n_i, so the size of the shared
            gradient stays that of the plain sum; approached with ``ema_decay``, or the factor would jump from batch to batch.
            ``"sum"``: Σ w_i = T, the paper's, and the default of ``update="paper"``. ``"reference"``: the task named by
            ``reference`` keeps weight 1.
        reference: the task whose weight stays 1; it implies ``scale="reference"``.
        update_every: the weights are updated on the first optimiser step and then on one in so many, at a place that moves
            so that tasks which take turns are all met; the others cost nothing.
        min_weight: least weight, above 0 and at most 1. Bounds are of the weights that are applied, after the scale rule.
        max_weight: greatest weight, at least 1; ``None`` for no bound.
        priorities: relative importance per task, above 0, a factor of the targets; 1 for tasks not named.
        ema_decay: β of the averages: of ``"closed_form"``, log w ← β log w + (1 − β) log ŵ, and of ``scale="gradient"``,
            w ← w (Σ n_i / Σ w_i n_i)^{1 − β}.
        tasks: all tasks' names, if they are to be fixed from the start.

    Raises:
        ValueError: for a setting outside its range, or a name in ``initial_losses``, ``priorities`` or ``reference`` that
            is no task (at the first update, when the names are known); with ``alpha`` above 0, for a loss below 0, or an L_i(0)
            that is not above 0.
    """

    needs = ("gradient_norms",)

    def __init__(
        self,
        alpha: float = 0.12,
        lr: float = 0.025,
        *,
        update: Update = "log",
        optimizer: OptimizerFactory = torch.optim.Adam,
        initial_losses: InitialLosses = "first",
        scale: ScaleRule | None = None,
        reference: str | None = None,
        update_every: int = 1,
        min_weight: float = 1e-8,
        max_weight: float | None = 1e8,
        priorities: Mapping[str, float] | None = None,
        ema_decay: float = 0.9,
        tasks: Iterable[str] | None = None,
    ) -> None:
        no_sum = "or no weights could sum to the number of tasks"
        effects = "at least 0: at 0 all norms are pulled together, at 1.5 slow tasks are favoured"
        self.alpha = check_number("alpha", alpha, lambda value: 0 <= value < math.inf, effects)
        self.lr = check_number("lr", lr, lambda value: 0 <= value < math.inf, "at least 0")
        self.ema_decay = check_number("ema_decay", ema_decay, lambda value: 0 <= value < 1, "at least 0 and below 1")
        self.min_weight = check_number(
            "min_weight", min_weight, lambda value: 0 < value <= 1, f"above 0 and at most 1, {no_sum}"
        )
        upper = math.inf if max_weight is None else max_weight
        self.max_weight = check_number(
            "max_weight", upper, lambda value: value >= 1, f"at least 1, {no_sum}; None for no bound"
        )
        # The bounds are of the weights that are applied; on the way there, these are what any arithmetic can bear.
        self._bearable = min(self.min_weight, LEAST), max(self.max_weight, 1 / LEAST)
        self.update_rule = check_choice("update", update, get_args(Update))
        self.reference = None if reference is None else plain_name(reference)
        if scale is None:
            scale = "reference" if reference is not None else "sum" if self.update_rule == "paper" else "gradient"
        self.scale = check_choice("scale", scale, get_args(ScaleRule))
        if (self.scale == "reference") != (reference is not None):
            raise ValueError(
                f"scale='reference' and reference='task' go together: got scale={self.scale!r} with "
                f"reference={self.reference!r}. Name the task whose weight stays 1, or choose another scale rule."
            )
        self.priorities = {
            task: check_number(
                f"priority of task {task!r}", value, lambda number: 0 < number < math.inf, "above 0; 1 is the usual importance"
            )
            for task, value in check_per_task("priorities", priorities).items()
        }
        self.needs_positive_losses = self.alpha > 0
        self._initial_losses = InitialLossTracker(initial_losses)
        check_factory("optimizer", optimizer)
        self._optimizer = VectorOptimizer(optimizer, self.lr)
        self._parts = {"initial_losses": self._initial_losses, "optimizer": self._optimizer}
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "alpha": self.alpha,
            "lr": self.lr,
            "update": self.update_rule,
            "optimizer": self._optimizer.name,
            "initial_losses": self._initial_losses.setting,
            "scale": self.scale,
            "reference": self.reference,
            "min_weight": self.min_weight,
            "max_weight": None if self.max_weight == math.inf else self.max_weight,
            "priorities": dict(self.priorities),
            "ema_decay": self.ema_decay,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"update": self.update_rule}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if state["update"] != self.update_rule:  # the memory of another parametrisation would be of another quantity
            self._optimizer.reset()

    def _check(self, measurement: Measurement) -> None:
        super()._check(measurement)
        self._check_named("initial_losses", self._initial_losses.given, measurement)
        self._check_named("priorities", self.priorities, measurement)
        self._check_named("reference", (self.reference,) if self.reference else (), measurement)

    def _check_losses(self, measurement: Measurement, active: Tensor | None) -> None:
        if self.alpha > 0:
            self._initial_losses.check(measurement, active)
        super()._check_losses(measurement, active)

    def _is_settled(self, tasks: Sequence[str]) -> bool:
        return super()._is_settled(tasks) and self._initial_losses.knows_all(tasks)

    def _update(self, measurement: Measurement, positions: Tensor | None) -> None:
        assert measurement.gradient_norms is not None, "the contract has checked it"
        norms, losses = measurement.gradient_norms.to(self._weights), measurement.losses.to(self._weights)
        with_gradient = self._mask(measurement)
        initial = self._initial_losses.observe(measurement, with_gradient).to(self._weights)
        active = with_gradient
        if self.alpha > 0:  # a ratio needs an L(0): until it is known, the task is as if absent
            known = self._initial_losses.known(measurement.tasks, norms)
            active = known if active is None else active if known is None else active & known
            if known is not None and not known.any():
                self.skipped_updates += ~(sum_among(losses + norms, with_gradient).isfinite() & (norms.sum() > 0))
                return
        weights = self._weights if positions is None else self._weights[positions]
        ratios = loss_ratios(losses, initial)
        rates = relative_inverse_training_rates(ratios, active)
        priorities = self._priorities_of(measurement.tasks)
        weighted = weights * norms
        feasible = self.update_rule != "paper"
        targets = target_norms(weighted, rates, self.alpha, priorities=priorities, feasible=feasible, active=active)
        self.diagnostics = {"grad_norm": weighted, "target_norm": targets, "loss_ratio": ratios, "inverse_rate": rates}
        if active is not None:
            self.diagnostics |= {tag: self.diagnostics[tag].where(active, torch.nan) for tag in list(self.diagnostics)[1:]}

        # A sum carries any NaN or infinity of the losses or norms; where all norms are zero there is nothing to balance.
        seen = sum_among(losses + targets, active)  # and the targets carry those of the norms
        if active is not with_gradient:
            seen = seen + sum_among(losses + norms, with_gradient)
        usable = seen.isfinite() & (sum_among(norms, active) > 0)
        if self.alpha > 0 and not reading_is_free(usable):  # where it is, a negative loss was refused
            usable = usable & (sum_among(ratios.clamp_max(0.0), active) == 0)
        certain = active is None and reading_is_free(usable) and bool(usable)
        accept = None if certain else usable.expand(weights.shape) if active is None else usable & active
        new = self._step(weights, weighted, targets, norms, rates, priorities, active, accept, positions)
        new = self._rescale(new.clamp(*self._bearable), norms, measurement.tasks, weights, active)
        if accept is not None:
            self.skipped_updates += ~usable
            new = torch.where(accept, new, weights)
        if positions is None:
            self._weights = new
        else:
            self._weights[positions] = new

    def _priorities_of(self, tasks: tuple[str, ...]) -> Tensor | None:
        return self._weights.new_tensor([self.priorities.get(task, 1.0) for task in tasks]) if self.priorities else None

    def _step(
        self,
        weights: Tensor,
        weighted: Tensor,
        targets: Tensor,
        norms: Tensor,
        rates: Tensor,
        priorities: Tensor | None,
        active: Tensor | None,
        accept: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """The new weights before they are rescaled, shape ``[T]``; of tasks that do not take part, anything."""
        if self.update_rule == "closed_form":
            wanted = where_active(balanced_weights(norms, rates, self.alpha, priorities=priorities), active)
            wanted = wanted * (sum_among(weights, active) / wanted.sum())
            return (self.ema_decay * weights.log() + (1 - self.ema_decay) * wanted.clamp(*self._bearable).log()).exp()
        logarithmic = self.update_rule == "log"
        # Of L_grad / Ḡ on log w: a number without a unit, so that the losses' unit does not meet an optimiser's epsilon.
        scaled = weighted / mean_among(weighted, active) if logarithmic else norms
        gradient = gradnorm_gradient(weighted, targets, scaled)
        values = self._weights.log() if logarithmic else self._weights
        stepped = self._optimizer.step(values, gradient, accept, positions)
        return stepped.exp() if logarithmic else stepped

    def _rescale(self, weights: Tensor, norms: Tensor, tasks: tuple[str, ...], before: Tensor, active: Tensor | None) -> Tensor:
        """The weights on the scale rule's set, within the bounds; who does not take part keeps what it had."""
        bounds: tuple[Bound, Bound] = (self.min_weight, self.max_weight)
        if active is not None:
            bounds = (before.where(~active, self.min_weight), before.where(~active, self.max_weight))
        if self.scale == "gradient":
            return scale_towards_gradient(weights, where_active(norms, active), 1 - self.ema_decay, *bounds)
        if self.scale == "reference":
            return self._rescale_to_reference(weights, tasks, before, active, bounds)
        absent = self._weights.sum() - before.sum() if len(tasks) < len(self.tasks) else 0.0
        return scale_to_sum(weights, len(self.tasks) - absent, *bounds)

    def _rescale_to_reference(
        self,
        weights: Tensor,
        tasks: tuple[str, ...],
        before: Tensor,
        active: Tensor | None,
        bounds: tuple[Bound, Bound],
    ) -> Tensor:
        """Where the reference does not take part, the others share what they had."""
        if self.reference not in tasks:
            return scale_to_sum(weights, before.sum(), *bounds)
        position = tasks.index(self.reference)
        relative = scale_to_reference(weights, position, *bounds)
        if active is None:
            return relative
        return torch.where(active[position], relative, scale_to_sum(weights, before.sum(), *bounds))
