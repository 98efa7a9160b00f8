"""How the tasks' cotangents are carried from where tasks meet down to W, each on its own.

Where several tasks' graphs have met, the backward carries their sum, so each task's part has to be pushed down beside it: one
vector-Jacobian product per task and node, each node once per task however many meeting places lie above it, and nothing that
users have hung on the graph (see ``vector_jacobian``). From a node that needs the engine, ``torch.autograd.grad`` goes the rest
of the way.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradnorm.autograd_graph import task_graph
from lightning_gradnorm.factors import WeightFactors
from lightning_gradnorm.vector_jacobian import inputs_of, need_engine, undone, vector_jacobian_product

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
        nodes: those that will be asked for, and all below them that lead to W.
        engine_first: those of the nodes from which the engine goes the rest of the way.
        edges: node → its children that lead to W.
        targets: (node, its input) → number of the tensor of W whose gradient arrives there.
        wanted: the tensors of W, or the edges on which their gradients arrive.
        arrivals: where to take cotangents from, and where to put them.
        factors: product's node → which of its children is a weight of W, and where to put the factors of that weight's gradient
            instead of multiplying them.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        engine_first: Collection[Node],
        edges: Mapping[Node, Sequence[Node]],
        targets: Mapping[Target, int],
        wanted: Sequence[Tensor] | Sequence[GradientEdge],
        arrivals: Arrivals,
        factors: Mapping[Node, tuple[int, WeightFactors]] | None = None,
    ) -> None:
        self._nodes, self._edges, self._targets, self._wanted, self._arrivals = nodes, edges, targets, wanted, arrivals
        self._factors = factors or {}
        self._engine_first = engine_first
        self._engine_runs = False

    @torch.no_grad()
    def lower(self, node: Node) -> None:
        """Carry on what has arrived at the node; all that will arrive there is there."""
        if self._engine_runs:
            return  # it comes past on its own account: the node's turn is later
        below = self._edges.get(node)
        arrived = self._arrivals.take(node)
        if not arrived or below is None:
            return
        if node in self._engine_first:
            self._to_the_end(node, arrived)
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

    def lower_all(self, nodes: Iterable[Node]) -> None:
        """The nodes one after the other, parents before children."""
        for node in nodes:
            self.lower(node)

    def _to_the_end(self, node: Node, arrived: list[tuple[int, dict[int, Tensor]]]) -> None:
        leaves = [tensor for tensor in self._wanted if isinstance(tensor, Tensor)]
        self._engine_runs = True
        try:
            while arrived:
                task, held = arrived.pop()
                here = {self._targets.get((node, number)) for number in held}  # it has arrived there already
                with undone(self._nodes, leaves):
                    found = torch.autograd.grad(
                        [GradientEdge(node, number) for number in held],
                        self._wanted,
                        list(held.values()),
                        retain_graph=True,
                        allow_unused=True,
                    )
                for k, gradient in enumerate(found):
                    if gradient is not None and k not in here:
                        self._arrivals.add_at_target(task, k, gradient)
        finally:
            self._engine_runs = False


def gradients_of(losses: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """Each loss's gradient on each tensor, ``None`` where it does not reach it; one backward per loss, which leaves no trace.

    As ``torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)``, but that no hook runs, and modules inside a
    checkpoint count nothing.

    Args:
        losses: task name → scalar loss.
        tensors: leaves, or whatever else the gradients are wanted of.
    """
    found = []
    for loss in losses.values():
        arrivals = Arrivals(1, len(tensors), {}, {})
        if loss.grad_fn is not None:
            graph = task_graph(loss.grad_fn, {loss.grad_fn: 0}, tensors)
            arrivals = Arrivals(1, len(tensors), graph.targets, graph.edges)
            arrivals.add(0, loss.grad_fn, loss.output_nr, torch.ones_like(loss))
            order = list(reversed(graph.edges))
            Descent(order, need_engine(order), graph.edges, graph.targets, tensors, arrivals).lower_all(order)
        found.append(arrivals.gradients[0])
    return found
