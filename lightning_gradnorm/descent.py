"""How the tasks' cotangents are carried from where tasks meet down to W, each on its own.

Where several tasks' graphs have met, the backward carries their sum, so each task's part has to be pushed down beside it: one
vector-Jacobian product per task and node, each node once per task however many meeting places lie above it, and nothing that
users have hung on the graph (see ``vector_jacobian``). What a checkpoint has saved can be had once in each run of the engine,
so there each task gets a run of its own.
"""

import threading
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradnorm.autograd_graph import Edge, TaskGraph, task_graph
from lightning_gradnorm.factors import WeightFactors
from lightning_gradnorm.vector_jacobian import VectorJacobianProduct, added, frames_of, in_graph_task, undone

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
            held[number] = cotangent if number not in held else added(held[number], cotangent)

    def add_at_target(self, task: int, k: int, gradient: Tensor) -> None:
        """Take a part of a task's gradient on a tensor of W."""
        # The tensor itself, not an alias: seeing it held, autograd copies it for .grad instead of taking its memory.
        held, value = self.gradients[task][k], gradient.detach() if gradient.requires_grad else gradient
        self.gradients[task][k] = value if held is None else added(held, value)

    def take(self, node: Node, task: int | None = None) -> list[tuple[int, dict[int, Tensor]]]:
        """(task, input → cotangent) of what has arrived at the node, of all tasks or of one, and forget it."""
        if task is None:
            return list(self._at.pop(node, {}).items())
        held = self._at.get(node, {}).pop(task, None)
        return [] if held is None else [(task, held)]

    def let_go(self) -> None:
        """Let go of the graph, and of all that has not been carried on."""
        self._at.clear()
        self._targets, self._edges = {}, {}


class Descent:
    """Carries what has arrived at a node on, by hand.

    Args:
        nodes: those that will be asked for, and all below them that lead to W; children before parents.
        edges: node → its children that lead to W.
        targets: (node, its input) → number of the tensor of W whose gradient arrives there.
        arrivals: where to take cotangents from, and where to put them.
        factors: product's node → which of its children is a weight of W, and where to put the factors of that weight's gradient
            instead of multiplying them.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        edges: Mapping[Node, Sequence[Node]],
        targets: Mapping[Target, int],
        arrivals: Arrivals,
        factors: Mapping[Node, tuple[int, WeightFactors]] | None = None,
        frames: Mapping[Node, int] | None = None,
    ) -> None:
        self._nodes, self._edges, self._targets, self._arrivals = nodes, edges, targets, arrivals
        self._factors = factors or {}
        self._frames = frames_of(nodes) if frames is None else frames
        self._products: dict[Node, VectorJacobianProduct] = {}
        self._ways: dict[int, list[Node]] = {}  # frame → the nodes that lead to one of its own, parents before children

    @torch.no_grad()
    def lower(self, node: Node, of: int | None = None) -> None:
        """Carry on what has arrived at the node, of all tasks or of one; all that will arrive there is there."""
        arrived = self._arrivals.take(node, of)
        if not arrived or node not in self._edges:
            return
        if node in self._frames:
            while arrived:
                with undone():  # each task sees what the ordinary backward will see: a spectral norm moves on as it is run
                    in_graph_task(self._through_frame, node, *arrived.pop())
            return
        product = self._new_product(node) if of is None else self._product(node)  # kept only while tasks come one by one
        while arrived:
            task, held = arrived.pop()
            if node in self._factors:
                self._factors[node][1].add(node, task, held[0])
            for child, number, gradient in product(held):
                self._arrivals.add(task, child, number, gradient)

    def lower_all(self) -> None:
        """All nodes, parents before children."""
        for node in reversed(self._nodes):
            self.lower(node)

    def _product(self, node: Node) -> VectorJacobianProduct:
        """From the inputs of a node to those of its children that lead to W."""
        if node not in self._products:
            self._products[node] = self._new_product(node)
        return self._products[node]

    def _new_product(self, node: Node) -> VectorJacobianProduct:
        below = self._edges[node]
        wanted = [child is not None and (child in below or (child, nr) in self._targets) for child, nr in node.next_functions]
        if node in self._factors:
            wanted[self._factors[node][0]] = False
        return VectorJacobianProduct(node, wanted)

    def _through_frame(self, start: Node, task: int, held: dict[int, Tensor]) -> None:
        """From a node of a frame to where nothing leads to the frame any more: what it has saved can be had once in a run."""
        frame = self._frames[start]
        if frame not in self._ways:
            leading = {node for node, other in self._frames.items() if other == frame}
            for node in self._nodes:
                if not leading.isdisjoint(self._edges[node]):
                    leading.add(node)
            self._ways[frame] = [node for node in reversed(self._nodes) if node in leading]
        way = self._ways[frame]
        inside, at = set(way), {start: held}
        for node in way:
            if node in at:
                for child, number, gradient in self._product(node)(at.pop(node)):
                    if child in inside and (child, number) not in self._targets:
                        other = at.setdefault(child, {})
                        other[number] = gradient if number not in other else added(other[number], gradient)
                    else:
                        self._arrivals.add(task, child, number, gradient)


class Pace:
    """Lowers the tasks' cotangents as soon as all that they bring to a node is there, and says when a gradient is whole.

    So what one node has sent down is still at hand when the next takes it up.

    Args:
        descent: of these nodes.
        edges: node where several tasks have met → its children that lead to W.
        leaving: a task's own node → the edges on which its gradient leaves what is its own.
        owners: a task's own node → the task.
        held: those of the nodes that must not be lowered before the engine comes to them.
        whole: called with task and number of a tensor of W, once all that the task brings there is there.
        ends: node → the number of the tensor of W of which ``whole`` tells, and whose gradient arrives there and nowhere else.
        apart: whether no task waits for the others, so that what is to be let go of is; else those that come to a node leave it
            together, while what the node has saved is at hand.
    """

    def __init__(
        self,
        descent: Descent,
        edges: Mapping[Node, Sequence[Node]],
        leaving: Mapping[Node, Iterable[Edge]],
        owners: Mapping[Node, int],
        held: Container[Node],
        whole: Callable[[int, int], None],
        ends: Mapping[Node, int],
        *,
        apart: bool,
    ) -> None:
        assert apart or not ends, "a gradient is one task's"
        self._descent, self._edges, self._whole, self._ends, self._apart = descent, edges, whole, ends, apart
        self._awaited = Counter[tuple[int | None, Node | int]]()  # of a task; None is all of them
        self._counting = threading.Lock()  # the engine has a thread for each device
        self._tasks_at: dict[Node, list[int | None]] = {}  # of the nodes that are held
        entries: dict[int | None, list[Node]] = {}
        for node, out in leaving.items():
            for _, child, _, k, _ in out:
                if child in edges:
                    entries.setdefault(owners[node] if apart else None, []).append(child)
                elif k is not None and k in ends.values():
                    self._awaited[owners[node], k] += 1
        for task, come in entries.items():
            self._expect(task, come, held)

    def _expect(self, task: int | None, come: list[Node], held: Container[Node]) -> None:
        reached = set[Node]()
        while come:
            node = come.pop()
            self._awaited[task, self._ends.get(node, node)] += 1
            if node in self._edges and node not in reached:
                reached.add(node)
                come += self._edges[node]
                if node in held:
                    self._awaited[task, node] += 1
                    self._tasks_at.setdefault(node, []).append(task)

    @property
    def calls(self) -> Iterable[Node]:
        """The nodes at which ``engine_at`` has to be called, as the engine comes to them."""
        return self._tasks_at

    def engine_at(self, node: Node) -> None:
        """The engine has come to the node: lower what waited for nothing else."""
        for task in self._tasks_at[node]:
            self._came(task, node)

    def came(self, task: int, to: Node | int) -> None:
        """One of a task's own nodes has sent what it sends to a node, or to a tensor of W."""
        self._came(task if self._apart else None, to)

    def _came(self, task: int | None, to: Node | int) -> None:
        come = [to]
        while come:
            to = come.pop()
            with self._counting:
                self._awaited[task, to] -= 1
                if self._awaited[task, to]:
                    continue
            if isinstance(to, int) and task is not None:
                self._whole(task, to)
            elif not isinstance(to, int) and to in self._edges:
                self._descent.lower(to, task)
                come += [self._ends.get(child, child) for child in self._edges[to]]


def gradients_of(losses: Mapping[str, Tensor], tensors: Sequence[Tensor] | Sequence[GradientEdge]) -> list[list[Tensor | None]]:
    """Each loss's gradient on each tensor, ``None`` where it does not reach it; one backward per loss, which leaves no trace.

    As ``torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)``, but that no hook runs, and modules inside a
    checkpoint count nothing.

    Args:
        losses: task name → scalar loss.
        tensors: leaves, or whatever else the gradients are wanted of; or the edges on which those arrive.
    """
    found: list[list[Tensor | None]] = []
    for loss in losses.values():
        if loss.grad_fn is None:
            found.append([None] * len(tensors))
        else:
            graph = task_graph(loss.grad_fn, {loss.grad_fn: 0}, tensors)
            found += carried_down(loss, [torch.ones_like(loss)], graph, len(tensors))
    return found


def carried_down(output: Tensor, cotangents: Sequence[Tensor], graph: TaskGraph, tensors: int) -> list[list[Tensor | None]]:
    """What each cotangent of a tensor brings to each tensor of W, ``None`` where it brings nothing; no hook runs.

    Args:
        output: with a graph; of any shape.
        cotangents: in its shape and dtype.
        graph: that of ``output``, from it down to the tensors of W.
        tensors: how many they are.
    """
    assert output.grad_fn is not None, "it has a graph"
    arrivals = Arrivals(len(cotangents), tensors, graph.targets, graph.edges)
    for number, cotangent in enumerate(cotangents):
        arrivals.add(number, output.grad_fn, output.output_nr, cotangent)
    Descent(list(graph.edges), graph.edges, graph.targets, arrivals).lower_all()
    return arrivals.gradients
