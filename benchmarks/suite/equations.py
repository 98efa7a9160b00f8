"""What the equations of the suite share, and the published ones with an exact solution; points are (t, x), or (x, y)."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.suite.problem import Batch, Problem, generator
from benchmarks.suite.taylor import TanhNetwork

GRID = 60  # points on each side of the grid on which errors are taken


class Equation(Problem):
    """A network for u on a box and fresh points in every step; Adam, slower by a factor of ten at the end.

    Args:
        seed: of the points.

    Attributes:
        low, high: corners of the box.
        width, hidden, outputs: of the network.
        inside, border: how many points a batch has inside, and on each part of the border.
    """

    kind = "equation"
    residuals = ("pde",)
    low: tuple[float, float] = (0.0, 0.0)
    high: tuple[float, float] = (1.0, 1.0)
    width, hidden, outputs = 24, 3, 1
    inside, border = 100, 25
    steps = 4000
    lr = 3e-3

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.network = TanhNetwork(self.low, self.high, self.width, self.hidden, self.outputs)

    def __init_subclass__(cls) -> None:
        cls.raised = tuple(task for task in getattr(cls, "tasks", ()) if task not in cls.residuals)
        cls.shared = (f"network.layers.{cls.hidden - 1}.weight",)

    def lr_factor(self, progress: float) -> float:
        return 0.1**progress

    def stream(self) -> Iterator[Batch]:
        draws = generator(self.seed)
        while True:
            yield uniform(self.low, self.high, self.inside, draws), *self.conditions(self.border, draws)

    def conditions(self, count: int, draws: torch.Generator) -> Sequence[Tensor]:
        """Points of the losses other than the residual's, so many per part: at the start, then at both ends."""
        return start(self.low, self.high, count, draws), ends(self.low, self.high, count, draws)

    def solution(self, x: Tensor) -> Tensor:
        """u, ``[N]``, at points ``[N, 2]``."""
        raise NotImplementedError

    def errors(self) -> Sequence[float]:
        points = grid(self.low, self.high, GRID)
        return [relative(self.network(points), self.solution(points))]


def relative(u: Tensor, exact: Tensor) -> float:
    """‖u − exact‖ / ‖exact‖."""
    return ((u - exact).norm() / exact.norm()).item()


def squares(*residuals: Tensor) -> Tensor:
    """Squared residuals of which each point has several, ``[N]`` each, as entries of their own.

    Their mean is that of the points' sums.
    """
    return len(residuals) * torch.cat(residuals).square()


def grid(low: Sequence[float], high: Sequence[float], size: int) -> Tensor:
    """``size`` × ``size`` points over a rectangle, ``[size², 2]``, the first coordinate slowest."""
    return torch.cartesian_prod(*(torch.linspace(a, b, size) for a, b in zip(low, high, strict=True)))


def uniform(low: Sequence[float], high: Sequence[float], count: int, draws: torch.Generator) -> Tensor:
    """Points drawn evenly from a box, ``[count, d]``."""
    a, b = torch.tensor(low), torch.tensor(high)
    return a + (b - a) * torch.rand(count, len(a), generator=draws)


def start(low: Sequence[float], high: Sequence[float], count: int, draws: torch.Generator) -> Tensor:
    """Points at the least first coordinate, ``[count, 2]``."""
    points = uniform(low, high, count, draws)
    points[:, 0] = low[0]
    return points


def ends(low: Sequence[float], high: Sequence[float], count: int, draws: torch.Generator) -> Tensor:
    """Points at the least second coordinate, then at the greatest with the same first ones, ``[2 count, 2]``."""
    points = uniform(low, high, count, draws).repeat(2, 1)
    points[:count, 1], points[count:, 1] = low[1], high[1]
    return points


def all_sides(low: Sequence[float], high: Sequence[float], count: int, draws: torch.Generator) -> Tensor:
    """Points on the four sides of a rectangle, ``count`` on each: left, right, bottom, top."""
    left = uniform(low, high, 4 * count, draws)
    for side, block in enumerate(left.split(count)):
        block[:, side // 2] = (low, high)[side % 2][side // 2]
    return left


class Helmholtz(Equation):
    """Δu + u = q, u = sin(πx) sin(3πy): zero on the border (Wang, Teng, Perdikaris 2021, with 4 in the place of 3)."""

    name = "Helmholtz"
    tasks = ("pde", "boundary")
    low, high = (-1.0, -1.0), (1.0, 1.0)

    def conditions(self, count: int, draws: torch.Generator) -> Sequence[Tensor]:
        return (all_sides(self.low, self.high, count, draws),)

    def losses(self, inside: Tensor, sides: Tensor) -> dict[str, Tensor]:
        u, _, (u_xx, u_yy) = self.network.derivatives(inside, second=2)
        residual = u_xx + u_yy + u - (1 - 10 * math.pi**2) * self.solution(inside)
        return {"pde": residual.square(), "boundary": 4 * self.network(sides).square()}

    def solution(self, x: Tensor) -> Tensor:
        return torch.sin(math.pi * x[:, 0]) * torch.sin(3 * math.pi * x[:, 1])


class KleinGordon(Equation):
    """u_tt − u_xx + u³ = f, u = x cos(5πt) + (tx)³; u and u_t given at t = 0, u at both ends (Wang et al. 2021)."""

    name = "Klein–Gordon"
    tasks = ("pde", "initial", "boundary")

    def losses(self, inside: Tensor, first: Tensor, sides: Tensor) -> dict[str, Tensor]:
        u, _, (u_tt, u_xx) = self.network.derivatives(inside, second=2)
        at_start, (speed, _), _ = self.network.derivatives(first)
        return {
            "pde": (u_tt - u_xx + u**3 - self.forcing(inside)).square(),
            "initial": squares(at_start - self.solution(first), speed),
            "boundary": 2 * (self.network(sides) - self.solution(sides)).square(),
        }

    def solution(self, x: Tensor) -> Tensor:
        t, x = x.unbind(1)
        return x * torch.cos(5 * math.pi * t) + (t * x) ** 3

    def forcing(self, x: Tensor) -> Tensor:
        """f, ``[N]``."""
        t, x = x.unbind(1)
        wave = x * torch.cos(5 * math.pi * t)
        return -25 * math.pi**2 * wave + 6 * t * x**3 - 6 * x * t**3 + (wave + (t * x) ** 3) ** 3
