"""Equations in the set-ups of DB-PINN (Zhou et al., IJCAI 2025), scaled: smaller networks, fresh points, fewer steps.

References are computed here: Cole and Hopf's transform, a spectral solver, finite differences.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.suite import references
from benchmarks.suite.equations import Equation, all_sides, grid, relative, squares, uniform
from benchmarks.suite.problem import Batch, generator

Number = TypeVar("Number", Tensor, references.Array)
VISCOSITY = 0.01 / math.pi


class AllenCahn(Equation):
    """u_t = D u_xx + 5u − 5u³, u = x² cos πx at t = 0, periodic in x.

    Published: D = 1e-4, t ≤ 1, 4 × 128, 80,000 steps. Here D = 1e-3 and t ≤ 0.5, which a small network can learn in time.
    """

    name = "Allen–Cahn"
    tasks = ("pde", "initial", "boundary")
    low, high = (0.0, -1.0), (0.5, 1.0)
    diffusion = 1e-3

    def losses(self, inside: Tensor, first: Tensor, sides: Tensor) -> dict[str, Tensor]:
        u, (u_t, _), (u_xx,) = self.network.derivatives(inside, second=1)
        x = first[:, 1]
        values, (_, slopes), _ = self.network.derivatives(sides)
        (left, right), (slope_left, slope_right) = values.chunk(2), slopes.chunk(2)
        return {
            "pde": (u_t - self.diffusion * u_xx - 5 * u + 5 * u**3).square(),
            "initial": (self.network(first) - x**2 * torch.cos(math.pi * x)).square(),
            "boundary": squares(left - right, slope_left - slope_right),
        }

    def errors(self) -> Sequence[float]:
        t, x, u = references.allen_cahn(self.diffusion, self.high[0], 50)
        return [relative(self.network(torch.cartesian_prod(t, x[::4])), u[:, ::4].flatten())]


class Burgers(Equation):
    """u_t + u u_x = ν u_xx, ν = 0.01/π, u = −sin πx at t = 0, zero at both ends."""

    name = "Burgers"
    tasks = ("pde", "initial", "boundary")
    low, high = (0.0, -1.0), (1.0, 1.0)

    def losses(self, inside: Tensor, first: Tensor, sides: Tensor) -> dict[str, Tensor]:
        u, (u_t, u_x), (u_xx,) = self.network.derivatives(inside, second=1)
        return {
            "pde": (u_t + u * u_x - VISCOSITY * u_xx).square(),
            "initial": (self.network(first) + torch.sin(math.pi * first[:, 1])).square(),
            "boundary": 2 * self.network(sides).square(),
        }

    def solution(self, x: Tensor) -> Tensor:
        return references.burgers(x, VISCOSITY)


class BurgersInverse(Burgers):
    """u_t + λ₁ u u_x = λ₂ u_xx, both coefficients unknown, from u at 300 points; they start at 2 and 0.2.

    Published: 8 × 20, 5,000 steps and L-BFGS. The errors are u's and the mean of the coefficients' relative ones.
    """

    name = "Burgers, inverse"
    tasks = ("pde", "initial", "boundary", "data")

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.coefficients = nn.Parameter(torch.tensor([2.0, 0.2]))

    def stream(self) -> Iterator[Batch]:
        measured = uniform(self.low, self.high, 300, generator(self.seed, 1))
        values = self.solution(measured)
        for batch in super().stream():
            yield *batch, measured, values

    def losses(self, inside: Tensor, first: Tensor, sides: Tensor, measured: Tensor, values: Tensor) -> dict[str, Tensor]:
        u, (u_t, u_x), (u_xx,) = self.network.derivatives(inside, second=1)
        advection, diffusion = self.coefficients.unbind()
        known = super().losses(inside, first, sides)
        return known | {
            "pde": (u_t + advection * u * u_x - diffusion * u_xx).square(),
            "data": (self.network(measured) - values).square(),
        }

    def errors(self) -> Sequence[float]:
        relative_errors = (self.coefficients / torch.tensor([1.0, VISCOSITY]) - 1).abs()
        return [*super().errors(), relative_errors.mean().item()]


def lid_speed(x: Number) -> Number:
    """At points x, 1 in the middle."""
    return 16 * (x * (1 - x)) ** 2


class Cavity(Equation):
    """The steady flow under a moving lid at Re = 100, as (u, v, p); the error is that of the speed √(u² + v²).

    Published: 3 × 50 for the stream function and p, 40,000 steps. Here u, v, p and the continuity equation in the residual,
    which spares third derivatives, and a lid whose speed is 16 x² (1 − x)², which spares the singular corners.
    """

    name = "cavity"
    tasks = ("pde", "walls", "lid")
    outputs = 3
    reynolds = 100.0

    def conditions(self, count: int, draws: torch.Generator) -> Sequence[Tensor]:
        sides = all_sides(self.low, self.high, count, draws)
        return sides[: 3 * count], sides[3 * count :]

    def losses(self, inside: Tensor, walls: Tensor, lid: Tensor) -> dict[str, Tensor]:
        flow, (along_x, along_y), (twice_x, twice_y) = self.network.derivatives(inside, second=2)
        velocity, pressure_slope = flow[:, :2], torch.stack([along_x[:, 2], along_y[:, 2]], 1)
        carried = velocity[:, :1] * along_x[:, :2] + velocity[:, 1:] * along_y[:, :2]
        momentum = carried + pressure_slope - (twice_x + twice_y)[:, :2] / self.reynolds
        continuity = along_x[:, 0] + along_y[:, 1]
        moving = torch.stack([lid_speed(lid[:, 0]), 0 * lid[:, 0]], 1)
        return {
            "pde": squares(*momentum.unbind(1), continuity),
            "walls": 3 * squares(*self.network(walls)[:, :2].unbind(1)),
            "lid": squares(*(self.network(lid)[:, :2] - moving).unbind(1)),
        }

    def errors(self) -> Sequence[float]:
        exact = references.cavity(self.reynolds, lid_speed)
        u, v, _ = self.network(grid(self.low, self.high, len(exact))).unbind(1)
        return [relative(torch.hypot(u, v), torch.hypot(*exact.unbind(2)).flatten())]
