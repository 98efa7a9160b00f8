"""NASA's C-MAPSS engines: remaining useful life (in cycles) and state of health, from windows of sensor readings.

Prepared as usual: 14 of 21 sensors, z-scores per flight regime fitted on the training engines, windows of 30 cycles, life
capped at 125 cycles (the test engines' too), tested on the last window of each test engine; the few engines with a shorter
record are padded with their first reading. Three classes of health: over 80 cycles, 30 to 80, 30 or less.
"""

from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm import MultiTaskMixin

SENSORS = (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)
WINDOW, CAP = 30, 125
HEALTHY, WORN = 80, 30  # above the first: healthy; at most the second: near failure
Windows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Engines:
    """One subset.

    Attributes:
        train, test: windows ``[N, 14, 30]`` and remaining useful life in cycles ``[N]``.
    """

    train: Windows
    test: Windows

    @classmethod
    def read(cls, folder: Path, subset: str) -> "Engines":
        """``train_FD001.txt.xz``, ``test_FD001.txt.xz`` and ``RUL_FD001.txt.xz``, for ``subset="FD001"``."""
        train, test = (np.loadtxt(folder / f"{part}_{subset}.txt.xz") for part in ("train", "test"))
        left = np.loadtxt(folder / f"RUL_{subset}.txt.xz", ndmin=1)
        scale = Regimes(train)
        series = [(scale(rows), len(rows) - 1 - np.arange(len(rows))) for rows in by_engine(train)]
        windows = [all_windows(values, lives) for values, lives in series]
        last = np.stack([padded(scale(rows))[-WINDOW:] for rows in by_engine(test)])
        return cls(
            as_tensors(np.concatenate([part for part, _ in windows]), np.concatenate([lives for _, lives in windows])),
            as_tensors(last, left),
        )


class Regimes:
    """z-scores per flight regime, of which there are one or six; they differ in the first setting.

    Args:
        rows: all training engines', as they stand in the file.
    """

    def __init__(self, rows: NDArray[np.float64]) -> None:
        self.of = {
            regime: (part.mean(0), np.maximum(part.std(0), 1e-6))
            for regime in np.unique(rows[:, 2].round())
            for part in [sensors(rows[rows[:, 2].round() == regime])]
        }

    def __call__(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sensors ``[N, 14]``, scaled."""
        means, spreads = (np.stack([self.of[regime][i] for regime in rows[:, 2].round()]) for i in (0, 1))
        return (sensors(rows) - means) / spreads


def sensors(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The chosen ones' readings; they stand after engine, cycle and three settings."""
    return rows[:, [4 + number for number in SENSORS]]


def by_engine(rows: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Each engine's rows, in the order of its cycles."""
    return [rows[rows[:, 0] == engine] for engine in np.unique(rows[:, 0])]


def padded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """At least a window of rows, the first one repeated."""
    return np.concatenate([np.repeat(values[:1], max(WINDOW - len(values), 0), 0), values])


def all_windows(values: NDArray[np.float64], lives: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Every window of one engine ``[N, 30, 14]``, with the life at its last cycle."""
    values = padded(values)
    windows = np.lib.stride_tricks.sliding_window_view(values, WINDOW, axis=0).transpose(0, 2, 1)
    return windows, lives[-len(windows) :]


def as_tensors(windows: NDArray[np.float64], lives: NDArray[np.float64] | NDArray[np.int64]) -> Windows:
    """Channels first, lives capped."""
    return torch.from_numpy(windows).float().transpose(1, 2).contiguous(), torch.from_numpy(lives).float().clamp(max=CAP)


def health(lives: Tensor) -> Tensor:
    """0 healthy, 1 worn, 2 near failure."""
    return (lives <= HEALTHY).long() + (lives <= WORN).long()


def nasa_score(predicted: Tensor, true: Tensor) -> float:
    """Σ exp(−d/13) − 1 where the prediction is early, exp(d/10) − 1 where it is late (Saxena et al. 2008)."""
    late = (predicted - true).double()
    return torch.where(late < 0, torch.expm1(-late / 13), torch.expm1(late / 10)).sum().item()


class Turbofan(MultiTaskMixin, L.LightningModule):
    """Three convolutions along time, one dense layer that both tasks share, two heads; Adam with a cosine to zero.

    Args:
        steps: of the fit.
        unit: cycles that the life's head counts in: 1, or 125 for a target scaled by hand.
        factors: task → factor of its loss.
        start: cycles in the bias of the life's head before training; by default what the layer draws, near 0.
    """

    def __init__(
        self, steps: int, unit: float = 1.0, factors: dict[str, float] | None = None, start: float | None = None
    ) -> None:
        super().__init__()
        self.steps, self.unit, self.factors = steps, unit, factors or {}
        self.trunk = nn.Sequential(
            nn.Conv1d(len(SENSORS), 32, 5, stride=2),
            nn.ReLU(),
            nn.Conv1d(32, 32, 3, stride=2),
            nn.ReLU(),
            nn.Conv1d(32, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4, 64),
            nn.ReLU(),
        )
        self.life, self.state = nn.Linear(64, 1), nn.Linear(64, 3)
        if start is not None:
            nn.init.constant_(self.life.bias, start / unit)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, 14, 30]`` → life in the unit ``[N]``, scores of the states ``[N, 3]``."""
        features = self.trunk(windows)
        return self.life(features).squeeze(1), self.state(features)

    def shared_layer(self) -> nn.Module:
        return self.trunk[7]  # what would be found from the graph too, and its bias

    def task_losses(self, batch: Windows, batch_idx: int) -> dict[str, Tensor]:
        windows, lives = batch
        life, scores = self(windows)
        losses = {"life": F.mse_loss(life, lives / self.unit), "health": F.cross_entropy(scores, health(lives))}
        return {task: self.factors.get(task, 1.0) * loss for task, loss in losses.items()}

    @torch.no_grad()
    def measures(self, test: Windows) -> dict[str, float]:
        """Root mean square error and NASA's score of the life in cycles, accuracy of the state."""
        windows, lives = test
        life, scores = self(windows)
        life = (self.unit * life).clamp(0, CAP)
        return {
            "RMSE": (life - lives).square().mean().sqrt().item(),
            "NASA score": nasa_score(life, lives),
            "accuracy": (scores.argmax(1) == health(lives)).float().mean().item(),
        }

    def configure_optimizers(self) -> dict[str, object]:
        adam = torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": slower, "interval": "step"}}
