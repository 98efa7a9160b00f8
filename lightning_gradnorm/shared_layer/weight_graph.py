"""Which weights the tasks' losses reach, and which of them lies above which: from the autograd graph of one batch."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_gradnorm.autograd_graph import children_first

# Whose backward may not run before the ordinary one: a compiled one gives its buffers away as it runs, and a reentrant
# checkpoint refuses to run for gradients that are asked for by name.
_RUNS_ONCE = {"CompiledFunctionBackward", "CheckpointFunctionBackward"}

_Made = int | Node | None  # a weight's number; a leaf that is no weight; several of them


class WeightGraph:
    """The weights in the graph of several losses, numbered in the order in which the forward pass first used them.

    That order goes by the nodes' sequence numbers; a node that another thread has numbered counts as later than all that it
    is made of. Two walks over the graph's N nodes, with the weights and tasks as bits of integers: about linear in N.

    Args:
        losses: task name → scalar loss, with its graph.
        weight_names: parameter → name of the weight that it is, or is a part of.

    Attributes:
        tasks: task names.
        names: of the weights, K of them, in the order of first use.
        above: ``[K, K]``, whether weight i lies above weight j: some path leads from a loss through a use of i to a use of j.
            Where each lies above the other (recurrence, tied weights, derivatives), the one first used later does.
        reached: ``[T, K]``, whether the task's loss reaches the weight.
        runs_once: ``[K]``, whether some path to the weight leads through a node whose backward may run only once.
    """

    def __init__(self, losses: Mapping[str, Tensor], weight_names: Mapping[nn.Parameter, str]) -> None:
        self.tasks: tuple[str, ...] = tuple(losses)
        self._roots = [loss.grad_fn for loss in losses.values()]
        self._ways: dict[Node, list[Node]] = {}  # node → its children; children before parents
        self._uses: list[list[Node]] = []  # weight → nodes in which it meets something else
        self._find(weight_names)
        every = (1 << len(self.tasks)) - 1
        flow = self._flow({})
        self.reached: Tensor = _bits(flow, len(self.tasks)).T
        self.runs_once: Tensor = torch.tensor([bool(bits & ~every) for bits in flow], dtype=torch.bool)

    def last_of(self, weights: Tensor) -> Tensor:
        """Those of the weights, a mask ``[K]``, above which no other of them lies."""
        last = weights & ~self.above[weights].any(0)
        if weights.any() and not last.any():  # a circle of three or more
            last[weights.nonzero().max()] = True
        return last

    def reached_with(self, heads: Mapping[int, Iterable[int]]) -> Tensor:
        """``[T, K]``: what each task's loss still reaches where some weights' uses let only some tasks through.

        Args:
            heads: weight → numbers of the tasks that may pass through it, and reach it.
        """
        only = {node: sum(1 << task for task in tasks) for weight, tasks in heads.items() for node in self._uses[weight]}
        return _bits(self._flow(only), len(self.tasks)).T

    def _find(self, weight_names: Mapping[nn.Parameter, str]) -> None:
        """Walk from the leaves up: what is made of what, which weights are used below each node."""
        numbers: dict[Node, int] = {}
        made_of: dict[Node, _Made] = {}  # a transposed weight, say, stands for the weight
        below: dict[Node, int] = {}  # bits of the weights that are used in the node or below it
        found: dict[str, int] = {}
        first_use: list[tuple[int, int]] = []
        lower: list[int] = []  # weight → bits of those below it
        roots = set(self._roots)
        for node, edges in children_first(filter(None, self._roots), {}):
            ways = self._ways[node] = [child for child, _ in edges if child is not None]
            if not ways:
                parameter = getattr(node, "variable", None)
                name = weight_names.get(parameter) if isinstance(parameter, nn.Parameter) else None
                made_of[node] = node if name is None else found.setdefault(name, len(found))
                below[node] = 0
                if len(found) > len(lower):
                    lower.append(0)
                    first_use.append((1 << 63, 0))
                    self._uses.append([])
                continue
            number = numbers[node] = max([node._sequence_nr(), *(numbers[child] + 1 for child in ways if child in numbers)])
            parts: dict[_Made, Node] = {made_of[child]: child for child in ways}
            below[node] = 0
            for child in ways:
                below[node] |= below[child]
            if len(parts) == 1 and node not in roots:
                made_of[node] = next(iter(parts))
                continue
            made_of[node] = None
            used = [(made, numbers.get(child, number)) for made, child in parts.items() if isinstance(made, int)]
            for weight, taken_up in used:  # of weights that meet here, one lies above those that were taken up before it
                self._uses[weight].append(node)
                first_use[weight] = min(first_use[weight], (number, taken_up))
                before = sum(1 << other for other, when in used if when < taken_up)
                lower[weight] |= (below[node] | before) & ~(1 << weight)
            below[node] |= sum(1 << weight for weight, _ in used)
        self._order(list(found), first_use, lower)

    def _order(self, names: list[str], first_use: list[tuple[int, int]], lower: list[int]) -> None:
        order = sorted(range(len(names)), key=first_use.__getitem__)
        self.names: list[str] = [names[weight] for weight in order]
        self._uses = [self._uses[weight] for weight in order]
        above = _bits([lower[weight] for weight in order], len(names))[:, order]
        self.above: Tensor = above & ~(above.T & torch.ones_like(above).triu(1))

    def _flow(self, only: Mapping[Node, int]) -> list[int]:
        """Walk from the losses down: weight → bits of the tasks that reach it; one more bit where a way there runs once.

        Args:
            only: node → bits that may pass through it; all may through others.
        """
        once = 1 << len(self.tasks)
        bits: dict[Node, int] = {}
        for task, root in enumerate(self._roots):
            if root is not None:
                bits[root] = bits.get(root, 0) | 1 << task
        for node in reversed(self._ways):
            passing = bits.get(node, 0) & only.get(node, -1)
            if type(node).__name__ in _RUNS_ONCE:
                passing |= once
            bits[node] = passing
            for child in self._ways[node]:
                bits[child] = bits.get(child, 0) | passing
        flow = [0] * len(self._uses)
        for weight, uses in enumerate(self._uses):
            for node in uses:
                flow[weight] |= bits[node]
        return flow


def _bits(rows: list[int], count: int) -> Tensor:
    """Integers → a mask ``[rows, count]``; column j says whether bit j is set."""
    mask = torch.zeros(len(rows), count, dtype=torch.bool)
    for row, bits in enumerate(rows):
        digits = format(bits & ((1 << count) - 1), f"0{count}b")[::-1] if count else ""
        if digits:
            mask[row] = torch.frombuffer(bytearray(digits, "ascii"), dtype=torch.uint8) == ord("1")
    return mask
