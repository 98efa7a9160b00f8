"""A callback that remembers what it applied and measured, and fits and histories to compare."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_gradnorm import GradNormCallback
from tests.helpers import SCALES, TrunkAndHeads, quiet_trainer

TASKS = list(SCALES)


class Watch(GradNormCallback):
    """Remembers, per optimiser step, the weights that it applied and the norms of the unweighted gradients."""

    def __init__(self, **settings):
        super().__init__(**({"lr": 0.1, "summary": False} | settings))
        self.applied, self.norms, self.inside = [], [], []

    def on_before_backward(self, trainer, pl_module, loss):
        super().on_before_backward(trainer, pl_module, loss)
        self.inside.append(self.weights)

    def on_train_batch_end(self, trainer, *args):
        before, steps = self.balancer.weights_for(TASKS), self.balancer.steps
        super().on_train_batch_end(trainer, *args)
        if self.balancer.steps > steps:
            self.applied.append(before)
            shown = self.balancer.diagnostics.get("grad_norm")
            self.norms.append(None if shown is None else shown / before)


def train(tmp_path, module, data, callback=None, **settings):
    callback = callback or Watch()
    quiet_trainer(tmp_path, callbacks=[callback, *settings.pop("callbacks", [])], **settings).fit(module, data)
    return callback


def assert_same_history(one, other, rtol=1e-5):
    assert len(one.applied) == len(other.applied) > 2
    torch.testing.assert_close(torch.stack(one.applied), torch.stack(other.applied), rtol=rtol, atol=0)
    torch.testing.assert_close(torch.stack(one.norms), torch.stack(other.norms), rtol=rtol, atol=0)
    assert one.weights == pytest.approx(other.weights, rel=rtol)


def norms_by_hand(parameter, losses):
    return torch.stack([torch.autograd.grad(loss, parameter, retain_graph=True)[0].norm() for loss in losses])


def loader(x):
    return DataLoader(list(x), batch_size=None)


class OnTensors(TrunkAndHeads):
    def training_step(self, batch, batch_idx):
        return self.total_loss(self.losses(batch))
