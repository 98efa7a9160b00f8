"""Adam, then L-BFGS: the Klein–Gordon equation on fixed points, and weights that hold still in the second phase.

u_tt − u_xx + u³ = f on 0 < x, t < 1, with u = x cos(5πt) + (xt)³ (Wang et al., 2021). Three losses: ``pde``, ``boundary``
(u at x = 0 and 1), ``initial`` (u and u_t at t = 0).

L-BFGS evaluates its closure many times per step, and compares the values in a line search: within a step the objective must
not change. Under automatic optimisation Lightning makes that closure of ``training_step``, and the callback updates the
weights once per optimiser step, after it; so they are constant inside the closure. They may still move from step to step, and
L-BFGS builds its curvature out of gradients of the last ten steps. Hence three ways:

- ``equal``: the plain sum, in both phases;
- ``moving``: GradNorm in both phases, one callback for two fits;
- ``held``: GradNorm with Adam, and its last weights for L-BFGS: ``LossBalancingCallback(FixedWeights(callback.weights))``.

The last two have the Adam phase in common.

Measured with three seeds, 2000 steps of Adam and 100 of L-BFGS, relative L2 error: the plain sum comes from 96 %, 642 % and
102 % after Adam to 10 %, 22 % and 31 % after L-BFGS; GradNorm from 9 %, 23 % and 23 % to 1.0 %, 1.5 % and 1.2 % with moving
weights, to 1.2 %, 1.7 % and 1.5 % with held ones. There is little between the two: an average of 2000 steps moves by 2 % in
100 more.

    python examples/pinn_lbfgs.py        # three seeds, about five minutes
    python examples/pinn_lbfgs.py --help
"""

import copy
import math
from collections.abc import Sequence

import lightning as L
import torch
from _common import BLUE, GREEN, ORANGE, Progress, figure_style, plt, quiet_lightning, save
from _pinn import (
    TASK_COLOURS,
    Draws,
    History,
    Pinn,
    draw_errors,
    draw_field,
    draw_weights,
    fit,
    gradient,
    grid,
    print_errors,
    read_arguments,
    tanh_network,
    uniform,
)
from torch import Tensor

from lightning_gradnorm import FixedWeights, GradNormCallback, LossBalancingCallback

Batch = tuple[Tensor, Tensor, Tensor]
LOW, HIGH, EXTENT = (0.0, 0.0), (1.0, 1.0), (0, 1, 0, 1)  # of (x, t)
COLOURS = {"equal": ORANGE, "moving": GREEN, "held": BLUE}


def solution(points: Tensor) -> Tensor:
    """u, ``[N]``, at points (x, t), ``[N, 2]``."""
    x, t = points.T
    return x * torch.cos(5 * math.pi * t) + (x * t) ** 3


class KleinGordon(Pinn):
    """u as a network of three hidden layers.

    Attributes:
        second_phase: whether ``configure_optimizers`` gives L-BFGS instead of Adam.
    """

    def __init__(self) -> None:
        points = grid(LOW, HIGH)
        super().__init__(tanh_network(2, 40, 3), points, solution(points))
        self.second_phase = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x - 1)

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        inside, sides, start = batch
        x, t = inside.T
        source = 6 * x * t * (x**2 - t**2) - 25 * math.pi**2 * x * torch.cos(5 * math.pi * t) + solution(inside) ** 3
        u = self(inside.requires_grad_())
        slopes = gradient(u, inside)
        u_xx, u_tt = (gradient(slopes[:, i], inside)[:, i] for i in (0, 1))
        u_start = self(start.requires_grad_())
        u_t = gradient(u_start, start)[:, 1]  # 0 in the exact solution
        return {
            "pde": (u_tt - u_xx + u**3 - source.detach()).square().mean(),
            "boundary": (self(sides) - solution(sides)).square().mean(),
            "initial": (u_start - solution(start).detach()).square().mean() + u_t.square().mean(),
        }

    def configure_optimizers(self) -> object:
        if not self.second_phase:
            return super().configure_optimizers()
        return torch.optim.LBFGS(self.parameters(), max_iter=20, history_size=10, line_search_fn="strong_wolfe")


def balancing() -> GradNormCallback:
    """GradNorm, the equation's residual at weight 1."""
    return GradNormCallback(residuals=["pde"], summary=False)


def second_callback(way: str, first: GradNormCallback) -> list[L.Callback]:
    """What weighs the losses while L-BFGS runs: nothing, GradNorm that goes on from the first, or its last weights."""
    if way == "held":
        return [LossBalancingCallback(FixedWeights(first.weights), summary=False)]
    if way == "equal":
        return []
    second = balancing()  # one callback on another module starts anew, unless it is given what to go on from
    second.load_state_dict(first.state_dict())
    return [second]


def fixed_points(seed: int) -> Batch:
    """The same in every step, as a line search needs: 500 inside, 100 on the two sides, 50 at the start."""
    draws = torch.Generator().manual_seed(seed)
    inside, sides, start = (uniform(LOW, HIGH, count, draws) for count in (500, 100, 50))
    sides[:, 0] = torch.arange(100) % 2
    start[:, 1] = 0
    return inside, sides, start


def train_once(seed: int, steps: int, every: int, progress: Progress) -> dict[str, tuple[KleinGordon, History]]:
    """Both phases, three ways; the second has a twentieth of the steps, of up to 25 evaluations each."""
    points, found = fixed_points(seed), {}
    for ways in (("equal",), ("held", "moving")):
        torch.manual_seed(seed)
        adam, before = KleinGordon(), History(every)
        callback = balancing()
        progress.name(f"seed {seed}, Adam")
        fit(adam, Draws(lambda _: points, seed, steps), [progress, *([] if ways == ("equal",) else [callback]), before])
        for way in ways:
            module, history = KleinGordon(), copy.deepcopy(before)
            module.load_state_dict(adam.state_dict())
            module.second_phase, history.every = True, 1
            progress.name(f"seed {seed}, L-BFGS, {way}")
            fit(module, Draws(lambda _: points, seed, steps // 20), [progress, *second_callback(way, callback), history])
            found[way] = module, history
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, list[History]]:
    args = read_arguments(arguments, __doc__, "pinn_lbfgs", steps=2000, quick_steps=200)
    progress = Progress((2 * args.steps + 3 * (args.steps // 20)) * args.seeds)
    with quiet_lightning():
        found = [train_once(seed, args.steps, args.every, progress) for seed in range(args.seeds)]
    runs = {way: [by_way[way][1] for by_way in found] for way in COLOURS}
    rows = {}
    for way, histories in runs.items():
        rows[f"{way}: after Adam"] = [h.errors[h.steps.index(args.steps)] for h in histories]
        rows[f"{way}: after L-BFGS"] = [h.errors[-1] for h in histories]
    print_errors(f"Klein–Gordon, {args.steps} steps of Adam, {args.steps // 20} of L-BFGS", rows)
    with figure_style(), torch.no_grad():
        figure, (top, bottom) = plt.subplots(2, 2, figsize=(9.5, 6.8))
        module = found[-1]["held"][0]
        draw_field(top[0], module(module.test_points), EXTENT, "u, held weights, last seed", cmap="RdBu_r", vmin=-1.5, vmax=1.5)
        error = (module(module.test_points) - module.exact).abs()
        draw_field(top[1], error, EXTENT, "its error |u − exact|", cmap="magma", vmin=0)
        for axes in top:
            axes.set(xlabel="x", ylabel="t")
        draw_errors(bottom[0], runs, COLOURS)
        draw_weights(bottom[1], runs["moving"], TASK_COLOURS)
        for axes in bottom:
            axes.axvline(args.steps, color="0.5", linestyle=":", linewidth=1)
        bottom[0].set(title="relative L2 error ↓; dotted: L-BFGS begins", xlim=(0.95 * args.steps, None))
        bottom[1].set_title("GradNorm's loss weights, moving")
        save(figure, "Klein–Gordon equation; curves", args.out / "pinn_lbfgs.png")
    print(f"Figure: {args.out / 'pinn_lbfgs.png'}")
    return runs


if __name__ == "__main__":
    main()
