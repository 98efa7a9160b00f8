"""Equations with exact solutions beside the published ones, from a residual that dominates to constraints that do."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.suite.equations import Equation, all_sides


class Periodic(Equation):
    """First order in t, given at t = 0, periodic in x (Krishnapriyan et al. 2021)."""

    tasks = ("pde", "initial", "boundary")
    high = (1.0, 2 * math.pi)

    def residual(self, u: Tensor, u_t: Tensor, u_x: Tensor) -> Tensor:
        """Of the equation, ``[N]``."""
        raise NotImplementedError

    def losses(self, inside: Tensor, first: Tensor, sides: Tensor) -> dict[str, Tensor]:
        u, (u_t, u_x), _ = self.network.derivatives(inside)
        left, right = self.network(sides).chunk(2)
        return {
            "pde": self.residual(u, u_t, u_x).square(),
            "initial": (self.network(first) - self.solution(first)).square(),
            "boundary": (left - right).square(),
        }


class Reaction(Periodic):
    """u_t = ρ u (1 − u), ρ = 5, from a bell at t = 0."""

    name = "reaction"
    rate = 5.0

    def residual(self, u: Tensor, u_t: Tensor, u_x: Tensor) -> Tensor:
        return u_t - self.rate * u * (1 - u)

    def solution(self, x: Tensor) -> Tensor:
        t, x = x.unbind(1)
        bell = torch.exp(-((x - math.pi) ** 2) / (2 * (math.pi / 4) ** 2))
        grown = bell * torch.exp(self.rate * t)
        return grown / (grown + 1 - bell)


class Advection(Periodic):
    """u_t + c u_x = 0, c = 10 (in the source 30), u = sin x at t = 0."""

    name = "advection"
    speed = 10.0

    def residual(self, u: Tensor, u_t: Tensor, u_x: Tensor) -> Tensor:
        return u_t + self.speed * u_x

    def solution(self, x: Tensor) -> Tensor:
        t, x = x.unbind(1)
        return torch.sin(x - self.speed * t)


class Transport(Equation):
    """u_t + u_x = 0, two waves, given at t = 0 and where they come in: gradients of like size."""

    name = "transport"
    tasks = ("pde", "initial", "inflow")

    def losses(self, inside: Tensor, first: Tensor, sides: Tensor) -> dict[str, Tensor]:
        _, (u_t, u_x), _ = self.network.derivatives(inside)
        inflow = sides.chunk(2)[0]
        return {
            "pde": (u_t + u_x).square(),
            "initial": (self.network(first) - self.solution(first)).square(),
            "inflow": (self.network(inflow) - self.solution(inflow)).square(),
        }

    def solution(self, x: Tensor) -> Tensor:
        t, x = x.unbind(1)
        return torch.sin(2 * math.pi * (x - t)) + 0.5 * torch.sin(6 * math.pi * (x - t))


class Wave(Equation):
    """u_tt = u_xx, two standing waves; u and u_t given at t = 0, u at both ends."""

    name = "wave"
    tasks = ("pde", "initial", "speed", "boundary")

    def losses(self, inside: Tensor, first: Tensor, sides: Tensor) -> dict[str, Tensor]:
        _, _, (u_tt, u_xx) = self.network.derivatives(inside, second=2)
        at_start, (speed, _), _ = self.network.derivatives(first)
        return {
            "pde": (u_tt - u_xx).square(),
            "initial": (at_start - self.solution(first)).square(),
            "speed": speed.square(),
            "boundary": 2 * self.network(sides).square(),
        }

    def solution(self, x: Tensor) -> Tensor:
        t, x = x.unbind(1)
        modes = ((1.0, 1), (0.5, 3))
        return sum((a * torch.sin(math.pi * k * x) * torch.cos(math.pi * k * t) for a, k in modes), torch.zeros(()))


class Elliptic(Equation):
    """∇·(κ∇u) = f, κ = 1 + x², u = sin(2πx) sin(3πy) + x² − y: the residual's gradient is a hundred times the border's."""

    name = "elliptic"
    tasks = ("pde", "boundary")

    def conditions(self, count: int, draws: torch.Generator) -> Sequence[Tensor]:
        return (all_sides(self.low, self.high, count, draws),)

    def losses(self, inside: Tensor, sides: Tensor) -> dict[str, Tensor]:
        _, (u_x, _), (u_xx, u_yy) = self.network.derivatives(inside, second=2)
        x = inside[:, 0]
        residual = (1 + x**2) * (u_xx + u_yy) + 2 * x * u_x - self.forcing(inside)
        return {
            "pde": residual.square(),
            "boundary": (self.network(sides) - self.solution(sides)).square(),
        }

    def solution(self, x: Tensor) -> Tensor:
        x, y = x.unbind(1)
        return torch.sin(2 * math.pi * x) * torch.sin(3 * math.pi * y) + x**2 - y

    def forcing(self, x: Tensor) -> Tensor:
        """f, ``[N]``."""
        x, y = x.unbind(1)
        ripple = torch.sin(2 * math.pi * x) * torch.sin(3 * math.pi * y)
        slope = 2 * math.pi * torch.cos(2 * math.pi * x) * torch.sin(3 * math.pi * y)
        return (1 + x**2) * (2 - 13 * math.pi**2 * ripple) + 2 * x * (2 * x + slope)


class Heat(Equation):
    """u_t = D u_xx in coarse units, D = 0.1, t ≤ 40, 0 ≤ x ≤ 10, three scales at t = 0.

    Its derivatives are small numbers, so the constraints' gradients exceed the residual's.
    """

    name = "heat, coarse units"
    tasks = ("pde", "initial", "boundary")
    high = (40.0, 10.0)
    diffusion = 0.1

    def losses(self, inside: Tensor, first: Tensor, sides: Tensor) -> dict[str, Tensor]:
        _, (u_t, _), (u_xx,) = self.network.derivatives(inside, second=1)
        return {
            "pde": (u_t - self.diffusion * u_xx).square(),
            "initial": (self.network(first) - self.solution(first)).square(),
            "boundary": 2 * self.network(sides).square(),
        }

    def solution(self, x: Tensor) -> Tensor:
        t, x = x.unbind(1)
        parts = [
            a * torch.sin(k * math.pi * x / 10) * torch.exp(-self.diffusion * (k * math.pi / 10) ** 2 * t)
            for a, k in ((1.0, 1), (0.5, 3), (0.3, 6))
        ]
        return torch.stack(parts).sum(0)
