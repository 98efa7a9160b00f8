"""Tasks that are there in a step and have no gradient on the shared layer: they are as if absent."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_gradnorm.measurement import Measurement, is_of_gradients, reading_is_free

_OF_IDLE = {"grad_norm": 0.0}  # diagnostic → its entry for a task without a gradient; a target or a rate it does not have


def mask_of(measurement: Measurement, needs: Iterable[str]) -> Tensor | None:
    """Which tasks have a gradient, boolean, shape ``[T]``; ``None`` where all have, or none of the needs is of gradients."""
    for name in needs:
        if is_of_gradients(name):
            sizes: Tensor = getattr(measurement, name)
            sizes = sizes.diagonal() if sizes.ndim > 1 else sizes
            return None if reading_is_free(sizes) and 0.0 not in sizes.tolist() else sizes != 0
    return None


def without_idle(measurement: Measurement, active: Tensor | None) -> Measurement:
    """As if the tasks that are not active were absent; all of them where none is."""
    kept = [] if active is None else [position for position, is_active in enumerate(active.tolist()) if is_active]
    return measurement.only(kept) if 0 < len(kept) < len(measurement.tasks) else measurement


def spread(tag: str, vector: Tensor, active: Tensor | None) -> Tensor:
    """A diagnostic of the active tasks, with entries for the others."""
    if active is None:
        return vector
    return vector.new_full(active.shape, _OF_IDLE.get(tag, torch.nan)).masked_scatter(active, vector)
