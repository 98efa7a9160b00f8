"""A small Faster R-CNN on bright rectangles of two kinds."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.ops import box_iou

from benchmarks.clients.measure import Client, main
from lightning_gradnorm import GradNormCallback, LossBalancingCallback
from tests.clients.test_torchvision import Detector, batches, pictures

TRAINING, HELD_OUT = pictures(256, seed=1), pictures(64, seed=2)


def make(callback: LossBalancingCallback | None) -> tuple[Detector, DataLoader]:
    return Detector("Faster R-CNN", lr=0.02), batches(TRAINING, size=8, shuffle=True)


@torch.no_grad()
def errors(module: Any) -> Mapping[str, float]:
    """Of the rectangles found with their kind (by half of their union at least), and of how well these fit."""
    module.eval()
    found, said, there, overlap = 0, 0, 0, []
    for image, target in HELD_OUT:
        seen = module.model([image])[0]
        sure = seen["scores"] > 0.5
        boxes, labels = seen["boxes"][sure], seen["labels"][sure]
        said, there = said + len(boxes), there + len(target["boxes"])
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            match = box_iou(box[None], boxes[labels == label])[0]
            if len(match) and match.max() > 0.5:
                found += 1
                overlap.append(float(match.max()))
    return {"1 − F1": 1 - 2 * found / max(1, said + there), "1 − overlap": 1 - sum(overlap) / max(1, len(overlap))}


METHODS = {"plain": lambda: None, "GradNorm": lambda: GradNormCallback(losses_of="model", summary=False)}
CLIENT = Client("torchvision", ("torchvision", "lightning"), make, errors, steps=150, methods=METHODS)

if __name__ == "__main__":
    main(CLIENT)
