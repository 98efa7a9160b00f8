"""torchvision's detectors return a dict of losses, which the usual ``training_step`` adds up."""

import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed; make clients installs it apart")

import itertools

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import Conv2dNormActivation

from lightning_gradnorm import GradNormCallback, MultiTaskMixin, total_loss
from tests.clients.oracle import Oracle, assert_moving, assert_same, fit

pytestmark = pytest.mark.client

SIDE, WIDTH = 64, 32


def pyramid() -> BackboneWithFPN:
    """Four levels and the pooled one that torchvision adds."""
    widths = (3, 8, 16, 24, 32)
    stages = [Conv2dNormActivation(a, b, stride=2) for a, b in itertools.pairwise(widths)]
    return BackboneWithFPN(nn.Sequential(*stages), {str(k): str(k) for k in range(4)}, list(widths[1:]), WIDTH)


def anchors() -> AnchorGenerator:
    return AnchorGenerator(((4,), (8,), (16,), (32,), (64,)), ((1.0,),) * 5)


def two_stages(kind: type[FasterRCNN], **heads: nn.Module) -> FasterRCNN:
    return kind(
        pyramid(),
        min_size=SIDE,
        max_size=SIDE,
        rpn_anchor_generator=anchors(),
        rpn_post_nms_top_n_train=64,
        box_batch_size_per_image=32,
        box_head=TwoMLPHead(WIDTH * 7 * 7, 64),
        box_predictor=FastRCNNPredictor(64, 3),
        **heads,
    )


DETECTORS = {
    "Faster R-CNN": lambda: two_stages(FasterRCNN),
    "Mask R-CNN": lambda: two_stages(
        MaskRCNN, mask_head=MaskRCNNHeads(WIDTH, (WIDTH,), 1), mask_predictor=MaskRCNNPredictor(WIDTH, WIDTH, 3)
    ),
    "RetinaNet": lambda: RetinaNet(pyramid(), 3, min_size=SIDE, max_size=SIDE, anchor_generator=anchors()),
}
LEVELS = {f"model.backbone.fpn.layer_blocks.{k}.0.weight" for k in range(4)}


def pictures(count: int, seed: int = 1) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Bright rectangles of two kinds on noise, one or two in a picture."""
    draws = torch.Generator().manual_seed(seed)
    made = []
    for k in range(count):
        image, masks = 0.1 * torch.rand(3, SIDE, SIDE, generator=draws), torch.zeros(1 + k % 2, SIDE, SIDE, dtype=torch.uint8)
        boxes, labels = [], []
        for i, mask in enumerate(masks):
            x, y, width, height = torch.randint(8, 28, (4,), generator=draws).tolist()
            mask[y : y + height, x : x + width] = 1
            image[i, mask.bool()] += 0.8
            boxes.append([x, y, x + width, y + height])
            labels.append(i + 1)
        made.append((image, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels), "masks": masks}))
    return made


def batches(data: list, size: int = 2, *, shuffle: bool = False) -> DataLoader:
    return DataLoader(data, size, shuffle, collate_fn=lambda pairs: tuple(zip(*pairs, strict=True)))


class Detector(L.LightningModule):
    """As people write it."""

    def __init__(self, kind: str, oracle: Oracle | None = None, lr: float = 1e-3):
        super().__init__()
        self.model, self.lr = DETECTORS[kind](), lr
        if oracle is not None:
            self.model.register_forward_hook(lambda module, args, losses: oracle.see(losses))

    def training_step(self, batch, batch_idx):
        losses = self.model(*batch)
        return sum(losses.values())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class WithTotalLoss(Detector):
    def training_step(self, batch, batch_idx):
        losses = self.model(*batch)
        return total_loss(losses)


class WithMixin(MultiTaskMixin, Detector):
    def training_step(self, batch, batch_idx):
        losses = self.model(*batch)
        return self.total_loss(losses)


def trained(module: type[Detector], kind: str, mode: str | None = "balance", **door):
    """With a callback in that mode, or none."""
    callback = GradNormCallback(mode=mode, summary=False, **door) if mode else None
    oracle = Oracle(callback) if mode else None
    torch.manual_seed(0)
    return callback, oracle, fit(module(kind, oracle), batches(pictures(6)), callback, oracle)


@pytest.mark.parametrize("kind", DETECTORS)
def test_the_norms_are_those_of_autograd_on_all_levels_of_the_pyramid(kind):
    callback, oracle, trace = trained(WithTotalLoss, kind)
    assert trace.error(oracle) < 1e-6
    assert set(callback.shared.names) == LEVELS
    assert callback.engine_used == "joint"
    assert_moving(trace)


@pytest.mark.parametrize("kind", DETECTORS)
def test_the_function_and_the_mixin_are_one_run(kind):
    assert_same(trained(WithTotalLoss, kind)[2], trained(WithMixin, kind)[2])


@pytest.mark.parametrize("kind", DETECTORS)
def test_watching_leaves_the_plain_run_as_it_is(kind):
    watched, plain = trained(WithTotalLoss, kind, "monitor")[2], trained(Detector, kind, None)[2]
    assert torch.equal(watched.parameters, plain.parameters)


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_module_that_nobody_touched_is_balanced_by_the_name_of_its_detector(kind):
    callback, oracle, trace = trained(Detector, kind, losses_of="model")
    assert trace.error(oracle) < 1e-6
    assert set(callback.shared.names) == LEVELS
    assert_moving(trace)
    assert_same(trace, trained(WithTotalLoss, kind)[2])
