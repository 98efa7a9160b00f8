"""Beside Lightning's other callbacks, activation checkpointing, the second namespace, and without a Trainer."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as others
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm import GradNorm, GradNormCallback, JointBackward, tap_losses
from tests.callbacks.watching import TASKS, OnTensors, assert_same_history, loader, train
from tests.helpers import TrunkAndHeads, batches, quiet_trainer


@pytest.mark.feature("`EMAWeightAveraging`, `StochasticWeightAveraging`, `ModelPruning`", "supported", "unaffected")
@pytest.mark.filterwarnings("ignore")  # their own
@pytest.mark.parametrize(
    "other",
    [
        lambda: others.EMAWeightAveraging(decay=0.9),
        lambda: others.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=10),
        lambda: others.ModelPruning("l1_unstructured", parameter_names=["bias"], amount=0.0),
    ],
    ids=["EMA", "SWA", "pruning"],
)
def test_other_callbacks_change_nothing(tmp_path, other, request):
    if request.node.callspec.id == "EMA" and not hasattr(others, "EMAWeightAveraging"):
        pytest.skip("Lightning before 2.6 has no such callback")
    x, module = torch.randn(4, 8, 6), OnTensors()
    beside = train(tmp_path, copy.deepcopy(module), loader(x), callbacks=[other()])
    assert_same_history(beside, train(tmp_path, copy.deepcopy(module), loader(x)), rtol=1e-6)


class Finetuned(OnTensors):
    """A backbone that a finetuning callback freezes, and the rest."""

    def __init__(self):
        super().__init__()
        self.backbone = self.trunk


@pytest.mark.feature("`BackboneFinetuning`", "supported", "the weights wait while the shared layer is frozen; told once")
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_while_a_finetuning_callback_keeps_the_layer_frozen_the_weights_wait(tmp_path):
    finetuning = others.BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)
    with pytest.warns(
        UserWarning, match="The weights stay as they are while a finetuning callback keeps the layer frozen"
    ) as caught:
        callback = train(tmp_path, Finetuned(), loader(torch.randn(3, 8, 6)), callbacks=[finetuning], max_epochs=4)
    assert sum("finetuning" in str(warning.message) for warning in caught) == 1
    moved = [not torch.equal(weights, torch.ones(4, dtype=torch.float64)) for weights in callback.applied]
    assert moved == [False] * 7 + [True] * 5  # two epochs frozen; the first step after them still applies ones
    assert callback.shared.names == ("trunk.2.weight",)


def test_frozen_in_mid_training_the_weights_wait(tmp_path):
    class Toggled(OnTensors):
        def training_step(self, batch, batch_idx):
            self.trunk[2].requires_grad_(batch_idx not in (2, 3))
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="is frozen or was not used in this step"):
        callback = train(tmp_path, Toggled(), loader(torch.randn(6, 8, 6)))
    still = [torch.equal(a, b) for a, b in zip(callback.applied, callback.applied[1:], strict=False)]
    assert still == [False, False, True, True, False]


class Checkpointed(OnTensors):
    """The whole trunk computed again in the backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.forwards = reentrant, 0
        self.trunk[2].register_forward_hook(self._count)

    def _count(self, *_):
        self.forwards += 1

    def features(self, x):
        return checkpoint(self.trunk, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.feature(
    "activation checkpointing, `use_reentrant=False`, with the shared layer in it",
    "supported",
    "exact; the forward is computed T + 1 times more, once per task and once for the backward",
)
def test_non_reentrant_checkpointing_is_exact_and_its_cost_known(tmp_path):
    x, module = torch.randn(3, 8, 6), Checkpointed(reentrant=False)
    plain = OnTensors()
    plain.load_state_dict(module.state_dict())
    callback = train(tmp_path, module, loader(x))
    assert_same_history(callback, train(tmp_path, plain, loader(x)), rtol=1e-5)
    # Per step: the forward, once again for each task's product, once again for the backward itself; once for each task in
    # the batch in which the layer is found; and there the second reading, which proves the first: for each task, and for all.
    assert module.forwards == 3 * (1 + len(TASKS) + 1) + len(TASKS) + (len(TASKS) + 1)


@pytest.mark.feature(
    "activation checkpointing, `use_reentrant=True`, with the shared layer in it", "refused", "“pass use_reentrant=False”"
)
def test_a_reentrant_checkpoint_over_the_layer_says_use_reentrant_false(tmp_path):
    with pytest.raises(ValueError, match="use_reentrant=False"):
        train(tmp_path, Checkpointed(reentrant=True), loader(torch.randn(3, 8, 6)))


def test_a_balancer_can_be_pickled_and_copied_after_a_fit(tmp_path):
    callback = GradNormCallback(lr=0.1, summary=False)
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.fit(TrunkAndHeads(), batches(3))
    again = pickle.loads(pickle.dumps(callback.balancer))
    assert again.weights == callback.weights
    assert copy.deepcopy(callback.balancer).weights == callback.weights


@pytest.mark.feature("`Fabric`", "supported", "`GradNorm` and `JointBackward` in a Fabric loop equal the Trainer")
def test_a_fabric_loop_equals_the_trainer(tmp_path):
    x, module = torch.randn(6, 8, 6), TrunkAndHeads()
    by_trainer = OnTensors()
    by_trainer.load_state_dict(module.state_dict())
    expected = train(tmp_path, by_trainer, loader(x))

    fabric = L.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    network, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
    network.mark_forward_method("losses")
    gradnorm = GradNorm(lr=0.1)
    for batch in x:
        optimizer.zero_grad()
        losses = tap_losses(network.losses(batch))
        total = gradnorm.total(losses)
        reader = JointBackward(total, losses, [module.trunk[2].weight])
        fabric.backward(total)
        gradnorm.update(reader.measurement())
        optimizer.step()
    assert gradnorm.weights == pytest.approx(expected.weights, rel=1e-6)


NAMESPACES = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
order = sys.argv[2].split("+")
modules = {name: importlib.import_module(name) for name in order}
namespaces = [name for name in order if name != "lightning_gradnorm"]
from lightning_gradnorm import GradNormCallback
from tests.callbacks.cli_program import two_tasks
for pl in map(modules.get, namespaces):
    for form in (lambda c: c, lambda c: [c]):
        callback = GradNormCallback(summary=False)
        off = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=sys.argv[1], callbacks=form(callback), **off)
        trainer.fit(two_tasks(pl)())
        assert callback.balancer.steps == 3 and callback.weights["a"] > 1, callback.weights
if order == ["pytorch_lightning"]:
    assert "lightning.pytorch" not in sys.modules, "a namespace that nobody asked for was imported"
"""


@pytest.mark.feature("`lightning.pytorch` and `pytorch_lightning`", "supported", "whichever is imported first")
@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "lightning.pytorch",
        "pytorch_lightning",
        "lightning.pytorch+pytorch_lightning",
        "lightning_gradnorm+pytorch_lightning",
    ],
)
def test_both_lightning_namespaces(tmp_path, order):
    for name in order.split("+"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    program = [sys.executable, "-c", NAMESPACES, str(tmp_path), order]
    done = subprocess.run(program, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
