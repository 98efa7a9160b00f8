"""GradNorm in a Hugging Face accelerate loop, with accumulated batches, bfloat16 and a state that is saved and resumed.

The network, the data and the three tasks are those of ``digits.py``. The ``session`` is an object like any other to accelerate:
registered for checkpointing, its weights are in every ``save_state``. It also runs on several processes, which then hold the
same weights: ``torchrun --nproc_per_node 2 examples/accelerate_loop.py``.

    pip install accelerate
    python examples/accelerate_loop.py            # ten seconds or so
    python examples/accelerate_loop.py --help
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from _common import loop_parser, print_held_out
from accelerate import Accelerator, PartialState
from digits_problem import Digits, load
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_gradnorm import BalancingSession, EqualWeights, GradNorm, LossBalancer, total_loss

TRAIN, TEST = load()


def task_losses(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Task → loss of one batch, unweighted."""
    scores, pixels, ink = network(images)
    regressions = {"pixels": F.mse_loss(pixels, images), "ink": F.mse_loss(ink, images.sum(1))}
    return {"digit": F.cross_entropy(scores, labels)} | regressions


def train(balancer: LossBalancer, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One run, saved in the middle and gone on with from there; the losses on the test images."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16" if args.bf16 else "no")
    torch.manual_seed(args.seed)
    module = Digits()
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    network, optimizer, batches = accelerator.prepare(module, optimizer, DataLoader(TRAIN, batch_size=32, shuffle=True))
    session = BalancingSession(balancer, module, shared_layer=module.trunk[2])
    accelerator.register_for_checkpointing(session)
    for epoch in range(args.epochs):
        for images, labels in batches:
            with accelerator.accumulate(network), session.batch():
                total = total_loss(task_losses(network, images, labels))
                session.before_backward(total)
                accelerator.backward(total)
                session.after_backward()
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                session.step()
        if epoch == args.epochs // 2:
            accelerator.save_state(str(folder))  # model, optimizer, random numbers, and the weights
            accelerator.wait_for_everyone()
            accelerator.load_state(str(folder))
    with torch.no_grad():
        return {task: loss.item() for task, loss in task_losses(network, *TEST.tensors).items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = loop_parser(__doc__, "of 22 steps each", epochs=40)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"), help="where states go; default %(default)s")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # layers as small as these are slower on several
    gradnorm = GradNorm(alpha=args.alpha)
    equal, balanced = (train(balancer, args, args.out / type(balancer).__name__) for balancer in (EqualWeights(), gradnorm))
    if not PartialState().is_main_process:
        return
    print_held_out(equal, balanced, gradnorm.weights)


if __name__ == "__main__":
    main()
