"""What one optimiser step measured: all that a balancer ever sees of a model."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Measurement(NamedTuple):
    """Detached statistics of the tasks that took part in one optimiser step.

    Attributes:
        tasks: the names of those tasks, ``T`` of them; the order of the entries below.
        losses: L_i(t), unweighted, shape ``[T]``, in the losses' own units.
        gradient_norms: n_i = ‖∇_W L_i‖₂ of the *unweighted* losses on the shared layer W, shape ``[T]``, or ``None``
            where they were not measured.
        gradient_maxima: max ∣∇_W L_i∣, the largest entry in size, shape ``[T]``, or ``None``.
        gradient_means: mean ∣∇_W L_i∣ over the entries, shape ``[T]``, or ``None``.
        kpis: each task's key performance indicator (an accuracy, say), shape ``[T]``, or ``None``.
        ntk_traces: the mean of ‖∇_W r‖² over the points of the task, whose loss is the mean of r², shape ``[T]``, or ``None``:
            the trace of its tangent kernel over the number of points.
        gramian: ⟨∇_W L_i, ∇_W L_j⟩, the inner products of the unweighted losses' gradients on W, shape ``[T, T]``, or ``None``.
    """

    tasks: tuple[str, ...]
    losses: Tensor
    gradient_norms: Tensor | None = None
    gradient_maxima: Tensor | None = None
    gradient_means: Tensor | None = None
    kpis: Tensor | None = None
    ntk_traces: Tensor | None = None
    gramian: Tensor | None = None

    def only(self, positions: Sequence[int]) -> "Measurement":
        """Of the tasks at these positions, as if the others were absent.

        Args:
            positions: in ``tasks``.
        """
        index = torch.tensor(positions, device=self.losses.device)
        others = {name: vector[index] for name, vector in self._asdict().items() if isinstance(vector, Tensor)}
        if self.gramian is not None:
            others["gramian"] = self.gramian[index][:, index]
        return self._replace(tasks=tuple(self.tasks[position] for position in positions), **others)


def is_of_gradients(field: str) -> bool:
    """Whether a field of a measurement is of the tasks' gradients on the shared layer, and 0 for a task that has none."""
    return field == "gramian" or field.startswith(("gradient_", "ntk_"))


def reading_is_free(tensor: Tensor) -> bool:
    """Whether a number can be asked for without making the host wait for a device."""
    return tensor.is_cpu


def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it, so that sums of squares neither overflow nor lose digits."""
    return torch.float32 if device.type == "mps" else torch.float64


def stack_scalars(scalars: Iterable[Tensor]) -> Tensor:
    """``T`` scalars of any float type and device → shape ``[T]`` on the first one's device, as wide as it can be."""
    scalars = list(scalars)
    device = scalars[0].device
    return torch.stack([scalar.to(device) for scalar in scalars]).to(widest_float(device))
