"""A library that multiplies its loss terms by numbers, and runs of it."""

import lightning as L
import torch

from tests.helpers import SCALES, Recorder, TrunkAndHeads, batches, quiet_trainer

TASKS = list(SCALES)
FACTORS = dict(zip(TASKS, (1.0, 0.25, -0.5, 3.0), strict=True))


class Library(L.LightningModule):
    """As somebody else wrote it: numbers come in, and each is multiplied with its term somewhere inside."""

    def __init__(self, weights, **settings):
        super().__init__()
        self.save_hyperparameters()
        inner = TrunkAndHeads(**settings)
        self.trunk, self.heads, self.scales = inner.trunk, inner.heads, inner.scales

    features, losses, reduced = TrunkAndHeads.features, TrunkAndHeads.losses, TrunkAndHeads.reduced

    def total(self, batch):
        losses = self.losses(batch[0])
        return sum(self.hparams["weights"][task] * losses[task] for task in losses)

    def training_step(self, batch, batch_idx):
        return self.total(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Scaled(TrunkAndHeads):
    """The library's numbers, in a module of one's own."""

    def losses(self, x):
        return {task: loss if FACTORS[task] == 1 else FACTORS[task] * loss for task, loss in super().losses(x).items()}


def weights_of(callback, factors=None):
    return {task: callback.weight(task, **({"factor": factors[task]} if factors else {})) for task in TASKS}


def fit(folder, make, callback, data=None, **settings):
    torch.manual_seed(0)
    recorder = Recorder(callback)
    module = make()
    trainer = quiet_trainer(folder, callbacks=[*([callback] if callback else []), recorder], **settings)
    trainer.fit(module, batches(6) if data is None else data)
    return recorder


def same(found, expected):
    return found.weights == expected.weights and all(map(torch.equal, found.parameters, expected.parameters))
