"""Data to be fitted: scikit-learn's digits, the toy of the GradNorm paper, and regressions made in code."""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.suite.problem import Batch, Problem, generator


def relu_trunk(*widths: int) -> nn.Sequential:
    """A ReLU after every linear layer."""
    layers = [(nn.Linear(*pair), nn.ReLU()) for pair in itertools.pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in layer))


def shuffled(rows: Batch, size: int, draws: torch.Generator) -> Iterator[Batch]:
    """Batches of the rows, in a new order in every epoch; those left over wait for the next."""
    while True:
        order = torch.randperm(len(rows[0]), generator=draws)
        for chosen in order[: len(order) // size * size].split(size):
            yield tuple(row[chosen] for row in rows)


def rmse(answer: Tensor, truth: Tensor) -> float:
    """Root mean square error."""
    return (answer - truth).square().mean().sqrt().item()


def miss_rate(scores: Tensor, labels: Tensor) -> float:
    """Share of wrong classes; of no wrong one, that of half a wrong one."""
    return max((scores.argmax(1) != labels).float().mean().item(), 0.5 / len(labels))


def entropy(labels: Tensor) -> float:
    """Of the classes' frequencies: the cross-entropy of the best constant scores."""
    share = labels.bincount().double() / len(labels)
    return -(share * share.log()).nansum().item()


@functools.cache
def digits() -> tuple[Batch, Batch]:
    """1347 images ``[N, 64]`` with labels to train on, 450 to test with; the same split for every seed."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return (train_images.float(), train_labels), (test_images.float(), test_labels)


class Digits(Problem):
    """Class, pixels and amount of ink of a handwritten digit, as in ``examples/digits.py``."""

    name, kind, steps = "digits", "data", 1500
    tasks, raised = ("digit", "pixels", "ink"), ("digit", "pixels")
    shared = ("trunk.2.weight", "trunk.2.bias")
    lr = 3e-3
    batch = 64

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        mean_image = digits()[0][0].mean(0)
        self.trunk = relu_trunk(64, 128, 16)
        self.digit = nn.Linear(16, 10)
        self.pixels = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64))
        self.ink = nn.Linear(16, 1)
        nn.init.constant_(self.ink.bias, mean_image.sum().item())
        with torch.no_grad():
            self.pixels[-1].bias.copy_(mean_image)

    def stream(self) -> Iterator[Batch]:
        return shuffled(digits()[0], self.batch, generator(self.seed))

    def epoch(self) -> int:
        return len(digits()[0][1]) // self.batch

    def answers(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores ``[N, 10]``, images ``[N, 64]``, ink ``[N]``."""
        code = self.trunk(images / 16)
        return self.digit(code), self.pixels(code), self.ink(code).squeeze(1)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores, pixels, ink = self.answers(images)
        return {
            "digit": F.cross_entropy(scores, labels),
            "pixels": F.mse_loss(pixels, images),
            "ink": F.mse_loss(ink, images.sum(1)),
        }

    def errors(self) -> Sequence[float]:
        images, labels = digits()[1]
        scores, pixels, ink = self.answers(images)
        return [miss_rate(scores, labels), rmse(pixels, images), rmse(ink, images.sum(1))]

    def trivial_losses(self) -> Mapping[str, float]:
        images, labels = digits()[0]
        pixels, ink = images.var(0).mean().item(), images.sum(1).var().item()
        return {"digit": entropy(labels), "pixels": pixels, "ink": ink}


class Pairs(Problem):
    """The classes of the left and of the right one of two digits: two tasks that are balanced already."""

    name, kind, steps = "pairs of digits", "data", 800
    tasks, raised = ("left", "right"), ("left",)
    shared = ("dense.0.weight", "dense.0.bias")

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)])
        self.dense = relu_trunk(32 * 4 * 8, 64)
        self.left, self.right = nn.Linear(64, 10), nn.Linear(64, 10)

    @staticmethod
    def draw(rows: Batch, count: int, draws: torch.Generator) -> Batch:
        """Two images each, side by side ``[count, 1, 8, 16]``, and their labels ``[count, 2]``."""
        chosen = torch.randint(len(rows[1]), (count, 2), generator=draws)
        squares = rows[0].reshape(-1, 8, 8)[chosen] / 16
        return torch.cat(squares.unbind(1), 2).unsqueeze(1), rows[1][chosen]

    def stream(self) -> Iterator[Batch]:
        draws = generator(self.seed)
        while True:
            yield self.draw(digits()[0], 64, draws)

    def scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of the left and of the right, ``[N, 10]`` each."""
        first, second = self.convolutions
        features = self.dense(second(F.max_pool2d(first(images).relu(), 2)).relu().flatten(1))
        return self.left(features), self.right(features)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        pairs = zip(self.tasks, self.scores(images), labels.unbind(1), strict=True)
        return {task: F.cross_entropy(scores, label) for task, scores, label in pairs}

    def errors(self) -> Sequence[float]:
        images, labels = self.draw(digits()[1], 3000, generator(0, 1))
        return [miss_rate(scores, label) for scores, label in zip(self.scores(images), labels.unbind(1), strict=True)]

    def trivial_losses(self) -> Mapping[str, float]:
        return dict.fromkeys(self.tasks, math.log(10))


class Toy(Problem):
    """f_i(x) = σ_i tanh((B + ε_i) x), from 250 to 100 numbers; the error is Σ_i L_i(t)/L_i(0) / T on held-out inputs."""

    kind = "data"
    steps = 1500
    shared = ("trunk.6.weight", "trunk.6.bias")
    lr = 2e-3
    sigmas: tuple[float, ...]

    def __init_subclass__(cls) -> None:
        cls.tasks = tuple(f"σ={sigma:g}" for sigma in cls.sigmas)
        middle = math.exp(sum(map(math.log, cls.sigmas)) / len(cls.sigmas))
        cls.raised = tuple(task for task, sigma in zip(cls.tasks, cls.sigmas, strict=True) if sigma < middle)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.trunk = relu_trunk(250, 100, 100, 100, 100)
        self.heads = nn.ModuleList(nn.Linear(100, 100) for _ in self.sigmas)
        draws = generator(seed, 1)
        matrices = 10 * torch.randn(100, 250, generator=draws) + 3.5 * torch.randn(len(self.sigmas), 100, 250, generator=draws)
        self.matrices = matrices.flatten(0, 1).T.contiguous()
        self.held_out = self.draw(1000, draws)
        self.first = self.held_out_losses()

    def draw(self, size: int, draws: torch.Generator) -> Batch:
        """Inputs ``[size, 250]`` of length one, and tanh((B + ε_i) x), ``[T, size, 100]``."""
        x = F.normalize(2 * torch.rand(size, 250, generator=draws) - 1)
        return x, (x @ self.matrices).tanh_().unflatten(1, (-1, 100)).transpose(0, 1)

    def stream(self) -> Iterator[Batch]:
        draws = generator(self.seed)
        while True:
            yield self.draw(100, draws)

    def losses(self, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        parts = zip(self.tasks, self.sigmas, self.heads, targets.unbind(0), strict=True)
        return {task: F.mse_loss(head(features), sigma * target) for task, sigma, head, target in parts}

    @torch.no_grad()
    def held_out_losses(self) -> list[float]:
        """One per task."""
        return [loss.item() for loss in self.losses(*self.held_out).values()]

    def errors(self) -> Sequence[float]:
        ratios = [now / then for now, then in zip(self.held_out_losses(), self.first, strict=True)]
        return [sum(ratios) / len(ratios)]

    def trivial_losses(self) -> Mapping[str, float]:
        return {task: sigma**2 for task, sigma in zip(self.tasks, self.sigmas, strict=True)}


class ToyOfTwo(Toy):
    """σ = 1 and 100."""

    name, sigmas = "toy, T = 2", (1, 100)


class ToyOfTen(Toy):
    """The σ of public code."""

    name, sigmas = "toy, T = 10", (48, 3, 54, 16, 9, 30, 52, 26, 47, 81)
