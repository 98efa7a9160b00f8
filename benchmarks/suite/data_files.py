"""Problems on real files, from the folder that $LIGHTNING_GRADNORM_DATA names, prepared as in the experiments."""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

from benchmarks.experiments import tox21, turbofans
from benchmarks.suite.data import entropy, miss_rate, relu_trunk, rmse, shuffled
from benchmarks.suite.problem import Batch, Problem, generator

NEEDS_FILES = "LIGHTNING_GRADNORM_DATA"

ASSAYS = (
    *(f"NR-{name}" for name in ("AR", "AR-LBD", "AhR", "Aromatase", "ER", "ER-LBD", "PPAR-gamma")),
    *(f"SR-{name}" for name in ("ARE", "ATAD5", "HSE", "MMP", "p53")),
)


def folder() -> Path | None:
    """Where the files are, if they are anywhere."""
    return Path(os.environ[NEEDS_FILES]) if NEEDS_FILES in os.environ else None


def file_folder(name: str) -> Path:
    """One of its folders."""
    where = folder()
    if where is None:
        raise FileNotFoundError(f"${NEEDS_FILES} does not name a folder with {name}/; see benchmarks/results/README.md")
    return where / name


@functools.cache
def engines(subset: str) -> turbofans.Engines:
    """One subset of C-MAPSS."""
    return turbofans.Engines.read(file_folder("cmapss"), subset)


class Turbofan(Problem):
    """Remaining life in cycles, and state of health, from windows of sensor readings; the network of the experiment."""

    kind, steps = "data", 1200
    tasks, raised = ("life", "health"), ("health",)
    shared = ("dense.0.weight", "dense.0.bias")
    batch = 128
    subset: str

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        sizes = ((len(turbofans.SENSORS), 32, 5, 2), (32, 32, 3, 2), (32, 64, 3, 1))
        self.convolutions = nn.ModuleList(nn.Conv1d(i, o, size, stride=stride) for i, o, size, stride in sizes)
        self.dense = relu_trunk(64 * 4, 64)
        self.life, self.health = nn.Linear(64, 1), nn.Linear(64, 3)

    def lr_factor(self, progress: float) -> float:
        return (1 + torch.tensor(torch.pi * progress).cos().item()) / 2

    def stream(self) -> Iterator[Batch]:
        return shuffled(engines(self.subset).train, self.batch, generator(self.seed))

    def epoch(self) -> int:
        return len(engines(self.subset).train[1]) // self.batch

    def answers(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Life ``[N]``, scores of the states ``[N, 3]``."""
        features = windows
        for convolution in self.convolutions:
            features = convolution(features).relu()
        features = self.dense(features.flatten(1))
        return self.life(features).squeeze(1), self.health(features)

    def losses(self, windows: Tensor, lives: Tensor) -> dict[str, Tensor]:
        life, scores = self.answers(windows)
        return {"life": F.mse_loss(life, lives), "health": F.cross_entropy(scores, turbofans.health(lives))}

    def errors(self) -> Sequence[float]:
        windows, lives = engines(self.subset).test
        life, scores = self.answers(windows)
        return [rmse(life.clamp(0, turbofans.CAP), lives), miss_rate(scores, turbofans.health(lives))]

    def trivial_losses(self) -> Mapping[str, float]:
        lives = engines(self.subset).train[1]
        return {"life": lives.var().item(), "health": entropy(turbofans.health(lives))}


class TurbofanOne(Turbofan):
    """One flight regime."""

    name = subset = "FD001"


class TurbofanTwo(Turbofan):
    """Six flight regimes."""

    name = subset = "FD002"


class Assays(Problem):
    """Twelve toxicity assays from fingerprints, a fifth of the labels missing; the error is 1 − mean ROC-AUC.

    Raised by hand are those with the fewest positive labels, below one in twenty: all gradients are alike at first. The
    dropout's masks come with the batches, so that all methods see the same ones.
    """

    name, kind, steps = "Tox21", "data", 400
    tasks, raised = ASSAYS, ("NR-AR", "NR-AR-LBD", "NR-PPAR-gamma", "SR-ATAD5")
    shared = ("last.weight",)
    weight_decay = 1e-2
    batch = 128

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.entry, self.last, self.heads = nn.Linear(1024, 256), nn.Linear(256, 128), nn.Linear(128, len(ASSAYS))

    def stream(self) -> Iterator[Batch]:
        draws = generator(self.seed)
        for bits, labels in shuffled(molecules().train, self.batch, draws):
            yield bits, labels, 2.0 * (torch.rand(len(bits), 256, generator=draws) < 0.5)

    def epoch(self) -> int:
        return len(molecules().train[1]) // self.batch

    def logits(self, bits: Tensor, kept: Tensor | None = None) -> Tensor:
        """``[N, 12]``."""
        features = self.entry(bits).relu()
        return self.heads(self.last(features if kept is None else features * kept).relu())

    def losses(self, bits: Tensor, labels: Tensor, kept: Tensor) -> dict[str, Tensor]:
        there = labels != tox21.MISSING
        losses = F.binary_cross_entropy_with_logits(self.logits(bits, kept), labels.clamp_min(0), reduction="none")
        means = (losses * there).sum(0) / there.sum(0).clamp_min(1)
        return dict(zip(self.tasks, means.unbind(), strict=True))

    def errors(self) -> Sequence[float]:
        bits, labels = molecules().test
        columns = zip(self.logits(bits).T, labels.T, strict=True)
        areas = [binary_auroc(logit[label >= 0], label[label >= 0].long()).item() for logit, label in columns]
        return [1 - sum(areas) / len(areas)]

    def trivial_losses(self) -> Mapping[str, float]:
        labels = molecules().train[1]
        return {task: entropy(column[column >= 0].long()) for task, column in zip(self.tasks, labels.T, strict=True)}


@functools.cache
def molecules() -> tox21.Molecules:
    """Tox21, split."""
    return tox21.Molecules.read(file_folder("tox21"))


NEED_FILES = (Turbofan, Assays)
