"""Walks over the autograd graph: which nodes lead to W, and which task each of them belongs to."""

import functools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

# Owners of a graph node, beside the number of the one task that it belongs to.
REST = -1  # no task: the nodes above the taps, and terms that were added to the total
MERGED = -2  # several: the engine sums their gradients before the node runs

_COMPILED = "CompiledFunctionBackward"
_REENTRANT = "CheckpointFunctionBackward"

_TURNS = "TBackward0"


# A way on which a task's gradient leaves what is its own: output of the node that it leaves; the node that it comes to, and its
# input there; the number of the tensor of W that it is the gradient of, or None where it has to be carried on; whether it is
# that gradient transposed.
Edge = tuple[int, Node, int, int | None, bool]
_Ways = tuple[tuple[Node | None, int], ...]  # of a node's outputs: child and the child's input


@dataclass(frozen=True)
class TaskGraph:
    """The part of a backward graph that leads from the tasks' losses to W.

    Attributes:
        root: where the backward begins.
        targets: (node, its input) → the number of the tensor of W whose gradient arrives there; of those in the graph.
        owners: node → the task whose loss alone reaches it, ``REST`` or ``MERGED``; of all nodes that were met.
        merged: node that is ``MERGED`` → its children that lead to W; nodes in order, children before parents.
        leaving: a node that is a task's own → the edges on which that task's gradient leaves what is its own: into W, or into
            a merged node that leads there. Only nodes that have such edges.
        met: numbers of the tasks whose tapped loss the root was built from.
        lowest: a node below which nothing leads to W, if it is known.
    """

    root: Node
    targets: dict[tuple[Node, int], int]
    owners: dict[Node, int]
    merged: dict[Node, list[Node]]
    leaving: dict[Node, list[Edge]]
    met: set[int]
    lowest: Node | None

    @functools.cached_property
    def edges(self) -> dict[Node, list[Node]]:
        """Node → its children that lead to W; nodes in order, children before parents. A walk: most have no need of it."""
        return _leading([self.root], self.targets, self.lowest)

    @property
    def seen(self) -> list[Node]:
        """All nodes that were looked at, children before parents. A walk."""
        return nodes_below(self.root, self.lowest)

    @property
    def reaching(self) -> set[int]:
        """Numbers of the tasks whose loss leads to W."""
        return {self.owners[node] for node in self.leaving}

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
        return {cls.__name__ for cls in set(map(type, self.owners))}

    def _leads_through(self, kind: str, *, merged_only: bool) -> bool:
        if kind not in self._kinds:
            return False
        return any(type(node).__name__ == kind for node in (self.merged if merged_only else self.edges))


def task_graph(root: Node, taps: Mapping[Node, int], w: Sequence[Tensor | GradientEdge]) -> TaskGraph:
    """Walk the graph: once where tasks meet at W alone, and once more below the nodes where they meet above it.

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
    # Nothing below the only node of W leads to it. (The nodes' sequence numbers say no more about what leads where: threads
    # count on their own, and so a graph made by a backward on a GPU has other numbers than the forward's.)
    nodes_of_w = {node for node, _ in targets}
    lowest = next(iter(nodes_of_w)) if len(nodes_of_w) == 1 and not leaves else None
    owners: dict[Node, int] = {**taps, root: taps.get(root, REST)}
    ways_of: dict[Node, _Ways] = {}  # asking a node for its children is what a walk costs most: once each
    met = {taps[root]} if root in taps else set()
    leaving: dict[Node, list[Edge]] = {}
    again = set[Node]()  # a task's own nodes with more than one way to them
    meet_above = False
    stack = [(root, () if root is lowest else root.next_functions)]
    while stack:
        node, ways = stack.pop()
        owner, ways_of[node] = owners[node], ways
        for i, (child, nr) in enumerate(ways):
            if child is None:
                continue
            held = owners.get(child)
            if held is None:
                owners[child] = owner
                below = () if child is lowest else child.next_functions
                if below:
                    stack.append((child, below))
                elif leaves and (number := leaves.get(id(getattr(child, "variable", None)))) is not None:
                    targets[child, 0] = number
                    nodes_of_w.add(child)
            elif held == owner:
                again.add(child)
            elif held != MERGED:
                below = ways_of.get(child) or (() if child is lowest else child.next_functions)
                if child in taps:
                    meet_above |= owner != REST  # one loss made of another
                    if held in met:
                        continue
                    met.add(held)
                else:
                    owners[child] = MERGED
                    meet_above |= bool(below)
                stack.append((child, below))  # what lies below is merged too, or the task's own
            if child in nodes_of_w and owner >= 0 and (number_of_w := targets.get((child, nr))) is not None:
                leaving.setdefault(node, []).append((i, child, nr, number_of_w, False))
    merged: dict[Node, list[Node]] = {}
    if meet_above:
        merged = _leading([node for node, owner in owners.items() if owner == MERGED], targets, lowest, ways_of)
        leaving = {}
        for node, ways in ways_of.items():
            for i, (child, nr) in enumerate(ways) if owners[node] >= 0 else ():
                if child is not None and (child in merged or child in taps or (child, nr) in targets):
                    number_of_w = None if child in merged else targets.get((child, nr))
                    leaving.setdefault(node, []).append((i, child, nr, number_of_w, False))
    _leave_above_transposes(leaving, owners, again)
    return TaskGraph(root, targets, owners, merged, leaving, met, lowest)


def _leave_above_transposes(leaving: dict[Node, list[Edge]], owners: Mapping[Node, int], again: Container[Node]) -> None:
    """Have one node of a Linear's read both of its gradients, where the weight's is transposed on its way and used by others.

    Seen above the transpose, the gradient is another tensor than the one that arrives at the weight. So autograd does not see
    it held, and would take its memory for ``.grad``, were it not added to another task's.
    """
    turns: dict[Node, int] = {}
    for node, out in leaving.items():
        _, child, _, k, _ = out[0]
        if type(node).__name__ == _TURNS and node not in again and k is not None and owners[child] == MERGED:
            turns[node] = k
    for node in [node for node in leaving if node not in turns] if turns else ():
        for i, (below, nr) in enumerate(node.next_functions):
            if below in turns:
                leaving[node].append((i, below, nr, turns[below], True))
                del leaving[below]


def _leading(
    roots: Iterable[Node],
    targets: Mapping[tuple[Node, int], int],
    lowest: Node | None,
    known: Mapping[Node, _Ways] = MappingProxyType({}),
) -> dict[Node, list[Node]]:
    """Node → its children that lead to W, of the roots and all below them; children before parents."""
    nodes_of_w = {node for node, _ in targets}
    edges: dict[Node, list[Node]] = {}
    for node, ways in children_first(roots, {}, lowest, known):
        leading = [child for child, nr in ways if child in edges or (child in nodes_of_w and (child, nr) in targets)]
        if leading:
            edges[node] = leading
    return edges


def children_first(
    roots: Iterable[Node],
    seen: dict[Node, _Ways | None],
    lowest: Node | None = None,
    known: Mapping[Node, _Ways] = MappingProxyType({}),
) -> Iterator[tuple[Node, _Ways]]:
    """Depth-first: every node, with the ways down from it, after all that it leads to; a leaf has none.

    Args:
        roots: where to begin.
        seen: filled with all nodes that were met, leaves included.
        lowest: a node below which the walk does not go.
        known: node → the ways down from it, where a walk has asked for them.
    """
    for root in roots:
        stack = [root]
        while stack:
            node = stack[-1]
            if node not in seen:
                held = known.get(node)
                ways = seen[node] = held if held is not None else () if node is lowest else node.next_functions
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


def nodes_below(root: Node | None, lowest: Node | None = None) -> list[Node]:
    """The node and all that it leads to, children before parents; none of no node.

    Args:
        root: where to begin.
        lowest: a node below which the walk does not go.
    """
    return [] if root is None else [node for node, _ in children_first([root], {}, lowest)]


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
