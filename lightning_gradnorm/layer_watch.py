"""Notes the calls of a shared Linear or convolution, and reads the tasks' gradients through it where the Gram form is less."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lightning_gradnorm.autograd_graph import are_used_in_calls_only
from lightning_gradnorm.gradients import GradientReader, JointBackward
from lightning_gradnorm.layer_gradients import CONVOLUTIONS, LayerCall, LayerGradients, gram_is_less


class LayerBackward(GradientReader):
    """``JointBackward`` down to the outputs of a layer's calls, and from there all tasks at once; see ``LayerGradients``."""

    engine = "joint"

    def __init__(
        self,
        root: Tensor,
        losses: Mapping[str, Tensor],
        parameters: Iterable[Tensor],
        layer: nn.Module,
        calls: Iterable[LayerCall],
    ) -> None:
        self._layer, self._calls = layer, list(calls)
        super().__init__(root, losses, parameters)

    def _begin(self, root: Tensor, losses: Mapping[str, Tensor]) -> None:
        outputs, edges = [call.output for call in self._calls], [call.edge for call in self._calls]
        self._at_outputs = JointBackward(root, losses, outputs, edges)

    @property
    def is_merged(self) -> bool:
        """Whether several tasks meet above every call, so that there is anything to carry through the layer."""
        return self._at_outputs.is_merged

    def gradients(self) -> LayerGradients:
        found = LayerGradients(self._at_outputs.gradients(), self._layer, self._calls, self._parameters)
        self._calls = []
        return found

    def discard(self) -> None:
        self._at_outputs.discard()
        self._calls = []


class _Blind:
    """What a copy of the layer keeps of a watch on it: a hook that notes nothing."""

    _calls = None

    def _note(self, layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        pass


class LayerWatch:
    """Watches a layer's calls, so that its tasks' gradients can be read all at once::

        watch = LayerWatch(net.shared)  # once
        for x, y in batches:
            watch.start()
            …
            reader = watch.reader(total, losses)  # in the place of JointBackward(total, losses, net.shared.parameters())
            total.backward()

    Any module may be given; what is neither a Linear nor a convolution, or is used in another way than by calling it, is read
    by ``JointBackward`` as ever.

    Args:
        layer: the shared layer.
        parameters: those of its parameters that W consists of; by default all that are trained.
    """

    def __init__(self, layer: nn.Module, parameters: Iterable[Tensor] | None = None) -> None:
        self.layer = layer
        self.parameters = [p for p in layer.parameters() if p.requires_grad] if parameters is None else list(parameters)
        self._calls: list[LayerCall] | None = None  # while nothing is noted
        self._handle: RemovableHandle | None = None
        self.start()

    def start(self) -> None:
        """Note calls from now on, up to the next ``reader``."""
        self._calls = []
        if self._handle is None and self.is_known():
            self._handle = self.layer.register_forward_hook(self._note)

    def stop(self) -> None:
        """Note nothing more, let go of what was noted, and take the hook off the layer."""
        self._calls = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __deepcopy__(self, memo: dict[int, object]) -> "_Blind":
        return _Blind()

    def __reduce__(self) -> tuple[type["_Blind"], tuple[()]]:
        return (_Blind, ())

    def is_known(self) -> bool:
        """Whether the layer's weight is among W, and all of W is the layer's own."""
        if type(self.layer) not in (nn.Linear, *CONVOLUTIONS):
            return False
        own = [self.layer.weight, self.layer.bias]
        return any(p is self.layer.weight for p in self.parameters) and all(
            any(p is other for other in own) for p in self.parameters
        )

    def _note(self, layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if not torch.is_grad_enabled() or self._calls is None:
            return
        given = inputs[0] if len(inputs) == 1 else None
        alone = len(layer._forward_hooks) == 1  # another hook may give another output
        if alone and isinstance(given, Tensor) and isinstance(output, Tensor) and output.requires_grad:
            self._calls.append(LayerCall(given, output, get_gradient_edge(output)))
        else:
            self._calls = None  # this step is read in the general way

    def reader(self, root: Tensor, losses: Mapping[str, Tensor]) -> GradientReader:
        """For the backward of ``root``: as ``JointBackward`` takes it, and raises.

        Args:
            root: scalar that ``backward()`` will be called on.
            losses: the tapped losses that it was built from.
        """
        calls, self._calls = self._calls, None
        if calls and root.grad_fn is not None and gram_is_less(self.layer, calls, len(losses)) and self._are_all(root, calls):
            reader = LayerBackward(root, losses, self.parameters, self.layer, calls)
            if reader.is_merged:
                return reader
            reader.discard()  # every task has calls of its own: its gradient passes by on its way to W, for nothing
        return JointBackward(root, losses, self.parameters)

    def _are_all(self, root: Tensor, calls: list[LayerCall]) -> bool:
        """Whether W is used in these calls, and nowhere else in the graph."""
        assert root.grad_fn is not None
        return are_used_in_calls_only(self.parameters, {call.edge.node for call in calls}, root.grad_fn)
