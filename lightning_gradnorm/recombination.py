"""The tasks' gradients put together anew, in the one joint backward, at the node where all of them meet."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradnorm.autograd_graph import MERGED, REST, Edge, TaskGraph
from lightning_gradnorm.gradient_reader import IncompleteBackwardError
from lightning_gradnorm.joint_backward import JointBackward
from lightning_gradnorm.task_gradients import TaskGradients, Weigh
from lightning_gradnorm.vector_jacobian import added, has_shards

_INSTEAD = "Take when='next step', which needs no such place."
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}  # of a sum of cotangents; less is kept in half precision
_ROUNDING_IN_HALF = 5e-2


class ScatteredTasksError(RuntimeError):
    """The tasks do not meet at one place with everything that they share below it, so no weights can act there."""

    def __init__(self, what: str) -> None:
        super().__init__(
            "when='same step' acts where the tasks' gradients meet: at the one output of a trunk that holds all that the tasks "
            f"share, and that every head takes. Here {what}. {_INSTEAD}"
        )


class RecombiningBackward(JointBackward):
    """The joint backward, in which Σ_i w_i g_i takes the place of Σ_i g_i from where the tasks meet.

    When the engine comes to the node at which all tasks' cotangents have arrived, they are carried down to W, as
    ``JointBackward`` does; ``weigh`` makes weights of the gradients there, and the weighted sum is what goes on from the
    node. So everything below, W and all that lies under it, gets the gradient of Σ_i w_i L_i in the same backward, while what
    is a task's own keeps the gradient that the total gave it. Further terms of the total act as they are.

    Args:
        root: scalar that ``backward()`` will be called on.
        losses: task name → loss from ``tap_losses`` that ``root`` was built from.
        parameters: W, the shared parameters.
        edges: where gradients are read, one for each of them, if not at the parameters themselves.
        weigh: called once, in the backward.
        verify: whether to see to it that what arrives there is the tasks' sum, which a hook may have changed; asks the device.

    Raises:
        ScatteredTasksError: if the tasks meet elsewhere, too.
    """

    def __init__(
        self,
        root: Tensor,
        losses: Mapping[str, Tensor],
        parameters: Iterable[Tensor],
        edges: Iterable[GradientEdge] | None = None,
        *,
        weigh: Weigh,
        verify: bool = False,
    ) -> None:
        self._weigh, self._verify = weigh, verify
        super().__init__(root, losses, parameters, edges)

    def _begin(self, root: Tensor, losses: Mapping[str, Tensor]) -> None:
        self._place: tuple[Node, int] | None = None
        self._has_rest, self._has_acted = False, False
        self._arrived: dict[int, Tensor] = {}
        super()._begin(root, losses)

    def _check(self, graph: TaskGraph, losses: Mapping[str, Tensor]) -> None:
        super()._check(graph, losses)
        self._place = meeting_place(graph)
        self._has_rest = any(
            way == self._place for node, owner in graph.owners.items() if owner == REST for way in node.next_functions
        )
        if has_shards(graph.merged):
            raise ScatteredTasksError("parameters between that place and the shared layer are sharded")

    def _held(self, graph: TaskGraph, frames: Container[Node]) -> Container[Node]:
        assert self._place is not None, "it was checked"
        return {self._place[0]}  # all below is carried down as the engine comes there

    def _lay_hooks(self, root: Tensor, losses: Mapping[str, Tensor]) -> None:
        super()._lay_hooks(root, losses)
        assert self._place is not None, "it was checked"
        node, number = self._place
        self._handles.append(node.register_prehook(lambda sums: self._recombine(sums, number)))

    def _read(self, task: int, leaving: list[Edge], grad_inputs: tuple[Tensor | None, ...], ways: object) -> None:
        for output, *_ in leaving:
            gradient = grad_inputs[output]
            if gradient is not None:
                self._arrived[task] = added(self._arrived[task], gradient) if task in self._arrived else gradient
        super()._read(task, leaving, grad_inputs, ways)

    @torch.no_grad()
    def _recombine(self, sums: tuple[Tensor | None, ...], number: int) -> tuple[Tensor | None, ...]:
        """In the place of the sum that has arrived at this input of the node, the weighted one."""
        arrived, self._arrived = self._arrived, {}
        whole = sums[number]
        assert whole is not None, "the tasks' cotangents have arrived"
        rest = _sum(arrived, [-1.0] * len(self.tasks), whole) if self._has_rest else None
        if self._verify and not self._has_rest:
            self._refuse_changed(whole, arrived)
        weighted = _sum(arrived, self._weigh(self._found()), rest)
        self._has_acted = True
        return tuple(weighted if i == number else held for i, held in enumerate(sums))

    def _refuse_changed(self, whole: Tensor, arrived: Mapping[int, Tensor]) -> None:
        sizes = torch.stack([part.abs().amax() for part in arrived.values()])
        off = (_sum(arrived, [-1.0] * len(self.tasks), whole)).abs().amax()
        if off.isfinite() and off > _ROUNDING.get(whole.dtype, _ROUNDING_IN_HALF) * sizes.amax():
            raise ScatteredTasksError("a hook on the trunk's output changes the gradient that arrives there")

    def gradients(self) -> TaskGradients:
        if not self._has_acted:
            self.discard()
            raise IncompleteBackwardError(
                "The backward did not come to where the tasks' gradients meet, so they could not be put together anew. Call "
                f"backward() once on the total, without inputs=. {_INSTEAD}"
            )
        return super().gradients()

    def discard(self) -> None:
        super().discard()
        self._arrived, self._place = {}, None


def _sum(parts: Mapping[int, Tensor], weights: Sequence[float], start: Tensor | None) -> Tensor:
    """Σ_i w_i g_i, added to what there is at the start, if anything."""
    for task, part in parts.items():
        start = part * weights[task] if start is None else torch.add(start, part, alpha=weights[task])
    assert start is not None, "there are tasks"
    return start


def meeting_place(graph: TaskGraph) -> tuple[Node, int]:
    """The node, and its input, at which all tasks' gradients come together on their way to W, and nothing else is shared above.

    Raises:
        ScatteredTasksError: if there are several.
    """
    places = {(child, number) for out in graph.leaving.values() for _, child, number, _, _ in out}
    if len(places) > 1:
        names = sorted({_name_of(node) for node, _ in places})
        raise ScatteredTasksError(f"they meet at {len(places)} places on the way to the shared layer ({', '.join(names)})")
    (place,) = places
    if graph.owners.get(place[0]) != MERGED:
        raise ScatteredTasksError("there is one task alone")
    below = _below(place[0])
    for node, owner in graph.owners.items():
        for way in node.next_functions if owner >= 0 else ():
            child, _ = way
            shared = child is not None and (child in below or graph.owners.get(child) == MERGED)
            if shared and way != place:
                raise ScatteredTasksError(
                    f"they also meet at {_name_of(child)}, which is no part of what lies below that output"
                )
    return place


def _below(node: Node) -> set[Node]:
    """The node and all that it leads to."""
    seen, stack = {node}, [node]
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return seen


def _name_of(node: Any) -> str:
    """For people: the operation, or the parameter's shape."""
    parameter = getattr(node, "variable", None)
    if isinstance(parameter, Tensor):
        return f"a parameter of shape {tuple(parameter.shape)}"
    return type(node).__name__.removesuffix("0").removesuffix("Backward")
