"""What it costs to log at every step: GradNorm's own tags, against as many scalars logged by the module itself.

The digits example, GradNorm in both cases; one logs its tags at every step, the other nothing while the module logs as many
numbers with Lightning's ``log_dict``. Fits of the two alternate in one process; medians of the step times (of means over twenty
steps each), and their quartiles over the rounds.

    python benchmarks/logging_cost.py
"""

import argparse
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _common import quiet_lightning
from digits_problem import Digits, DigitsData

from lightning_gradnorm import GradNormCallback
from lightning_gradnorm.callbacks.log import BalancingLog
from lightning_gradnorm.comparison import StepTimes


class Plain(Digits):
    """Logs so many numbers itself."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.values = {f"group/{k}": torch.tensor(float(k)) for k in range(count)}

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.log_dict(self.values)
        return super().training_step(batch, batch_idx)


class Silent(BalancingLog):
    """Writes nothing."""

    def is_written(self, trainer: L.Trainer, number: int) -> bool:
        return False


def silent() -> GradNormCallback:
    """GradNorm that writes nothing."""
    callback = GradNormCallback(update_every=1, summary=False)
    callback._log = Silent(None, False)
    return callback


def step_seconds(module: L.LightningModule, callback: GradNormCallback, epochs: int) -> tuple[float, int]:
    """Median time of a step, and how many tags were logged."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=TensorBoardLogger(folder),
            log_every_n_steps=1,
            limit_val_batches=0,
            callbacks=[callback, times],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DigitsData())
    return times.median(), len(callback.logged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="default %(default)s")
    parser.add_argument("--epochs", type=int, default=5, help="per fit, of 22 steps each; default %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
    ratios, steps = [], []
    with quiet_lightning():
        _, count = step_seconds(Digits(), GradNormCallback(update_every=1, summary=False), args.epochs)
        for _ in range(args.rounds):
            ours, _ = step_seconds(Digits(), GradNormCallback(update_every=1, summary=False), args.epochs)
            theirs, _ = step_seconds(Plain(count), silent(), args.epochs)
            bare, _ = step_seconds(Digits(), silent(), args.epochs)
            ratios.append(ours / theirs)
            steps.append((ours, theirs, bare))
    low, middle, high = statistics.quantiles(ratios, n=4)
    own, others, bare = (1000 * statistics.median(column) for column in zip(*steps, strict=True))
    print(f"{count} tags at every step: {middle:.3f} [{low:.3f}–{high:.3f}] of the step that logs as many by log_dict")
    print(f"Medians: {own:.2f} ms, {others:.2f} ms, and {bare:.2f} ms where nothing is logged")


if __name__ == "__main__":
    main()
