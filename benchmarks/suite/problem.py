"""What a problem of the suite is."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["data", "equation"]
Batch = tuple[Tensor, ...]


class Problem(nn.Module):
    """One problem with the network of one seed; its parameters are drawn from the global generator.

    What ``losses`` reads of the module is alike in all seeds, so that the trainings of several can be stacked: what differs
    comes with the batch.

    Args:
        seed: of what is drawn besides the network.

    Attributes:
        name: for people and records.
        kind: data to be fitted, or an equation to be solved.
        steps: of the whole training.
        tasks: names of the losses, in their order.
        residuals: those that are the residual of an equation.
        raised: those whose weight is tried by hand at 10 and 100: on equations all but the residuals; on data those whose
            gradient on W is the smaller one at first.
        shared: W, as dotted names.
        lr, betas, weight_decay: of Adam, or AdamW.
    """

    name: str
    kind: Kind
    steps: int
    tasks: tuple[str, ...]
    residuals: tuple[str, ...] = ()
    raised: tuple[str, ...] = ()
    shared: tuple[str, ...]
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def stream(self) -> Iterator[Batch]:
        """A batch for every step, without end; the same ones for the same seed."""
        raise NotImplementedError

    def losses(self, *batch: Tensor) -> dict[str, Tensor]:
        """Task → loss, scalar, or one per point, of which the mean counts; no more than ``torch.func.vmap`` can stack."""
        raise NotImplementedError

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        return self.losses(*batch)

    def epoch(self) -> int:
        """Steps from one end of an epoch to the next; where batches never repeat, a fiftieth of the training stands for it."""
        return max(self.steps // 50, 1)

    def errors(self) -> Sequence[float]:
        """On what was held out; lower is better, above 0."""
        raise NotImplementedError

    @torch.no_grad()
    def error(self) -> float:
        """The geometric mean of the errors."""
        values = self.errors()
        return math.exp(sum(math.log(value) for value in values) / len(values)) if all(map(math.isfinite, values)) else math.nan

    def lr_factor(self, progress: float) -> float:
        """Of the learning rate, at a share of the training."""
        return 1.0

    def trivial_losses(self) -> Mapping[str, float]:
        """Task → what the best constant prediction comes to on the training data; none for equations."""
        return {}


def generator(seed: int, purpose: int = 0) -> torch.Generator:
    """A stream of random numbers of its own for each purpose of a seed."""
    return torch.Generator().manual_seed(1_000_000 * (purpose + 1) + seed)
