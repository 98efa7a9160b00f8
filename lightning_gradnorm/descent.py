"""How the tasks' cotangents are carried from where tasks meet down to W, each on its own.

Where several tasks' graphs have met, the backward carries their sum, so each task's part has to be pushed down beside it: one
vector-Jacobian product per task and node. ``ByHand`` runs node after node, each once per task however many meeting places lie
above it, and nothing that users have hung on the graph (see ``vector_jacobian``). ``ByEngine`` is for nodes that need the
engine: one ``torch.autograd.grad`` per task and meeting place.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradnorm.factors import WeightFactors
from lightning_gradnorm.vector_jacobian import inputs_of, undone, vector_jacobian_product

Target = tuple[Node, int]


class Arrivals:
    """What has arrived so far: at nodes, to be carried on, and at W.

    Attributes:
        gradients: per task, per tensor of W: the sum of what arrived there, ``None`` where nothing did.
    """

    def __init__(self, tasks: int, tensors: int, targets: Mapping[Target, int], edges: Mapping[Node, Sequence[Node]]) -> None:
        self.gradients: list[list[Tensor | None]] = [[None] * tensors for _ in range(tasks)]
        self._targets, self._edges = targets, edges
        self._at: dict[Node, dict[int, dict[int, Tensor]]] = {}  # node → task → input → cotangent

    def add(self, task: int, node: Node, number: int, cotangent: Tensor) -> None:
        """Take a cotangent of a task at an input of a node."""
        k = self._targets.get((node, number))
        if k is not None:
            self.add_at_target(task, k, cotangent)
        if node in self._edges:
            held = self._at.setdefault(node, {}).setdefault(task, {})
            held[number] = cotangent if number not in held else held[number] + cotangent

    def add_at_target(self, task: int, k: int, gradient: Tensor) -> None:
        """Take a part of a task's gradient on a tensor of W."""
        # The tensor itself, not an alias: seeing it held, autograd copies it for .grad instead of taking its memory.
        held, value = self.gradients[task][k], gradient.detach() if gradient.requires_grad else gradient
        self.gradients[task][k] = value if held is None else held + value

    def take(self, node: Node) -> list[tuple[int, dict[int, Tensor]]]:
        """(task, input → cotangent) of what has arrived at the node, and forget it."""
        return list(self._at.pop(node, {}).items())

    def let_go(self) -> None:
        """Let go of the graph, and of all that has not been carried on."""
        self._at.clear()
        self._targets, self._edges = {}, {}


class Descent:
    """Carries what has arrived at a node on.

    Args:
        edges: node → its children that lead to W.
        arrivals: where to take cotangents from, and where to put them.
    """

    def __init__(self, edges: Mapping[Node, Sequence[Node]], arrivals: Arrivals) -> None:
        self._edges, self._arrivals = edges, arrivals

    def lower(self, node: Node) -> None:
        """Carry on what has arrived at the node; all that will arrive there is there."""
        raise NotImplementedError


class ByHand(Descent):
    """Node after node, each once per task.

    Args:
        edges: node → its children that lead to W.
        targets: (node, its input) → number of the tensor of W whose gradient arrives there.
        arrivals: where to take cotangents from, and where to put them.
        factors: product's node → which of its children is a weight of W, and where to put the factors of that weight's gradient
            instead of multiplying them.
    """

    def __init__(
        self,
        edges: Mapping[Node, Sequence[Node]],
        targets: Mapping[Target, int],
        arrivals: Arrivals,
        factors: Mapping[Node, tuple[int, WeightFactors]],
    ) -> None:
        super().__init__(edges, arrivals)
        self._targets, self._factors = targets, factors

    @torch.no_grad()
    def lower(self, node: Node) -> None:
        arrived = self._arrivals.take(node)
        below = self._edges.get(node)
        if not arrived or below is None:
            return
        ways = node.next_functions
        wanted = [child is not None and (child in below or (child, nr) in self._targets) for child, nr in ways]
        if node in self._factors:
            weight, factors = self._factors[node]
            factors.add(node, {task: held[0] for task, held in arrived})
            wanted[weight] = False
            if not any(wanted):
                return
        count = inputs_of(node)
        while arrived:
            task, held = arrived.pop()
            down = vector_jacobian_product(node, [held.get(i) for i in range(count)], wanted)
            for gradient, (child, number), leads in zip(down, ways, wanted, strict=True):
                if leads and child is not None and gradient is not None:
                    self._arrivals.add(task, child, number, gradient)


class ByEngine(Descent):
    """From a meeting place straight to W, by the engine.

    Args:
        edges: node → its children that lead to W.
        targets: (node, its input) → number of the tensor of W whose gradient arrives there.
        arrivals: where to take cotangents from, and where to put them.
        wanted: the tensors of W, or the edges on which their gradients arrive.
    """

    def __init__(
        self,
        edges: Mapping[Node, Sequence[Node]],
        targets: Mapping[Target, int],
        arrivals: Arrivals,
        wanted: Sequence[Tensor] | Sequence[GradientEdge],
    ) -> None:
        super().__init__(edges, arrivals)
        self._targets, self._wanted = targets, wanted

    def lower(self, node: Node) -> None:
        arrived = self._arrivals.take(node)
        while arrived:
            task, held = arrived.pop()
            starts = [GradientEdge(node, number) for number in held]
            found = by_engine(starts, list(held.values()), self._wanted, self._edges)
            here = {self._targets.get((node, number)) for number in held}  # it has arrived there already
            for k, gradient in enumerate(found):
                if gradient is not None and k not in here:
                    self._arrivals.add_at_target(task, k, gradient)


def by_engine(
    starts: Sequence[Tensor] | Sequence[GradientEdge],
    cotangents: Sequence[Tensor],
    wanted: Sequence[Tensor] | Sequence[GradientEdge],
    nodes: Iterable[Node],
) -> list[Tensor | None]:
    """``torch.autograd.grad`` that keeps the graph, and undoes what it would leave behind in modules and hooks."""
    leaves = [tensor for tensor in wanted if isinstance(tensor, Tensor)]
    with undone(nodes, leaves):
        return list(torch.autograd.grad(starts, wanted, cotangents, retain_graph=True, allow_unused=True))
