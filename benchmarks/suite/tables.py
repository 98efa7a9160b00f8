"""Rows of numbers made in code: regressions in unequal units, and a regression beside a class, 500 : 1 in gradient."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.suite.data import entropy, miss_rate, relu_trunk, rmse, shuffled
from benchmarks.suite.problem import Batch, Problem, generator


@functools.cache
def rows(seed: int, features: int, targets: int, train: int) -> tuple[Batch, Batch]:
    """Inputs ``[N, features]`` and smooth functions of them ``[N, targets]`` with variance 1 and a twentieth of noise.

    Each target is a mixture, its own, of hidden features that all share.

    Returns:
        Rows to train on, and 2000 held out.
    """
    draws = generator(seed, 1)
    x = torch.randn(train + 2000, features, generator=draws)
    inner = torch.randn(features, 10, generator=draws) / features**0.5
    hidden = torch.sin(x @ inner + torch.randn(10, generator=draws))
    y = hidden @ torch.randn(10, targets, generator=draws)
    y = (y - y.mean(0)) / y.std(0) + 0.05**0.5 * torch.randn(len(x), targets, generator=draws)
    return (x[:train], y[:train]), (x[train:], y[train:])


class Regressions(Problem):
    """Eight regressions in units from 0.1 to 100; the error is the geometric mean of the RMSE over the unit."""

    name, kind, steps = "eight regressions", "data", 2000
    units = (0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
    tasks = tuple(f"unit {unit:g}" for unit in units)
    raised = tasks[:4]
    shared = ("trunk.2.weight", "trunk.2.bias")
    batch = 64

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.trunk = relu_trunk(16, 64, 64)
        self.heads = nn.ModuleList(nn.Linear(64, 1) for _ in self.units)

    def stream(self) -> Iterator[Batch]:
        return shuffled(rows(self.seed, 16, 8, 2048)[0], self.batch, generator(self.seed))

    def epoch(self) -> int:
        return 2048 // self.batch

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        parts = zip(self.tasks, self.units, self.heads, y.unbind(1), strict=True)
        return {task: F.mse_loss(head(features).squeeze(1), unit * target) for task, unit, head, target in parts}

    def errors(self) -> Sequence[float]:
        losses = self.losses(*rows(self.seed, 16, 8, 2048)[1])
        return [loss.sqrt().item() / unit for loss, unit in zip(losses.values(), self.units, strict=True)]

    def trivial_losses(self) -> Mapping[str, float]:
        return {task: unit**2 for task, unit in zip(self.tasks, self.units, strict=True)}


class Tabular(Problem):
    """A price, in units of which it spans dozens, and whether a thing is sold: gradients of 500 : 1."""

    name, kind, steps = "tabular 500 : 1", "data", 1500
    tasks, raised = ("price", "sold"), ("sold",)
    shared = ("trunk.2.weight", "trunk.2.bias")
    unit = 20.0
    batch = 32

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.trunk = relu_trunk(12, 64, 64)
        self.price, self.sold = nn.Linear(64, 1), nn.Linear(64, 2)

    def parts(self) -> tuple[Batch, Batch]:
        """Inputs, prices and classes: to train on, and held out."""
        train, test = ((x, 3 * self.unit + self.unit * y[:, 0], (y[:, 1] > 0).long()) for x, y in rows(self.seed, 12, 2, 2048))
        return train, test

    def stream(self) -> Iterator[Batch]:
        return shuffled(self.parts()[0], self.batch, generator(self.seed))

    def epoch(self) -> int:
        return 2048 // self.batch

    def losses(self, x: Tensor, price: Tensor, sold: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        return {
            "price": F.mse_loss(self.price(features).squeeze(1), price),
            "sold": F.cross_entropy(self.sold(features), sold),
        }

    def errors(self) -> Sequence[float]:
        x, price, sold = self.parts()[1]
        features = self.trunk(x)
        return [rmse(self.price(features).squeeze(1), price), miss_rate(self.sold(features), sold)]

    def trivial_losses(self) -> Mapping[str, float]:
        _, price, sold = self.parts()[0]
        return {"price": price.var().item(), "sold": entropy(sold)}
