"""The tasks' gradients put together anew, in the one joint backward, at the node where all of them meet."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from lightning_gradnorm.autograd_graph import REST, Edge, TaskGraph, nodes_below
from lightning_gradnorm.descent import Target, gradients_of
from lightning_gradnorm.gradient_reader import IncompleteBackwardError
from lightning_gradnorm.joint_backward import JointBackward
from lightning_gradnorm.meeting_place import MeetingPlace, ScatteredTasksError, meeting_place
from lightning_gradnorm.task_gradients import TaskGradients, Weigh
from lightning_gradnorm.vector_jacobian import has_shards

_INSTEAD = "Take when='next step'."
_ONCE = "Call backward() once on the total, without inputs=."
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}  # of a sum of cotangents; less is kept in half precision
_ROUNDING_IN_HALF = 5e-2


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
        verify: whether to have a second look at what further terms bring there, by a backward of their own. That what arrives
            is the tasks' sum, where there are no further ones, is seen to each time: a hook may change it.

    Attributes:
        applied: the weights that have acted, in the tasks' order; empty before.

    Raises:
        ScatteredTasksError: if the tasks meet elsewhere, too.
        RuntimeError: in the backward, if that is to be differentiated itself.
    """

    _way_out = "take when='next step'"

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
        self._place: MeetingPlace | None = None
        self._numbers: dict[int, int] = {}  # input of the meeting place → the number of what arrives there
        self._has_rest = False
        self._rest: _Unhooked | None = None
        self.applied: list[float] = []
        super()._begin(root, losses)

    def nodes_if_more_than(self, number: int) -> list[Node]:
        assert self._place is not None, "it was found"
        if len(self.graph.owners) + len(self._place.below) <= number:
            return []
        return nodes_below(self.graph.root)

    def _further_targets(self, graph: TaskGraph) -> dict[Target, int]:
        place = self._place = meeting_place(graph)
        if has_shards(node for node in graph.merged if node in place.below):
            raise ScatteredTasksError("parameters between that place and the shared layer are sharded")
        above = graph.merged.keys() - place.below | {place.node}
        rest = (node for node, owner in graph.owners.items() if owner == REST)
        self._has_rest = any(child in above for node in rest for child, _ in node.next_functions)
        known = {number: graph.targets.get((place.node, number)) for number in place.inputs}
        new = [number for number, k in known.items() if k is None]
        further = {(place.node, number): k for k, number in enumerate(new, len(self._wanted))}
        self._numbers = {number: further[place.node, number] if k is None else k for number, k in known.items()}
        return further

    def _held(self, graph: TaskGraph, frames: Container[Node]) -> Container[Node]:
        assert self._place is not None, "it was found"
        held = super()._held(graph, frames)
        above = {node for node in graph.merged if node not in self._place.below and node in held}
        return above | {self._place.node}  # all below is carried down as the engine comes there

    def _lay_hooks(self, root: Tensor, losses: Mapping[str, Tensor]) -> None:
        super()._lay_hooks(root, losses)
        assert self._place is not None, "it was found"
        if (
            self._verify
            and self._has_rest
            and not (self.graph.compiled(merged_only=False) or self.graph.has_reentrant_checkpoint())
        ):
            self._rest = _Unhooked(root, losses, [GradientEdge(self._place.node, number) for number in self._numbers])
            self._handles.append(self._rest.handle)
        self._handles.append(self._place.node.register_prehook(self._recombine))

    def _recombine(self, sums: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """In the place of the sums that have arrived at the node, the weighted ones."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward(create_graph=True) asks for gradients that can be differentiated, and when='same step' multiplies "
                f"them by weights that are made without a graph. {_INSTEAD}"
            )
        self._refuse_again()
        rows = self._arrivals.gradients
        weights = self.applied = list(self._weigh(self._found()))
        sent = list(sums)
        for number, k in self._numbers.items():
            whole, parts = sums[number], [(weights[task], row[k]) for task, row in enumerate(rows)]
            arrived = [(weight, part) for weight, part in parts if part is not None]
            if whole is None or not arrived:
                continue
            if self._rest is not None or not self._has_rest:
                self._refuse_changed(whole, number, [part for _, part in arrived])
            rest = _sum([(-1.0, part) for _, part in arrived], whole) if self._has_rest else None
            sent[number] = _sum(arrived, rest)
        for row in rows:
            del row[len(self._wanted) :]
        return tuple(sent)

    def _read(self, task: int, leaving: list[Edge], grad_inputs: tuple[Tensor | None, ...], grad_outputs: object) -> None:
        self._refuse_again()
        super()._read(task, leaving, grad_inputs, grad_outputs)

    def _refuse_again(self) -> None:
        if self.applied:
            raise IncompleteBackwardError(
                f"The total went backward a second time, and the weights of when='same step' act once. {_ONCE} {_INSTEAD}"
            )

    def _refuse_changed(self, whole: Tensor, number: int, parts: list[Tensor]) -> None:
        if self._rest is not None:
            parts = [*parts, *self._rest.at(list(self._numbers).index(number), self._cotangents)]
        if _is_off(whole, parts):
            raise ScatteredTasksError("a hook on the trunk's output changes the gradient that arrives there")

    def _found(self) -> TaskGradients:
        found = super()._found()
        return replace(found, gradients=[row[: len(self.parameters)] for row in found.gradients])

    def gradients(self) -> TaskGradients:
        if not self.applied:
            self.discard()
            raise IncompleteBackwardError(
                "The backward did not come to where the tasks' gradients meet, so they could not be put together anew. "
                f"{_ONCE} {_INSTEAD}"
            )
        return super().gradients()

    def discard(self) -> None:
        super().discard()
        self._place = self._rest = None


class _Unhooked:
    """What the terms beside the tasks bring to some edges, were there no hook: the total's gradient without the tasks'.

    Args:
        root: scalar that ``backward()`` will be called on.
        losses: task → loss that it was built from.
        edges: where.

    Attributes:
        handle: of the hook that reads what ``root`` is scaled by.
    """

    def __init__(self, root: Tensor, losses: Mapping[str, Tensor], edges: Sequence[GradientEdge]) -> None:
        assert root.grad_fn is not None, "it was built from losses"
        self._of_root, self._of_tasks = gradients_of({"": root}, edges)[0], gradients_of(losses, edges)
        self._scale: Tensor | None = None
        self._number = root.output_nr
        self.handle: RemovableHandle = root.grad_fn.register_prehook(self._note_scale)

    def _note_scale(self, grad_outputs: tuple[Tensor | None, ...]) -> None:
        self._scale = grad_outputs[self._number]

    def at(self, k: int, of_losses: Sequence[Tensor | None]) -> list[Tensor]:
        """The parts of the sum that arrives at the edge of number ``k``.

        Args:
            k: which edge.
            of_losses: what has arrived at each task's loss.
        """
        whole, parts = self._of_root[k], [row[k] for row in self._of_tasks]
        minus = [-part * seed for part, seed in zip(parts, of_losses, strict=True) if part is not None and seed is not None]
        return minus if whole is None or self._scale is None else [whole * self._scale, *minus]


def _is_off(whole: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether a sum is another than that of its parts, by more than rounding."""
    if whole.layout != torch.strided:
        return False
    rest = whole.to(torch.promote_types(whole.dtype, torch.float32), copy=True)
    for part in parts:
        rest.sub_(part)
    off, rounding = _size(rest), max(_ROUNDING.get(whole.dtype, _ROUNDING_IN_HALF), len(parts) * torch.finfo(whole.dtype).eps)
    if not off.isfinite() or off <= rounding * _size(whole):  # most often; where much cancels, the parts decide
        return False
    return bool(off > rounding * torch.stack([_size(part) for part in parts]).sum())


def _size(tensor: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(tensor, 1, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return size


def _sum(parts: Iterable[tuple[float, Tensor]], start: Tensor | None) -> Tensor:
    """Σ_i w_i g_i, added to what there is at the start, if anything."""
    for weight, part in parts:
        start = part * weight if start is None else torch.add(start, part, alpha=weight)
    assert start is not None, "there are tasks"
    return start
