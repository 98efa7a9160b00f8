"""The tasks' gradients on one weight, kept as the factors that they are products of: the Gram form of their inner products.

A product Y = X Wᵀ, rows X ``[R, inputs]``, gives task i the gradient Δ_iᵀ X, with Δ_i ``[R, outputs]`` what arrives at Y. Its
norm needs no such product: ‖Δ_iᵀ X‖² = ⟨X Xᵀ, Δ_i Δ_iᵀ⟩, the Gram form, which takes fewer operations where rows are few. That
is counted, and where it takes more, the product is made. A convolution is a product with its unfolded input; a weight used in
several products has the rows of all of them.

X and Δ_i are taken from the product's own node in the graph, and only where the weight is its operand as it is, or
transposed, or cast to another precision.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradnorm.gram import Gram, can_wait
from lightning_gradnorm.measurement import widest_float


class WeightFactors:
    """Factors of the tasks' gradients on one weight.

    Args:
        tasks: how many.
        weight: the parameter.
        turned: whether the gradient on the weight is Δᵀ X (as of a Linear, and of convolutions) instead of Xᵀ Δ.
        sums_to_zero: whether the rows of each product's Δ_i sum to 0, as behind a normalisation over the batch. In floating
            point they do so but for rounding, which a large common part of the inputs would make much of.
        products: how many products the weight is used in.
        keep: whether the Δ_i are kept; else each is let go of once it has its part in ``squares``, where that can be.
        pairs: whether, if they are not kept, they are let go of together instead, once ``inner`` can be had.
    """

    def __init__(
        self,
        tasks: int,
        weight: Tensor,
        turned: bool,
        sums_to_zero: bool = False,
        products: int = 1,
        keep: bool = True,
        pairs: bool = False,
    ) -> None:
        self._tasks, self._weight, self._turned, self._sums_to_zero = tasks, weight, turned, sums_to_zero
        self._keeps = keep or pairs or products > 1
        self._awaited = tasks * products if pairs and not keep else None  # Δ_i, before all are let go of
        self._inner: Tensor | None = None
        self._inputs: list[Tensor] = []
        self._deltas: list[dict[int, Tensor]] = []
        self._places: dict[int, int] = {}  # identity of a product's node → its number
        self._gram: Gram | None = None  # of the Δ_i that were let go
        self._let_go: list[int] = []  # their tasks

    def add(self, node: Any, task: int, cotangent: Tensor) -> None:
        """Take what a task brought to a product's output."""
        convolves = type(node).__name__ == "ConvolutionBackward0"
        place = self._places.setdefault(id(node), len(self._inputs))
        if place == len(self._inputs):
            linear = node._saved_self if type(node).__name__ == "MmBackward0" else None
            operand = _unfolded(node) if convolves else (node._saved_mat1 if linear is None else linear).detach()
            if self._sums_to_zero and operand.numel():
                operand = operand - operand.mean(-2, keepdim=True)
            self._inputs.append(operand)
            self._deltas.append({})
        delta = _places(node, cotangent) if convolves else cotangent.detach()
        if self._keeps or not self._squared(delta, task):
            self._deltas[place][task] = delta
        if sum(map(len, self._deltas)) == self._awaited:
            self.inner()
            self._inputs.clear()
            self._deltas.clear()

    def _squared(self, delta: Tensor, task: int) -> bool:
        """Whether a Δ has its part in ``squares``, and need not be kept."""
        kind = torch.promote_types(torch.promote_types(torch.float32, self._inputs[0].dtype), delta.dtype)
        if self._gram is None:
            self._gram, self._kind = Gram(self._inputs[0].to(kind)), kind
        if kind != self._kind or not self._gram.take_if_sure(delta.to(kind)):
            return False
        self._let_go.append(task)
        return True

    def _rows(self, least: torch.dtype, tasks: Iterable[int]) -> tuple[Tensor, list[Tensor]]:
        """X, in at least that dtype, and each of these Δ_i as it is, over all products, ``[(groups,) R, …]``."""
        every = [delta for deltas in self._deltas for delta in deltas.values()]
        kind = functools.reduce(torch.promote_types, {row.dtype for row in (*self._inputs, *every)}, least)
        deltas = []
        for task in tasks:
            parts = [
                by_task[task] if task in by_task else every[0].new_zeros(*x.shape[:-1], every[0].shape[-1])
                for x, by_task in zip(self._inputs, self._deltas, strict=True)
            ]
            deltas.append(_joined(parts))
        return _joined([x.to(kind) for x in self._inputs]), deltas

    @property
    def is_empty(self) -> bool:
        """Whether no task's Δ is here."""
        return not any(self._deltas)

    @torch.no_grad()
    def squares(self) -> Tensor:
        """‖gradient on the weight‖² of each task, ``[T]``, as wide as the device allows.

        On the CPU, what float32 cannot hold to 1e-4 is computed again in float64; elsewhere nobody waits for the answer, and
        the factors are scaled so that their squares neither over- nor underflow.
        """
        if self._inner is not None:
            return self._inner.diagonal().clamp_min(0)
        parts: list[tuple[list[int], Tensor]] = []
        if self._gram is not None and self._let_go:
            parts.append((self._let_go, self._gram.squares()))
        kept = [task for task in range(self._tasks) if any(task in deltas for deltas in self._deltas)]
        if kept:
            inputs, deltas = self._rows(torch.float32, kept)
            gram = _gram_of(inputs, deltas)
            squares = gram.squares()
            if can_wait(squares.device) and not gram.trusts(squares, (delta.to(inputs) for delta in deltas)):
                squares = _gram_of(*self._rows(torch.float64, kept)).squares()
            parts.append((kept, squares))
        if len(parts) == 1 and parts[0][0] == list(range(self._tasks)):
            return parts[0][1].clamp_min(0)
        found = torch.zeros(self._tasks, dtype=widest_float(self._weight.device), device=self._weight.device)
        for tasks, squares in parts:
            found[tasks] = squares
        return found.clamp_min(0)

    @torch.no_grad()
    def dense(self) -> list[Tensor | None]:
        """Each task's gradient on the weight, in its shape."""
        if self.is_empty:
            return [None] * self._tasks
        inputs, deltas = self._rows(torch.float32, range(self._tasks))
        rows = [row.mT @ inputs if self._turned else inputs.mT @ row for row in (delta.to(inputs) for delta in deltas)]
        return [row.reshape(self._weight.shape) for row in rows]

    @torch.no_grad()
    def inner(self) -> Tensor:
        """⟨gradient of task i, of task j⟩, ``[T, T]``, as wide as the device allows.

        On the CPU, what float32 is not to be trusted with to 1e-6 of the two norms is computed again in float64. Elsewhere
        nobody waits for that answer, and the products are as wide as their sums.
        """
        if self._inner is None:
            self._inner = self._inner_now()
        return self._inner

    def _inner_now(self) -> Tensor:
        wide = widest_float(self._weight.device)
        found = torch.zeros(self._tasks, self._tasks, dtype=wide, device=self._weight.device)
        if self.is_empty:
            return found
        for least in (torch.float32, torch.float64) if can_wait(found.device) else (wide,):
            inputs, deltas = self._rows(least, range(self._tasks))
            gram = Gram(inputs)
            found = gram.inner(deltas)
            if inputs.dtype == wide or gram.trusts_inner(found, deltas):
                break
        return found


def _gram_of(inputs: Tensor, deltas: Iterable[Tensor]) -> Gram:
    gram = Gram(inputs)
    for delta in deltas:
        gram.take(delta.to(inputs))
    return gram


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)


def _unfolded(node: Any) -> Tensor:
    """What each output place of a convolution sees of its input, ``[(groups,) R, inputs]``."""
    x, kernel, groups = node._saved_input.detach(), node._saved_weight.shape[2:], node._saved_groups
    x = F.pad(x, [end for pad in reversed(node._saved_padding) for end in (pad, pad)])
    dims = len(kernel)
    for i in range(dims):
        reach = node._saved_dilation[i] * (kernel[i] - 1) + 1
        x = x.unfold(2 + i, reach, node._saved_stride[i])[..., :: node._saved_dilation[i]]
    x = x.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))  # batch, places, channels, kernel
    per_group = math.prod(x.shape[1 + dims :]) // groups
    x = x.reshape(math.prod(x.shape[: 1 + dims]), groups, per_group).transpose(0, 1)
    return x[0] if groups == 1 else x


def _places(node: Any, y: Tensor) -> Tensor:
    """A gradient at a convolution's output, ``[(groups,) R, outputs]``."""
    groups = node._saved_groups
    y = y.detach().movedim(1, -1)
    y = y.reshape(math.prod(y.shape[:-1]), groups, y.shape[-1] // groups).transpose(0, 1)
    return y[0] if groups == 1 else y
