"""Where a task has a gradient: on which weights, and in which of their entries."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_gradnorm.descent import gradients_of

_HALF_PRECISION = 2.0**15  # what a gradient that half precision rounds to zero is multiplied by; float16 ends at 65,504

_Support = list[list[Tensor]]  # part of a weight → per dimension, the indices with an entry that is not zero; none: no part


class Evidence:
    """What the batches so far have shown of the tasks' gradients; a gradient seen once is there.

    A weight that was not looked at counts as one that the task has a gradient on.
    """

    def __init__(self) -> None:
        self._supports: dict[str, dict[str, _Support | None]] = {}  # task → weight → where, None: nowhere

    def has(self, task: str, weight: str) -> bool:
        """Whether the task has a gradient on the weight, as far as is known."""
        return self._supports.get(task, {}).get(weight, []) is not None

    def is_silent(self, task: str, weights: Collection[str]) -> bool:
        """Whether the task has no gradient on any of the weights."""
        return not any(self.has(task, weight) for weight in weights)

    def meet(self, tasks: Iterable[str], weight: str) -> bool:
        """Whether there are entries of the weight in which all the tasks have a gradient.

        Judged along each dimension by itself (rows, columns, …), as heads that are written as one weight share none.
        """
        known = [support for task in tasks if (support := self._supports.get(task, {}).get(weight))]
        if not known:
            return True
        return any(
            all(bool(torch.stack(along).all(0).any()) for along in zip(*parts, strict=True)) if all(parts) else False
            for parts in zip(*known, strict=True)
        )

    def look(self, task: str, loss: Tensor, weights: Mapping[str, Sequence[nn.Parameter]]) -> None:
        """Take in a batch: one backward of the task's loss, down to the lowest of the weights; none if it brings no news.

        Args:
            task: its name.
            loss: its loss, with the graph, which is kept.
            weights: weight → its parts.
        """
        known = self._supports.setdefault(task, {})
        if not weights or (known.keys() >= weights.keys() and not self.is_silent(task, weights)):
            return
        tensors = [part for parts in weights.values() for part in parts]
        found = _supports(gradients_of({task: loss}, tensors)[0])
        if not any(found):
            found = _supports(gradients_of({task: loss * _HALF_PRECISION}, tensors)[0])
        where = iter(found)
        for weight, parts in weights.items():
            support = [next(where) for _ in parts]
            known[weight] = known.get(weight) or (support if any(support) else None)


def _supports(gradients: Sequence[Tensor | None]) -> _Support:
    """Per gradient: along each dimension, where it is not zero; nothing if it is zero. One transfer for all of them."""
    along = [[] if g is None else _along_each_dimension(g) for g in gradients]
    vectors = [vector for vectors in along for vector in vectors]
    if not vectors:
        return along
    device = vectors[0].device
    together = torch.cat([vector.to(device) for vector in vectors]).cpu()
    flat = iter(torch.split(together, [len(vector) for vector in vectors]))
    found = [[next(flat) for _ in vectors] for vectors in along]
    return [vectors if vectors and bool(vectors[0].any()) else [] for vectors in found]


def _along_each_dimension(gradient: Tensor) -> list[Tensor]:
    if gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1:  # of an embedding: the table may be large
        gradient = gradient.coalesce()
        there = gradient.values().ne(0)
        rows = torch.zeros(gradient.shape[0], dtype=torch.bool, device=gradient.device)
        rows[gradient.indices()[0]] = there.flatten(1).any(1)
        return [rows, *_along_each_dimension(there)[1:]]
    there = (gradient if gradient.layout == torch.strided else gradient.to_dense()).ne(0)
    if there.ndim < 2:
        return [there.reshape(-1)]
    return [there.any(dim=[other for other in range(there.ndim) if other != dim]) for dim in range(there.ndim)]
