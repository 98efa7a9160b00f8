"""GradNorm (Chen, Badrinarayanan, Lee, Rabinovich, ICML 2018, arXiv 1711.02257).

Symbols of the paper, and names here: L̃_i ``loss_ratio``; r_i ``relative_inverse_training_rate``; G_i ``gradient_norm`` of
the weighted loss, w_i n_i; Ḡ r_i^α ``target_norm``; L_grad ``gradnorm_loss``. All vectors have shape ``[T]``.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_gradnorm.balancers.base import LossBalancer
from lightning_gradnorm.balancers.checks import check_choice, check_that
from lightning_gradnorm.balancers.initial_losses import InitialLosses, InitialLossTracker
from lightning_gradnorm.balancers.optimizer import OptimizerFactory, VectorOptimizer
from lightning_gradnorm.balancers.scale import ScaleRule, scale_to_reference, scale_to_sum, scale_towards_gradient
from lightning_gradnorm.measurement import Measurement

Update = Literal["log", "paper", "closed_form"]


def loss_ratios(losses: Tensor, initial_losses: Tensor) -> Tensor:
    """L̃_i = L_i(t) / L_i(0): how much of the loss is left, the *inverse* training rate (section 3.1)."""
    return losses / initial_losses


def relative_inverse_training_rates(ratios: Tensor) -> Tensor:
    """r_i = L̃_i / mean_j L̃_j: above 1 for a task that trains slowly (section 3.1)."""
    return ratios / ratios.mean()


def target_norms(
    gradient_norms: Tensor, rates: Tensor, alpha: float, *, priorities: Tensor | None = None, feasible: bool = True
) -> Tensor:
    """Ḡ r_i^α (equation 1): what the weighted gradient norms should be; a constant for L_grad.

    The norms average to Ḡ and the printed targets, in general, do not, so they cannot be met unless α is 0 or 1 or all
    rates are equal. ``feasible`` divides them by mean_j r_j^α, after which they can.

    Args:
        gradient_norms: G_i = w_i n_i, shape ``[T]``.
        rates: r_i, shape ``[T]``.
        alpha: strength of the pull towards equal training rates; at 0 all norms are pulled together.
        priorities: relative importance of the tasks, a factor of the targets; not in the paper.
        feasible: a deviation from the printed equation; ``False`` for the printed one.
    """
    shares = rates**alpha
    if priorities is not None:
        shares = shares * (priorities / priorities.mean())
    return gradient_norms.mean() * (shares / shares.mean() if feasible else shares)


def gradnorm_loss(gradient_norms: Tensor, targets: Tensor) -> Tensor:
    """L_grad = Σ_i |G_i − target_i| (equation 2), scalar."""
    return (gradient_norms - targets).abs().sum()


def gradnorm_gradient(gradient_norms: Tensor, targets: Tensor, unweighted_norms: Tensor) -> Tensor:
    """∂L_grad/∂w_i = sign(G_i − target_i) n_i, with the targets constant (Algorithm 1); no second-order graph is needed.

    With G_i in the place of n_i it is ∂L_grad/∂log w_i.
    """
    return torch.sign(gradient_norms - targets) * unweighted_norms


def balanced_weights(unweighted_norms: Tensor, rates: Tensor, alpha: float, *, priorities: Tensor | None = None) -> Tensor:
    """w_i ∝ r_i^α / n_i: where L_grad with the feasible target is 0; up to their common factor."""
    shares = rates**alpha if priorities is None else rates**alpha * priorities
    return shares / unweighted_norms


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
        initial_losses: L_i(0): ``"first"`` measurement, the mean of the first N (an int; weights stay at 1 until then),
            or given per task, in the loss's units.
        scale: the common factor of the weights. ``"gradient"``, the default: Σ w_i n_i = Σ n_i, so the size of the shared
            gradient stays that of the plain sum; approached with ``ema_decay``, or the factor would jump from batch to batch.
            ``"sum"``: Σ w_i = T, the paper's, and the default of ``update="paper"``. ``"reference"``: the task named by
            ``reference`` keeps weight 1.
        reference: the task whose weight stays 1; it implies ``scale="reference"``.
        update_every: the weights are updated on the first and every so-manieth optimiser step; the others cost nothing.
        min_weight: least weight, above 0 and at most 1.
        max_weight: greatest weight, at least 1; ``None`` for no bound.
        priorities: relative importance per task, above 0, a factor of the targets; 1 for tasks not named.
        ema_decay: β of the averages: of ``"closed_form"``, log w ← β log w + (1 − β) log ŵ, and of ``scale="gradient"``,
            w ← w (Σ n_i / Σ w_i n_i)^{1 − β}.
        tasks: all tasks' names, if they are to be fixed from the start.

    Raises:
        ValueError: for a setting outside its range, or a name in ``initial_losses``, ``priorities`` or ``reference`` that
            is no task (at the first update, when the names are known).
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
        upper = math.inf if max_weight is None else max_weight
        check_that(
            "alpha",
            alpha,
            0 <= alpha < math.inf,
            "at least 0: at 0 all norms are pulled together, at 1.5 slow tasks are favoured",
        )
        check_that("lr", lr, 0 <= lr < math.inf, "at least 0")
        check_that("ema_decay", ema_decay, 0 <= ema_decay < 1, "at least 0 and below 1")
        check_that(
            "min_weight",
            min_weight,
            0 < min_weight <= 1,
            "above 0 and at most 1, or no weights could sum to the number of tasks",
        )
        check_that(
            "max_weight", upper, upper >= 1, "at least 1, or no weights could sum to the number of tasks; None for no bound"
        )
        check_choice("update", update, get_args(Update))
        if scale is None:
            scale = "reference" if reference is not None else "sum" if update == "paper" else "gradient"
        check_choice("scale", scale, get_args(ScaleRule))
        if (scale == "reference") != (reference is not None):
            raise ValueError(
                f"scale='reference' and reference='task' go together: got scale={scale!r} with reference={reference!r}. "
                "Name the task whose weight stays 1, or choose another scale rule."
            )
        for task, priority in (priorities or {}).items():
            check_that(f"priority of task {task!r}", priority, 0 < priority < math.inf, "above 0; 1 is the usual importance")
        self.alpha, self.lr, self.update_rule, self.scale, self.reference = float(alpha), float(lr), update, scale, reference
        self.min_weight, self.max_weight, self.ema_decay = float(min_weight), float(upper), float(ema_decay)
        self.priorities = {task: float(priority) for task, priority in (priorities or {}).items()}
        self._initial_losses = InitialLossTracker(initial_losses)
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
        self._initial_losses.check(measurement)

    def _update(self, measurement: Measurement, positions: Tensor | None) -> None:
        norms = measurement.gradient_norms
        initial = self._initial_losses.observe(measurement)
        assert norms is not None, "the contract has checked it"
        if initial is None:
            self.skipped_updates += ~(measurement.losses + norms).sum().isfinite()
            return
        norms = norms.to(self._weights)
        weights = self._weights if positions is None else self._weights[positions]
        ratios = loss_ratios(measurement.losses.to(self._weights), initial.to(self._weights))
        rates = relative_inverse_training_rates(ratios)
        priorities = self._priorities_of(measurement.tasks)
        weighted = weights * norms
        targets = target_norms(weighted, rates, self.alpha, priorities=priorities, feasible=self.update_rule != "paper")
        self.diagnostics = {"grad_norm": weighted, "target_norm": targets, "loss_ratio": ratios, "inverse_rate": rates}

        # A sum carries any NaN or infinity of the losses or norms; where all norms are zero there is nothing to balance.
        usable = (targets + ratios).sum().isfinite() & (norms.sum() > 0)
        certain = usable.device.type == "cpu" and bool(usable)  # elsewhere than on the CPU, asking would make the host wait
        new = self._step(weights, weighted, targets, norms, rates, priorities, None if certain else usable, positions)
        new = self._rescale(new.clamp(self.min_weight, self.max_weight), norms, measurement.tasks, weights)
        if not certain:
            self.skipped_updates += ~usable
            new = torch.where(usable, new, weights)
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
        usable: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """The new weights before they are rescaled, shape ``[T]``."""
        if self.update_rule == "closed_form":
            # A gradient of exactly zero asks for an infinite weight; that task waits.
            moves = norms > 0
            wanted = torch.where(moves, balanced_weights(norms, rates, self.alpha, priorities=priorities), 0.0)
            wanted = wanted * (torch.where(moves, weights, 0.0).sum() / wanted.sum())
            log_wanted = wanted.clamp(self.min_weight, self.max_weight).log()
            return torch.where(moves, self.ema_decay * weights.log() + (1 - self.ema_decay) * log_wanted, weights.log()).exp()
        logarithmic = self.update_rule == "log"
        # Of L_grad / Ḡ on log w: a number without a unit, so that the losses' unit does not meet an optimiser's epsilon.
        gradient = gradnorm_gradient(weighted, targets, weighted / weighted.mean() if logarithmic else norms)
        values = self._weights.log() if logarithmic else self._weights
        accept = None if usable is None else usable.expand(gradient.shape)
        stepped = self._optimizer.step(values, gradient, accept, positions)
        return stepped.exp() if logarithmic else stepped

    def _rescale(self, weights: Tensor, norms: Tensor, tasks: tuple[str, ...], before: Tensor) -> Tensor:
        """The weights on the scale rule's set, within the bounds."""
        bounds = self.min_weight, self.max_weight
        if self.scale == "gradient":
            return scale_towards_gradient(weights, norms, 1 - self.ema_decay, *bounds)
        if self.scale == "reference" and self.reference in tasks:
            return scale_to_reference(weights, tasks.index(self.reference), *bounds)
        if self.scale == "reference":  # it is absent: the others share what they had
            return scale_to_sum(weights, before.sum(), *bounds)
        absent = self._weights.sum() - before.sum() if len(tasks) < len(self.tasks) else 0.0
        return scale_to_sum(weights, len(self.tasks) - absent, *bounds)
