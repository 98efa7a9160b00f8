"""What arrives at W in the ordinary backward, whole: the tasks' gradients have to come to it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_gradnorm.autograd_graph import TaskGraph
from lightning_gradnorm.task_gradients import TaskGradients
from lightning_gradnorm.vector_jacobian import dtype_of


class Audit:
    """Adds up the gradients that the backward to come brings to W.

    Args:
        graph: the part of the backward graph that leads there.
        parameters: the tensors of W.

    Attributes:
        in_half_precision: whether a part of the way is computed in half precision.
    """

    def __init__(self, graph: TaskGraph, parameters: Sequence[Tensor]) -> None:
        self.in_half_precision = any(dtype_of(node).itemsize == 2 for node in graph.edges)
        self._parameters = list(parameters)
        self._whole: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for node in graph.edges:
            ways = [
                (i, graph.targets[child, number])
                for i, (child, number) in enumerate(node.next_functions)
                if child is not None and (child, number) in graph.targets
            ]
            if ways:
                self._handles.append(node.register_hook(self._add(ways)))

    def _add(self, ways: list[tuple[int, int]]) -> Callable[..., None]:
        def hook(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
            for i, k in ways:
                gradient = grad_inputs[i]
                if gradient is not None:
                    self._whole[k] = self._whole[k] + gradient if k in self._whole else gradient.detach()

        return hook

    def accounts_for(self, found: TaskGradients, tolerance: float) -> bool:
        """Whether the tasks' gradients come to the whole, up to a relative difference; once the backward has run."""
        if any(parameter.is_complex() for parameter in self._parameters):
            return False
        flat = found.flat()
        rows = flat * found.cotangents.to(flat).unsqueeze(1)
        parts = [self._whole.get(k, torch.zeros_like(p)).to_dense().flatten() for k, p in enumerate(self._parameters)]
        whole = torch.cat(parts).to(rows)
        return bool((rows.sum(0) - whole).norm() <= tolerance * whole.norm())

    def discard(self) -> None:
        """Take the hooks off the graph, and let go of what arrived."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._whole.clear()
