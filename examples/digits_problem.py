"""The three tasks on scikit-learn's handwritten digits, module and data, for ``digits.py``, ``compare.py`` and the configs."""

from collections.abc import Sequence

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_gradnorm import MultiTaskMixin


def load() -> tuple[TensorDataset, TensorDataset]:
    """1347 images to train on and 450 to test with, each with its label; the same split for every seed."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return TensorDataset(train_images.float(), train_labels), TensorDataset(test_images.float(), test_labels)


class Digits(MultiTaskMixin, L.LightningModule):
    """A trunk down to a code of 16 numbers, and a head per task.

    Args:
        lr: learning rate of Adam.

    The regressions start from the means of the training images, as one would set them by hand; from zero, the ink's loss
    would start at 100,000.
    """

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        mean_image = load()[0].tensors[0].mean(0)
        self.trunk = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16), nn.ReLU())
        self.digit = nn.Linear(16, 10)
        self.pixels = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64))
        self.ink = nn.Linear(16, 1)
        nn.init.constant_(self.ink.bias, mean_image.sum().item())
        with torch.no_grad():
            self.pixels[-1].bias.copy_(mean_image)
        errors = {task: MeanSquaredError(squared=False) for task in ("pixels", "ink")}
        self.held_out = nn.ModuleDict({"digit": MulticlassAccuracy(10, average="micro"), **errors})

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[N, 64]`` images → class scores ``[N, 10]``, images ``[N, 64]``, ink ``[N]``."""
        code = self.trunk(images / 16)
        return self.digit(code), self.pixels(code), self.ink(code).squeeze(1)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Task → loss, in the data's own units."""
        scores, pixels, ink = self(images)
        return {
            "digit": F.cross_entropy(scores, labels),
            "pixels": F.mse_loss(pixels, images),
            "ink": F.mse_loss(ink, images.sum(1)),
        }

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self.total_loss(self.losses(*batch))

    def shared_layer(self) -> nn.Module:
        return self.trunk[2]  # what GradNorm would find by itself: the last layer of the trunk

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        images, labels = batch
        truths = {"digit": labels, "pixels": images, "ink": images.sum(1)}
        for (task, truth), answer in zip(truths.items(), self(images), strict=True):
            metric = self.held_out[task]
            assert isinstance(metric, Metric)
            metric.update(answer, truth)
            self.log(f"held_out/{task}", metric)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class DigitsWithIndicators(Digits):
    """``Digits`` that also says how well each task is doing, between 0 and 1, for Dynamic Task Prioritization."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        losses = self.losses(images, labels)
        variances = {"pixels": images.var(0).mean(), "ink": images.sum(1).var()}
        explained = {task: (1 - losses[task] / variance).clamp(0, 1) for task, variance in variances.items()}
        likelihood = (-losses["digit"]).exp()  # of the right class, geometric mean
        return self.total_loss(losses, kpis={"digit": likelihood, **explained})


class DigitsData(L.LightningDataModule):
    """Batches for a Trainer.

    Args:
        batch_size: of the training batches; the held-out images come in one.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train, self.test = load()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=len(self.test))
