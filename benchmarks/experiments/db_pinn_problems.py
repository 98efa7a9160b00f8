"""Three set-ups of DB-PINN (Zhou et al., IJCAI 2025, arXiv 2505.11117, supplement A): equation, points, network, error.

Of the source: the points are drawn once (a Latin hypercube inside), every step takes all of them; coordinates have mean 0 and
standard deviation 1 over the points; Glorot's normal weights times 5/3; Adam at 1e-3, never slower; float32. The solutions
that errors are taken of are computed here, at the points of the source's files.
"""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.suite import references
from benchmarks.suite.equations import grid, relative
from benchmarks.suite.fluids import VISCOSITY
from benchmarks.suite.problem import generator
from benchmarks.suite.taylor import TanhNetwork

Points = tuple[Tensor, ...]


class Network(TanhNetwork):
    """As the source starts it.

    Args:
        points: all points of the training, ``[N, 2]``.
        width, hidden, outputs: of the network.
    """

    def __init__(self, points: Tensor, width: int, hidden: int, outputs: int = 1) -> None:
        super().__init__((0.0, 0.0), (1.0, 1.0), width, hidden, outputs)
        self.middle, self.scale = points.mean(0), 1 / points.std(0, correction=0)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight *= 5 / 3


def latin(count: int, draws: torch.Generator) -> Tensor:
    """A Latin hypercube on the unit square, ``[count, 2]``: each coordinate has one point in each of ``count`` strips."""
    strips = torch.stack([torch.randperm(count, generator=draws) for _ in range(2)], 1)
    return (strips + torch.rand(count, 2, generator=draws)) / count


def some(of: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """So many different rows."""
    return of[torch.randperm(len(of), generator=draws)[:count]]


class SetUp(nn.Module):
    """One problem with the points and the network of one seed.

    Args:
        seed: of both.

    Attributes:
        name: for people and records.
        tasks: names of the losses, in their order; each has a method of its name, the mean over points that are given.
        merged: those that gradient weighting takes as one, as in the source.
        shape: width, hidden layers and outputs of the network.
        inside: points of the residual.
        steps: of Adam.
        evaluations: of L-BFGS after it, for each step of Adam.
        betas: of Adam.
        update_every: steps from one update of the published methods' weights to the next.
        points: task → points, of equal length.
        network: all that the tasks' gradients are compared on.
    """

    name: str
    tasks: tuple[str, ...] = ("pde", "boundary", "initial")
    merged: tuple[str, ...] = ()
    shape: ClassVar[tuple[int, ...]]
    inside: ClassVar[int]
    steps: ClassVar[int]
    evaluations = 0.0
    betas = (0.9, 0.999)
    update_every = 10

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.points: dict[str, Points] = self.draw(generator(seed))
        torch.manual_seed(seed)
        points = torch.cat([part for parts in self.points.values() for part in parts if part.shape[1] == 2])
        self.network = Network(points, *self.shape)

    def double(self) -> "SetUp":
        """In double precision, points too."""
        self.points = {task: tuple(part.double() for part in parts) for task, parts in self.points.items()}
        self.network.middle, self.network.scale = self.network.middle.double(), self.network.scale.double()
        return super().double()

    def draw(self, draws: torch.Generator) -> dict[str, Points]:
        """The points, once and for all."""
        raise NotImplementedError

    def error(self) -> float:
        """Relative L2, on a grid."""
        raise NotImplementedError

    def more(self, data: Path | None) -> dict[str, float]:
        """What else there is to say at the end, with a folder of the source's files if there is one."""
        return {}


def in_time(inside: int, x: Tensor, t: Tensor, draws: torch.Generator, start: int) -> dict[str, Points]:
    """Points (t, x) on (0, 1) × (−1, 1): so many inside, and of the grid 100 at each end and ``start`` at t = 0."""
    box = latin(inside, draws) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
    first, times = some(x, start, draws), some(t, 100, draws)
    left, right = (torch.stack([times, torch.full_like(times, end)], 1) for end in (-1.0, 1.0))
    return {"pde": (box,), "boundary": (left, right), "initial": (torch.stack([0 * first, first], 1),)}


class BurgersInverse(SetUp):
    """u_t + λ₁ u u_x = λ₂ u_xx, u = −sin πx at t = 0, zero at the ends, u known at 300 points; λ starts at (2, 0.2).

    8 × 20, Adam (β₁ = 0.99) 5,000 steps, then L-BFGS with the last weights: 5,000 iterations of at most 6,250 evaluations.
    Published with 10,000 points inside; here 2,000. Where a line search of L-BFGS sees nothing but rounding, which λ₂ may
    bring about at its first steps, it goes on in double precision.
    """

    name = "Burgers, inverse"
    tasks = ("pde", "boundary", "initial", "data")
    shape, inside, steps, evaluations, betas = (20, 8), 2000, 5000, 1.25, (0.99, 0.999)
    time, space = torch.linspace(0, 0.99, 100), torch.linspace(-1, 1, 256)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.coefficients = nn.Parameter(torch.tensor([2.0, 0.2]))

    def draw(self, draws: torch.Generator) -> dict[str, Points]:
        measured = some(torch.cartesian_prod(self.time, self.space), 300, draws)
        known = references.burgers(measured, VISCOSITY).unsqueeze(1)
        return in_time(self.inside, self.space, self.time, draws, 100) | {"data": (measured, known)}

    def pde(self, inside: Tensor) -> Tensor:
        u, (u_t, u_x), (u_xx,) = self.network.derivatives(inside, second=1)
        advection, diffusion = self.coefficients.unbind()
        return (u_t + advection * u * u_x - diffusion * u_xx).square().mean()

    def boundary(self, left: Tensor, right: Tensor) -> Tensor:
        return self.network(left).square().mean() + self.network(right).square().mean()

    def initial(self, first: Tensor) -> Tensor:
        return (self.network(first) + torch.sin(torch.pi * first[:, 1])).square().mean()

    def data(self, measured: Tensor, known: Tensor) -> Tensor:
        return (self.network(measured) - known.squeeze(1)).square().mean()

    def error(self) -> float:
        points = torch.cartesian_prod(self.time, self.space)
        return relative(self.network(points.to(self.coefficients)), references.burgers(points, VISCOSITY))

    def more(self, data: Path | None) -> dict[str, float]:
        return dict(zip(("λ₁", "λ₂"), self.coefficients.tolist(), strict=True))


class AllenCahn(SetUp):
    """u_t = 1e-4 u_xx + 5u − 5u³ on (0, 1) × (−1, 1), u = x² cos πx at t = 0, u and u_x periodic; 4 × 128.

    Published with 20,000 points and 80,000 steps: forty times what it is here, with 2,000 points and 20,000 steps, and
    still a quarter of an hour.
    """

    name = "Allen–Cahn"
    shape, inside, steps, update_every = (128, 4), 2000, 20_000, 100
    space = torch.arange(512) * 2 / 512 - 1

    def draw(self, draws: torch.Generator) -> dict[str, Points]:
        return in_time(self.inside, self.space, torch.linspace(0, 1, 201), draws, 512)

    def pde(self, inside: Tensor) -> Tensor:
        u, (u_t, _), (u_xx,) = self.network.derivatives(inside, second=1)
        return (u_t - 1e-4 * u_xx - 5 * u + 5 * u**3).square().mean()

    def boundary(self, left: Tensor, right: Tensor) -> Tensor:
        (u, (_, u_x), _), (v, (_, v_x), _) = (self.network.derivatives(end) for end in (left, right))
        return (u - v).square().mean() + (u_x - v_x).square().mean()

    def initial(self, first: Tensor) -> Tensor:
        x = first[:, 1]
        return (self.network(first) - x**2 * torch.cos(torch.pi * x)).square().mean()

    def error(self) -> float:
        t, x, u = references.allen_cahn(1e-4, 1.0, 200, 2048)
        return relative(self.network(torch.cartesian_prod(t, x[::4])), u[:, ::4].flatten())


class Cavity(SetUp):
    """The steady flow under a lid of speed 1 at Re = 100, by a stream function and a pressure; the error is the speed's.

    3 × 50, 100 points on each side, the corners among them with both values. Published with 20,000 points inside; here 500.
    All of the 40,000 steps are needed: after a quarter no method has learnt the flow. The two corners that move and rest at
    once are left out of the error. The source's errors are of another solution, 100 × 100 points with moving corners; where
    its files are in ``DATA/cavity``, that is a measure too.
    """

    name = "cavity"
    tasks = ("pde", "walls", "lid")
    merged = ("walls", "lid")
    shape, inside, steps, reynolds = (50, 3, 2), 500, 40_000, 100.0

    def draw(self, draws: torch.Generator) -> dict[str, Points]:
        along = torch.linspace(0, 1, 100)
        sides = [torch.stack([0 * along + end, along], 1) for end in (0.0, 1.0)]
        bottom, lid = (side.flip(1) for side in sides)
        return {"pde": (latin(self.inside, draws),), "walls": (*sides, bottom), "lid": (lid,)}

    def velocity(self, x: Tensor) -> Tensor:
        """(u, v) = (∂ψ/∂y, −∂ψ/∂x), ``[N, 2]``."""
        _, (along_x, along_y), _ = self.network.derivatives(x)
        return torch.stack([along_y[:, 0], -along_x[:, 0]], 1)

    def pde(self, inside: Tensor) -> Tensor:
        _, slopes, second, third = self.network.third(inside)
        (psi_x, psi_y), (p_x, p_y) = slopes.unbind(2)[0], slopes.unbind(2)[1]
        psi_xx, psi_xy, psi_yy = second[..., 0]
        around_x, around_y = third[..., 0]
        along = psi_y * psi_xy - psi_x * psi_yy + p_x - around_y / self.reynolds
        across = psi_x * psi_xy - psi_y * psi_xx + p_y + around_x / self.reynolds
        return along.square().mean() + across.square().mean()

    def walls(self, *sides: Tensor) -> Tensor:
        return len(sides) * self.velocity(torch.cat(sides)).square().mean()

    def lid(self, top: Tensor) -> Tensor:
        return (self.velocity(top) - torch.tensor([1.0, 0.0])).square().mean()

    def speed(self, size: int) -> Tensor:
        """On ``[size, size]`` points, x slowest."""
        u, v = self.velocity(grid((0.0, 0.0), (1.0, 1.0), size)).unbind(1)
        return torch.hypot(u, v).view(size, size)

    def error(self) -> float:
        exact = torch.hypot(*references.cavity(self.reynolds, np.ones_like).unbind(2))
        found = self.speed(len(exact))
        for corner in (0, -1):
            found[corner, -1] = exact[corner, -1]
        return relative(found, exact)

    def more(self, data: Path | None) -> dict[str, float]:
        folder = data / "cavity" if data else None
        if folder is None or not folder.is_dir():
            return {}
        u, v = (torch.from_numpy(np.loadtxt(folder / f"reference_{name}.csv", delimiter=",")) for name in "uv")
        given = torch.hypot(u, v).float()
        return {"against the source's solution": relative(self.speed(len(given)), given)}


SETUPS: dict[str, type[SetUp]] = {each.name: each for each in (BurgersInverse, Cavity, AllenCahn)}
