"""Where the tasks' ways to W have come together, with all that the tasks share below: in the graph of a joint backward."""

from collections.abc import Container
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

from lightning_gradnorm.autograd_graph import MERGED, REST, TaskGraph, nodes_below


class ScatteredTasksError(RuntimeError):
    """The tasks do not meet at one place with everything that they share below it, so no weights can act there."""

    def __init__(self, what: str) -> None:
        super().__init__(
            "when='same step' acts where the tasks' gradients meet: at the one output of a trunk that holds all that the tasks "
            f"share, and that every head takes. Here {what}. Take when='next step', which needs no such place."
        )


class MeetingPlace(NamedTuple):
    """The node that all ways from the losses to W lead through.

    Attributes:
        node: nearest to the losses.
        inputs: those of its inputs, one for each output of its operation, at which gradients arrive.
        below: the node, and all that it leads to.
    """

    node: Node
    inputs: tuple[int, ...]
    below: set[Node]


def meeting_place(graph: TaskGraph) -> MeetingPlace:
    """Where all tasks' gradients have come together, with all that the tasks share below it.

    Above it tasks may share operations, the mean over positions, say, but no parameter.

    Raises:
        ScatteredTasksError: if there is no such place.
    """
    if len(graph.met) < 2:
        raise ScatteredTasksError("there is one task alone")
    entries: dict[Node, set[int]] = {}
    for out in graph.leaving.values():
        for _, entry, number, _, _ in out:
            entries.setdefault(entry, set()).add(number)
    names = sorted({_name_of(node) for node in entries})
    open_ways = {node: set(numbers) for node, numbers in entries.items()}
    for node in reversed(graph.merged):  # parents before children
        if len(open_ways) == 1:
            break
        if node in open_ways:
            del open_ways[node]
            for below, number in node.next_functions:
                if below is not None and (below in graph.merged or (below, number) in graph.targets):
                    open_ways.setdefault(below, set()).add(number)
    if len(open_ways) > 1:
        raise ScatteredTasksError(f"they come to the shared layer by several ways ({', '.join(names)})")
    ((node, inputs),) = open_ways.items()
    trunk = set(nodes_below(node))
    _check_above(graph, node, trunk)
    return MeetingPlace(node, tuple(sorted(inputs)), trunk)


def _check_above(graph: TaskGraph, place: Node, trunk: Container[Node]) -> None:
    """Raise where tasks share a parameter outside the trunk, or one comes into it by another way."""
    stack: list[tuple[Node, int]] = []  # a node that a task comes to and others may, and the task
    for node, owner in graph.owners.items():
        if node in trunk or owner == REST:
            continue
        for child, _ in node.next_functions:
            if child is not None and child in trunk and child is not place:
                raise ScatteredTasksError(f"a task also comes to {_name_of(child)}, inside the trunk, by a way of its own")
            if child is not None and owner != MERGED and graph.owners.get(child) == MERGED:
                stack.append((child, owner))
    tasks_at: dict[Node, set[int]] = {}
    while stack:
        node, task = stack.pop()
        if node in trunk or task in tasks_at.setdefault(node, set()):
            continue
        tasks_at[node].add(task)
        if hasattr(node, "variable") and len(tasks_at[node]) > 1:
            raise ScatteredTasksError(f"they also share {_name_of(node)}, which is no part of that trunk")
        stack += [(child, task) for child, _ in node.next_functions if child is not None]


def _name_of(node: Any) -> str:
    """For people: the operation, or the parameter's shape."""
    parameter = getattr(node, "variable", None)
    if isinstance(parameter, Tensor):
        return f"a parameter of shape {tuple(parameter.shape)}"
    return type(node).__name__.removesuffix("0").removesuffix("Backward")
