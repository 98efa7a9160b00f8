"""Tox21: twelve toxicity assays from molecular fingerprints, a fifth of the labels missing, one loss per assay.

``mixed``: batches of all molecules; a loss is the mean over the labels that are there. ``panels apart``: a batch has the
labels of one panel only, the seven nuclear receptors (NR) or the five stress responses (SR), so that half of the tasks are
absent from it. ROC-AUC on a fifth of the molecules, held out.

    python -m benchmarks.experiments.tox21 --data DATA         # five seeds: twenty minutes
    python -m benchmarks.experiments.tox21 --data DATA --quick
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from _common import figure_style, plt
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

from benchmarks.experiments.command import Case, Experiment, main
from benchmarks.experiments.curves import COLOURS, add_legend
from benchmarks.experiments.fits import PAST, STATIC, Fit, Shuffled, balancer_of
from benchmarks.experiments.records import Problem, Record, Records
from lightning_gradnorm import (
    EqualWeights,
    GradNorm,
    LossBalancer,
    MultiTaskMixin,
    UncertaintyWeighting,
)
from lightning_gradnorm.report.comparison import Better

MIXED, APART = "mixed", "panels apart"
MISSING = -1
BALANCERS: dict[str, Callable[[], LossBalancer]] = {
    "equal": EqualWeights,
    "uncertainty": UncertaintyWeighting,
    "GradNorm": GradNorm,
}
METHODS = (*BALANCERS, STATIC, *PAST)
BETTER: Mapping[str, Better] = {"mean ROC-AUC": "higher", "lowest ROC-AUC": "higher"}
Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Molecules:
    """The data, split.

    Attributes:
        tasks: names of the assays.
        train, test: fingerprints ``[N, 1024]`` and labels ``[N, 12]``: 0, 1, or −1 where there is none.
    """

    tasks: tuple[str, ...]
    train: Labelled
    test: Labelled

    @classmethod
    def read(cls, folder: Path) -> "Molecules":
        """``tox21_ecfp4_1024.npz``; every seed has the same split."""
        with np.load(folder / "tox21_ecfp4_1024.npz") as file:
            bits = torch.from_numpy(np.unpackbits(file["x_packed"], axis=1)).float()
            labels, tasks = torch.from_numpy(file["y"]).float(), tuple(map(str, file["tasks"]))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        test, train = order[: len(order) // 5], order[len(order) // 5 :]
        return cls(tasks, (bits[train], labels[train]), (bits[test], labels[test]))


read = functools.cache(Molecules.read)


class Batches(Shuffled):
    """The molecules, shuffled, in batches of 128.

    Args:
        molecules: whose training part it is.
        seed: of the orders.
        apart: whether a batch keeps the labels of one panel only.
    """

    def __init__(self, molecules: Molecules, seed: int, apart: bool) -> None:
        super().__init__(molecules.train, 128, seed)
        self.apart = apart
        self.receptors = torch.tensor([task.startswith("NR") for task in molecules.tasks])

    def __iter__(self) -> Iterator[Labelled]:
        for bits, labels in super().__iter__():
            if self.apart:
                kept = self.receptors if torch.rand((), generator=self.draws) < 0.5 else ~self.receptors
                labels = torch.where(kept, labels, float(MISSING))
            yield bits, labels


class Assays(MultiTaskMixin, L.LightningModule):
    """Two layers that all assays share, and a logit per assay.

    Args:
        tasks: names of the assays.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.tasks = tasks
        self.trunk = nn.Sequential(nn.Linear(1024, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 128), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(128, 1) for _ in tasks)

    def forward(self, bits: Tensor) -> Tensor:
        """``[N, 1024]`` → logits ``[N, 12]``."""
        features = self.trunk(bits)
        return torch.cat([head(features) for head in self.heads], 1)

    def shared_layer(self) -> nn.Parameter:
        return self.trunk[3].weight  # what would be found from the graph too

    def task_losses(self, batch: Labelled, batch_idx: int) -> dict[str, Tensor]:
        bits, labels = batch
        features, losses = self.trunk(bits), {}
        for task, head, label in zip(self.tasks, self.heads, labels.T, strict=True):
            there = label != MISSING
            if there.any():  # an assay without a label in this batch is left out
                losses[task] = F.binary_cross_entropy_with_logits(head(features[there]).squeeze(1), label[there])
        return losses

    @torch.no_grad()
    def areas(self, test: Labelled) -> dict[str, float]:
        """ROC-AUC per assay, over the molecules that have its label."""
        logits, labels = self(test[0]), test[1]
        there = labels != MISSING
        columns = zip(self.tasks, logits.T, labels.T, there.T, strict=True)
        return {task: binary_auroc(logit[known], label[known].long()).item() for task, logit, label, known in columns}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)


def fit(case: Case) -> Record:
    """One fit; all methods start from one network and see the same batches."""
    assert case.data is not None, "the experiment says that it needs them"
    molecules = read(case.data / "tox21")
    torch.manual_seed(case.seed)
    module, fit = Assays(molecules.tasks), Fit(case, balancer_of(case, BALANCERS))
    fit.run(module, Batches(molecules, case.seed, case.problem == APART))
    areas = module.eval().areas(molecules.test)
    return fit.record({"mean ROC-AUC": sum(areas.values()) / len(areas), "lowest ROC-AUC": min(areas.values()), **areas})


def draw(records: Records, path: Path) -> None:
    """Per assay: difference of the ROC-AUC to equal weights, a dot per seed."""
    problems = [problem for problem in (MIXED, APART) if records.of(problem, METHODS)]
    if not problems:
        return
    with figure_style():
        figure, grid = plt.subplots(1, len(problems), figsize=(5.6 * len(problems), 5), squeeze=False, sharey=True)
        for axes, problem in zip(grid[0], problems, strict=True):
            found = records.of(problem, METHODS)
            tasks = [name for name in found["equal"][0].measures if name not in BETTER][::-1]
            for shift, method in zip((0.2, 0.0, -0.2), ("GradNorm", "GradNorm 0.1", "uncertainty"), strict=True):
                for place, task in enumerate(tasks):
                    pairs = zip(found.get(method, []), found["equal"], strict=bool(method in found))
                    values = [ours.measures[task] - theirs.measures[task] for ours, theirs in pairs]
                    label = method if not place else None
                    heights = [place + shift] * len(values)
                    axes.plot(values, heights, "o", color=COLOURS[method], alpha=0.6, markersize=4, label=label)
            axes.axvline(0, color=COLOURS["equal"], linewidth=1.2)
            axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
            axes.set(title=f"{problem}: ROC-AUC minus that of equal weights", xlabel="to the right is better")
            add_legend(axes, loc="best")
        figure.savefig(path)
        plt.close(figure)


EXPERIMENT = Experiment(
    name="tox21",
    about=__doc__ or "",
    problems=dict.fromkeys((MIXED, APART), Problem(METHODS, BETTER, PAST)),
    fit=fit,
    draw=draw,
    steps=1000,
    quick_steps=20,
    seeds=5,
    after={STATIC: "GradNorm"},
    needs_data="tox21",
)

if __name__ == "__main__":
    main(EXPERIMENT)
