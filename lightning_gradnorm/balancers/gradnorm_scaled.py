"""GradNorm's rule as printed, and two of version 0.1: steps from batch to batch, and then the common factor."""

from typing import Literal, NamedTuple, get_args

from lightning_gradnorm.balancers.arrays import Vector, exp, log, where
from lightning_gradnorm.balancers.checks import check_choice, check_number
from lightning_gradnorm.balancers.gradnorm_equations import (
    balanced_weights,
    gradnorm_gradient,
    mean_among,
    sum_among,
    target_norms,
    where_active,
)
from lightning_gradnorm.balancers.gradnorm_step import Step
from lightning_gradnorm.balancers.optimizer import VectorOptimizer
from lightning_gradnorm.balancers.scale import (
    Bound,
    ScaleRule,
    bearable,
    scale_to_reference,
    scale_to_sum,
    scale_towards_gradient,
)
from lightning_gradnorm.deprecation import warn_deprecated
from lightning_gradnorm.plain import plain_name

Form = Literal["paper", "log", "closed_form"]
_WRITE = {  # what is gone in the next version → what to write
    "update='log'": "leave update out: the weights are then the average of those that it pulls towards",
    "update='closed_form'": "leave update out: the weights are the same ones, averaged over the training",
    "scale": "leave it out: the shared gradient keeps the plain sum's size, and with update='paper' Σ w is T",
    "reference": "residuals=['pde'] in the place of reference='pde', without other settings",
    "ema_decay": "leave it out; for weights that forget what is old, write lr=1 - ema_decay",
}


class SettingsOf01(NamedTuple):
    """What the updates of version 0.1 are set by; see ``ScaledUpdate``."""

    scale: ScaleRule = "gradient"
    reference: str | None = None
    ema_decay: float = 0.9


def settings_of_0_1(
    update: str, is_asked_for: bool, scale: ScaleRule | None, reference: str | None, ema_decay: float | None
) -> SettingsOf01:
    """These settings with their defaults, checked; a deprecation where something is given that is gone in the next version.

    Args:
        update: the form of the update.
        is_asked_for: whether it was given, or follows from the others.
        scale: ``None`` for the form's.
        reference: the task whose weight stays 1.
        ema_decay: ``None`` for 0.9.

    Raises:
        ValueError: for a setting outside its range, and for one that the form does not have.
    """
    given = {"scale": scale, "reference": reference, "ema_decay": ema_decay}
    old = [f"update={update!r}"] if is_asked_for and update in ("log", "closed_form") else []
    old += [name for name, value in given.items() if value is not None]
    for name in old:
        warn_deprecated(f"GradNorm's {name} is of version 0.1, and will be gone in the next version. Write: {_WRITE[name]}.")
    if update == "average":
        if old:
            raise ValueError(f"{old[0]} does not go with update='average'. Write: {_WRITE[old[0]]}.")
        return SettingsOf01()
    reference = None if reference is None else plain_name(reference)
    if scale is None:
        scale = "reference" if reference is not None else "sum" if update == "paper" else "gradient"
    scale = check_choice("scale", scale, get_args(ScaleRule))
    if (scale == "reference") != (reference is not None):
        raise ValueError(
            f"scale='reference' and reference='task' go together: got scale={scale!r} with reference={reference!r}. Name the "
            "task whose weight stays 1, or choose another scale rule."
        )
    decay = 0.9 if ema_decay is None else ema_decay
    return SettingsOf01(
        scale, reference, check_number("ema_decay", decay, lambda value: 0 <= value < 1, "at least 0 and below 1")
    )


class ScaledUpdate:
    """A step on L_grad or towards its rest, and then the scale rule.

    Args:
        form: ``"paper"``: Algorithm 1, the gradient of L_grad applied to w; ``"log"``: that of L_grad / Ḡ to log w, with the
            feasible target; ``"closed_form"``: an exponential average of log w, without the optimiser.
        alpha: α.
        optimizer: the weights' own.
        bounds: least and greatest weight, after the scale rule.
        settings: ``scale``, the common factor of the weights: ``"gradient"``, Σ w_i n_i = Σ n_i, approached with ``ema_decay``,
            or the factor would jump from batch to batch; ``"sum"``, Σ w_i = T, the paper's; ``"reference"``, the task named by
            ``reference`` keeps weight 1. ``ema_decay``, β of ``"closed_form"``, log w ← β log w + (1 − β) log ŵ, and of
            ``scale="gradient"``, w ← w (Σ n_i / Σ w_i n_i)^{1 − β}.
    """

    def __init__(
        self, form: Form, alpha: float, optimizer: VectorOptimizer, bounds: tuple[float, float], settings: SettingsOf01
    ) -> None:
        self._form, self._alpha, self._optimizer, self._bounds = form, alpha, optimizer, bounds
        self._scale, self._reference, self._ema_decay = settings
        self._bearable = bearable(*bounds)

    def next(self, step: Step, accept: Vector | None) -> tuple[Vector, dict[str, Vector]]:
        """See ``UpdateRule``."""
        weighted = step.weights * step.norms
        feasible = self._form != "paper"
        targets = target_norms(
            weighted, step.rates, self._alpha, priorities=step.priorities, feasible=feasible, active=step.active
        )
        new = self._stepped(step, weighted, targets, accept)
        new = self._rescaled(new.clip(*self._bearable), step)
        return targets, {"weights": step.of_all(step.all_weights, new, accept)}

    def _stepped(self, step: Step, weighted: Vector, targets: Vector, accept: Vector | None) -> Vector:
        """The new weights before they are rescaled, shape ``[T]``; of tasks that do not take part, anything."""
        if self._form == "closed_form":
            wanted = balanced_weights(step.norms, step.rates, self._alpha, priorities=step.priorities)
            wanted = where_active(wanted, step.active)
            wanted = wanted * (sum_among(step.weights, step.active) / wanted.sum())
            kept, rest = self._ema_decay, 1 - self._ema_decay
            return exp(kept * log(step.weights) + rest * log(wanted.clip(*self._bearable)))
        logarithmic = self._form == "log"
        # Of L_grad / Ḡ on log w: a number without a unit, so that the losses' unit does not meet an optimiser's epsilon.
        scaled = weighted / mean_among(weighted, step.active) if logarithmic else step.norms
        gradient = gradnorm_gradient(weighted, targets, scaled)
        values = log(step.all_weights) if logarithmic else step.all_weights
        stepped = self._optimizer.step(values, gradient, accept, step.positions)
        return exp(stepped) if logarithmic else stepped

    def _rescaled(self, weights: Vector, step: Step) -> Vector:
        """The weights on the scale rule's set, within the bounds; who does not take part keeps what it had."""
        bounds: tuple[Bound, Bound] = self._bounds
        before, active = step.weights, step.active
        if active is not None:
            bounds = where(~active, before, self._bounds[0]), where(~active, before, self._bounds[1])
        if self._scale == "gradient":
            return scale_towards_gradient(weights, where_active(step.norms, active), 1 - self._ema_decay, *bounds)
        if self._scale == "reference":
            return self._rescaled_to_reference(weights, step, bounds)
        absent = step.all_weights.sum() - before.sum() if len(step.tasks) < len(step.known) else 0.0
        return scale_to_sum(weights, len(step.known) - absent, *bounds)

    def _rescaled_to_reference(self, weights: Vector, step: Step, bounds: tuple[Bound, Bound]) -> Vector:
        """Where the reference does not take part, the others share what they had."""
        total = step.weights.sum()
        if self._reference is None or self._reference not in step.tasks:
            return scale_to_sum(weights, total, *bounds)
        position = step.tasks.index(self._reference)
        relative = scale_to_reference(weights, position, *bounds)
        if step.active is None:
            return relative
        return where(step.active[position], relative, scale_to_sum(weights, total, *bounds))
