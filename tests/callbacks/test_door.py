"""``total_loss`` without a module: whoever has the losses hands them over, and the Trainer at work is found."""

import copy
import pickle
import threading

import lightning as L
import pytest
import torch
from torch import nn

from lightning_gradnorm import GradNorm, GradNormCallback, LossBalancingCallback, UncertaintyWeighting, total_loss
from tests.helpers import Recorder, TrunkAndHeads, batches, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Criterion(nn.Module):
    """Adds up what it is given, deep inside somebody's code."""

    def forward(self, losses):
        return total_loss(losses)


class Foreign(L.LightningModule):
    """As somebody else wrote it: no mixin; a layer of its own under a name of ours."""

    shared_layer = "nobody's business"

    def __init__(self):
        super().__init__()
        inner = TrunkAndHeads()
        self.trunk, self.heads, self.scales, self.criterion = inner.trunk, inner.heads, inner.scales, Criterion()

    features, losses, reduced = TrunkAndHeads.features, TrunkAndHeads.losses, TrunkAndHeads.reduced

    def training_step(self, batch, batch_idx):
        return self.criterion(self.losses(batch[0]))

    def validation_step(self, batch, batch_idx):
        self.log("own", self.criterion(self.losses(batch[0])))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, module, callback, **settings):
    torch.manual_seed(0)
    recorder = Recorder(callback)
    quiet_trainer(folder, callbacks=[*([callback] if callback else []), recorder], **settings).fit(module(), batches(6))
    return recorder


@pytest.mark.feature(
    "a module that you did not write", "supported", "`total_loss({...})` where its losses are added up; equal to the mixin"
)
def test_a_foreign_module_is_weighed_as_one_with_the_mixin(tmp_path):
    found = fit(tmp_path, Foreign, GradNormCallback(lr=0.1, summary=False))
    expected = fit(tmp_path, TrunkAndHeads, GradNormCallback(lr=0.1, summary=False))
    assert found.weights == expected.weights
    assert max(abs(weight - 1) for weight in found.weights[-1].values()) > 0.1
    assert all(torch.equal(a, b) for a, b in zip(found.parameters, expected.parameters, strict=True))


def test_without_a_callback_it_is_the_plain_sum(tmp_path):
    found, expected = fit(tmp_path, Foreign, None), fit(tmp_path, TrunkAndHeads, None)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters, expected.parameters, strict=True))
    assert total_loss({"a": torch.tensor(2.0), "b": torch.tensor(3.0)}) == 5


def test_in_evaluation_it_is_the_plain_sum_and_logged(tmp_path):
    module, callback = Foreign(), GradNormCallback(lr=0.1, summary=False)
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.fit(module, batches(6), batches(2))
    torch.testing.assert_close(trainer.callback_metrics["own"], trainer.callback_metrics["val_total_loss"])
    assert max(abs(weight - 1) for weight in callback.weights.values()) > 0.1


class Between(L.Callback):
    """Trains another module between two epochs, and asks for a total there."""

    def __init__(self, folder):
        self.folder, self.totals = folder, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.totals.append(float(total_loss({"a": torch.tensor(2.0)})))
        quiet_trainer(self.folder).fit(Foreign(), batches(1))
        callback = GradNormCallback(summary=False)
        quiet_trainer(self.folder, callbacks=[callback]).fit(Foreign(), batches(2))
        self.totals.append(callback.balancer.steps)


def test_fits_within_a_fit_have_doors_of_their_own(tmp_path):
    callback, between = GradNormCallback(lr=0.1, summary=False), Between(tmp_path)
    torch.manual_seed(0)
    quiet_trainer(tmp_path, callbacks=[callback, between], max_epochs=2).fit(Foreign(), batches(3))
    assert between.totals == [2, 2, 2, 2]
    assert callback.balancer.steps == 6


def test_a_fit_in_another_thread_is_not_seen(tmp_path):
    totals = []

    class Asking(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            thread = threading.Thread(target=lambda: totals.append(float(total_loss({"a": torch.tensor(2.0)}))))
            thread.start()
            thread.join()

    callback = GradNormCallback(summary=False)
    quiet_trainer(tmp_path, callbacks=[callback, Asking()]).fit(Foreign(), batches(2))
    assert totals == [2, 2]
    assert callback.balancer.steps == 2


def test_after_an_exception_nobody_is_at_work(tmp_path):
    class Breaks(Foreign):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        quiet_trainer(tmp_path, callbacks=[GradNormCallback(summary=False)]).fit(Breaks(), batches(2))
    assert total_loss({"a": torch.tensor(2.0)}) == 2


# -- shared_layer= on the callback ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [Foreign, TrunkAndHeads])
@pytest.mark.parametrize(
    ("named", "names"), [("trunk.0", ("trunk.0.weight", "trunk.0.bias")), (["trunk.2.bias"], ("trunk.2.bias",))]
)
def test_the_callbacks_shared_layer_wins(tmp_path, module, named, names):
    class Names(module):
        def shared_layer(self):
            return self.trunk[2]

    callback = GradNormCallback(shared_layer=named, summary=False)
    quiet_trainer(tmp_path, callbacks=[callback]).fit(Names(), batches(2))
    assert callback.shared.names == names
    assert callback.shared.reason == "given by GradNormCallback(shared_layer=…)"
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        quiet_trainer(tmp_path, callbacks=[copied]).fit(Names(), batches(1))
        assert copied.shared.names == names


def test_a_shared_layer_that_is_not_there_is_refused_by_its_giver(tmp_path):
    with pytest.raises(
        ValueError, match=r"GradNormCallback\(shared_layer=…\) named 'trunk.9', which is no module or parameter of F"
    ):
        quiet_trainer(tmp_path, callbacks=[GradNormCallback(shared_layer="trunk.9")]).fit(Foreign(), batches(1))


@pytest.mark.parametrize("given", [nn.Linear(2, 2), 3, [], ["trunk", 1]])
def test_a_shared_layer_is_given_to_the_callback_by_name(given):
    with pytest.raises(TypeError, match=r"dotted name of a module or parameter .* Write shared_layer='model\.trunk\.2'"):
        GradNormCallback(shared_layer=given)


@pytest.mark.parametrize("make", [lambda: GradNorm(lr=0.1), UncertaintyWeighting], ids=["read", "not read"])
def test_losses_that_are_changed_in_place_for_the_log_are_balanced_as_they_were(tmp_path, make):
    class Rescales(Foreign):
        def training_step(self, batch, batch_idx):
            losses = self.losses(batch[0])
            total = self.criterion(losses)
            losses["small"] *= 1000
            losses["odd"].detach().mul_(2)
            return total

    found = fit(tmp_path, Rescales, LossBalancingCallback(make(), summary=False))
    expected = fit(tmp_path, Foreign, LossBalancingCallback(make(), summary=False))
    assert found.weights == expected.weights
    assert set(found.weights[-1]) == {"small", "middle", "large", "odd"}
