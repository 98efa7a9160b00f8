"""Coarse to fine: three levels of one Helmholtz problem, and weights that start anew at each.

Δu + u = q on (−1, 1)², u = 0 on the boundary, with q such that u = sin(πx) sin(nπy): n = 1 at 32 points, n = 2 at 64, n = 4
at 128, a third of the steps each; the network goes from level to level. What a balancer has learnt belongs to its level: the
size of the gradients, and, where α > 0, the losses L(0) that the training rates refer to. ``balancer.reset()`` forgets both;
a callback of a few lines does it where a level begins. Five ways:

- ``equal``: through the levels, with the plain sum;
- ``kept``: through the levels, GradNorm, never reset: its weights are the average over all of them;
- ``reset``: the same, reset at each level;
- ``forgetting``: never reset, with ``lr=0.01``: an average over the last few hundred steps;
- ``fine only``: as many steps at the last level alone, with GradNorm.

Measured with three seeds, 4500 steps in all, relative L2 error at the last level: ``kept`` 18 %, 18 % and 11 %; ``reset`` 15 %,
9 % and 14 %; ``forgetting`` 7 %, 7 % and 19 %; ``fine only`` 12 %, 15 % and 32 %; ``equal`` 141 % to 211 %. So the levels
help, with weights of their own: the last one asks for 200 to 310 on the boundary, and an average over all three comes to 60.
Where tasks change, reset where you know when, and forget where you do not.

    python examples/pinn_multilevel.py   # three seeds, about eight minutes
    python examples/pinn_multilevel.py --help
"""

import math
from collections.abc import Sequence

import lightning as L
import torch
from _common import BLACK, BLUE, GREEN, ORANGE, PURPLE, Progress, figure_style, plt, quiet_lightning, save
from _pinn import (
    TASK_COLOURS,
    Draws,
    History,
    Pinn,
    draw_errors,
    draw_weights,
    fit,
    grid,
    laplacian,
    print_errors,
    read_arguments,
    square_edges,
    tanh_network,
    uniform,
)
from torch import Tensor

from lightning_gradnorm import GradNormCallback

LOW, HIGH = (-1.0, -1.0), (1.0, 1.0)
LEVELS = ((1, 32), (2, 64), (4, 128))  # n, points
COLOURS = {"equal": ORANGE, "kept": GREEN, "reset": BLUE, "forgetting": BLACK, "fine only": PURPLE}


class MultilevelHelmholtz(Pinn):
    """u as a network of three hidden layers.

    Attributes:
        level: which problem is being solved.
    """

    def __init__(self) -> None:
        points = grid(LOW, HIGH)
        super().__init__(tanh_network(2, 50, 3), points, points[:, 0])
        self.start_level(0)

    def start_level(self, level: int) -> None:
        """From now on the losses and the error are that level's."""
        self.level = level
        self.exact = self.solution(self.test_points)

    def solution(self, x: Tensor) -> Tensor:
        """u of the level, ``[N]``, at points ``[N, 2]``."""
        return torch.sin(math.pi * x[:, 0]) * torch.sin(LEVELS[self.level][0] * math.pi * x[:, 1])

    def task_losses(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        (waves, count), (inside, edges) = LEVELS[self.level], batch
        inside = inside[:count]
        q = (1 - (1 + waves**2) * math.pi**2) * self.solution(inside)
        u = self(inside.requires_grad_())
        return {"pde": (laplacian(u, inside) + u - q).square().mean(), "boundary": self(edges).square().mean()}


class Levels(L.Callback):
    """An epoch, a level; where one begins, a balancer starts anew.

    Args:
        levels: that of each epoch.
        reset: the callback whose balancer is reset; ``None`` for none.
    """

    def __init__(self, levels: Sequence[int], reset: GradNormCallback | None) -> None:
        self.levels, self.reset = levels, reset

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: MultilevelHelmholtz) -> None:
        pl_module.start_level(self.levels[trainer.current_epoch])
        if self.reset is not None:
            self.reset.balancer.reset()


def train_once(method: str, seed: int, steps: int, every: int, progress: Progress) -> History:
    """One fit of three epochs."""
    torch.manual_seed(seed)
    forgetting = 0.01 if method == "forgetting" else None
    balancing = GradNormCallback(residuals=["pde"], lr=forgetting, summary=False)
    levels = Levels((2, 2, 2) if method == "fine only" else (0, 1, 2), balancing if method == "reset" else None)
    history = History(every)
    batches = Draws(lambda draws: (uniform(LOW, HIGH, 128, draws), square_edges(32, draws)), seed, steps // len(LEVELS))
    progress.name(f"seed {seed}, {method}")
    callbacks = [progress, levels, *([] if method == "equal" else [balancing]), history]
    fit(MultilevelHelmholtz(), batches, callbacks, epochs=len(LEVELS))
    return history


def main(arguments: Sequence[str] | None = None) -> dict[str, list[History]]:
    args = read_arguments(arguments, __doc__, "pinn_multilevel", steps=4500, quick_steps=600)
    args.steps -= args.steps % len(LEVELS)
    progress = Progress(args.steps * args.seeds * len(COLOURS))
    with quiet_lightning():
        runs = {
            method: [train_once(method, seed, args.steps, args.every, progress) for seed in range(args.seeds)]
            for method in COLOURS
        }
    title = f"Helmholtz, n = {LEVELS[-1][0]}, after {args.steps} steps in all"
    print_errors(title, {method: [history.errors[-1] for history in histories] for method, histories in runs.items()})
    with figure_style():
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 3.8))
        draw_errors(left, runs, COLOURS)
        left.set_title("relative L2 error at the level ↓")
        draw_weights(middle, runs["kept"], TASK_COLOURS)
        draw_weights(right, runs["reset"], TASK_COLOURS)
        middle.set_title("weights, kept")
        right.set_title("weights, reset at each level")
        for axes in (left, middle, right):
            for level in (1, 2):
                axes.axvline(level * args.steps / len(LEVELS), color="0.5", linestyle=":", linewidth=1)
        save(figure, "Three levels (dotted: the next begins)", args.out / "pinn_multilevel.png")
    print(f"Figure: {args.out / 'pinn_multilevel.png'}")
    return runs


if __name__ == "__main__":
    main()
