"""What each of two processes runs for ``test_epoch_values_distributed.py``."""

import os

import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_gradnorm import GradNormCallback
from tests.helpers import TrunkAndHeads, batches, quiet_trainer

SIZES = {"train": (6, 8), "val": (4, 8)}  # batches of both ranks together, and their size


class Absent(TrunkAndHeads):
    """The second rank never has ``odd`` in training, nor ``middle`` in evaluation; learns nothing, so that sums are known."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(lr=0.0)

    def shared_layer(self):
        return self.trunk[2]

    def without(self, task, batch):
        losses = self.losses(batch)
        if int(os.environ.get("LOCAL_RANK", 0)) == 1:
            del losses[task]
        return losses

    def training_step(self, batch, batch_idx):
        return self.total_loss(self.without("odd", batch))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.total_loss(self.without("middle", batch))


def rows(stage):
    """All batches, a list of tensors."""
    return [batch[0] for batch in batches(*SIZES[stage], seed=5)]


def loader(stage, rank):
    """Every second batch."""
    return DataLoader(rows(stage)[rank::2], batch_size=None)


def work(rank, path):
    metrics = {}
    for name, callback, loaders in (
        ("one loader", {}, [loader("val", rank)]),
        ("two loaders", {"update_every": 3}, [loader("val", rank), loader("val", rank)]),
    ):
        folder = path.parent / name
        trainer = quiet_trainer(
            folder,
            callbacks=[
                GradNormCallback(lr=0.1, tasks=["small", "middle", "large", "odd"], **callback),
                EarlyStopping("total_loss/unweighted"),
            ],
            strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
            devices=2,
            logger=CSVLogger(folder),
            log_every_n_steps=50,
            use_distributed_sampler=False,
            max_epochs=2,
            num_sanity_val_steps=1,
        )
        trainer.fit(Absent(), loader("train", rank), loaders)
        metrics[name] = {tag: float(value) for tag, value in trainer.callback_metrics.items()}
    torch.save(metrics, path)
