"""Walks over the autograd graph: which nodes lead to W, and which task each of them belongs to."""

import functools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

# Owners of a graph node, beside the number of the one task that it belongs to.
REST = -1  # no task: the nodes above the taps, and terms that were added to the total
MERGED = -2  # several: the engine sums their gradients before the node runs

_COMPILED = "CompiledFunctionBackward"
_REENTRANT = "CheckpointFunctionBackward"

Edge = tuple[int, Node, int]  # output of the parent, child node, input of the child
_Ways = tuple[tuple[Node | None, int], ...]  # of a node's outputs: child and the child's input


@dataclass(frozen=True)
class TaskGraph:
    """The part of a backward graph that leads from the tasks' losses to W.

    Attributes:
        targets: (node, its input) → the number of the tensor of W whose gradient arrives there; of those in the graph.
        edges: node → its children that lead to W; nodes in order, children before parents.
        owners: node → the task whose loss alone reaches it, ``REST`` or ``MERGED``; of those in ``edges`` and their children.
        leaving: a node that is a task's own → the edges on which that task's gradient leaves what is its own: into W, or into
            a merged node. Only nodes that have such edges.
        met: numbers of the tasks whose tapped loss the root was built from.
        seen: all nodes that were looked at, children before parents.
    """

    targets: dict[tuple[Node, int], int]
    edges: dict[Node, list[Node]]
    owners: dict[Node, int]
    leaving: dict[Node, list[Edge]]
    met: set[int]
    seen: list[Node]

    def compiled(self, *, merged_only: bool) -> bool:
        """Whether a node that leads to W is the whole backward of a ``torch.compile``d region.

        Such a node may run only once: its buffers are given away as it runs. A merged one would run once per task.
        """
        return self._leads_through(_COMPILED, merged_only=merged_only)

    def has_reentrant_checkpoint(self, *, merged_only: bool = False) -> bool:
        """Whether a part of the graph is hidden in a reentrant ``torch.utils.checkpoint``."""
        return self._leads_through(_REENTRANT, merged_only=merged_only)

    @functools.cached_property
    def _kinds(self) -> set[str]:
        return {cls.__name__ for cls in set(map(type, self.edges))}

    def _leads_through(self, kind: str, *, merged_only: bool) -> bool:
        if kind not in self._kinds:
            return False
        return any(type(node).__name__ == kind and (not merged_only or self.owners[node] == MERGED) for node in self.edges)


def task_graph(root: Node, taps: Mapping[Node, int], w: Sequence[Tensor | GradientEdge]) -> TaskGraph:
    """Walk the graph once.

    Args:
        root: node of the tensor that ``backward()`` will be called on.
        taps: node of each task's tapped loss → the task's number.
        w: the tensors whose gradients are wanted, or the edges on which those arrive.
    """
    targets: dict[tuple[Node, int], int] = {}
    leaves: dict[int, int] = {}  # identity of a tensor that is a leaf → its number
    for k, wanted in enumerate(w):
        if isinstance(wanted, GradientEdge):
            targets[wanted.node, wanted.output_nr] = k
        elif wanted.grad_fn is None:
            leaves[id(wanted)] = k
        else:
            targets[wanted.grad_fn, wanted.output_nr] = k
    nodes_of_w = {node for node, _ in targets}
    # Nothing below the only node of W leads to it. (The nodes' sequence numbers say no more about what leads where: threads
    # count on their own, and so a graph made by a backward on a GPU has other numbers than the forward's.)
    lowest = next(iter(nodes_of_w)) if len(nodes_of_w) == 1 and not leaves else None
    edges: dict[Node, list[Node]] = {}
    seen: dict[Node, _Ways | None] = {}
    order: list[Node] = []
    for node, ways in children_first([root], seen, lowest):
        order.append(node)
        if not ways:
            if leaves and (number := leaves.get(id(getattr(node, "variable", None)))) is not None:
                targets[node, 0] = number
                nodes_of_w.add(node)
            continue
        leading = [child for child, nr in ways if child in edges or (child in nodes_of_w and (child, nr) in targets)]
        if leading:
            edges[node] = leading
    owners = _owners(edges, taps)
    leaving: dict[Node, list[Edge]] = {}
    for node, below in edges.items():
        owner = owners[node]
        if owner >= 0 and any(child in nodes_of_w or owners[child] != owner for child in below):
            out = [(i, child, nr) for i, (child, nr) in enumerate(node.next_functions) if child is not None]
            out = [edge for edge in out if edge[1:] in targets or owners.get(edge[1], owner) != owner]
            if out:
                leaving[node] = out
    return TaskGraph(targets, edges, owners, leaving, {task for tap, task in taps.items() if tap in seen}, order)


def children_first(
    roots: Iterable[Node], seen: dict[Node, _Ways | None], lowest: Node | None = None
) -> Iterator[tuple[Node, _Ways]]:
    """Depth-first: every node, with the ways down from it, after all that it leads to; a leaf has none.

    Args:
        roots: where to begin.
        seen: filled with all nodes that were met, leaves included.
        lowest: a node below which the walk does not go.
    """
    for root in roots:
        stack = [root]
        while stack:
            node = stack[-1]
            if node not in seen:
                ways = seen[node] = () if node is lowest else node.next_functions
                for child, _ in ways:
                    if child is not None and child not in seen:
                        stack.append(child)
                if ways:
                    continue  # it comes up again
            stack.pop()
            below = seen[node]
            if below is not None:  # not done before
                seen[node] = None
                yield node, below


def _owners(edges: dict[Node, list[Node]], taps: Mapping[Node, int]) -> dict[Node, int]:
    owners: dict[Node, int] = {}
    for node in reversed(edges):
        owner = taps[node] if node in taps else owners.get(node, REST)
        owners[node] = owner
        for child in edges[node]:
            if owners.setdefault(child, owner) != owner:
                owners[child] = MERGED
    return owners


def nodes_met(root: Tensor, nodes: Container[Node | None]) -> set[Node]:
    """Those of the nodes that the graph of ``root`` meets first: what lies behind one of them is not looked at."""
    stack, seen, met = [root.grad_fn], set(), set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in nodes:
            met.add(node)
        else:
            stack += [child for child, _ in node.next_functions]
    return met
