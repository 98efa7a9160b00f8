"""Per-task gradients on the shared layer, from the one joint backward.

The ordinary backward of Σ w_i L_i carries every task's own gradient up to the point where tasks merge. ``JointBackward``
reads it there and carries it down to the shared parameters W with one small vector-Jacobian product per task: exact,
with no second backward through heads or trunk, no ``retain_graph`` for the caller, no second-order graph.
``PerTaskBackward`` is the slow, obvious way (one backward per task): the tests' oracle and the fallback.

Both leave the network as the plain backward does: every ``.grad``, also of tensors that retain theirs, how often a hook runs,
and what modules count inside a non-reentrant checkpoint. So hooks on W, and on tensors and modules below the place where
tasks meet, have no say in what is read: the norms are those of the network without these hooks. (A hook on a task's own part
of the graph changes what the joint backward brings from there. ``PerTaskBackward`` sees no hook at all.)
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_gradnorm.autograd_graph import TaskGraph, task_graph
from lightning_gradnorm.descent import Arrivals, Descent
from lightning_gradnorm.gradient_reader import (
    BETWEEN,
    CompiledSharedLayerError,
    GradientReader,
    HiddenUseError,
    IncompleteBackwardError,
    UnreachedSharedLayerError,
    check_reached,
)
from lightning_gradnorm.joint_backward import JointBackward
from lightning_gradnorm.losses import check_losses
from lightning_gradnorm.measurement import stack_scalars
from lightning_gradnorm.task_gradients import TaskGradients
from lightning_gradnorm.vector_jacobian import has_shards, undone

__all__ = [
    "CompiledSharedLayerError",
    "GradientReader",
    "HiddenUseError",
    "IncompleteBackwardError",
    "JointBackward",
    "PerTaskBackward",
    "UnreachedSharedLayerError",
    "tap_losses",
]


def tap_losses(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same losses, each behind an identity node of its own; no views, as losses are changed in place for the log.

    Whatever total is built from the tapped losses, the gradient that arrives at a tap is c_i = s · ∂total/∂L_i, with s
    the scale of the backward (a GradScaler's; 1/N of accumulation), and the tap's node belongs to its task alone.

    Args:
        losses: task name → scalar loss that requires grad.

    Raises:
        TypeError, ValueError: for losses that cannot be used; the message names the task and the way out.
    """
    return {task: loss.clone() for task, loss in check_losses(losses, differentiable=True).items()}


class PerTaskBackward(GradientReader):
    """Per-task gradients by one backward per task, before the joint one.

    Slow and obvious: each task walks its head and the way down to W once more.

    Args:
        root: scalar that ``backward()`` will be called on.
        losses: task name → loss from ``tap_losses`` that ``root`` was built from.
        parameters: W, the shared parameters.
        edges: where gradients are read, one for each of them, if not at the parameters themselves.
        keep, pairs: make no difference here.
    """

    engine: ClassVar[str] = "per_task"

    def _begin(self, root: Tensor, losses: Mapping[str, Tensor]) -> None:
        if root.grad_fn is None:
            raise ValueError("The total has no graph: build it from the losses that tap_losses() returned.")
        ends = {(loss.grad_fn, loss.output_nr): task for task, loss in enumerate(losses.values()) if loss.grad_fn is not None}
        graph = task_graph(root.grad_fn, {node: task for (node, _), task in ends.items()}, self._wanted)
        if graph.compiled(merged_only=False):
            raise CompiledSharedLayerError("The way from the losses to the shared layer leads")
        check_reached(graph, losses)
        if graph.has_reentrant_checkpoint():
            raise HiddenUseError(BETWEEN)
        if has_shards(graph.edges):
            self._gradients = self._by_engine(root, losses)
            return
        seeds = self._seeds(root, losses, graph, ends)
        arrivals = Arrivals(len(self.tasks), len(self._wanted), graph.targets, graph.edges)
        descent = Descent(list(graph.edges), graph.edges, graph.targets, arrivals)
        for (node, number), task in ends.items():  # one after the other: together they would hold all tasks' activations
            arrivals.add(task, node, number, seeds[task])
            descent.lower_all()
        self._wanted = []
        self._gradients = TaskGradients(self.tasks, arrivals.gradients, stack_scalars(seeds), self.parameters)

    def _by_engine(self, root: Tensor, losses: Mapping[str, Tensor]) -> TaskGradients:
        found = torch.autograd.grad(root, list(losses.values()), retain_graph=True, allow_unused=True)
        seeds = [_seed(seed, loss) for seed, loss in zip(found, losses.values(), strict=True)]
        with undone():
            rows: list[list[Tensor | None]] = [
                list(torch.autograd.grad(loss, self._wanted, seed, retain_graph=True, allow_unused=True))
                for loss, seed in zip(losses.values(), seeds, strict=True)
            ]
        return TaskGradients(self.tasks, rows, stack_scalars(seeds), self.parameters)

    @staticmethod
    def _seeds(
        root: Tensor, losses: Mapping[str, Tensor], graph: TaskGraph, ends: Mapping[tuple[Node, int], int]
    ) -> list[Tensor]:
        """∂root/∂L_i, as the joint backward has it, so that half precision under- and overflows no more; 1 where that is 0."""
        assert root.grad_fn is not None, "it was checked"
        nodes_of_ends = {node for node, _ in ends}
        above: dict[Node, list[Node]] = {}
        for node, below in graph.edges.items():
            if any(child in above or child in nodes_of_ends for child in below):
                above[node] = below
        arrivals = Arrivals(1, len(ends), ends, above)
        arrivals.add(0, root.grad_fn, root.output_nr, torch.ones_like(root))
        Descent(list(above), above, ends, arrivals).lower_all()
        return [_seed(seed, loss) for seed, loss in zip(arrivals.gradients[0], losses.values(), strict=True)]

    def gradients(self) -> TaskGradients:
        return self._gradients

    def discard(self) -> None:
        del self._gradients


def _seed(cotangent: Tensor | None, loss: Tensor) -> Tensor:
    one = torch.ones_like(loss)
    return one if cotangent is None else torch.where(cotangent == 0, one, cotangent).detach()
