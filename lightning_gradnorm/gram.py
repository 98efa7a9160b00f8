"""The Gram form: norms of products Δ_iᵀ X out of X Xᵀ and Δ_i Δ_iᵀ, and what rounding does to them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradnorm.measurement import widest_float

_TRUSTED = 1e-4  # largest relative error of a square that is let pass
_PROBES = 4


class Gram:
    """‖Δ_iᵀ X‖² of each task, with what all rows of X have in common taken out first.

    With μ the mean of the rows, X = X̃ + 1 μᵀ and s_i = Δ_iᵀ 1: ‖Δ_iᵀ X‖² = ⟨X̃ X̃ᵀ, Δ_i Δ_iᵀ⟩ + 2 ⟨s_i, Δ_iᵀ X̃ μ⟩ + ‖s_i‖² ‖μ‖².
    """

    def __init__(self, inputs: Tensor, deltas: Sequence[Tensor]) -> None:
        self._eps, self._tiny = torch.finfo(inputs.dtype).eps, torch.finfo(inputs.dtype).tiny
        self._units = inputs.new_ones(len(deltas))
        if not can_wait(inputs.device) and inputs.dtype != torch.float64 and inputs.numel() and deltas[0].numel():
            largest, of_inputs = torch.stack([_largest(delta) for delta in deltas]), _largest(inputs)
            self._units = largest * of_inputs
            inputs, deltas = inputs / of_inputs, [delta / unit for delta, unit in zip(deltas, largest.unbind(), strict=True)]
        self._rows = max(inputs.shape[-2], 1)
        mean = inputs.sum(-2, keepdim=True) / self._rows
        inputs = inputs - mean
        self._gram = inputs @ inputs.mT
        self._mean_square = mean.square().sum((-1, -2)).to(widest_float(mean.device))  # per group
        # Rows 1 and X̃ μ: both times Δ at once.
        self._pair = torch.cat([torch.ones_like(inputs[..., :1]), inputs @ mean.mT], dim=-1).mT.contiguous()
        self._deltas = deltas
        self._lengths = self._gram.new_zeros(0)

    def squares(self) -> Tensor:
        """Shape ``[T]``, as wide as the device allows."""
        wide, strips = widest_float(self._gram.device), _strips(self._gram)
        wholes, products, lengths = [], [], []
        for delta in self._deltas:
            for start, stop, strip in strips:
                block = delta[..., start:stop, :] @ delta[..., start:, :].mT
                wholes.append(torch.dot(block.flatten(), strip))
            products.append(self._pair @ delta)
            lengths.append(torch.linalg.vector_norm(delta))
        tasks = len(self._deltas)
        self._lengths = torch.stack(lengths).to(wide)
        sums, crossed = torch.stack(products).to(wide).unbind(-2)  # [T, (groups,) outputs] each
        # What is left of a sum that rounding alone has kept from 0 counts as 0.
        noise = 4 * self._eps * math.sqrt(self._rows) * self._lengths
        kept = torch.linalg.vector_norm(sums.reshape(tasks, -1), dim=1) > noise
        sums = sums * kept.reshape(-1, *[1] * (sums.ndim - 1))
        common = 2 * sums * crossed + sums.square() * self._mean_square.unsqueeze(-1)
        whole = torch.stack(wholes).view(tasks, -1).to(wide).sum(1) + common.reshape(tasks, -1).sum(1)
        squares: Tensor = whole * self._units.to(wide).square()
        return squares

    def trusts(self, squares: Tensor) -> bool:
        """Whether the squares are right to 1e-4, for all that rounding can have done to them; asks the device.

        Rounding makes an error of the size of ε ‖X̃ X̃ᵀ‖ ‖Δ Δᵀ‖, Frobenius norms. ‖Δ‖² is more than the last, and at hand;
        where that does not do, ‖Δ Δᵀ z‖ over a few z of random signs tells it about.
        """
        size, whole = 4 * self._eps * float(torch.linalg.vector_norm(self._gram)), True
        for delta, square, length in zip(self._deltas, squares.tolist(), self._lengths.tolist(), strict=True):
            if not math.isfinite(square):
                return False
            if length <= self._tiny / self._eps:  # nothing, or what float cannot square
                if bool(delta.any()):
                    return False
            else:
                whole &= size * length**2 + self._tiny <= _TRUSTED * square
        return whole or self._probes_trust(squares, size)

    def _probes_trust(self, squares: Tensor, size: float) -> bool:
        draws = torch.Generator(self._gram.device).manual_seed(0)
        signs = torch.randint(0, 2, (self._gram.shape[-1], _PROBES), generator=draws, device=self._gram.device)
        signs = (2 * signs - 1).to(self._gram)
        for delta, square in zip(self._deltas, squares.tolist(), strict=True):
            probed = 3 * float(torch.linalg.vector_norm(delta @ (delta.mT @ signs))) / math.sqrt(_PROBES)
            if size * probed + self._tiny > _TRUSTED * square and bool(delta.any()):
                return False
        return True


def can_wait(device: torch.device) -> bool:
    """Whether asking for a number makes no host wait."""
    return device.type == "cpu"


def _largest(tensor: Tensor) -> Tensor:
    """The largest entry in size, scalar, or 1 where all are 0; no one waits for it."""
    largest = tensor.abs().amax()
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _strip_count(rows: int) -> int:
    """Into how many strips a symmetric matrix is cut: none so thin that its products are slow."""
    return 4 if rows >= 128 else 1


def part_of_square(rows: int) -> float:
    """How much of a symmetric matrix of that many rows its triangle of blocks is."""
    strips = _strip_count(rows)
    return (strips + 1) / (2 * strips)


def _strips(gram: Tensor) -> list[tuple[int, int, Tensor]]:
    """Of a symmetric ``[…, R, R]``: (first row, row behind the last, entries from its diagonal block on) of each strip of rows.

    What lies beside the diagonal block is doubled; the entries are one after the other.
    """
    rows = gram.shape[-1]
    width = max(-(-rows // _strip_count(rows)), 1)
    strips = []
    for start in range(0, rows, width):
        strip = 2 * gram[..., start : start + width, start:]
        strip[..., :width] /= 2
        strips.append((start, min(start + width, rows), strip.flatten()))
    return strips or [(0, 0, gram.flatten())]
