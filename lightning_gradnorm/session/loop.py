"""What a session has to know of the loop that drives it, and what it gives back."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.session.ranks import RankAgreement
from lightning_gradnorm.shared_layer import SharedLayerSpec
from lightning_gradnorm.window import MeasurementWindow


def warn(about: str, message: str) -> None:
    """Python's own way to tell.

    Args:
        about: names the matter, for those who tell each once.
        message: for people.
    """
    warnings.warn(message, stacklevel=3)


@dataclass(frozen=True)
class Loop:
    """What a session has to know of the loop that drives it.

    Attributes:
        network: what is trained.
        shared_layer: what its user names as W; ``None`` to have it found.
        giver: where the user names it, for the messages.
        tell: takes each warning, as (what it is about, the message); each is told once in a run.
        inform: takes what is worth a line, and no warning.
        name: of what the user sees, for the messages.
        one_total: whether a second total before the backward is a mistake.
        may_thaw: whether a layer that is frozen now will be trained later.
        losses_of: the dotted name of a submodule that returns a dict of losses, which are weighed on their way out.
        ranks: what the ranks agree on, in a distributed run.
        norms_suffice: whether this batch is the whole of its step, and nobody will ask for the gradients' cosines.
    """

    network: nn.Module
    shared_layer: Callable[[], SharedLayerSpec | None] = lambda: None
    giver: str = "shared_layer()"
    tell: Callable[[str, str], None] = warn
    inform: Callable[[str], None] = lambda message: None
    name: str = "BalancingSession"
    one_total: bool = False
    may_thaw: bool = False
    losses_of: str | None = None
    ranks: RankAgreement | None = None
    norms_suffice: Callable[[], bool] = lambda: False


class BalancedStep(NamedTuple):
    """What one optimiser step was.

    Attributes:
        measurement: what it measured.
        applied: the weights that it applied, of ``measurement.tasks``, shape ``[T]``.
        due: whether the balancer learnt from it.
        window: its micro-batches, for the gradients' cosines.
        interval: of how many optimiser steps the balancer learnt from one at this step.
    """

    measurement: Measurement
    applied: Tensor
    due: bool
    window: MeasurementWindow
    interval: int
