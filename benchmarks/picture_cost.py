"""What the figure costs that is drawn while a fit goes on: how many pictures, how long each takes, and their share of the fit.

A small network with as many tasks as asked for, whose steps are filled up to a given length by sleeping, so that the share is
that of a real fit of such steps; TensorBoard is sent the pictures.

    python benchmarks/picture_cost.py                 # 10,000 steps of 5 ms, three tasks: about a minute
    python benchmarks/picture_cost.py --tasks 40 --steps 50000
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradnorm import GradNormCallback, MultiTaskMixin


class Paced(MultiTaskMixin, L.LightningModule):
    """A step of it takes so many seconds at least."""

    def __init__(self, tasks: int, seconds: float) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32)), nn.Linear(32, tasks)
        self.seconds, self.until = seconds, 0.0

    def shared_layer(self) -> nn.Module:
        return self.trunk[2]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(max(self.until - time.perf_counter(), 0.0))
        self.until = time.perf_counter() + self.seconds
        errors = (self.heads(self.trunk(batch[0]).tanh()) - batch[0].sum(1, keepdim=True)).square().mean(0)
        return self.total_loss({f"task {k}": 4.0**-k * error for k, error in enumerate(errors)})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="default %(default)s")
    parser.add_argument("--milliseconds", type=float, default=5.0, help="of a step at least; default %(default)s")
    parser.add_argument("--tasks", type=int, default=3, help="default %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*(num_workers|LeafSpec)")
    module = Paced(args.tasks, args.milliseconds / 1000)
    data = DataLoader(TensorDataset(torch.randn(32 * 500, 8)), batch_size=32)
    quiet: dict[str, Any] = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with tempfile.TemporaryDirectory() as folder:
        callback = GradNormCallback()
        logger = TensorBoardLogger(folder)
        trainer = L.Trainer(
            max_epochs=-1, max_steps=args.steps, accelerator="cpu", logger=logger, callbacks=[callback], **quiet
        )
        before = time.perf_counter()
        trainer.fit(module, data)
        elapsed = time.perf_counter() - before
        size = sum(path.stat().st_size for path in Path(logger.log_dir).glob("events*"))
    pictures = callback._reporting.pictures
    each = pictures.spent / pictures.count if pictures.count else 0.0
    print(f"{args.steps} steps of {args.milliseconds:g} ms, {args.tasks} tasks: {elapsed:.0f} s")
    share, megabytes = pictures.spent / elapsed, size / 2**20
    print(f"{pictures.count} pictures before the end, {1000 * each:.0f} ms each: {share:.2%} of the fit")
    print(f"The event file is of {megabytes:.1f} MiB")


if __name__ == "__main__":
    main()
