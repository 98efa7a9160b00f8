"""Walks over the autograd graph: which nodes lead to W, and which task each of them belongs to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

# Owners of a graph node, beside the number of the one task that it belongs to.
REST = -1  # no task: the nodes above the taps, and terms that were added to the total
MERGED = -2  # several: the engine sums their gradients before the node runs

_COMPILED = "CompiledFunctionBackward"

Edge = tuple[int, Node, int]  # output of the parent, child node, input of the child


@dataclass(frozen=True)
class TaskGraph:
    """The part of a backward graph that leads from the tasks' losses to W.

    Attributes:
        targets: (node, its input) → the number of the tensor of W whose gradient arrives there.
        edges: node → its edges that lead to W; nodes in order, children before parents.
        owners: node → the task whose loss alone reaches it, ``REST`` or ``MERGED``; of those in ``edges`` and their children.
        met: numbers of the tasks whose tapped loss the root was built from.
    """

    targets: dict[tuple[Node, int], int]
    edges: dict[Node, list[Edge]]
    owners: dict[Node, int]
    met: set[int]

    def leaving(self, node: Node) -> list[Edge]:
        """The edges on which a task's own gradient leaves the nodes that are its own: into W, or into a merged node."""
        owner = self.owners[node]
        return [edge for edge in self.edges[node] if edge[1:] in self.targets or self.owners[edge[1]] != owner]

    def compiled(self, *, merged_only: bool) -> bool:
        """Whether a node that leads to W is the whole backward of a ``torch.compile``d region.

        Such a node may run only once: its buffers are given away as it runs. A merged one would run once per task.
        """
        if not self._has(_COMPILED):
            return False
        return any(type(node).__name__ == _COMPILED and (not merged_only or self.owners[node] == MERGED) for node in self.edges)

    def has_reentrant_checkpoint(self) -> bool:
        """Whether a part of the graph is hidden in a reentrant ``torch.utils.checkpoint``."""
        return self._has("CheckpointFunctionBackward")

    def _has(self, kind: str) -> bool:
        return kind in {cls.__name__ for cls in set(map(type, self.edges))}

    def is_pushed(self, node: Node) -> bool:
        """Whether gradients that arrive here have to be carried on to W task by task."""
        return node in self.edges and self.owners[node] == MERGED


def task_graph(root: Node, taps: Mapping[Node, int], w: Iterable[Tensor]) -> TaskGraph:
    """Walk the graph once.

    Args:
        root: node of the tensor that ``backward()`` will be called on.
        taps: node of each task's tapped loss → the task's number.
        w: the tensors whose gradients are wanted: parameters, or features with a graph.
    """
    edges_of_w = [get_gradient_edge(tensor) for tensor in w]
    targets = {(edge.node, edge.output_nr): k for k, edge in enumerate(edges_of_w)}
    edges, met = _edges_that_lead_to(edges_of_w, targets, root, taps)
    return TaskGraph(targets, edges, _owners(edges, taps), met)


def _edges_that_lead_to(
    edges_of_w: list[GradientEdge], targets: Mapping[tuple[Node, int], int], root: Node, taps: Mapping[Node, int]
) -> tuple[dict[Node, list[Edge]], set[int]]:
    """Depth-first from ``root``: the edges that lead to W, children before parents, and the taps that were met."""
    # Nodes are numbered as the forward pass makes them, so a node older than all of W cannot lead there. (A parameter's
    # own node has the greatest number of all, and says nothing of its users.)
    inner = [edge.node._sequence_nr() for edge in edges_of_w if edge.node.next_functions]
    oldest = min(inner) if len(inner) == len(edges_of_w) else 0
    edges: dict[Node, list[Edge]] = {}
    met: set[int] = set()
    children: dict[Node, tuple[tuple[Node | None, int], ...] | None] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        if node not in children:
            found = children[node] = node.next_functions
            if node in taps:
                met.add(taps[node])
            for child, _ in found:
                if child is not None and child not in children and (not oldest or child._sequence_nr() >= oldest):
                    stack.append(child)
            continue
        stack.pop()
        below = children[node]
        if not below:
            continue  # a leaf, or done before
        children[node] = None
        leading = [(i, c, nr) for i, (c, nr) in enumerate(below) if c is not None and (c in edges or (c, nr) in targets)]
        if leading:
            edges[node] = leading
    return edges, met


def _owners(edges: dict[Node, list[Edge]], taps: Mapping[Node, int]) -> dict[Node, int]:
    owners: dict[Node, int] = {}
    for node in reversed(edges):
        owner = taps[node] if node in taps else owners.get(node, REST)
        owners[node] = owner
        for _, child, _ in edges[node]:
            owners[child] = owner if owners.get(child, owner) == owner else MERGED
    return owners


def is_built_from(root: Tensor, losses: Mapping[str, Tensor]) -> bool:
    """Whether the graph of ``root`` reaches any of the losses."""
    wanted = {loss.grad_fn for loss in losses.values()}
    stack, seen = [root.grad_fn], set()
    while stack:
        node = stack.pop()
        if node in wanted:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            stack += [child for child, _ in node.next_functions]
    return False


def count_uses(root: Node, parameters: Iterable[Tensor]) -> list[int]:
    """How many edges of the graph lead into each parameter: how often the forward pass used it."""
    nodes = [get_gradient_edge(parameter).node for parameter in parameters]
    uses = dict.fromkeys(nodes, 0)
    stack, seen = [root], {root}
    while stack:
        for child, _ in stack.pop().next_functions:
            if child in uses:
                uses[child] += 1
            elif child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return [uses[node] for node in nodes]


def first_uses(root: Node | None) -> dict[nn.Parameter, int]:
    """Every parameter that the graph reaches → the number of the node that used it first in the forward pass."""
    uses: dict[nn.Parameter, int] = {}
    seen: set[Node] = set()
    stack = [root] if root is not None else []
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            parameter = getattr(child, "variable", None)
            if isinstance(parameter, nn.Parameter):
                order = node._sequence_nr()
                uses[parameter] = min(order, uses.get(parameter, order))
            elif child not in seen:
                seen.add(child)
                stack.append(child)
    return uses
