"""Little clusters of atoms under a Morse potential: energies and forces that a network can learn."""

from typing import NamedTuple

import torch
from torch import Tensor

DEPTH, STEEPNESS, REST = 0.5, 1.5, 2.2  # eV, 1/Å, Å


class Cluster(NamedTuple):
    """One of N atoms.

    Attributes:
        positions: ``[N, 3]``, in Å.
        energy: scalar, in eV, above that of the regular cube.
        forces: ``[N, 3]``, -∂E/∂positions.
    """

    positions: Tensor
    energy: Tensor
    forces: Tensor


def energy_of(positions: Tensor) -> Tensor:
    """Σ over pairs of D[(1 - exp(-a(r - r₀)))² - 1], scalar."""
    first, second = torch.triu_indices(len(positions), len(positions), offset=1)
    distances = (positions[first] - positions[second]).norm(dim=1)
    return (DEPTH * ((1 - torch.exp(-STEEPNESS * (distances - REST))).square() - 1)).sum()


def clusters(count: int, seed: int = 0, jitter: float = 0.25) -> list[Cluster]:
    """``count`` clusters of eight atoms: the corners of a cube of side r₀, each moved by ``jitter`` Å in every direction."""
    random = torch.Generator().manual_seed(seed)
    corners = REST * torch.cartesian_prod(*3 * [torch.arange(2.0, dtype=torch.float64)])
    made = []
    for _ in range(count):
        positions = corners + jitter * torch.randn(corners.shape, generator=random, dtype=torch.float64)
        positions.requires_grad_()
        energy = energy_of(positions) - energy_of(corners)
        [slope] = torch.autograd.grad(energy, positions)
        made.append(Cluster(positions.detach().float(), energy.detach().float(), -slope.float()))
    return made
