"""The Gram form: inner products of products Δ_iᵀ X, and their norms, out of X Xᵀ and the Δ_i; what rounding does to them."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_gradnorm.measurement import widest_float

_TRUSTED = 1e-4  # largest relative error of a square that is let pass
_EXPECTED = 1e-6  # largest error of an inner product that is let pass, over the product of the two norms
_PROBES = 4
_BLOCK = 1 << 19  # elements of all tasks' Δ that are multiplied at once: what the cache holds
_WIDTH = 64  # such a block has a multiple of it as columns, so that its products are not slow
_Number = TypeVar("_Number", float, Tensor)


class Gram:
    """‖Δ_iᵀ X‖² of one task after the other, or ⟨Δ_iᵀ X, Δ_jᵀ X⟩ of all; what the rows of X have in common is taken out first.

    With μ the mean of the rows, X = X̃ + 1 μᵀ and s_i = Δ_iᵀ 1: ‖Δ_iᵀ X‖² = ⟨X̃ X̃ᵀ, Δ_i Δ_iᵀ⟩ + 2 ⟨s_i, Δ_iᵀ X̃ μ⟩ + ‖s_i‖² ‖μ‖².
    Of X̃ X̃ᵀ = U + Uᵀ a half is multiplied: ⟨Δ_iᵀ X̃, Δ_jᵀ X̃⟩ = ⟨Δ_i, U Δ_j⟩ + ⟨U Δ_i, Δ_j⟩.

    Args:
        inputs: X, ``[(groups,) R, inputs]``.
    """

    def __init__(self, inputs: Tensor) -> None:
        self._eps, self._tiny = torch.finfo(inputs.dtype).eps, torch.finfo(inputs.dtype).tiny
        self._rows = max(inputs.shape[-2], 1)
        self._waits = can_wait(inputs.device)
        self._scales = not self._waits and inputs.dtype != torch.float64
        self._of_inputs = _largest(inputs) if self._scales else inputs.new_ones(())
        if self._scales:
            inputs = inputs / self._of_inputs
        mean = inputs.sum(-2, keepdim=True) / self._rows
        inputs = inputs - mean
        self._strips = _strips(inputs)
        self._mean_square = mean.square().sum((-1, -2)).to(widest_float(mean.device))  # per group
        # Rows 1 and X̃ μ: both times Δ at once.
        self._pair = torch.cat([torch.ones_like(inputs[..., :1]), inputs @ mean.mT], dim=-1).mT.contiguous()
        self._units: list[Tensor] = []
        self._wholes: list[Tensor] = []
        self._inner: list[Tensor] = []  # of s and Δᵀ X̃ μ with each other, [(groups,) 2, 2]
        self._lengths: list[Tensor] = []

    def take(self, delta: Tensor) -> None:
        """Take a task's Δ, ``[(groups,) R, outputs]``."""
        if self._scales:
            largest = _largest(delta)
            self._units.append(largest * self._of_inputs)
            delta = delta / largest
        across = delta.mT
        for start, length, strip in self._strips:
            block = delta.narrow(-2, start, length) @ across.narrow(-1, start, across.shape[-1] - start)
            self._wholes.append(torch.dot(block.view(-1), strip))
        pair = (self._pair @ delta).to(widest_float(delta.device))
        self._inner.append(pair @ pair.mT)
        self._lengths.append(torch.linalg.vector_norm(delta))

    def take_if_sure(self, delta: Tensor) -> bool:
        """Take a Δ where what rounding does to its square is little without doubt, so that nobody has to see it again.

        Elsewhere than on the CPU, where nobody asks, that is so.
        """
        self.take(delta)
        if not self._waits:
            return True
        strips, length = len(self._strips), float(self._lengths[-1])
        groups = [rows[0] for rows in self._inner[-1].view(-1, 2, 2).tolist()]
        weighted = sum(own * mean for (own, _), mean in zip(groups, self._mean_square.view(-1).tolist(), strict=True))
        common = self._common(sum(own for own, _ in groups), sum(crossed for _, crossed in groups), weighted, length)
        square = sum(map(float, self._wholes[-strips:])) + common
        if self._bound_holds(square, length):
            return True
        del self._wholes[-strips:], self._inner[-1], self._lengths[-1]
        return False

    def _bound_holds(self, square: float, length: float) -> bool:
        return math.isfinite(square) and self._size * length**2 + self._tiny <= _TRUSTED * square

    def squares(self) -> Tensor:
        """Of all tasks that were taken, ``[T]``, as wide as the device allows."""
        tasks, wide = len(self._lengths), widest_float(self._pair.device)
        own, crossed = torch.stack(self._inner).view(tasks, -1, 2, 2)[:, :, 0].unbind(-1)  # [T, groups] each
        lengths = torch.stack(self._lengths).to(wide)
        common = self._common(own.sum(1), crossed.sum(1), (own * self._mean_square).sum(1), lengths)
        squares: Tensor = torch.stack(self._wholes).view(tasks, -1).to(wide).sum(1) + common
        return squares * torch.stack(self._units).to(wide).square() if self._scales else squares

    def inner(self, deltas: Sequence[Tensor]) -> Tensor:
        """⟨Δ_iᵀ X, Δ_jᵀ X⟩, ``[T, T]``, as wide as the device allows; none of them is kept.

        Args:
            deltas: each ``[(groups,) R, outputs]``, of any float dtype.
        """
        tasks, kind, wide = len(deltas), self._pair.dtype, self._mean_square.dtype
        units = [_largest(delta.to(kind)) for delta in deltas] if self._scales else []
        twice = self._pair.new_zeros(tasks, tasks)  # ⟨Δ_i, 2 U Δ_j⟩
        half = twice.new_zeros(tasks, tasks, dtype=wide)
        for block in self._blocks(deltas, units):
            for start, length, strip in self._strips:
                beside = block.shape[-2] - start
                product = strip.view(*block.shape[1:-2], length, beside) @ block.narrow(-2, start, beside)
                own = block.narrow(-2, start, length).reshape(tasks, -1)
                twice = torch.addmm(twice, own, product.reshape(tasks, -1).t())
            # Summed as a sum is, not as a product: equal numbers would be rounded one way.
            sums = block.sum(-2).to(wide)
            others = (self._pair[..., 1:, :] @ block).squeeze(-2).to(wide)
            others.addcmul_(sums, self._mean_square.unsqueeze(-1), value=0.5)
            half = torch.addmm(half, sums.reshape(tasks, -1), others.reshape(tasks, -1).t())
        half = half + twice / 2
        inner = half + half.t()
        if not units:
            return inner
        sizes = (torch.stack(units) * self._of_inputs).to(wide)
        return inner * torch.outer(sizes, sizes)

    def _blocks(self, deltas: Sequence[Tensor], units: Sequence[Tensor]) -> Iterator[Tensor]:
        """The same columns of all Δ_i, ``[T, (groups,) R, width]``, in X's dtype."""
        shape, outputs = (len(deltas), *deltas[0].shape[:-1]), deltas[0].shape[-1]
        width = max(_BLOCK // max(math.prod(shape), 1) // _WIDTH, 1) * _WIDTH
        room = self._pair.new_empty(math.prod(shape) * min(width, outputs))
        for start in range(0, outputs, width):
            length = min(width, outputs - start)
            block = room[: math.prod(shape) * length].view(*shape, length)
            for row, delta in zip(block, deltas, strict=True):
                row.copy_(delta.narrow(-1, start, length))
            for row, unit in zip(block, units, strict=False):
                row.div_(unit)
            yield block

    def _common(self, own: _Number, crossed: _Number, weighted: _Number, length: _Number) -> _Number:
        """What the mean has a part in, of a task or ``[T]``, and 0 where rounding alone has kept s from 0.

        Args:
            own: ‖s‖².
            crossed: ⟨s, Δᵀ X̃ μ⟩.
            weighted: ‖s‖² ‖μ‖².
            length: ‖Δ‖.
        """
        noise = 4 * self._eps * math.sqrt(self._rows) * length
        return (2 * crossed + weighted) * (own > noise**2)

    @functools.cached_property
    def _size(self) -> float:
        """4 ε ‖X̃ X̃ᵀ‖; asks the device."""
        whole = 0.0
        for start, length, strip in self._strips if self._pair.numel() else ():
            beside = strip.view(-1, length, self._rows - start)[..., length:]  # doubled here, and there twice
            whole += float(torch.linalg.vector_norm(strip)) ** 2 - float(torch.linalg.vector_norm(beside)) ** 2 / 2
        return 4 * self._eps * math.sqrt(whole)

    def trusts(self, squares: Tensor, deltas: Iterable[Tensor]) -> bool:
        """Whether the squares are right to 1e-4, for all that rounding can have done to them; asks the device.

        Rounding makes an error of the size of ε ‖X̃ X̃ᵀ‖ ‖Δ Δᵀ‖, Frobenius norms. ‖Δ‖² is more than the last, and at hand;
        where that does not do, ‖Δ Δᵀ z‖ over a few z of random signs tells it about.

        Args:
            squares: those of all tasks that were taken.
            deltas: what was taken.
        """
        return all(
            self._trusts_one(square, float(length), delta)
            for square, length, delta in zip(squares.tolist(), self._lengths, deltas, strict=True)
        )

    def trusts_inner(self, inner: Tensor, deltas: Sequence[Tensor]) -> bool:
        """Whether inner products are right to 1e-6 of the two norms, by what is to be expected of rounding; asks the device.

        Rounding errors that know nothing of each other add up to ε Σ_r (‖x̃_r‖² + ‖μ‖²) ‖δ_r‖² and less on the diagonal, and
        beside it to the geometric mean of two. At worst they all have one direction: so each square has to be one that
        ``trusts`` lets pass, too.

        Args:
            inner: what ``inner`` gave for these Δ_i.
            deltas: what was given.
        """
        return all(map(self._expects_one, inner.diagonal().tolist(), deltas))

    def _expects_one(self, square: float, delta: Tensor) -> bool:
        delta = delta.to(self._pair.dtype)
        rows = torch.linalg.vector_norm(delta, dim=-1).to(self._mean_square.dtype)
        length = float(torch.linalg.vector_norm(rows))
        error = 2 * self._eps * (float((rows.square() * self._row_squares).sum()) + square) + self._tiny * (square > 0)
        return error <= _EXPECTED * square and self._trusts_one(square, length, delta)

    @functools.cached_property
    def _row_squares(self) -> Tensor:
        """‖x̃_r‖² + ‖μ‖² of each row, ``[(groups,) R]``."""
        own = []
        for start, length, strip in self._strips:
            strip = strip.view(*self._pair.shape[:-2], length, self._pair.shape[-1] - start)
            own.append(strip.diagonal(dim1=-2, dim2=-1))
        return torch.cat(own, dim=-1).to(self._mean_square.dtype) + self._mean_square.unsqueeze(-1)

    def _trusts_one(self, square: float, length: float, delta: Tensor) -> bool:
        if not math.isfinite(square):
            return False
        if length <= self._tiny / self._eps:  # nothing, or what float cannot square
            return not bool(delta.any())
        if self._bound_holds(square, length):
            return True
        draws = torch.Generator(delta.device).manual_seed(0)
        signs = torch.randint(0, 2, (delta.shape[-2], _PROBES), generator=draws, device=delta.device)
        signs = (2 * signs - 1).to(delta)
        probed = 3 * float(torch.linalg.vector_norm(delta @ (delta.mT @ signs))) / math.sqrt(_PROBES)
        return self._size * probed + self._tiny <= _TRUSTED * square


def can_wait(device: torch.device) -> bool:
    """Whether asking for a number makes no host wait."""
    return device.type == "cpu"


def _largest(tensor: Tensor) -> Tensor:
    """The largest entry in size, scalar, or 1 where all are 0; no one waits for it."""
    if not tensor.numel():
        return tensor.new_ones(())
    largest = tensor.abs().amax()
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _strip_count(rows: int) -> int:
    """Into how many strips a symmetric matrix is cut: none so thin that its products are slow."""
    return 4 if rows >= 128 else 1


def part_of_square(rows: int) -> float:
    """How much of a symmetric matrix of that many rows its triangle of blocks is."""
    strips = _strip_count(rows)
    return (strips + 1) / (2 * strips)


def _strips(inputs: Tensor) -> list[tuple[int, int, Tensor]]:
    """Of X Xᵀ, ``[…, R, R]``: (first row, how many, the entries from its diagonal block on) of each strip of rows.

    What lies beside the diagonal block is doubled; the entries are one after the other.
    """
    rows, across = inputs.shape[-2], inputs.mT
    width = max(-(-rows // _strip_count(rows)), 1)
    strips = []
    for start in range(0, max(rows, 1), width):
        length = min(width, rows - start)
        strip = inputs.narrow(-2, start, length) @ across.narrow(-1, start, rows - start)
        strip[..., length:] *= 2
        strips.append((start, length, strip.view(-1)))
    return strips
