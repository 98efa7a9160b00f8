"""Three answers to every pixel of a picture, as on NYUv2 in the paper: kind of object, depth, and surface normal.

The losses are those of the GradNorm paper (Chen et al., ICML 2018, section 5), in the units that the data come in:

- ``segmentation``: cross-entropy over six classes, in nats;
- ``depth``: squared error, in square metres;
- ``normals``: 1 − the cosine of the angle between the answer and the truth.
"""

import itertools
from collections.abc import Iterator

import lightning as L
import torch
from scenes_renderer import Views, render
from scenes_rooms import CLASSES, draw_rooms
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_gradnorm import MultiTaskMixin

TASKS = ("segmentation", "depth", "normals")
# task → what is measured on held-out rooms, decimals to print; the lower, the better
MEASURES = {"segmentation": ("100 − mIoU", 1), "depth": ("depth RMSE, m", 3), "normals": ("mean angle, °", 2)}
BATCH = 8


def load(train: int = 1000, held_out: int = 250) -> tuple[Views, Views]:
    """Rooms to train on and rooms to test with, the same for every seed."""
    draws = torch.Generator().manual_seed(0)
    return render(draw_rooms(train, draws), draws=draws), render(draw_rooms(held_out, draws), draws=draws)


class Batches:
    """Batches of views in a new order in every epoch, every other one in a mirror; the same orders for the same seed.

    Args:
        views: that they are drawn from.
        seed: of the orders.
        size: of a batch; the views left over wait for the next epoch.
    """

    def __init__(self, views: Views, seed: int, size: int = BATCH) -> None:
        self.views, self.size = views, size
        self.draws = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.views) // self.size

    def __iter__(self) -> Iterator[Views]:
        order = torch.randperm(len(self.views), generator=self.draws)
        for i, rows in enumerate(order[: len(self) * self.size].split(self.size)):
            views = self.views[rows]
            yield mirrored(views) if i % 2 else views


def mirrored(views: Views) -> Views:
    """Left is right; a normal to the left is one to the right."""
    sides = views.normals.new_tensor([-1, 1, 1]).view(3, 1, 1)
    flipped = Views(*(part.flip(-1) for part in vars(views).values()))
    return Views(flipped.image, flipped.classes, flipped.depth, sides * flipped.normals)


def block(inputs: int, outputs: int) -> nn.Module:
    """A 3×3 convolution, batch-normalised."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Features ``[N, width, H/2, W/2]`` of an image ``[N, 3, H, W]``; H and W are multiples of 16.

    Args:
        width: of the first level; each of the three below has twice as many channels and half as many pixels on a side.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        levels = list(itertools.pairwise([width, 2 * width, 4 * width, 4 * width]))
        self.entry = nn.Sequential(nn.PixelUnshuffle(2), block(12, width))
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), block(i, o), block(o, o)) for i, o in levels)
        self.up = nn.ModuleList(block(i + o, i) for i, o in reversed(levels))
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        levels = [self.entry(images)]
        for down in self.down:
            levels.append(down(levels[-1]))
        features = levels.pop()
        for up in self.up:
            features = up(torch.cat([F.interpolate(features, scale_factor=2), levels.pop()], 1))
        return F.relu(self.last(features))


class SceneNet(MultiTaskMixin, L.LightningModule):
    """A small U-Net with a head per task.

    Args:
        mean_depth: where the depth starts, in metres, as one would set it by hand.
        steps: after which the learning rate is 0, along a cosine.
        lr: learning rate of Adam at the start.
        width: of the U-Net.
    """

    def __init__(self, mean_depth: float, steps: int, lr: float = 3e-3, width: int = 16) -> None:
        super().__init__()
        self.steps, self.lr = steps, lr
        self.trunk = UNet(width)
        channels = {"segmentation": len(CLASSES), "depth": 1, "normals": 3}
        self.heads = nn.ModuleDict({task: self._head(width, channels[task]) for task in TASKS})
        nn.init.constant_(self.heads["depth"][-1].bias, mean_depth)
        self.overlap = MulticlassJaccardIndex(len(CLASSES))

    @staticmethod
    def _head(width: int, channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, channels, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``[N, 3, H, W]`` → scores ``[N, C, H, W]``, metres ``[N, H, W]`` and unit vectors ``[N, 3, H, W]``."""
        features = self.trunk(images - 0.5)
        halves = (head(features) for head in self.heads.values())
        scores, depth, normals = (F.interpolate(half, scale_factor=2, mode="bilinear") for half in halves)
        return {"segmentation": scores, "depth": depth[:, 0], "normals": F.normalize(normals, dim=1)}

    def task_losses(self, batch: Views, batch_idx: int) -> dict[str, Tensor]:
        answers = self(batch.image)
        return {
            "segmentation": F.cross_entropy(answers["segmentation"], batch.classes),
            "depth": F.mse_loss(answers["depth"], batch.depth),
            "normals": 1 - (answers["normals"] * batch.normals).sum(1).mean(),  # both have length one
        }

    def shared_layer(self) -> nn.Module:
        return self.trunk.last

    @torch.no_grad()
    def answers(self, views: Views, at_once: int = 50) -> dict[str, Tensor]:
        """Classes, depths and normals for all views; normalised as in training, by what batches came to on average."""
        self.eval()
        parts = [self(views.image[i : i + at_once]) for i in range(0, len(views), at_once)]
        whole = {task: torch.cat([part[task] for part in parts]) for task in TASKS}
        return whole | {"segmentation": whole["segmentation"].argmax(1)}

    def measures(self, views: Views, answers: dict[str, Tensor]) -> dict[str, float]:
        """The paper's three, of answers to all views."""
        cosines = (answers["normals"] * views.normals).sum(1).clamp(-1, 1)
        overlap = self.overlap(answers["segmentation"], views.classes).item()
        distance = F.mse_loss(answers["depth"], views.depth).sqrt().item()
        values = 100 * (1 - overlap), distance, cosines.acos().rad2deg().mean().item()
        return {name: value for (name, _), value in zip(MEASURES.values(), values, strict=True)}

    def configure_optimizers(self) -> dict[str, object]:
        adam = torch.optim.Adam(self.parameters(), lr=self.lr, fused=True)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": slower, "interval": "step"}}
