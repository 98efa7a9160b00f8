"""A run that is stopped and resumed equals one that is not, step by step."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_gradnorm import GradNormCallback
from tests.helpers import MemoryLogger, Recorder, TrunkAndHeads, batches, loading, quiet_trainer

STEPS, PER_EPOCH = 12, 6


class StatefulLoader:
    """Batches in order, which go on where a checkpoint left them."""

    def __init__(self):
        self.batches = [batch[0] for batch in batches(PER_EPOCH)]
        self.position = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.position < len(self.batches):
            self.position += 1
            yield [self.batches[self.position - 1]]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def fit(folder, callback, *, max_steps=STEPS, ckpt_path=None, weights_only=None, make=TrunkAndHeads, **trainer_settings):
    """Train with the callback, or with none, and save a checkpoint after every step; what every batch saw."""
    torch.manual_seed(7)
    seen, memory = Recorder(callback), MemoryLogger()
    every_step = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
    trainer = quiet_trainer(
        folder,
        callbacks=[*([callback] if callback else []), seen, every_step],
        max_epochs=-1,
        max_steps=max_steps,
        logger=memory,
        enable_checkpointing=True,
        **trainer_settings,
    )
    trainer.fit(make(torch.optim.Adam), StatefulLoader(), ckpt_path=ckpt_path, **loading(weights_only=weights_only))
    seen.logged = memory.logged
    return seen


def assert_went_on(resumed, whole, batches_before):
    """The resumed run saw what the whole one did after its first ``batches_before``, bit for bit."""
    assert resumed.weights == whole.weights[batches_before:] != []
    for ours, theirs in zip(resumed.parameters, whole.parameters[batches_before:], strict=True):
        assert torch.equal(ours, theirs)


def balancing(settings):
    return GradNormCallback(summary=False, **{"lr": 0.1, **settings})


SETTINGS = {
    "default": {"lr": None},
    "forgetting": {},
    "paper": {"update": "paper"},
    "residuals": {"residuals": ["odd"]},
    "momentum": {"optimizer": torch.optim.RMSprop},
    "every 3rd": {"update_every": 3},
    "mean of 4 first": {"alpha": 1.5, "initial_losses": 4},
}


@pytest.mark.feature(
    "checkpoint and resume, also in mid-epoch",
    "supported",
    "weights, parameters and logged values equal the uninterrupted run's, step by step",
)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_equals_uninterrupted(tmp_path, settings):
    whole_callback = balancing(settings)
    whole = fit(tmp_path, whole_callback)
    assert len(whole.logged) == STEPS
    for stop in (1, 2, 5, PER_EPOCH, 7, STEPS - 1):
        callback = balancing(settings)
        resumed = fit(tmp_path, callback, ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert_went_on(resumed, whole, stop)
        assert resumed.logged == whole.logged[stop:], stop
        assert callback.report.rows == whole_callback.report.rows, stop


@pytest.mark.feature(
    "the model's `state_dict`",
    "supported",
    "has no key of ours; loads with and without the package, also with `weights_only=True`",
)
def test_the_models_state_dict_has_no_key_of_ours(tmp_path):
    callback = balancing({})
    fit(tmp_path, callback, max_steps=3)
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    plain = TrunkAndHeads()
    assert set(checkpoint["state_dict"]) == set(plain.state_dict())
    plain.load_state_dict(checkpoint["state_dict"])
    assert callback.state_key in checkpoint["callbacks"]


@pytest.mark.feature("`trainer.test(ckpt_path=…)` after `fit`", "supported", "the live weights stay")
def test_testing_a_checkpoint_does_not_touch_the_live_weights(tmp_path):
    class WithTest(TrunkAndHeads):
        def test_step(self, batch, batch_idx):
            self.log("test", self.total_loss(self.losses(batch[0])))

    torch.manual_seed(7)
    module, callback = WithTest(), GradNormCallback(lr=0.1)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_steps=4)
    trainer.fit(module, batches(10))
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches(10))
    live = callback.weights
    assert callback.balancer.steps == 8
    trainer.test(module, batches(2), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert callback.weights == live
    fresh = GradNormCallback(lr=0.1)
    quiet_trainer(tmp_path, callbacks=[fresh]).test(module, batches(2), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert fresh.weights and fresh.weights != live, "a fresh callback tests with the checkpoint's weights"
