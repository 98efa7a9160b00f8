"""A small tanh network with its derivatives, carried forward beside its values: no graph of a graph is ever built."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TanhNetwork(nn.Module):
    """u on a box, whose coordinates are scaled to mean 0 and standard deviation 1; Glorot's initial weights.

    Args:
        low, high: corners of the box, ``d`` numbers each.
        width, hidden: of the tanh layers.
        outputs: numbers at each point.
    """

    def __init__(self, low: Sequence[float], high: Sequence[float], width: int, hidden: int, outputs: int = 1) -> None:
        super().__init__()
        a, b = torch.tensor(low), torch.tensor(high)
        self.middle, self.scale = (a + b) / 2, 12**0.5 / (b - a)
        widths = [len(low), *[width] * hidden, outputs]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, d]`` → ``[N]``, or ``[N, outputs]`` if there are several."""
        x = (x - self.middle) * self.scale
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x).tanh()
        return last(x).squeeze(-1)

    def derivatives(self, x: Tensor, second: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Values, ∂u/∂x_i of all coordinates, ∂²u/∂x_i² of the last ones.

        Args:
            x: points, ``[N, d]``.
            second: of how many coordinates, counted from the last, the second derivatives are wanted.

        Returns:
            ``[N]``, ``[d, N]`` and ``[second, N]``, with ``outputs`` behind if there are several.
        """
        d = x.shape[-1]
        first_layer, *hidden, last = self.layers
        a = torch.tanh(first_layer((x - self.middle) * self.scale))
        slope = 1 - a * a
        z = (first_layer.weight * self.scale).T.unsqueeze(1)  # [d, 1, width]: the same at every point
        once = slope * z
        twice = -2 * a * once[d - second :] * z[d - second :]
        for layer in hidden:
            z = torch.cat([a.unsqueeze(0), once, twice]) @ layer.weight.T
            a = torch.tanh(z[0] + layer.bias)
            slope = 1 - a * a
            once = slope * z[1 : d + 1]
            twice = slope * z[d + 1 :] - 2 * a * once[d - second :] * z[d + 1 - second : d + 1]
        z = (torch.cat([a.unsqueeze(0), once, twice]) @ last.weight.T).squeeze(-1)
        return z[0] + (last.bias if last.out_features > 1 else last.bias[0]), z[1 : d + 1], z[d + 1 :]

    def third(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values and derivatives on a plane as far as the slopes of the Laplacian, as a stream function needs them.

        Args:
            x: points, ``[N, 2]``.

        Returns:
            u ``[N]``; ∂u/∂x, ∂u/∂y ``[2, N]``; ∂²u/∂x², ∂²u/∂x∂y, ∂²u/∂y² ``[3, N]``; ∂Δu/∂x, ∂Δu/∂y ``[2, N]``; with
            ``outputs`` behind if there are several.
        """
        first_layer, *hidden, last = self.layers
        slopes = (first_layer.weight * self.scale).T.unsqueeze(1)
        through = tanh_jet(first_layer((x - self.middle) * self.scale), slopes, 0 * slopes[[0, 0, 1]], 0 * slopes)
        for layer in hidden:
            z = through @ layer.weight.T
            through = tanh_jet(z[0] + layer.bias, z[1:3], z[3:6], z[6:])
        z = (through @ last.weight.T).squeeze(-1)
        return z[0] + (last.bias if last.out_features > 1 else last.bias[0]), z[1:3], z[3:6], z[6:]


def tanh_jet(z: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """tanh z and its derivatives on a plane, from those of z: what ``TanhNetwork.third`` carries, ``[8, N, width]``."""
    a = torch.tanh(z)
    once = 1 - a * a
    twice = -2 * a * once
    thrice = (6 * a * a - 2) * once
    (x, y), (xx, xy, yy) = first, second
    both = (xx + yy) * first + 2 * torch.stack([xx * x + xy * y, xy * x + yy * y])
    slopes = once * third + twice * both + thrice * (x * x + y * y) * first
    bent = once * second + twice * torch.stack([x * x, x * y, y * y])
    return torch.cat([a.unsqueeze(0), once * first, bent, slopes.expand(2, *a.shape)])
