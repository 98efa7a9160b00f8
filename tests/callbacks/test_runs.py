"""Evaluation and tuning before a fit, one fit after another, short ones, and one that breaks off."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from tests.callbacks.watching import TASKS, Watch, assert_same_history, train
from tests.helpers import TrunkAndHeads, batches, quiet_trainer


class WithValidation(TrunkAndHeads):
    def validation_step(self, batch, batch_idx):
        self.log("val", self.total_loss(self.losses(batch[0])))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.total_loss(self.losses(batch[0]))


def fit_after(tmp_path, what):
    torch.manual_seed(0)
    module, callback = WithValidation(), Watch()
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_steps=6, max_epochs=-1, num_sanity_val_steps=2)
    what(trainer, module)
    torch.manual_seed(1)
    trainer.fit(module, batches(6), batches(2))
    return callback


TRIALS = {
    "validate": lambda trainer, module: trainer.validate(module, batches(2), verbose=False),
    "test": lambda trainer, module: trainer.test(module, batches(2), verbose=False),
    "predict": lambda trainer, module: trainer.predict(module, batches(2)),
}


@pytest.mark.feature("`validate`, `test`, `predict` before `fit`; sanity check", "supported", "L(0) and weights untouched")
@pytest.mark.parametrize("trial", TRIALS.values(), ids=TRIALS)
def test_evaluation_before_fit_changes_nothing(tmp_path, trial):
    assert_same_history(fit_after(tmp_path, trial), fit_after(tmp_path, lambda *_: None), rtol=0)


@pytest.mark.feature("`lr_find`, `scale_batch_size`", "supported", "L(0) and weights untouched")
@pytest.mark.filterwarnings("ignore")  # the tuner's own
def test_the_tuner_changes_nothing(tmp_path):
    class Sized(WithValidation):
        batch_size = 8

        def train_dataloader(self):
            loader = batches(40)
            return DataLoader(loader.dataset, batch_size=self.batch_size)

        def val_dataloader(self):
            return batches(2)

    def run(find):
        torch.manual_seed(0)
        module, callback = Sized(), Watch()
        trainer = quiet_trainer(tmp_path, callbacks=[callback], max_steps=6, max_epochs=-1, enable_checkpointing=True)
        if find:
            tuner = L.pytorch.tuner.Tuner(trainer)
            tuner.lr_find(module, num_training=5, update_attr=False)
            tuner.scale_batch_size(module, max_trials=1, steps_per_trial=1)
            module.batch_size = 8
            assert callback.weights == {}
        trainer.fit(module)
        return callback

    assert_same_history(run(True), run(False), rtol=0)


@pytest.mark.feature("two `fit`s of one module", "supported", "the second goes on; `callback.balancer.reset()` starts anew")
def test_two_fits_go_on_with_the_weights(tmp_path):
    module, callback = TrunkAndHeads(), Watch()
    quiet_trainer(tmp_path, callbacks=[callback]).fit(module, batches(4))
    first = callback.weights
    quiet_trainer(tmp_path, callbacks=[callback]).fit(module, batches(4))
    assert dict(zip(TASKS, callback.applied[4].tolist(), strict=True)) == first
    assert callback.balancer.steps == 8
    callback.balancer.reset()
    assert callback.weights == {}


@pytest.mark.feature("`limit_train_batches`, `overfit_batches`, `max_steps`, `fast_dev_run`", "supported")
@pytest.mark.parametrize(
    "settings", [{"limit_train_batches": 3}, {"overfit_batches": 3}, {"max_steps": 3}, {"fast_dev_run": 3}], ids=str
)
def test_short_runs_update_once_per_step(tmp_path, settings):
    callback = train(tmp_path, TrunkAndHeads(), batches(6), **settings)
    assert callback.balancer.steps == 3


@pytest.mark.feature("an exception or Ctrl-C in a step", "supported", "the state is that of the last whole step")
@pytest.mark.parametrize("where", ["training_step", "on_before_zero_grad", "on_train_batch_end"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_whole_state_and_no_graph(tmp_path, where, error):
    module, callback = TrunkAndHeads(), Watch()
    original = getattr(module, where)

    def fails(*args, **kwargs):
        result = original(*args, **kwargs)
        if module.global_step >= 2:
            raise error("stop")
        return result

    setattr(module, where, fails)
    with pytest.raises((error, SystemExit)):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(module, batches(6))
    assert callback._session.noted == []
    assert not callback._session.window
    assert callback.balancer.steps == 2
    assert all(0 < weight < 1e6 for weight in callback.weights.values())
    setattr(module, where, original)
    quiet_trainer(tmp_path, callbacks=[callback]).fit(module, batches(3))
    assert all(0 < weight < 1e6 for weight in callback.weights.values())
