"""GradNorm's weights as the average, over all of the training, of those under which L_grad is 0."""

from lightning_gradnorm.balancers.arrays import Vector, exp, isfinite, log, surely_all
from lightning_gradnorm.balancers.gradnorm_equations import weights_at_rest, weights_half_way
from lightning_gradnorm.balancers.gradnorm_step import Step
from lightning_gradnorm.balancers.optimizer import VectorOptimizer
from lightning_gradnorm.balancers.scale import bearable

SEEN, NORM, SHARE = "steps_averaged", "last_norm", "last_share"
START = 30.0  # as so many steps the weight counts that a task starts with
RECENT = 2.0  # η = 2 / (t + 30): of two measurements, one that is twice as late counts twice
EVEN = 1.0  # η = 1 / (t + 30): all count alike


class AveragedUpdate:
    """log w ← log w − η (log w − log ŵ): a step of an optimiser of the weights' own on ½ ‖log w − log ŵ‖².

    ŵ is where L_grad with these norms is 0, in one step's measurement and so noisy. With SGD and η = 2 / t at the t-th step,
    the Robbins-Monro rate, w is the average of all that was measured, the last the most: fast at first, slower and slower,
    with no rate to be tuned. A measurement stands for all the steps until the next, so that it makes no difference how many are
    measured. Where conditions stand beside residuals of equations, η = 1 / t: these gradients change by orders of magnitude
    while the equation is learnt, and weights that follow at once keep it from that.

    The first weight, one, counts as 30 steps: an untrained network's gradients say little of what is to come. Forces have next
    to none where energies start flat, a border is met early by u ≈ 0, and weights that take one such batch whole are in the
    thousands at the second step.

    A task that is absent counts with its last norm: tasks that take turns are balanced as if they had come together.

    Args:
        residuals: the tasks that are residuals of equations; others are then conditions. None: all tasks are alike.
        optimizer: the weights' own, of learning rate 1 where the rate falls.
        lr: below which the rate of one step does not fall; ``None``: the optimiser has a rate of its own, and it is left alone.
        bounds: least and greatest weight.
    """

    remembers: tuple[tuple[str, float], ...] = ((SEEN, 0.0), (NORM, 0.0), (SHARE, 0.0))

    def __init__(
        self, residuals: tuple[str, ...], optimizer: VectorOptimizer, lr: float | None, bounds: tuple[float, float]
    ) -> None:
        self._residuals, self._optimizer, self._lr, self._bounds = residuals, optimizer, lr, bounds
        self._bearable = bearable(*bounds)

    def next(self, step: Step, accept: Vector | None) -> tuple[Vector, dict[str, Vector]]:
        """See ``UpdateRule``; the targets are ŵ_i n_i."""
        wanted = self._wanted(step)
        seen = step.of_step(step.memory[SEEN]) + step.interval
        known = isfinite(wanted)  # or there is nothing yet to compare with
        there = accept if surely_all(known) else known if accept is None else known & accept
        values = log(step.all_weights)
        gradient = step.of_step(values) - log(wanted.clip(*self._bearable))
        stepped = self._optimizer.step(values, self._rate(seen, step.interval) * gradient, there, step.positions)
        return wanted * step.norms, {
            "weights": step.of_all(step.all_weights, exp(stepped).clip(*self._bounds), there),
            SEEN: step.of_all(step.memory[SEEN], seen, there),
            NORM: step.of_all(step.memory[NORM], step.norms, accept),
            SHARE: step.of_all(step.memory[SHARE], step.shares, accept),
        }

    def _wanted(self, step: Step) -> Vector:
        """ŵ, of the step's tasks; NaN where there is nothing yet to compare with."""
        norms = step.of_all(step.memory[NORM], step.norms, step.active)
        shares = step.of_all(step.memory[SHARE], step.shares, step.active)
        if not self._residuals:
            return step.of_step(weights_at_rest(norms, shares))
        return step.of_step(weights_half_way(norms, shares, step.members(self._residuals)))

    def _rate(self, seen: Vector, interval: int) -> Vector | float:
        """η, of a measurement that stands for so many steps, after so many."""
        if self._lr is None:
            return 1.0
        falling = (EVEN if self._residuals else RECENT) * interval / (seen + START)
        return falling.clip(1 - (1 - self._lr) ** interval, 1.0)
