"""``JointBackward``: the tasks' gradients out of the one joint backward."""

import functools
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from lightning_gradnorm.autograd_graph import MERGED, REST, Edge, TaskGraph, task_graph
from lightning_gradnorm.descent import Arrivals, Descent, Pace, Target
from lightning_gradnorm.factors import WeightFactors
from lightning_gradnorm.gradient_reader import (
    BETWEEN,
    CompiledSharedLayerError,
    GradientReader,
    HiddenUseError,
    IncompleteBackwardError,
    check_reached,
)
from lightning_gradnorm.measurement import stack_scalars
from lightning_gradnorm.task_gradients import TaskGradients, is_small, norm_of
from lightning_gradnorm.vector_jacobian import frames_of, shape_of
from lightning_gradnorm.weight_products import find_factors


class JointBackward(GradientReader):
    """Per-task gradients read from the one backward of ``root``, by hooks on the autograd graph.

    A node that only one task reaches ("exclusive") carries, during the joint backward, that task's own gradient, times
    c_i. A node that two tasks reach, or a task and a further term of ``root``, is "merged": the engine sums before it.

    1. One walk marks each node with its owner, and keeps those that lead to W.
    2. On an edge from an exclusive node straight into a parameter of W, a hook reads the task's gradient: free.
       (Physics-informed losses that meet only at the parameters need nothing else.)
    3. On an edge from an exclusive node into a merged one, the hook keeps the task's cotangent. A prehook of the merged
       node, which fires when all cotangents have arrived and before the node is used up, carries each task's on by the
       node's vector-Jacobian product, and from there as far down as nothing else is waited for.
    4. A hook on each tapped loss reads c_i.

    Where a weight of W is an operand of matrix products or convolutions, and rows are few, the factors of the tasks'
    gradients are kept in the place of their products: see ``lightning_gradnorm.factors``.

    Use it around an ordinary backward::

        losses = tap_losses(losses)
        total = sum(weight[task] * loss for task, loss in losses.items())
        reader = JointBackward(total, losses, shared_layer.parameters())
        total.backward()
        norms = reader.gradients().norms()

    Args:
        root: scalar that ``backward()`` will be called on.
        losses: task name → loss from ``tap_losses`` that ``root`` was built from.
        parameters: W, the shared parameters.
        edges: where gradients are read, one for each of them, if not at the parameters themselves.
        keep: whether more than the norms will be asked for; if not, a large gradient is let go of once its norm is had.
        pairs: whether, if not, inner products will be asked for all the same: then factors are let go of once these are had.

    Attributes:
        is_merged: whether several tasks meet above every tensor of W, so that products are needed at all.

    Raises:
        ValueError: if two losses share a node (they were not tapped), or ``root`` was not built from them.
        UnreachedSharedLayerError: if a task's loss does not reach any of the parameters.
        HiddenUseError: if a reentrant checkpoint lies where tasks have met.
    """

    engine: ClassVar[str] = "joint"
    _keeps_factors = True
    _way_out = "choose engine='per_task'"

    def _begin(self, root: Tensor, losses: Mapping[str, Tensor]) -> None:
        self._cotangents: list[Tensor | None] = [None] * len(self.tasks)
        self._handles: list[RemovableHandle] = []
        self._accumulated: dict[int, int] = {}
        self._factors: dict[int, WeightFactors] = {}
        self._arrivals = Arrivals(0, 0, {}, {})
        self._graph: TaskGraph | None = None
        self._pace: Pace | None = None
        self._norms: list[dict[int, Tensor]] | None = None if self._keep else [{} for _ in self.tasks]
        self._awaited = 0  # exclusive nodes whose hook has not fired yet
        self.is_merged: bool = False
        try:
            self._lay_hooks(root, losses)
        except BaseException:
            self.discard()
            raise

    def gradients(self) -> TaskGradients:
        """The tasks' gradients, once ``root.backward()`` has run.

        Raises:
            IncompleteBackwardError: if the backward did not pass through all of the tasks' graphs (it was not run, or
                was restricted with ``inputs=``), or the total gives a task the weight 0 (told on the CPU; the norm is NaN
                elsewhere).
            HiddenUseError: if W was used inside a reentrant checkpoint too.
        """
        self.discard()
        return self._found()

    def _found(self) -> TaskGradients:
        """What has arrived at W by now: all that is wanted, once every node that is a task's own has run."""
        if any(count > 1 for count in self._accumulated.values()):
            raise HiddenUseError
        cotangents = [c for c in self._cotangents if c is not None]
        if self._awaited or len(cotangents) < len(self.tasks):
            raise IncompleteBackwardError(
                "The backward did not pass through the graph of every task's loss, so the tasks' gradients could not be read "
                f"from it. Call backward() once on the total, without inputs=; or {self._way_out}."
            )
        seeds = stack_scalars(cotangents)
        if seeds.device.type == "cpu" and 0.0 in (said := seeds.tolist()):
            unseen = [task for task, seed in zip(self.tasks, said, strict=True) if seed == 0]
            raise IncompleteBackwardError(
                f"The total gives {', '.join(f'task {task!r}' for task in unseen)} the weight 0, so nothing of its gradient is "
                f"in the backward. Leave it out of the losses, give it a small weight, or {self._way_out}."
            )
        rows = self._arrivals.gradients
        return TaskGradients(self.tasks, rows, seeds, self.parameters, self._factors, self._norms, self._pairs)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What tells one kind of graph from another, while the backward is to come: nodes, and the shape where tasks meet."""
        merged = next(reversed(self.graph.merged), None)
        return len(self.graph.owners), () if merged is None else shape_of(merged)

    def nodes_if_more_than(self, number: int) -> list[Node]:
        """All nodes of the graph that Python has looked at, children before parents; none where they are fewer.

        Args:
            number: up to which a graph is freed without harm.
        """
        return self.graph.seen if len(self.graph.owners) > number else []

    @property
    def graph(self) -> TaskGraph:
        """The part of the graph that leads to W, while the backward is to come."""
        assert self._graph is not None, "before the backward"
        return self._graph

    def discard(self) -> None:
        """Remove the hooks, and with them every reference to the graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._graph, self._pace, self._wanted = None, None, []
        self._arrivals.let_go()

    def _lay_hooks(self, root: Tensor, losses: Mapping[str, Tensor]) -> None:
        taps = {loss.grad_fn: task for task, loss in enumerate(losses.values()) if loss.grad_fn is not None}
        if len(taps) < len(self.tasks) or root.grad_fn is None:
            raise ValueError("Every loss needs an autograd node of its own: pass the losses through tap_losses() first.")
        graph = task_graph(root.grad_fn, taps, self._wanted)
        self._check(graph, losses)
        further = self._further_targets(graph)
        graph.targets.update(further)
        self.is_merged = all(graph.owners.get(node, REST) == MERGED for node, _ in graph.targets)
        self._awaited, self._graph = len(graph.leaving), graph
        self._arrivals = Arrivals(len(self.tasks), len(self._wanted) + len(further), graph.targets, graph.merged)
        self._pace = self._paced(graph)
        for node, leaving in graph.leaving.items():
            self._handles.append(node.register_hook(functools.partial(self._read, graph.owners[node], leaving)))
        if graph.has_reentrant_checkpoint():  # then count how often W takes in a gradient: once is all that we can see
            leaves: list[Any] = [tensor for tensor in self.parameters if tensor.is_leaf]
            self._handles += [leaf.register_post_accumulate_grad_hook(self._count) for leaf in leaves]
        self._handles += [node.register_prehook(self._read_cotangent(task)) for node, task in taps.items()]

    def _paced(self, graph: TaskGraph) -> Pace | None:
        """What carries on from where tasks meet above W, and lets go of large gradients; ``None`` where there is neither."""
        ends = {} if self._keep or self._pairs else _ends_to_let_go(graph, self.parameters)
        if not graph.merged and not ends:
            return None
        by_node: Mapping[Node, tuple[int, WeightFactors]] = {}
        frames = frames_of(graph.merged)
        if self._keeps_factors and not frames:  # a frame's operands can be had once
            of_w = {target: k for target, k in graph.targets.items() if k < len(self._wanted)}
            by_node, self._factors = find_factors(
                graph.merged, graph.leaving, of_w, self._wanted, len(self.tasks), self._keep, self._pairs
            )
        descent = Descent(list(graph.merged), graph.merged, graph.targets, self._arrivals, by_node, frames)
        held = self._held(graph, frames)
        apart = not self._keep and bool(ends or by_node)
        pace = Pace(descent, graph.merged, graph.leaving, graph.owners, held, self._let_go, ends, apart=apart)
        self._handles += [node.register_prehook(_engine_at(pace, node)) for node in pace.calls]
        return pace

    def _further_targets(self, graph: TaskGraph) -> dict[Target, int]:
        """Places, beside W's, at which each task's gradient is wanted → their numbers, which follow those of W."""
        return {}

    def _held(self, graph: TaskGraph, frames: Container[Node]) -> Container[Node]:
        """Where tasks' cotangents wait for the engine."""
        return frames if self._may_hurry() else graph.merged

    def _may_hurry(self) -> bool:
        """Whether nodes may run before the engine comes: not beside a device's streams, or hooks that gather shards."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        return not together and all(tensor.device.type == "cpu" for tensor in (*self.parameters, *self._losses))

    def _check(self, graph: TaskGraph, losses: Mapping[str, Tensor]) -> None:
        check_reached(graph, losses)
        if graph.compiled(merged_only=True):
            raise CompiledSharedLayerError("The tasks' gradients meet above the shared layer")
        if graph.has_reentrant_checkpoint(merged_only=True):
            raise HiddenUseError(BETWEEN)

    def _count(self, parameter: Tensor) -> None:
        self._accumulated[id(parameter)] = self._accumulated.get(id(parameter), 0) + 1

    def _read_cotangent(self, task: int) -> Callable[..., None]:
        def prehook(grad_outputs: tuple[Tensor | None, ...]) -> None:
            self._cotangents[task] = grad_outputs[0]

        return prehook

    def _read(self, task: int, leaving: list[Edge], grad_inputs: tuple[Tensor | None, ...], _: object) -> None:
        """The hook of a task's own node, which has run."""
        self._awaited -= 1
        arrivals, pace = self._arrivals, self._pace
        for output, child, number, k, turned in leaving:
            gradient = grad_inputs[output]
            if gradient is not None and k is None:
                arrivals.add(task, child, number, gradient)
            elif gradient is not None and k is not None:
                arrivals.add_at_target(task, k, gradient.t() if turned else gradient)
            if pace is not None:
                pace.came(task, child if k is None else k)
        if not self._awaited:
            self._own_what_was_turned()

    @torch.no_grad()
    def _let_go(self, task: int, k: int) -> None:
        """Of a gradient that is whole, its norm is all that will be asked for."""
        gradient = self._arrivals.gradients[task][k]
        if gradient is not None and self._norms is not None:
            self._norms[task][k] = norm_of(gradient)
            self._arrivals.gradients[task][k] = None

    def _own_what_was_turned(self) -> None:
        """A gradient seen above its transpose, to which no other task's is added, will have its memory taken for ``.grad``."""
        rows = self._arrivals.gradients
        for k in {k for out in self.graph.leaving.values() for *_, k, turned in out if turned and k is not None}:
            held = [(row, gradient) for row in rows if (gradient := row[k]) is not None]
            if len(held) == 1:
                row, gradient = held[0]
                row[k] = gradient.clone()


def _ends_to_let_go(graph: TaskGraph, tensors: Sequence[Tensor]) -> dict[Node, int]:
    """Node → number of the tensor of W whose gradient arrives there alone, and is large enough to have its norm by itself."""
    times = Counter(node for node, _ in graph.targets)
    return {
        node: k
        for (node, _), k in graph.targets.items()
        if times[node] == 1 and node not in graph.merged and not is_small(tensors[k])
    }


def _engine_at(pace: Pace, node: Node) -> Callable[..., None]:
    def prehook(grad_outputs: tuple[Tensor | None, ...]) -> None:
        pace.engine_at(node)

    return prehook
