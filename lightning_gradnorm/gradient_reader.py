"""What every reader of the tasks' gradients is: built before the backward, asked after it; and what can be wrong."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_gradnorm.autograd_graph import TaskGraph
from lightning_gradnorm.measurement import Measurement, stack_scalars
from lightning_gradnorm.task_gradients import TaskGradients

BETWEEN = "Between the losses and the shared layer lies"


class UnreachedSharedLayerError(ValueError):
    """A task's loss does not reach the shared layer: it has no gradient there to balance."""

    def __init__(self, tasks: Iterable[str]) -> None:
        self.tasks: tuple[str, ...] = tuple(tasks)
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
            "buffers are given away as it runs, and a second run can return wrong gradients without an error. Keep the shared "
            "layer outside the compiled region (compile the trunk below it and the heads above it), or take norm_of='features' "
            "with a shared_layer() whose output leaves the compiled region."
        )


class HiddenUseError(RuntimeError):
    """A reentrant checkpoint hides a part of the tasks' gradients, which cannot be told apart by task."""

    def __init__(self, what: str = "The shared layer is also used inside") -> None:
        super().__init__(
            f"{what} a reentrant torch.utils.checkpoint, which hides that part of the tasks' gradients. "
            "Pass use_reentrant=False."
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
        keep: whether the gradients themselves will be asked for. If only their norms are, a large one is let go of as soon as
            its norm is had, where the engine can.
        pairs: whether their inner products will be asked for, too: if these and norms are all, what they are made of is let go
            of as soon as they are had, where the engine can.

    Attributes:
        tasks: task names.
        parameters: the tensors of W, each once.

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
        *,
        keep: bool = True,
        pairs: bool = False,
    ) -> None:
        self.tasks: tuple[str, ...] = tuple(losses)
        self._keep, self._pairs = keep, pairs
        given = list(parameters)
        first = {id(parameter): k for k, parameter in reversed(list(enumerate(given)))}  # one given twice counts once
        kept = sorted(first.values())
        self.parameters: list[Tensor] = [given[k] for k in kept]
        self._wanted: list[Tensor] | list[GradientEdge] = list(self.parameters)
        if edges is not None:
            edges = list(edges)
            self._wanted = [edges[k] for k in kept]
        self._losses = [loss.detach() for loss in losses.values()]
        self._begin(root, losses)

    @abstractmethod
    def _begin(self, root: Tensor, losses: Mapping[str, Tensor]) -> None:
        """Whatever is to be done before ``root.backward()``."""

    @property
    def wanted(self) -> list[Tensor] | list[GradientEdge]:
        """The tensors of W, or the edges on which their gradients arrive, while the backward is to come."""
        return self._wanted

    @abstractmethod
    def gradients(self) -> TaskGradients:
        """The tasks' gradients, once ``root.backward()`` has run."""

    @property
    def shapes(self) -> tuple[object, ...]:
        """What tells one kind of graph from another, while the backward is to come."""
        return ()

    @abstractmethod
    def discard(self) -> None:
        """Let go of the graph, and of all that was read."""

    def measurement(self, *, gramian: bool = False) -> Measurement:
        """The losses and unweighted gradient norms as a balancer's ``update`` takes them, once ``root.backward()`` has run.

        Args:
            gramian: whether the gradients' inner products are wanted too; they need ``keep=True`` or ``pairs=True``.
        """
        gradients = self.gradients()
        inner = gradients.gramian() if gramian else None
        norms = gradients.norms() if inner is None else inner.diagonal().clamp_min(0).sqrt()
        return Measurement(self.tasks, stack_scalars(self._losses), norms, gramian=inner)


def check_reached(graph: TaskGraph, losses: Mapping[str, Tensor]) -> None:
    """Raise for losses that the root was not built from, or that do not lead to W."""
    if len(graph.met) < len(losses):
        missing = [task for i, task in enumerate(losses) if i not in graph.met]
        raise ValueError(
            f"The total was not built from the tapped loss of {', '.join(f'task {task!r}' for task in missing)}. "
            "Build it from the losses that tap_losses() returned."
        )
    reaching = graph.reaching
    unreached = [task for i, (task, loss) in enumerate(losses.items()) if i not in reaching and loss.grad_fn not in graph.edges]
    if unreached:
        raise UnreachedSharedLayerError(unreached)
