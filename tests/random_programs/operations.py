"""Pieces without a layer of their own: views, operations in place, what is done around other pieces."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tests.random_programs.description import Piece
from tests.random_programs.pieces import PIECES, Through, in_two

OPERATIONS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "activation": [
        torch.tanh,
        torch.relu,
        nn.functional.gelu,
        torch.sin,
        nn.functional.softplus,
        lambda h: torch.softmax(h, 1),
    ],
    "dropout": [lambda h: nn.functional.dropout(h, 0.3), lambda h: h * torch.rand(h.shape, dtype=torch.float32).to(h.dtype)],
    "reshaped": [
        lambda h: in_two(h).transpose(1, 2).reshape(h.shape),
        lambda h: h.reshape(len(h), 2, 2, h.shape[1] // 4).permute(0, 3, 1, 2).flatten(1),
        lambda h: h.T.contiguous().T,
        lambda h: h.unsqueeze(0).squeeze(0).view_as(h),
    ],
    "cut_up": [
        lambda h: torch.cat([part.tanh() if i else part for i, part in enumerate(h.split(h.shape[1] // 2, 1))], 1),
        lambda h: torch.cat(h.chunk(4, 1)[::-1], 1),
        lambda h: torch.stack([part * (i + 1) for i, part in enumerate(h.unbind(1))], 1),
        lambda h: torch.cat([h.narrow(1, 2, 4), h.narrow(1, 0, h.shape[1] - 4)], 1),
        lambda h: torch.cat([h.split(h.shape[1] // 2, 1)[0]] * 2, 1),
    ],
    "expanded": [
        lambda h: h + h.mean(1, keepdim=True).expand_as(h),
        lambda h: h[:, :1].expand(-1, h.shape[1]) * h,
        lambda h: torch.stack([h, h.tanh()]).mean(0),
        lambda h: h - h.mean(0),
    ],
    "indexed": [
        lambda h: h[:, torch.arange(h.shape[1] - 1, -1, -1)],
        lambda h: h[torch.arange(len(h)) // 2],
        lambda h: h.roll(1, 0).flip(1),
        lambda h: h.sort(1).values,
        lambda h: h.cumsum(1) / h.shape[1],
        lambda h: torch.zeros_like(h).index_add(1, torch.arange(h.shape[1]) // 2, h),
    ],
    "in_place": [
        lambda h: h.relu_(),
        lambda h: h.add_(0.5),
        lambda h: h.mul_(1.5),
        lambda h: h.add_(h.detach().tanh()),
        lambda h: h.mul_(torch.linspace(0.5, 1.5, h.shape[1], dtype=h.dtype)),
        lambda h: h.masked_fill_(torch.arange(h.shape[1]) < 2, 0.1),
    ],
    "written_in_place": [
        lambda h: _written(h, lambda z: z[:, :2].add_(1.0)),
        lambda h: _written(h, lambda z: z[:, 2:].relu_()),
        lambda h: _written(h, lambda z: z.__setitem__((slice(None), slice(2)), z[:, 2:4].tanh())),
        lambda h: _written(h.clone(), lambda z: z[:, :3].mul_(0.5)),
        lambda h: _written(torch.zeros_like(h), lambda z: z.copy_(h)),
        lambda h: _written(h.clone(), lambda z: z.view(len(z), 2, z.shape[1] // 2)[:, 0].copy_(in_two(h)[:, 1])),
    ],
    "held_back": [
        lambda h: h.detach() * h,
        lambda h: h * 0.0,
        lambda h: torch.where(h > 0, h, h.detach()),
        lambda h: h + (h.tanh() - h).detach(),
    ],
    "function": [
        lambda h: _Two.apply(h)[1],
        lambda h: _Doubled.apply(h),
        lambda h: _Two.apply(h)[0],
        lambda h: sum(_Two.apply(h)),
        lambda h: _Blocked.apply(h) + h,
        lambda h: _Blocked.apply(h),
    ],
}


def _written(h: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    write(h)
    return h


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return 2 * h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class _Two(torch.autograd.Function):
    """Two outputs, of which one is perhaps not used: its gradient is None then."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h)
        return h.sin(), h.square()

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        (h,) = ctx.saved_tensors
        parts = [g for g in (None if a is None else a * h.cos(), None if b is None else 2 * b * h) if g is not None]
        return sum(parts) if parts else None


class _Blocked(torch.autograd.Function):
    """Its backward has nothing to say."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def _operation(kind: str) -> Callable[[int, int], nn.Module]:
    variants = OPERATIONS[kind]
    return lambda width, option: Through(variants[option % len(variants)])


PIECES.update({kind: _operation(kind) for kind in OPERATIONS})


def _differentiated(inner: nn.Module, h: Tensor) -> Tensor:
    """Of the inner pieces' energy with respect to what they are given."""
    h = h if h.requires_grad else h.detach().requires_grad_()
    with torch.enable_grad():  # in validation too
        return torch.autograd.grad(inner(h).square().sum(), h, create_graph=True)[0]


def _repeated(inner: nn.Module, h: Tensor) -> Tensor:
    for _ in range(3):
        h = inner(h).tanh()
    return h


AROUND: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "sequence": lambda inner, h: inner(h),
    "checkpointed": lambda inner, h: checkpoint(inner, h, use_reentrant=False),
    "differentiated": _differentiated,
    "repeated": _repeated,
    "skipped": lambda inner, h: h + inner(h),
    "on_a_part": lambda inner, h: torch.cat([inner(h)[:, :4], h[:, 4:]], 1),
    "twice": lambda inner, h: inner(h) + inner(h.sin()),
    "without_graph": lambda inner, h: h + _without_graph(inner, h),
}


def _without_graph(inner: nn.Module, h: Tensor) -> Tensor:
    with torch.no_grad():
        return inner(h.clone())


def make(piece: Piece, width: int) -> nn.Module:
    """The module of a piece, its parameters drawn from the generator as it stands."""
    if piece.kind in AROUND:
        return Through(AROUND[piece.kind], nn.Sequential(*[make(inner, width) for inner in piece.inner]))
    return PIECES[piece.kind](width, piece.option)
