"""Which way the tasks' gradients are read, and the proof that it is right.

On the first measured step, and again where tasks, layer or shapes are new, the gradients are read a second, slow way, one
backward per task, and the norms are compared. Where they differ, the slow way is used from then on, and a sentence says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradnorm.audit import Audit
from lightning_gradnorm.autograd_graph import nodes_below
from lightning_gradnorm.balancers.checks import check_choice
from lightning_gradnorm.descent import gradients_of
from lightning_gradnorm.gradients import (
    CompiledSharedLayerError,
    GradientReader,
    HiddenUseError,
    IncompleteBackwardError,
    JointBackward,
    PerTaskBackward,
)
from lightning_gradnorm.recombination import RecombiningBackward
from lightning_gradnorm.task_gradients import TaskGradients, Weigh
from lightning_gradnorm.vector_jacobian import has_shards

Engine = Literal["auto", "joint", "per_task"]


class _Tolerance(NamedTuple):
    norms: float
    rounding: float
    whole: float


# Relative difference of the norms; what is rounding, of the largest norm; and of all that arrives at W.
_AGREE = {torch.float32: _Tolerance(1e-3, 1e-4, 1e-5), torch.float64: _Tolerance(1e-3, 1e-4, 1e-13)}
_AGREE_IN_HALF = _Tolerance(5e-2, 1e-2, 1e-2)  # where a part of the way is in half precision
_DEEP = 10_000  # nodes of a graph
_MOST_CHECKS = 8  # shapes may differ from batch to batch


class Reading:
    """Reads the tasks' gradients around each backward, by the engine that was chosen and has proved right.

    Args:
        engine: ``"joint"``: from the one backward; ``"per_task"``: by one backward per task, slower; ``"auto"``: the first,
            and the second where the backward cannot be read.

    Attributes:
        engine: what was chosen.
        engine_used: ``"joint"`` or ``"per_task"``, once something was read.
        words: what is to be told of a change of engine, once each; whoever tells takes it out.
    """

    def __init__(self, engine: Engine = "auto") -> None:
        check_choice("engine", engine, get_args(Engine))
        self.engine = engine
        self.restart()

    def restart(self) -> None:
        """Another training: everything is to be proved again."""
        self.engine_used: str | None = None
        self.words: list[str] = []
        self._type: type[GradientReader] = PerTaskBackward if self.engine == "per_task" else JointBackward
        self._proved: set[Any] = set()
        self._reader: GradientReader | None = None
        self._second: PerTaskBackward | None = None
        self._audit: Audit | None = None
        self._whole: list[Tensor | None] = []  # the gradient of the total, the slow way
        self._outlives: list[Node] = []  # the last deep graph's nodes, which Python holds until that graph is gone

    @property
    def engine_to_use(self) -> str:
        """What the next backward is read by."""
        return self._type.engine

    def begin(
        self,
        root: Tensor,
        losses: Mapping[str, Tensor],
        tensors: Sequence[Tensor],
        edges: Sequence[GradientEdge] | None = None,
        *,
        keep: bool = True,
        pairs: bool = False,
        weigh: Weigh | None = None,
    ) -> None:
        """Get ready for the backward of ``root``; other arguments and errors are those of ``GradientReader``.

        Args:
            root: scalar that ``backward()`` will be called on.
            losses: the tapped losses.
            tensors: W.
            edges: where its gradients arrive.
            keep: whether more than norms will be asked for.
            pairs: whether inner products will be asked for beside the norms.
            weigh: the weights under which the gradients are put together anew where the tasks meet, in this backward, if they
                are to be; see ``RecombiningBackward``.

        Raises:
            ScatteredTasksError: if there is no such place.
        """
        self.discard()
        try:
            reader = self._reader = self._new(root, losses, tensors, edges, keep=keep, pairs=pairs, weigh=weigh)
        except (ValueError, RuntimeError):
            self._outlives = _nodes_if_deep(root)
            raise
        # PyTorch 2.13 frees a graph that Python has looked at by recursion, and 40,000 nodes in a row overflow the stack. Not
        # if Python holds the nodes until all else is gone, as it is by the next reading, and lets go of parents first.
        self._outlives = reader.nodes_if_more_than(_DEEP) if isinstance(reader, JointBackward) else []
        kind = (
            type(reader),
            tuple(losses),
            tuple((tuple(t.shape), t.dtype, id(t) if t.is_leaf else 0) for t in tensors),
            reader.shapes,
        )
        if kind in self._proved or len(self._proved) == _MOST_CHECKS or not isinstance(reader, JointBackward):
            return
        if not has_shards(reader.graph.edges):
            self._proved.add(kind)
            reader.discard()  # or it would hear of the second reading
            try:
                self._second = PerTaskBackward(root, losses, tensors, edges)
            except (CompiledSharedLayerError, HiddenUseError):
                self._second = None  # that way is not open here
            reader = self._reader = self._new(root, losses, tensors, edges, weigh=weigh, verify=True)
            assert isinstance(reader, JointBackward), "as the one before"
            if self._second is not None:
                self._audit = Audit(root, reader.graph, reader.parameters)
                self._whole = gradients_of({"total": root}, reader.wanted)[0]

    def _new(
        self,
        root: Tensor,
        losses: Mapping[str, Tensor],
        tensors: Sequence[Tensor],
        edges: Sequence[GradientEdge] | None,
        *,
        keep: bool = True,
        pairs: bool = False,
        weigh: Weigh | None,
        verify: bool = False,
    ) -> GradientReader:
        if weigh is not None:
            return RecombiningBackward(root, losses, tensors, edges, weigh=weigh, verify=verify)
        return self._type(root, losses, tensors, edges, keep=keep, pairs=pairs)

    def finish(self) -> TaskGradients | None:
        """What the backward brought; ``None`` where nothing was begun.

        Raises:
            IncompleteBackwardError: if it could not be read; ``engine="auto"`` goes on with the other engine, where that can do
                what was asked for.
            RuntimeError: if what was put together anew has proved wrong.
        """
        reader, second, audit, whole = self._reader, self._second, self._audit, self._whole
        self._reader = self._second = self._audit = None
        self._whole = []
        if reader is None:
            return None
        try:
            found = reader.gradients()
        except IncompleteBackwardError as error:
            if self.engine == "auto" and not isinstance(reader, RecombiningBackward):
                self._type = PerTaskBackward
                self.words.append(f"{error} From the next step on, engine='per_task' is used, which is slower.")
            raise
        self.engine_used = reader.engine
        if second is None or audit is None:
            return found
        slow = second.gradients()
        in_half = audit.in_half_precision
        tolerance = _AGREE_IN_HALF if in_half else _AGREE.get(audit.precision, _AGREE_IN_HALF)
        difference = _difference(found.norms(), slow.norms(), tolerance)
        # The second reading does not see what hooks of the user do to gradients; the first sees a part of it.
        weights = reader.applied if isinstance(reader, RecombiningBackward) else [1.0] * len(found.tasks)
        together = _together(slow, weights)
        apart = _together(found, weights) - audit.scale.to(together) * together
        further = _together(slow, [weight - 1 for weight in weights])
        changed = difference is not None and audit.hooks_changed(whole, further, apart, tolerance.whole)
        audit.discard()
        if difference is None or changed:
            return found
        task, one, other = difference
        if isinstance(reader, RecombiningBackward):
            raise RuntimeError(
                "The gradients that were put together anew in the backward are not those of one backward per task: the norm "
                f"of task {slow.tasks[task]!r} is {one:.4g} by the first, {other:.4g} by the second. Take when='next step'. "
                "Please report the network: this should not happen."
            )
        self._type, self.engine_used = PerTaskBackward, PerTaskBackward.engine
        self.words.append(
            "The gradients read from the one backward are not those of one backward per task: the norm of task "
            f"{slow.tasks[task]!r} is {one:.4g} by the first, {other:.4g} by the second. From now on engine='per_task' is "
            "used, which is slower. Please report the network: this should not happen."
        )
        return slow

    def discard(self) -> None:
        """Let go of what was begun."""
        for part in (self._reader, self._second, self._audit):
            if part is not None:
                part.discard()
        self._reader = self._second = self._audit = None
        self._whole = []


def _nodes_if_deep(root: Tensor) -> list[Node]:
    """All nodes of a graph, children before parents; none of one that is freed without harm."""
    nodes = nodes_below(root.grad_fn)
    return nodes if len(nodes) > _DEEP else []


def _together(gradients: TaskGradients, weights: Sequence[float]) -> Tensor:
    """The tasks' gradients as the backward carries them, weighed and added up, ``[|W|]``."""
    rows = gradients.flat()
    return (rows * (gradients.cotangents.to(rows) * rows.new_tensor(weights)).unsqueeze(1)).sum(0)


def _difference(found: Tensor, expected: Tensor, tolerance: _Tolerance) -> tuple[int, float, float] | None:
    """(task, its norm, its norm the other way) where the two differ most, if by more than rounding; numbers alone decide."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if not bool(torch.isfinite(expected).all()) or not len(found):
        return None
    off = (found - expected).abs() / torch.maximum(expected, tolerance.rounding * expected.max()).clamp_min(1e-300)
    off = torch.where(off.isnan(), torch.inf, off)
    task = int(off.argmax())
    return None if off[task] <= tolerance.norms else (task, float(found[task]), float(expected[task]))
