"""Two tasks that are balanced already: the classes of the left and of the right one of two handwritten digits.

scikit-learn's digits, side by side; neither task is harder, larger or rarer than the other, so equal weights are right, and the
question is whether GradNorm does harm. What ``diagnose`` says beforehand is kept with the records.

    python -m benchmarks.experiments.no_harm                   # ten seeds: ten minutes
    python -m benchmarks.experiments.no_harm --quick
"""

from collections.abc import Callable, Iterator, Mapping

import lightning as L
import torch
from digits_problem import load
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.experiments.command import Case, Experiment, main
from benchmarks.experiments.fits import PAST, Fit
from benchmarks.experiments.records import Problem, Record
from lightning_gradnorm import (
    EqualWeights,
    GradNorm,
    LossBalancer,
    MultiTaskMixin,
    UncertaintyWeighting,
    diagnose,
)
from lightning_gradnorm.report.comparison import Better

NAME = "pairs of digits"
METHODS: dict[str, Callable[[], LossBalancer]] = {
    "equal": EqualWeights,
    "GradNorm": GradNorm,
    "uncertainty": UncertaintyWeighting,
}
BETTER: Mapping[str, Better] = {"left accuracy": "higher", "right accuracy": "higher"}
Pairs = tuple[Tensor, Tensor]


def pairs_of(images: Tensor, labels: Tensor, count: int, draws: torch.Generator) -> Pairs:
    """Two images each, side by side ``[count, 1, 8, 16]``, and their labels ``[count, 2]``."""
    chosen = torch.randint(len(labels), (count, 2), generator=draws)
    squares = images.reshape(-1, 8, 8)[chosen] / 16
    return torch.cat(squares.unbind(1), 2).unsqueeze(1), labels[chosen]


class Batches:
    """Pairs of training images, drawn anew for every step; an epoch is 50 steps.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self.images, self.labels = load()[0].tensors
        self.draws = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return 50

    def __iter__(self) -> Iterator[Pairs]:
        return (pairs_of(self.images, self.labels, 64, self.draws) for _ in range(len(self)))


class TwoDigits(MultiTaskMixin, L.LightningModule):
    """Two convolutions and a dense layer that both tasks share, two heads.

    Args:
        factors: task → factor of its loss.
    """

    def __init__(self, factors: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.factors = factors or {}
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 8, 64),
            nn.ReLU(),
        )
        self.left, self.right = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``[N, 1, 8, 16]`` → task → scores ``[N, 10]``."""
        features = self.trunk(images)
        return {"left": self.left(features), "right": self.right(features)}

    def task_losses(self, batch: Pairs, batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        pairs = zip(self(images).items(), labels.T, strict=True)
        return {task: self.factors.get(task, 1.0) * F.cross_entropy(score, label) for (task, score), label in pairs}

    @torch.no_grad()
    def accuracies(self, test: Pairs) -> dict[str, float]:
        """Of both tasks."""
        scores = self(test[0]).items()
        return {f"{t} accuracy": (s.argmax(1) == y).float().mean().item() for (t, s), y in zip(scores, test[1].T, strict=True)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)


def fit_pairs(case: Case, balancer: LossBalancer, factors: Mapping[str, float]) -> Record:
    """One fit; all methods start from one network and see the same pairs."""
    torch.manual_seed(case.seed)
    module, fit = TwoDigits(factors), Fit(case, balancer)
    fit.run(module, Batches(case.seed))
    test = pairs_of(*load()[1].tensors, 5000, torch.Generator().manual_seed(0))
    return fit.record(module.accuracies(test))


def fit(case: Case) -> Record:
    """One method, one seed. The baseline's record has the diagnosis."""
    record = fit_pairs(case, METHODS[case.method](), {})
    if case.method == "equal":
        torch.manual_seed(case.seed)
        found = diagnose(TwoDigits(), Batches(case.seed))
        record.extras.update(diagnosis=found.weighting, spread=found.spread)
    return record


EXPERIMENT = Experiment(
    name="no_harm",
    about=__doc__ or "",
    problems={NAME: Problem((*METHODS, PAST[0]), BETTER, PAST)},
    fit=fit,
    steps=1500,
    quick_steps=20,
    seeds=10,
)

if __name__ == "__main__":
    main(EXPERIMENT)
