"""``LayerWatch`` of version 0.1: ``JointBackward`` reads as fast without it."""

import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lightning_gradnorm.gradients import GradientReader, JointBackward


class LayerWatch:
    """Deprecated: write ``JointBackward(total, losses, layer.parameters())``, which finds the layer's calls in the graph.

    Args:
        layer: the shared layer.
        parameters: those of its parameters that W consists of; by default all that are trained.
    """

    def __init__(self, layer: nn.Module, parameters: Iterable[Tensor] | None = None) -> None:
        warnings.warn(
            "LayerWatch is no longer needed, and will be gone in the next version: JointBackward finds the layer's calls in "
            "the graph. Write JointBackward(total, losses, layer.parameters()) in the place of watch.reader(total, losses).",
            DeprecationWarning,
            stacklevel=2,
        )
        self.layer = layer
        trained = (parameter for parameter in layer.parameters() if parameter.requires_grad)
        self.parameters: list[Tensor] = list(trained if parameters is None else parameters)

    def start(self) -> None:
        """Does nothing any more."""

    def stop(self) -> None:
        """Does nothing any more."""

    def reader(self, root: Tensor, losses: Mapping[str, Tensor]) -> GradientReader:
        """``JointBackward`` of the layer's parameters.

        Args:
            root: scalar that ``backward()`` will be called on.
            losses: the tapped losses that it was built from.
        """
        return JointBackward(root, losses, self.parameters)
