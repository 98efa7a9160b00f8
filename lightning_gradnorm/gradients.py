"""Per-task gradients on the shared layer, from the one joint backward.

The ordinary backward of Σ w_i L_i carries every task's own gradient up to the point where tasks merge. ``JointBackward``
reads it there and carries it down to the shared parameters W with one small vector-Jacobian product per task: exact,
with no second backward through heads or trunk, no ``retain_graph`` for the caller, no second-order graph.
``PerTaskBackward`` is the slow, obvious way (``torch.autograd.grad`` once per task): the tests' oracle and the fallback.
Both leave every parameter's ``.grad`` as the plain backward makes it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from lightning_gradnorm.autograd_graph import MERGED, REST, task_graph
from lightning_gradnorm.losses import check_losses
from lightning_gradnorm.measurement import Measurement, stack_scalars
from lightning_gradnorm.task_gradients import TaskGradients


def tap_losses(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same losses, each behind an identity node of its own.

    Whatever total is built from the tapped losses, the gradient that arrives at a tap is c_i = s · ∂total/∂L_i, with s
    the scale of the backward (a GradScaler's; 1/N of accumulation), and the tap's node belongs to its task alone.

    Args:
        losses: task name → scalar loss that requires grad.

    Raises:
        TypeError, ValueError: for losses that cannot be used; the message names the task and the way out.
    """
    return {task: loss.view_as(loss) for task, loss in check_losses(losses, differentiable=True).items()}


class UnreachedSharedLayerError(ValueError):
    """A task's loss does not reach the shared layer: it has no gradient there to balance."""

    def __init__(self, tasks: Iterable[str]) -> None:
        self.tasks = tuple(tasks)
        super().__init__(
            f"The loss of {', '.join(f'task {task!r}' for task in self.tasks)} does not reach the shared layer: no gradient "
            "flows from it to those parameters. Let shared_layer() name a layer that every task uses; leave a task out "
            "of the dict for a batch that has no label for it; and where the layer runs inside torch.utils.checkpoint, "
            "pass use_reentrant=False (a reentrant checkpoint hides its parameters from the graph). "
            "With torch.compile, compile the trunk below the layer and the heads above it, not the whole module."
        )


class CompiledSharedLayerError(RuntimeError):
    """A compiled backward would have to run several times, which ``torch.compile`` does not allow."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} inside a region that torch.compile has compiled into one backward, and that may run only once: its "
            "buffers are "
            "given away as it runs, and a second run can return wrong gradients without an error. Keep the shared layer "
            "outside the "
            "compiled region (compile the trunk below it and the heads above it), or take norm_of='features' with a "
            "shared_layer() whose output leaves the compiled region."
        )


class HiddenUseError(RuntimeError):
    """The shared layer was used inside a reentrant checkpoint as well, where its gradient cannot be told apart by task."""

    def __init__(self) -> None:
        super().__init__(
            "The shared layer is also used inside a reentrant torch.utils.checkpoint, which hides that part of the tasks' "
            "gradients. Pass use_reentrant=False."
        )


class IncompleteBackwardError(RuntimeError):
    """The backward did not pass through every node that carries a task's gradient."""


class GradientReader(ABC):
    """Reads each task's gradient on W around one ordinary backward of ``root``.

    Args:
        root: scalar that ``backward()`` will be called on: the total, scaled or with further terms as the case may be.
        losses: the tapped losses (see ``tap_losses``) that ``root`` was built from.
        parameters: the tensors of W: shared parameters, or features with a graph (for the norms of their gradients).
        edges: where in the graph their gradients arrive; by default at each tensor as it is now. A feature that is changed in
            place once the layer has returned it, as by ``nn.ReLU(inplace=True)``, stands for something else from then on: take
            its ``torch.autograd.graph.get_gradient_edge`` before.

    Raises:
        UnreachedSharedLayerError: if a task's loss does not reach any of the parameters.
        CompiledSharedLayerError: if a compiled backward would have to run more than once.
    """

    engine: ClassVar[str]

    def __init__(
        self,
        root: Tensor,
        losses: Mapping[str, Tensor],
        parameters: Iterable[Tensor],
        edges: Iterable[GradientEdge] | None = None,
    ) -> None:
        self.tasks = tuple(losses)
        self._parameters = list(parameters)
        self._wanted: list[Tensor] | list[GradientEdge] = list(self._parameters)
        if edges is not None:
            self._wanted = list(edges)
        self._losses = [loss.detach() for loss in losses.values()]
        self._begin(root, losses)

    @abstractmethod
    def _begin(self, root: Tensor, losses: Mapping[str, Tensor]) -> None:
        """Whatever is to be done before ``root.backward()``."""

    @abstractmethod
    def gradients(self) -> TaskGradients:
        """The tasks' gradients, once ``root.backward()`` has run."""

    @abstractmethod
    def discard(self) -> None:
        """Let go of the graph, and of all that was read."""

    def measurement(self) -> Measurement:
        """The losses and unweighted gradient norms as a balancer's ``update`` takes them, once ``root.backward()`` has run."""
        return Measurement(self.tasks, stack_scalars(self._losses), self.gradients().norms())


class PerTaskBackward(GradientReader):
    """Per-task gradients by ``torch.autograd.grad``, once per task, before the joint backward.

    Slow and obvious: each task walks its head and the way down to W once more.
    """

    engine: ClassVar[str] = "per_task"

    def _begin(self, root: Tensor, losses: Mapping[str, Tensor]) -> None:
        taps = {loss.grad_fn: task for task, loss in enumerate(losses.values()) if loss.grad_fn is not None}
        if root.grad_fn is not None and task_graph(root.grad_fn, taps, self._wanted).compiled(merged_only=False):
            raise CompiledSharedLayerError("The way from the losses to the shared layer leads")
        # With the joint backward's own cotangents as seeds, half precision under- and overflows no more than it does.
        seeds = torch.autograd.grad(root, list(losses.values()), retain_graph=True)
        gradients: list[list[Tensor | None]] = [
            list(torch.autograd.grad(loss, self._wanted, seed, retain_graph=True, allow_unused=True))
            for loss, seed in zip(losses.values(), seeds, strict=True)
        ]
        unreached = [task for task, row in zip(self.tasks, gradients, strict=True) if all(g is None for g in row)]
        if unreached:
            raise UnreachedSharedLayerError(unreached)
        self._wanted.clear()
        self._gradients = TaskGradients(self.tasks, gradients, stack_scalars(seeds), self._parameters)

    def gradients(self) -> TaskGradients:
        return self._gradients

    def discard(self) -> None:
        del self._gradients


class JointBackward(GradientReader):
    """Per-task gradients read from the one backward of ``root``, by hooks on the autograd graph.

    A node that only one task reaches ("exclusive") carries, during the joint backward, that task's own gradient, times
    c_i. A node that two tasks reach, or a task and a further term of ``root``, is "merged": the engine sums before it.

    1. One walk marks each node with its owner, and keeps those that lead to W.
    2. On an edge from an exclusive node straight into a parameter of W, a hook reads the task's gradient: free.
       (Physics-informed losses that meet only at the parameters need nothing else.)
    3. On an edge from an exclusive node into a merged one, the hook keeps the task's cotangent. A prehook of the merged
       node, which fires when all cotangents have arrived and before anything below it is freed, pushes each task's
       cotangent down to W.
    4. A hook on each tapped loss reads c_i.

    Use it around an ordinary backward::

        losses = tap_losses(losses)
        total = sum(weight[task] * loss for task, loss in losses.items())
        reader = JointBackward(total, losses, shared_layer.parameters())
        total.backward()
        norms = reader.gradients().norms()

    Attributes:
        is_merged: whether several tasks meet above every tensor of W, so that products are needed at all.

    Raises:
        ValueError: if two losses share a node (they were not tapped), or ``root`` was not built from them.
        UnreachedSharedLayerError: if a task's loss does not reach any of the parameters.
    """

    engine: ClassVar[str] = "joint"

    def _begin(self, root: Tensor, losses: Mapping[str, Tensor]) -> None:
        self._cotangents: list[Tensor | None] = [None] * len(self.tasks)
        self._gradients: list[list[Tensor | None]] = [[None] * len(self._parameters) for _ in self.tasks]
        self._arrived: dict[Node, dict[int, dict[int, Tensor]]] = {}  # merged node → task → input → cotangent
        self._handles: list[RemovableHandle] = []
        self._accumulated: dict[int, int] = {}
        self._awaited = 0  # exclusive nodes whose hook has not fired yet
        self.is_merged = False
        try:
            self._lay_hooks(root, losses)
        except BaseException:
            self.discard()
            raise

    def gradients(self) -> TaskGradients:
        """The tasks' gradients, once ``root.backward()`` has run.

        Raises:
            IncompleteBackwardError: if the backward did not pass through all of the tasks' graphs (it was not run, or
                was restricted with ``inputs=``).
            HiddenUseError: if W was used inside a reentrant checkpoint too.
        """
        self.discard()
        if any(count > 1 for count in self._accumulated.values()):
            raise HiddenUseError
        cotangents = [c for c in self._cotangents if c is not None]
        if self._awaited or len(cotangents) < len(self.tasks):
            raise IncompleteBackwardError(
                "The backward did not pass through the graph of every task's loss, so the tasks' gradients could not be read "
                "from it. Call backward() once on the total, without inputs=; or choose engine='per_task'."
            )
        return TaskGradients(self.tasks, self._gradients, stack_scalars(cotangents), self._parameters)

    def discard(self) -> None:
        """Remove the hooks, and with them every reference to the graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._arrived.clear()
        self._wanted.clear()

    def _lay_hooks(self, root: Tensor, losses: Mapping[str, Tensor]) -> None:
        taps = {loss.grad_fn: task for task, loss in enumerate(losses.values()) if loss.grad_fn is not None}
        if len(taps) < len(self.tasks) or root.grad_fn is None:
            raise ValueError("Every loss needs an autograd node of its own: pass the losses through tap_losses() first.")
        graph = task_graph(root.grad_fn, taps, self._wanted)
        if len(graph.met) < len(taps):
            missing = [task for i, task in enumerate(self.tasks) if i not in graph.met]
            raise ValueError(
                f"The total was not built from the tapped loss of {', '.join(f'task {task!r}' for task in missing)}. "
                "Build it from the losses that tap_losses() returned."
            )
        unreached = [task for task, loss in losses.items() if loss.grad_fn not in graph.edges]
        if unreached:
            raise UnreachedSharedLayerError(unreached)
        if graph.compiled(merged_only=True):
            raise CompiledSharedLayerError("The tasks' gradients meet above the shared layer")
        self.is_merged = all(graph.owners.get(node, REST) == MERGED for node, _ in graph.targets)
        self._awaited = len(graph.leaving)
        pushed: dict[Node, None] = {}
        for node, leaving in graph.leaving.items():
            # Where it leaves to: a tensor of W, or a merged node whose prehook takes it on.
            ways = [(i, child, nr, None if graph.is_pushed(child) else graph.targets[child, nr]) for i, child, nr in leaving]
            pushed |= {child: None for _, child, _, k in ways if k is None}
            self._handles.append(node.register_hook(self._read(graph.owners[node], ways)))
        if graph.has_reentrant_checkpoint():  # then count how often W takes in a gradient: once is all that we can see
            leaves: list[Any] = [tensor for tensor in self._parameters if tensor.is_leaf]
            self._handles += [leaf.register_post_accumulate_grad_hook(self._count) for leaf in leaves]
        self._handles += [node.register_prehook(self._push_down(node)) for node in pushed]
        self._handles += [node.register_prehook(self._read_cotangent(task)) for node, task in taps.items()]

    def _count(self, parameter: Tensor) -> None:
        self._accumulated[id(parameter)] = self._accumulated.get(id(parameter), 0) + 1

    def _read_cotangent(self, task: int) -> Callable[..., None]:
        def prehook(grad_outputs: tuple[Tensor | None, ...]) -> None:
            self._cotangents[task] = grad_outputs[0]

        return prehook

    def _read(self, task: int, ways: list[tuple[int, Node, int, int | None]]) -> Callable[..., None]:
        def hook(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
            self._awaited -= 1
            for output, child, number, k in ways:
                gradient = grad_inputs[output]
                if gradient is None:
                    continue
                if k is not None:
                    self._add(task, k, gradient)
                else:
                    held = self._arrived.setdefault(child, {}).setdefault(task, {})
                    held[number] = gradient if number not in held else held[number] + gradient

        return hook

    def _push_down(self, node: Node) -> Callable[..., None]:
        def prehook(grad_outputs: tuple[Tensor | None, ...]) -> None:
            # All taken at once, for each product runs the node, and with it this prehook, again; and let go of one by one.
            arrived = self._arrived.pop(node, {})
            while arrived:
                task, held = arrived.popitem()
                gradients = torch.autograd.grad(
                    [GradientEdge(node, number) for number in held],
                    self._wanted,
                    list(held.values()),
                    retain_graph=True,
                    allow_unused=True,
                )
                for k, gradient in enumerate(gradients):
                    if gradient is not None:
                        self._add(task, k, gradient)

        return prehook

    def _add(self, task: int, k: int, gradient: Tensor) -> None:
        # The tensor itself, not a detached alias: seeing it held, autograd copies it for .grad instead of taking its memory.
        held = self._gradients[task][k]
        gradient = gradient if held is None else held + gradient
        self._gradients[task][k] = gradient.detach() if gradient.requires_grad else gradient
