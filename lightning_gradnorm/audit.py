"""What arrives at W in the ordinary backward, whole."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_gradnorm.autograd_graph import TaskGraph
from lightning_gradnorm.measurement import widest_float
from lightning_gradnorm.vector_jacobian import added, dtype_of


class Audit:
    """Adds up the gradients that the backward to come brings to W.

    Args:
        root: what the backward leads through, itself or a multiple of it.
        graph: the part of the backward graph that leads there.
        parameters: the tensors of W.

    Attributes:
        in_half_precision: whether a part of the way is computed in half precision.
        precision: of W: the coarsest of its tensors', of a complex one that of its parts.
        scale: what arrived at ``root``: 1 where the backward was its own, 1/N in a loop that divides it for accumulation.
    """

    def __init__(self, root: Tensor, graph: TaskGraph, parameters: Sequence[Tensor]) -> None:
        self.in_half_precision: bool = any(dtype_of(node).itemsize == 2 for node in graph.edges)
        self._parameters = list(parameters)
        dtypes = [(parameter.real if parameter.is_complex() else parameter).dtype for parameter in self._parameters]
        self.precision: torch.dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        self._whole: dict[int, Tensor] = {}
        self.scale: Tensor = torch.ones_like(root)
        self._handles: list[RemovableHandle] = []
        if root.grad_fn is not None:
            self._handles.append(root.grad_fn.register_prehook(self._note_scale(root.output_nr)))
        for node in graph.edges:
            ways = [
                (i, graph.targets[child, number])
                for i, (child, number) in enumerate(node.next_functions)
                if child is not None and (child, number) in graph.targets
            ]
            if ways:
                self._handles.append(node.register_hook(self._add(ways)))

    def _note_scale(self, number: int) -> Callable[..., None]:
        def hook(grad_outputs: tuple[Tensor | None, ...]) -> None:
            gradient = grad_outputs[number]
            if gradient is not None:
                self.scale = gradient.detach()

        return hook

    def _add(self, ways: list[tuple[int, int]]) -> Callable[..., None]:
        def hook(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
            for i, k in ways:
                gradient = grad_inputs[i]
                if gradient is not None:
                    self._whole[k] = added(self._whole[k], gradient) if k in self._whole else gradient.detach()

        return hook

    def hooks_changed(self, expected: Sequence[Tensor | None], further: Tensor, difference: Tensor, rounding: float) -> bool:
        """Whether hooks of the user have changed what arrived; once the backward has run.

        Args:
            expected: what the root's own backward brings without hooks, one per tensor of W.
            further: what the weights that act in the backward add to that, ``[|W|]``.
            difference: of two readings of the tasks' gradients, all tasks together, ``[|W|]``. Where no hook is at work, what
                arrived is off by nothing, and not by as much as the readings.
            rounding: relative to all that arrived, what is nothing.
        """
        whole = _flat([self._whole.get(k) for k in range(len(self._parameters))], self._parameters)
        off = (whole - self.scale.to(whole) * (_flat(expected, self._parameters) + further.to(whole))).norm()
        return bool(off > rounding * whole.norm()) and bool(off > 0.5 * difference.to(off).norm())

    def discard(self) -> None:
        """Take the hooks off the graph, and let go of what arrived."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._whole.clear()


def _flat(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    parts = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(gradients, like, strict=True)]
    parts = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
    return torch.cat([part.detach().flatten().to(parts[0].device, widest_float(parts[0].device)) for part in parts])
