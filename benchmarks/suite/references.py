"""Solutions without a formula, by methods that have nothing to do with networks; each is computed once in a process."""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def burgers(points: Tensor, viscosity: float) -> Tensor:
    """u_t + u u_x = ν u_xx on (−1, 1), u = −sin πx at t = 0, zero at both ends: the Cole–Hopf transform.

    Args:
        points: (t, x), ``[N, 2]``, with t ≥ 0.
        viscosity: ν.

    Returns:
        u, ``[N]``, by Gauss and Hermite's quadrature with 100 nodes.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    t, x = points.double().numpy().T[..., None]
    from_ = x - np.sqrt(4 * viscosity * t) * nodes
    log_kernel = -np.cos(np.pi * from_) / (2 * np.pi * viscosity)
    kernel = weights * np.exp(log_kernel - log_kernel.max(1, keepdims=True))
    return torch.from_numpy(-(np.sin(np.pi * from_) * kernel).sum(1) / kernel.sum(1)).float()


@functools.cache
def allen_cahn(diffusion: float, end: float, moments: int, size: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """u_t = D u_xx + 5u − 5u³ on (−1, 1), periodic, u = x² cos πx at t = 0: Fourier in x, Runge–Kutta in t.

    Args:
        diffusion: D.
        end: the last t.
        moments: how many equal intervals of t are kept, besides t = 0.
        size: points in x.

    Returns:
        t ``[moments + 1]``, x ``[size]``, u ``[moments + 1, size]``.
    """
    x = np.arange(size) * 2 / size - 1
    decay = -diffusion * (np.pi * np.fft.rfftfreq(size, 1 / size)) ** 2
    inner = max(round(end / moments / 1e-3), 1)
    step = end / moments / inner
    half = np.exp(decay * step / 2)

    def source(v: NDArray[np.complex128]) -> NDArray[np.complex128]:
        u = np.fft.irfft(v, size)
        return np.fft.rfft(5 * u - 5 * u**3)

    v = np.fft.rfft(x**2 * np.cos(np.pi * x))
    kept = [np.fft.irfft(v, size)]
    for _ in range(moments):
        for _ in range(inner):  # the linear part exactly, the rest by the classical fourth order
            a = source(v)
            b = source(half * (v + step / 2 * a))
            c = source(half * v + step / 2 * b)
            d = source(half * half * v + step * half * c)
            v = half * half * v + step / 6 * (half * half * a + 2 * half * (b + c) + d)
        kept.append(np.fft.irfft(v, size))
    return torch.linspace(0, end, moments + 1), torch.from_numpy(x).float(), torch.from_numpy(np.stack(kept)).float()


@functools.cache
def cavity(reynolds: float, lid: Callable[[Array], Array], cells: int = 32) -> Tensor:
    """The steady flow in a unit square whose lid moves to the right, extrapolated from two grids.

    Args:
        reynolds: the Reynolds number, of speed 1.
        lid: its speed at points x; the ends are at rest.
        cells: on each side of the coarser grid.

    Returns:
        (u, v) at the coarser grid's points, ``[cells + 1, cells + 1, 2]``, x slowest. With a speed of 1 the extrema on the
        centre lines agree with the literature's to a thousandth.
    """
    coarse, fine = cavity_on(reynolds, lid, cells), cavity_on(reynolds, lid, 2 * cells)[::2, ::2]
    return torch.from_numpy((4 * fine - coarse) / 3).float()


def cavity_on(reynolds: float, lid: Callable[[Array], Array], cells: int) -> Array:
    """The same on one grid, from stream function and vorticity.

    Central differences of second order, Thom's values of the vorticity on the walls, Poisson's equation by sines, explicit
    steps until nothing moves.
    """
    h = 1 / cells
    k = np.arange(1, cells)
    sines = np.sqrt(2 / cells) * np.sin(np.pi * np.outer(k, k) / cells)
    bands = (2 - 2 * np.cos(np.pi * k / cells)) / h**2
    inverse = 1 / (bands[:, None] + bands)
    speed = np.zeros(cells + 1)
    speed[1:-1] = lid(k * h)
    psi, omega = np.zeros((cells + 1, cells + 1)), np.zeros((cells + 1, cells + 1))
    step = 0.8 * min(h * h * reynolds / 4, 4 / reynolds)
    for _ in range(math.ceil(60 / step)):
        inside = sines @ (inverse * (sines @ omega[1:-1, 1:-1] @ sines)) @ sines
        psi[1:-1, 1:-1] = inside
        omega[0], omega[-1] = -2 * psi[1] / h**2, -2 * psi[-2] / h**2
        omega[:, 0], omega[:, -1] = -2 * psi[:, 1] / h**2, -2 * psi[:, -2] / h**2 - 2 * speed / h
        u = (psi[1:-1, 2:] - psi[1:-1, :-2]) / (2 * h)
        v = -(psi[2:, 1:-1] - psi[:-2, 1:-1]) / (2 * h)
        along_x = (omega[2:, 1:-1] - omega[:-2, 1:-1]) / (2 * h)
        along_y = (omega[1:-1, 2:] - omega[1:-1, :-2]) / (2 * h)
        around = omega[2:, 1:-1] + omega[:-2, 1:-1] + omega[1:-1, 2:] + omega[1:-1, :-2]
        change = (around - 4 * omega[1:-1, 1:-1]) / h**2 / reynolds - u * along_x - v * along_y
        omega[1:-1, 1:-1] += step * change
        if np.abs(change).max() < 1e-6:
            break
    velocity = np.zeros((cells + 1, cells + 1, 2))
    velocity[1:-1, 1:-1, 0], velocity[1:-1, 1:-1, 1] = u, v
    velocity[:, -1, 0] = speed
    return velocity
