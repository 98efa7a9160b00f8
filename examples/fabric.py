"""GradNorm in a loop of one's own: Lightning Fabric, no Trainer and no callback.

The network, the data and the three tasks are those of ``digits.py``. To an ordinary Fabric loop a ``BalancingSession`` adds
five lines: in a ``batch`` losses are weighed, ``total_loss`` stands for their sum, ``before_backward`` and ``after_backward``
read the tasks' gradients on the shared layer, and ``step`` moves the weights for the next step.

    python examples/fabric.py            # ten seconds or so
    python examples/fabric.py --help
"""

import argparse
from collections.abc import Sequence

import torch
from _common import loop_parser, print_held_out, quiet_lightning
from digits_problem import Digits, load
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_gradnorm import BalancingSession, EqualWeights, GradNorm, LossBalancer, total_loss

TRAIN, TEST = load()


def task_losses(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Task → loss of one batch, unweighted."""
    scores, pixels, ink = network(images)
    regressions = {"pixels": F.mse_loss(pixels, images), "ink": F.mse_loss(ink, images.sum(1))}
    return {"digit": F.cross_entropy(scores, labels)} | regressions


def train(balancer: LossBalancer, args: argparse.Namespace) -> dict[str, float]:
    """One run; the losses on the test images."""
    fabric = Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(args.seed)
    module = Digits()
    network, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=3e-3))
    batches = fabric.setup_dataloaders(DataLoader(TRAIN, batch_size=64, shuffle=True))
    session = BalancingSession(balancer, module, shared_layer=module.trunk[2])
    for _ in range(args.epochs):
        for images, labels in batches:
            with session.batch():
                total = total_loss(task_losses(network, images, labels))
                session.before_backward(total)
                fabric.backward(total)
                session.after_backward()
            optimizer.step()
            optimizer.zero_grad()
            session.step()
    with torch.no_grad():
        return {task: loss.item() for task, loss in task_losses(network, *TEST.tensors).items()}


def main(arguments: Sequence[str] | None = None) -> None:
    args = loop_parser(__doc__, "of 22 steps each", epochs=40).parse_args(arguments)
    torch.set_num_threads(1)  # layers as small as these are slower on several
    gradnorm = GradNorm(alpha=args.alpha)
    with quiet_lightning():
        equal, balanced = train(EqualWeights(), args), train(gradnorm, args)
    print_held_out(equal, balanced, gradnorm.weights)


if __name__ == "__main__":
    main()
