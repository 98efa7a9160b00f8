"""Known functions in the place of a network, to see that a problem's losses are what they say."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.suite.fluids import VISCOSITY


def slopes(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


class Exact(torch.nn.Module):
    """Stands for the network: a known function ``[N, d]`` → ``[N]`` or ``[N, 2]``, its derivatives by autograd."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def derivatives(self, x: Tensor, second: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        x = x.requires_grad_()
        u = self.function(x)
        once = torch.stack([slopes(part, x).T for part in u.unbind(1)], 2) if u.ndim > 1 else slopes(u, x).T
        d = x.shape[1]
        twice = [slopes(once[i], x)[:, i] for i in range(d - second, d)]
        return u, once, torch.stack(twice) if twice else once[:0]

    def third(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, once, _ = self.derivatives(x)
        twice = [[slopes(once[i, :, o], x) for i in (0, 1)] for o in (0, 1)]
        second = torch.stack([torch.stack([a[:, 0], a[:, 1], b[:, 1]]) for a, b in twice], 2)
        return u, once, second, torch.stack([slopes(second[0, :, o] + second[2, :, o], x).T for o in (0, 1)], 2)


def smooth_burgers(points: Tensor) -> Tensor:
    """``references.burgers`` once more, in torch, so that it has derivatives."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    t, x = (column.unsqueeze(1) for column in points.unbind(1))
    origin = x - torch.sqrt(4 * VISCOSITY * t + 1e-300) * torch.from_numpy(nodes)
    kernel = torch.log(torch.from_numpy(weights)) - torch.cos(math.pi * origin) / (2 * math.pi * VISCOSITY)
    return -(torch.sin(math.pi * origin) * kernel.softmax(1)).sum(1)
