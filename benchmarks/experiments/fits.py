"""What the experiments' fits share: shuffled batches, the method of a case, a fit and its record."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from _common import quiet_trainer
from torch import Tensor

from benchmarks.experiments.command import Case
from benchmarks.experiments.records import Record
from lightning_gradnorm import FixedWeights, LossBalancer, LossBalancingCallback
from lightning_gradnorm.comparison import StepTimes

STATIC = "GradNorm static"  # retrained with the mean weights of the GradNorm run on the same seed
PAST = ("GradNorm 0.1", "GradNorm 0.1 static")  # version 0.1's default: α = 0.12, log w, the shared gradient's size kept


class Shuffled:
    """The rows of some tensors in a new order in every epoch; the same orders for the same seed.

    Args:
        tensors: of equal length.
        size: of a batch; the rows left over wait for the next epoch.
        seed: of the orders.
    """

    def __init__(self, tensors: tuple[Tensor, ...], size: int, seed: int) -> None:
        self.tensors, self.size = tensors, min(size, len(tensors[0]))
        self.draws = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.tensors[0]) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(self.tensors[0]), generator=self.draws)
        for chosen in order[: len(self) * self.size].split(self.size):
            yield tuple(tensor[chosen] for tensor in self.tensors)


def balancer_of(case: Case, makes: Mapping[str, Callable[[], LossBalancer]]) -> LossBalancer:
    """The case's method out of ``makes``, or the static one."""
    if case.method != STATIC:
        return makes[case.method]()
    assert case.before is not None, "the experiment says that it follows GradNorm"
    return FixedWeights(case.before.mean_weights)


class Fit:
    """A fit of so many steps, with what its record takes from it.

    Args:
        case: which.
        balancer: the method.
    """

    def __init__(self, case: Case, balancer: LossBalancer) -> None:
        self.case, self.balancing, self.times = case, LossBalancingCallback(balancer, summary=False), StepTimes()

    def run(
        self, module: L.LightningModule, *loaders: Iterable[Any], callbacks: Iterable[L.Callback] = (), **settings: Any
    ) -> None:
        """Train; ``callbacks`` see the weights updated, ``settings`` are the Trainer's."""
        in_order = [self.case.progress, self.balancing, *callbacks, self.times]
        quiet_trainer(in_order, max_steps=self.case.steps, max_epochs=-1, **settings).fit(module, *loaders)

    def record(self, measures: Mapping[str, float], curves: Mapping[str, list[float]] | None = None) -> Record:
        """What came of it."""
        case, balancing = self.case, self.balancing
        which = case.problem, case.method, case.seed, case.steps
        weights = balancing.weights, balancing.mean_weights
        return Record(*which, dict(measures), self.times.median(), *weights, dict(curves or {}))
