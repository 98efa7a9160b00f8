"""Traces of the terms' tangent kernels, without a gradient per point.

Of residuals r_j at N points, the tangent kernel K = J Jᵀ has the trace Σ_j ‖∇_W r_j‖². With random signs ε_j, ∇_W Σ_j ε_j r_j
has just this for the mean of its squared norm (Hutchinson 1990), and is one vector-Jacobian product.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_gradnorm.autograd_graph import task_graph
from lightning_gradnorm.descent import carried_down
from lightning_gradnorm.gradient_reader import CompiledSharedLayerError, HiddenUseError
from lightning_gradnorm.task_gradients import TaskGradients
from lightning_gradnorm.vector_jacobian import has_shards, undone


def ntk_trace(squares: Tensor, tensors: Sequence[Tensor], signs: Tensor, edges: Sequence[GradientEdge] | None = None) -> Tensor:
    """The mean of ‖∇_W r_j‖² over the points, scalar, estimated without bias; the graph is left as it was, and no hook runs.

    Points whose residual is exactly 0 are left out; where all are, it is 0.

    Args:
        squares: r² of residuals r, with its graph, of any shape; each entry counts as a point.
        tensors: W.
        signs: random ones, ``[K, …]`` for ``squares`` of shape ``[…]``: the estimate is the mean of K, and each of these has a
            relative standard deviation of √2 at most, that being where all residuals pull alike.
        edges: where the gradients on W arrive, if not at the tensors as they are.

    Raises:
        CompiledSharedLayerError, HiddenUseError: if the graph cannot be walked twice.
    """
    assert squares.grad_fn is not None, "it has a graph"
    wanted = list(tensors) if edges is None else list(edges)
    graph = task_graph(squares.grad_fn, {squares.grad_fn: 0}, wanted)
    if graph.compiled(merged_only=False):
        raise CompiledSharedLayerError("The way from the residuals to the shared layer leads")
    if graph.has_reentrant_checkpoint():
        raise HiddenUseError("Between the residuals and the shared layer lies")
    detached = squares.detach()
    sent = residual_cotangents(detached, signs).unbind()
    rows: list[list[Tensor | None]]
    if has_shards(graph.edges):
        with undone():
            rows = [list(torch.autograd.grad(squares, wanted, one, retain_graph=True, allow_unused=True)) for one in sent]
    else:
        rows = carried_down(squares, sent, graph, len(wanted))
    sums = TaskGradients(tuple(map(str, range(len(rows)))), rows, detached.new_ones(len(rows)), list(tensors))
    return sums.norms().square().mean() / detached.count_nonzero().clamp_min(1)


def generator_of(*numbers: int) -> torch.Generator:
    """Random numbers that are a function of these numbers alone, such as a step's and a rank's; no other stream is touched."""
    return torch.Generator().manual_seed(zlib.crc32(repr(numbers).encode()))


def random_signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """1 or −1 each, float32."""
    return torch.randint(0, 2, tuple(shape), generator=generator).float() * 2 - 1


def residual_cotangents(squares: Tensor, signs: Tensor) -> Tensor:
    """What to send back from r² to have ∇ Σ_j ε_j r_j: ε_j / (2 √r_j²), and 0 where r_j = 0.

    ∇ r_j² = 2 r_j ∇r_j, so it is that up to each residual's own sign, which random ones swallow.

    Args:
        squares: detached.
        signs: ε, of a shape that broadcasts against it.
    """
    sizes = squares.to(torch.promote_types(squares.dtype, torch.float32)).sqrt()
    return torch.where(sizes == 0, 0.0, signs.to(sizes) / (2 * sizes)).to(squares.dtype)
