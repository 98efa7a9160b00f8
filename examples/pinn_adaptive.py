"""Collocation points that go where the residual is: a steep front that travels (Burgers' equation).

u_t + u u_x = ν u_xx for −0.5 < x < 1, 0 < t < 1 and ν = 0.002, with u = ½ − ½ tanh((x − t/2) / 4ν): a front about 0.02 wide,
along the line x = t/2. Three losses: ``pde``, ``boundary`` (both sides) and ``initial``. The residual is taken at 150 points
only, of which even ones put about two into the front:

- ``fixed``: drawn evenly, once;
- ``even``: drawn evenly, anew every 250 steps;
- ``by residual``: every 250 steps, out of 2000 even ones, with probability ∝ |r| / mean |r| + 1: RAD of Wu et al. (2023).

All with GradNorm, which has to follow a residual loss that jumps at every redraw.

Measured with three seeds, 2500 steps, relative L2 error: ``fixed`` 30 %, 34 % and 20 %; ``even`` 1.9 %, 8 % and 14 %; ``by
residual`` 4.0 %, 1.5 % and 2.2 %. Half of the gain is in drawing anew at all; drawing by residual was best on two of
three. Until the network has a front at all, its residual is not there, and the points are spread widely.

    python examples/pinn_adaptive.py     # three seeds, about three minutes
    python examples/pinn_adaptive.py --help
"""

from collections.abc import Sequence
from pathlib import Path

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

from lightning_gradnorm import GradNormCallback

LOW, HIGH, EXTENT = (-0.5, 0.0), (1.0, 1.0), (-0.5, 1, 0, 1)  # of (x, t)
VISCOSITY = 0.002
COUNT, POOL = 150, 2000
METHODS = {"fixed": ORANGE, "even": GREEN, "by residual": BLUE}


def front(points: Tensor) -> Tensor:
    """How far points (x, t), ``[N, 2]``, are from the front along x, ``[N]``."""
    return points[:, 0] - 0.5 * points[:, 1]


def solution(points: Tensor) -> Tensor:
    """u, ``[N]``."""
    return 0.5 - 0.5 * torch.tanh(front(points) / (4 * VISCOSITY))


class Burgers(Pinn):
    """u as a network of three hidden layers, of coordinates from −1 to 1.

    Attributes:
        points: where the residual is taken, ``[COUNT, 2]``.
    """

    def __init__(self) -> None:
        where = grid(LOW, HIGH)
        super().__init__(tanh_network(2, 32, 3), where, solution(where))
        self.points = torch.empty(0, 2)

    def forward(self, x: Tensor) -> Tensor:
        low, high = torch.tensor(LOW), torch.tensor(HIGH)
        return super().forward((2 * x - low - high) / (high - low))

    def residual(self, points: Tensor) -> Tensor:
        """u_t + u u_x − ν u_xx, ``[N]``, at points ``[N, 2]``."""
        points = points.clone().requires_grad_()
        u = self(points)
        u_x, u_t = gradient(u, points).unbind(1)
        return u_t + u * u_x - VISCOSITY * gradient(u_x, points)[:, 0]

    def task_losses(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        sides, start = batch
        return {
            "pde": self.residual(self.points).square().mean(),
            "boundary": (self(sides) - solution(sides)).square().mean(),
            "initial": (self(start) - solution(start)).square().mean(),
        }


def border(draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """64 points on the two sides, 128 on the start."""
    sides, start = uniform(LOW, HIGH, 64, draws), uniform(LOW, HIGH, 128, draws)
    sides[:, 0] = torch.where(torch.arange(64) % 2 == 0, LOW[0], HIGH[0])
    start[:, 1] = 0
    return sides, start


class Redraw(L.Callback):
    """Gives the module its points at the first step and, unless they are fixed, new ones at every 250th.

    Args:
        method: one of ``METHODS``.
        seed: of the draws.
    """

    def __init__(self, method: str, seed: int) -> None:
        self.method, self.draws = method, torch.Generator().manual_seed(seed)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Burgers, *args: object) -> None:
        if trainer.global_step % 250 or (self.method == "fixed" and trainer.global_step):
            return
        pool, chosen = uniform(LOW, HIGH, POOL, self.draws), torch.arange(COUNT)
        if self.method == "by residual":
            sizes = pl_module.residual(pool).detach().abs()
            chosen = torch.multinomial(sizes / sizes.mean() + 1, COUNT, generator=self.draws)
        pl_module.points = pool[chosen]


def train_once(method: str, seed: int, steps: int, every: int, progress: Progress) -> tuple[Burgers, History]:
    """One fit; all methods start from the same network."""
    torch.manual_seed(seed)
    module, history = Burgers(), History(every)
    balancing = GradNormCallback(residuals=["pde"], summary=False)
    progress.name(f"seed {seed}, {method}")
    fit(module, Draws(border, seed, steps), [progress, Redraw(method, seed), balancing, history])
    return module, history


def draw(found: dict[str, list[tuple[Burgers, History]]], path: Path) -> None:
    """Where the last points of the last seed went, over what was learnt; the errors; the weights."""
    runs = {method: [history for _, history in fits] for method, fits in found.items()}
    with figure_style(), torch.no_grad():
        figure, (top, bottom) = plt.subplots(2, 3, figsize=(13, 7))
        for axes, method in zip(top, METHODS, strict=True):
            module = found[method][-1][0]
            draw_field(
                axes, module(module.test_points), EXTENT, f"u and its last points: {method}", cmap="Blues", vmin=0, vmax=1
            )
            axes.scatter(*module.points.T.numpy(), s=8, color=ORANGE, edgecolors="black", linewidths=0.3)
            axes.set(xlabel="x", ylabel="t")
        draw_errors(bottom[0], runs, METHODS)
        for axes, method in zip(bottom[1:], ("even", "by residual"), strict=True):
            draw_weights(axes, runs[method], TASK_COLOURS)
            axes.set_title(f"GradNorm's loss weights, {method}")
        save(figure, "Burgers' equation, last seed above; curves", path)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[tuple[Burgers, History]]]:
    args = read_arguments(arguments, __doc__, "pinn_adaptive", steps=2500, quick_steps=600)
    progress = Progress(args.steps * args.seeds * len(METHODS))
    found: dict[str, list[tuple[Burgers, History]]] = {}
    with quiet_lightning():
        for method in METHODS:
            found[method] = [train_once(method, seed, args.steps, args.every, progress) for seed in range(args.seeds)]
    title = f"Burgers, {COUNT} points, after {args.steps} steps"
    print_errors(title, {method: [history.errors[-1] for _, history in fits] for method, fits in found.items()})
    draw(found, args.out / "pinn_adaptive.png")
    print(f"Figure: {args.out / 'pinn_adaptive.png'}")
    return found


if __name__ == "__main__":
    main()
