"""Checkpoints of every kind, loaded by runs that are not quite those that wrote them."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_gradnorm import GradNorm, GradNormCallback, LossBalancingCallback
from tests.callbacks.test_resume import PER_EPOCH, SETTINGS, STEPS, StatefulLoader, assert_went_on, balancing, fit
from tests.helpers import Recorder, TrunkAndHeads, batches, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

METHOD = {"alpha": 1.0, "lr": 0.1}


class Restored(TrunkAndHeads):
    """Starts a fresh run where a checkpoint's network and optimiser were, and takes nothing else from it."""

    def __init__(self, path):
        super().__init__(torch.optim.Adam)
        self.checkpoint = torch.load(path, weights_only=True)
        self.load_state_dict(self.checkpoint["state_dict"])

    def on_train_start(self):
        self.optimizers().optimizer.load_state_dict(self.checkpoint["optimizer_states"][0])


def fresh_run_from(path, callback, position):
    """The batches after ``position``, up to ``STEPS``, by a run that knows the network and the optimiser alone."""
    seen, data = Recorder(callback), StatefulLoader()
    data.position = position
    callbacks = [*([callback] if callback else []), seen]
    quiet_trainer(path.parent, callbacks=callbacks, max_epochs=-1, max_steps=STEPS - position).fit(Restored(path), data)
    return seen


@pytest.mark.feature(
    "a checkpoint made with the callback, in a run without it",
    "supported",
    "Lightning warns that it is missing; the run goes on with the plain sum",
)
def test_without_the_callback_a_run_goes_on_from_a_checkpoint_made_with_it(tmp_path):
    fit(tmp_path, balancing({}), max_steps=3)
    path = tmp_path / "step=3.ckpt"
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: \['LossBalancing\[GradNorm\]'\]"):
        without = fit(tmp_path, None, ckpt_path=path)
    assert_went_on(without, fresh_run_from(path, None, 3), 0)


@pytest.mark.feature(
    "a checkpoint made without the callback, in a run with it", "supported", "weights 1 and L(0) from the first step after it"
)
def test_with_the_callback_a_run_starts_to_weigh_from_a_checkpoint_made_without_it(tmp_path):
    fit(tmp_path, None, max_steps=3)
    path = tmp_path / "step=3.ckpt"
    weighed = fit(tmp_path, balancing({}), ckpt_path=path)
    assert_went_on(weighed, fresh_run_from(path, balancing({}), 3), 0)
    assert min(weighed.weights[-1].values()) < 0.9


@pytest.mark.feature(
    "`GradNormCallback()` and `LossBalancingCallback(GradNorm())`",
    "supported",
    "one resumes from the other's checkpoint, exactly",
)
@pytest.mark.parametrize("first", ["named", "general"])
def test_the_named_and_the_general_callback_find_each_others_state(tmp_path, first):
    callbacks = {
        "named": lambda: GradNormCallback(**METHOD, summary=False),
        "general": lambda: LossBalancingCallback(GradNorm(**METHOD), summary=False),
    }
    make, make_other = callbacks.pop(first), *callbacks.values()
    whole = fit(tmp_path, make())
    resumed = fit(tmp_path, make_other(), ckpt_path=tmp_path / "step=4.ckpt")
    assert_went_on(resumed, whole, 4)
    assert resumed.logged == whole.logged[4:]


@pytest.mark.feature(
    "resume at an accumulation boundary in mid-epoch", "supported", "equals the uninterrupted run, micro-batch by micro-batch"
)
@pytest.mark.parametrize("stop", [1, 2, PER_EPOCH // 2, 4, 5])
def test_resume_at_an_accumulation_boundary(tmp_path, stop):
    whole = fit(tmp_path, balancing({}), max_steps=STEPS // 2, accumulate_grad_batches=2)
    assert len(whole.weights) == STEPS
    path = tmp_path / f"step={stop}.ckpt"
    resumed = fit(tmp_path, balancing({}), max_steps=STEPS // 2, accumulate_grad_batches=2, ckpt_path=path)
    assert_went_on(resumed, whole, 2 * stop)
    assert resumed.logged == whole.logged[stop:]


@pytest.mark.feature(
    "`weights_only=True` (a safe load)", "supported", "the state is tensors, numbers, strings, lists and dicts"
)
@pytest.mark.parametrize(
    "settings",
    [
        *SETTINGS.values(),
        {"priorities": {"odd": 2.0}},
        {"initial_losses": {"odd": 3.0}},
        {"tasks": list(TrunkAndHeads().scales)},
    ],
    ids=[*SETTINGS, "priorities", "given initial losses", "declared tasks"],
)
def test_resume_from_a_safe_load(tmp_path, settings):
    whole = fit(tmp_path, balancing(settings), max_steps=6)
    path = tmp_path / "step=4.ckpt"
    assert_went_on(fit(tmp_path, balancing(settings), max_steps=6, ckpt_path=path, weights_only=True), whole, 4)
    by_key = torch.load(path, weights_only=True)["callbacks"]
    assert "LossBalancing[GradNorm]" in by_key


class WithTest(TrunkAndHeads):
    """Notes the total loss of each test batch, and the plain sum."""

    def __init__(self):
        super().__init__(torch.optim.Adam)
        self.tested = []

    def test_step(self, batch, batch_idx):
        losses = self.losses(batch[0])
        self.tested.append((self.total_loss(losses), sum(losses.values())))


@pytest.mark.feature(
    "`save_weights_only=True`", "supported", "holds the network alone: it loads anywhere, and brings no loss weights"
)
def test_a_checkpoint_of_the_network_alone_loads_anywhere_and_brings_no_loss_weights(tmp_path):
    callback = GradNormCallback(**METHOD, summary=False)
    network_alone = ModelCheckpoint(tmp_path, filename="alone", save_weights_only=True)
    module = WithTest()
    settings = {"callbacks": [callback, network_alone], "enable_checkpointing": True}
    quiet_trainer(tmp_path, **settings).fit(module, batches(4))
    path = tmp_path / "alone.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert "callbacks" not in checkpoint
    loaded = WithTest.load_from_checkpoint(path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))

    live = callback.weights
    quiet_trainer(tmp_path, callbacks=[callback]).test(module, batches(2), ckpt_path=path, verbose=False)
    assert callback.weights == live
    assert len(module.tested) == 2
    assert all(torch.equal(total, plain) for total, plain in module.tested), "whatever the weights are"

    fresh = GradNormCallback(**METHOD, summary=False)
    quiet_trainer(tmp_path, callbacks=[fresh]).test(loaded, batches(2), ckpt_path=path, verbose=False)
    assert fresh.weights == {}
    assert all(torch.equal(total, plain) for total, plain in loaded.tested)

    with pytest.raises(KeyError, match="checkpoint contains only the model"):  # Lightning's own, with or without us
        quiet_trainer(tmp_path, callbacks=[fresh], max_epochs=2).fit(loaded, batches(4), ckpt_path=path)
    assert fresh.weights == {}
    quiet_trainer(tmp_path, callbacks=[fresh]).fit(loaded, batches(4))
    assert fresh.balancer.steps == 4
