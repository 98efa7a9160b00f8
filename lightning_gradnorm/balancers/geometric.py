"""Geometric loss strategy (Chennupati, Sistu, Yogamani, Rawashdeh, CVPR workshops 2019, arXiv 1904.08492)."""

from collections.abc import Sequence

from torch import Tensor

from lightning_gradnorm.balancers.own_losses import OwnLosses

_LEAST_LOSS = 1e-30


def geometric_weights(losses: Tensor) -> Tensor:
    """∂ (Π_i L_i)^{1/T} / ∂L_i = (Π_j L_j)^{1/T} / (T L_i), shape ``[T]``."""
    losses = losses.clamp_min(_LEAST_LOSS)
    return (losses.log().mean() - losses.log()).exp() / len(losses)


class GeometricLoss(OwnLosses):
    """Trains on (Π_i L_i)^{1/T}: every task's relative progress counts alike, whatever its unit.

    It has no state. The applied weight ∂total/∂L_i depends on the losses of the step itself, is what is reported, and is
    not bound to a sum: Σ w_i L_i is the geometric mean. Under DDP and accumulation each batch has its own weights.

    Source: Chennupati, Sistu, Yogamani, Rawashdeh, CVPR workshops 2019, arXiv 1904.08492.

    Args:
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: as everywhere; only what is reported between steps depends on it.

    Raises:
        ValueError: for a negative loss.
    """

    def _weights_of(self, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        return geometric_weights(losses)
