"""The two problems of Wang, Teng, Perdikaris (SISC 2021) as they set them up, and one fit by any method.

Adam at 1e-3, times 0.9 every 1000 steps (smoothly), 128 fresh points per step inside and on each part of the border,
coordinates scaled to mean 0 and standard deviation 1, Glorot's initial weights, tanh, float32; relative L2 error on a grid of
100 × 100 points. Learning-rate annealing measures on every tenth step, as in the paper.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from _common import figure_style, plt
from _pinn import Draws, History, Pinn, draw_field, fit, gradient, grid, laplacian, square_edges, tanh_network, uniform
from torch import Tensor, nn

from benchmarks.experiments.command import Case, Experiment
from benchmarks.experiments.curves import COLOURS, add_legend, draw_curve
from benchmarks.experiments.records import Problem, Record, Records
from lightning_gradnorm import (
    EqualWeights,
    GradNorm,
    LearningRateAnnealing,
    LossBalancer,
    LossBalancingCallback,
    SelfAdaptivePoints,
)
from lightning_gradnorm.comparison import StepTimes
from lightning_gradnorm.report.comparison import Better

POINTS = 128  # a batch's, inside and on each part of the border
POOL = 1024  # fixed points of the self-adaptive masks, of which a batch takes 128
ERROR: Mapping[str, Better] = {"relative L2 error": "lower"}
FIELD = 50  # points per side of the solutions that are kept for the figure


@dataclass(frozen=True)
class Method:
    """How one fit goes about it.

    Attributes:
        balancer: makes the method.
        norms_on: the last hidden layer's weight, or all weight matrices without the biases.
        masks: whether the points are fixed, and weighed by self-adaptive masks.
    """

    balancer: Callable[[], LossBalancer]
    norms_on: Literal["last", "matrices"] = "last"
    masks: bool = False


METHODS = {
    "equal": Method(EqualWeights),
    "annealing": Method(lambda: LearningRateAnnealing("pde"), "matrices"),
    "GradNorm": Method(lambda: GradNorm(residuals=["pde"])),
    "self-adaptive": Method(EqualWeights, masks=True),
}
FIVE = "GradNorm 0.1, five settings"  # no longer made: reference, alpha=0, closed form, ema_decay=0.98, update_every=100
STACKED = "GradNorm, in a stack"  # ten networks at once, as in the suite: not made here
FIVE_STACKED, ANNEALING_STACKED = f"{FIVE}, in a stack", "annealing, in a stack"
DRAWN = ("equal", "annealing", "GradNorm", FIVE, "self-adaptive")
SHOWN = (*DRAWN, STACKED, FIVE_STACKED, ANNEALING_STACKED)


class PhysicsProblem(Pinn):
    """A network for u on a box, and the losses.

    Args:
        method: how its losses are weighed.
        hidden: layers of 50.
        low, high: corners of the box.
    """

    hidden: int
    low: tuple[float, float]
    high: tuple[float, float]

    def __init__(self, method: Method) -> None:
        points = grid(self.low, self.high)
        super().__init__(tanh_network(2, 50, self.hidden), points, self.solution(points))
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        return super().forward(math.sqrt(12) * (x - (low + high) / 2) / (high - low))

    def shared_layer(self) -> nn.Parameter | list[nn.Parameter]:
        matrices = [parameter for parameter in self.network.parameters() if parameter.ndim == 2]
        return {"last": matrices[-2], "matrices": matrices}[self.method.norms_on]

    def configure_optimizers(self) -> dict[str, object]:
        adam = torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)
        slower = torch.optim.lr_scheduler.ExponentialLR(adam, gamma=0.9 ** (1 / 1000))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": slower, "interval": "step"}}

    @staticmethod
    def solution(x: Tensor) -> Tensor:
        """u, ``[N]``, at points ``[N, 2]``."""
        raise NotImplementedError

    @classmethod
    def border(cls, count: int, draws: torch.Generator) -> tuple[Tensor, ...]:
        """Points of the losses other than the residual's, so many per part."""
        raise NotImplementedError

    def residual(self, x: Tensor) -> Tensor:
        """Of the equation, ``[N]``, at points ``[N, 2]``."""
        raise NotImplementedError

    def border_losses(self, *points: Tensor) -> dict[str, Tensor]:
        """Task → loss per point, as many as there are in each part; the parts of one task are added."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        inside, index, *border = batch
        losses = {"pde": self.residual(inside).square(), **self.border_losses(*border)}
        if self.method.masks:
            return self.total_loss(losses, points={"pde": index})
        return self.total_loss({task: loss.mean() for task, loss in losses.items()})


class Helmholtz(PhysicsProblem):
    """Δu + u = q on (−1, 1)², u = sin(πx) sin(4πy): zero on the border."""

    hidden, low, high = 3, (-1.0, -1.0), (1.0, 1.0)

    @staticmethod
    def solution(x: Tensor) -> Tensor:
        return torch.sin(math.pi * x[:, 0]) * torch.sin(4 * math.pi * x[:, 1])

    @classmethod
    def border(cls, count: int, draws: torch.Generator) -> tuple[Tensor, ...]:
        return (square_edges(count, draws),)

    def residual(self, x: Tensor) -> Tensor:
        u = self(x.requires_grad_())
        return laplacian(u, x) + u - (1 - 17 * math.pi**2) * self.solution(x.detach())

    def border_losses(self, edges: Tensor) -> dict[str, Tensor]:
        return {"boundary": 4 * self(edges).square()}  # the source adds the four edges' means


class KleinGordon(PhysicsProblem):
    """u_tt − u_xx + u³ = f on (0, 1)², of (t, x), u = x cos(5πt) + (tx)³; u and u_t given at t = 0, u at both ends."""

    hidden, low, high = 5, (0.0, 0.0), (1.0, 1.0)

    @staticmethod
    def solution(x: Tensor) -> Tensor:
        t, x = x.unbind(1)
        return x * torch.cos(5 * math.pi * t) + (t * x) ** 3

    @staticmethod
    def forcing(x: Tensor) -> Tensor:
        """f, ``[N]``."""
        t, x = x.unbind(1)
        u = x * torch.cos(5 * math.pi * t) + (t * x) ** 3
        return -25 * math.pi**2 * x * torch.cos(5 * math.pi * t) + 6 * t * x**3 - 6 * x * t**3 + u**3

    @classmethod
    def border(cls, count: int, draws: torch.Generator) -> tuple[Tensor, ...]:
        start, ends = uniform(cls.low, cls.high, count, draws), uniform(cls.low, cls.high, 2 * count, draws)
        start[:, 0] = 0
        ends[:, 1] = torch.tensor([0.0, 1.0]).repeat(count)
        return start, ends

    def residual(self, x: Tensor) -> Tensor:
        u = self(x.requires_grad_())
        slopes = gradient(u, x)
        u_tt, u_xx = (gradient(slopes[:, i], x)[:, i] for i in (0, 1))
        return u_tt - u_xx + u**3 - self.forcing(x.detach())

    def border_losses(self, start: Tensor, ends: Tensor) -> dict[str, Tensor]:
        u = self(start.requires_grad_())
        speed = gradient(u, start)[:, 0]
        at_start = (u - self.solution(start.detach())).square() + speed.square()
        return {"initial": at_start, "boundary": 2 * (self(ends) - self.solution(ends)).square()}  # both ends' means, added


PROBLEMS: Mapping[str, type[PhysicsProblem]] = {"Helmholtz": Helmholtz, "Klein–Gordon": KleinGordon}


def batches(problem: type[PhysicsProblem], seed: int, steps: int, *, fixed: bool) -> Iterable[tuple[Tensor, ...]]:
    """Points inside with their index, and the border's; fresh ones in every step, or out of fixed ones."""
    first = torch.Generator().manual_seed(seed + 2_000_000)
    pool, border = uniform(problem.low, problem.high, POOL, first), problem.border(POINTS, first)

    def fresh(draws: torch.Generator) -> tuple[Tensor, ...]:
        inside = uniform(problem.low, problem.high, POINTS, draws)
        return inside, torch.arange(POINTS), *problem.border(POINTS, draws)

    def chosen(draws: torch.Generator) -> tuple[Tensor, ...]:
        index = torch.randperm(POOL, generator=draws)[:POINTS]
        return pool[index], index, *(points.clone() for points in border)

    return Draws(chosen if fixed else fresh, seed, steps)


def balancing(method: Method, problem: type[PhysicsProblem]) -> LossBalancingCallback:
    """The method's callback."""
    masks = {}
    if method.masks:
        tasks = ("pde", "boundary", "initial") if problem is KleinGordon else ("pde", "boundary")
        masks = {task: SelfAdaptivePoints(POOL if task == "pde" else None, mask="polynomial") for task in tasks}
    return LossBalancingCallback(method.balancer(), points=masks, summary=False)


def fit_once(case: Case, problem: type[PhysicsProblem], method: Method) -> Record:
    """One fit; all methods start from one network and, but for the masks, see the same points."""
    torch.manual_seed(case.seed)
    module, history, callback, times = problem(method), History(case.every), balancing(method, problem), StepTimes()
    points = batches(problem, case.seed, case.steps, fixed=method.masks)
    callbacks: list[L.Callback] = [case.progress, callback, history, times]
    fit(module, points, callbacks)
    weights = {f"weight {task}": [step[task] for step in history.weights] for task in history.weights[-1]}
    extras = {}
    if case.seed == 0:
        where = grid(problem.low, problem.high, FIELD)
        with torch.no_grad():
            extras = {"solution": module(where).tolist()}
    return Record(
        case.problem,
        case.method,
        case.seed,
        case.steps,
        {"relative L2 error": history.errors[-1]},
        times.median(),
        callback.weights,
        callback.mean_weights,
        {"step": [float(step) for step in history.steps], "error": history.errors, **weights},
        extras,
    )


def draw_problem(name: str, methods: Sequence[str], records: Records, path: Path) -> None:
    """Errors and weights over the steps; below, the exact solution, and each method's with its error."""
    found, problem = records.of(name, methods), PROBLEMS[name]
    shown = [method for method in methods if method in found and found[method][0].extras]
    if not found:
        return
    columns = max(len(shown) + 1, 4)
    extent = [problem.low[0], problem.high[0], problem.low[1], problem.high[1]]
    exact = problem.solution(grid(problem.low, problem.high, FIELD))
    top = float(exact.abs().max())
    with figure_style():
        figure = plt.figure(figsize=(2.6 * columns, 9.6))
        upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.35))
        left, right = upper.subplots(1, 2)
        for method in (method for method in methods if method in found):
            draw_curve(left, found[method], "error", color=COLOURS[method], label=method)
        for each in (left, right):
            each.locator_params(axis="x", nbins=5)
        left.set(title=f"{name}: relative L2 error ↓", xlabel="step", yscale="log")
        add_legend(left, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        tasks = [task for task in found[next(iter(found))][0].weights if task != "pde"]
        for method in (m for m in methods if m in found and m not in ("equal", "self-adaptive")):
            for task, style in zip(tasks, ("-", "--"), strict=False):
                ratios = [
                    [a / b for a, b in zip(fit.curves[f"weight {task}"], fit.curves["weight pde"], strict=True)]
                    for fit in found[method]
                ]
                draw_curve(right, found[method], ratios, color=COLOURS[method], linestyle=style, label=f"{method}: {task}")
        right.set(title="weight of a term over the residual's", xlabel="step", yscale="log")
        add_legend(right, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        axes = lower.subplots(2, columns, squeeze=False)
        for column in axes.T:
            for each in column:
                each.set_axis_off()
        draw_field(axes[0][0], exact, extent, "exact u", cmap="RdBu_r", vmin=-top, vmax=top)
        axes[0][0].set_axis_on()
        for (above, below), method in zip(axes.T[1:], shown, strict=False):
            solution = torch.tensor(found[method][0].extras["solution"])
            draw_field(above, solution, extent, method, cmap="RdBu_r", vmin=-top, vmax=top)
            draw_field(below, (solution - exact).abs(), extent, "its error |u − exact|", cmap="magma", vmin=0)
            for each in (above, below):
                each.set_axis_on()
                each.title.set_fontsize(8)
        figure.savefig(path)
        plt.close(figure)


def published(file: str, name: str, about: str) -> Experiment:
    """One of the problems by all methods, as long as published."""
    return Experiment(
        name=file,
        about=about,
        problems={name: Problem(SHOWN, ERROR, (FIVE, STACKED, FIVE_STACKED, ANNEALING_STACKED))},
        fit=lambda case: fit_once(case, PROBLEMS[name], METHODS[case.method]),
        draw=partial(draw_problem, name, DRAWN),
        steps=40_000,
        quick_steps=10,
        seeds=3,
    )
