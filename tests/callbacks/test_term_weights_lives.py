"""``callback.weight`` in hyperparameters and checkpoints, beside other callbacks, in other processes and loops."""

import warnings

import lightning as L
import numpy as np
import pytest
import torch
import yaml

from lightning_gradnorm import (
    GradNormCallback,
    total_loss,
)
from tests.callbacks.library import FACTORS, TASKS, Library, fit, same, weights_of
from tests.helpers import TrunkAndHeads, batches, quiet_trainer


def test_saved_hyperparameters_are_plain_numbers(tmp_path):
    callback = GradNormCallback(0, lr=0.1, summary=False)
    module = Library(weights_of(callback, FACTORS))
    trainer = quiet_trainer(
        tmp_path, callbacks=[callback], logger=L.pytorch.loggers.CSVLogger(tmp_path), enable_checkpointing=True
    )
    trainer.fit(module, batches(6))
    path = tmp_path / "whole.ckpt"
    trainer.save_checkpoint(path)
    held = torch.load(path, weights_only=True)["hyper_parameters"]["weights"]
    assert held == FACTORS
    assert {type(weight) for weight in held.values()} == {float}
    assert "0.25" in (next(tmp_path.rglob("hparams.yaml"))).read_text()
    again = Library.load_from_checkpoint(path)
    assert again.hparams["weights"] == FACTORS
    assert module.hparams["weights"]["small"].task == "small", "the module at work keeps its own"


def test_numpy_and_yaml_have_the_plain_number():
    weight, array = GradNormCallback().weight("a", 0.5), np.array([1.0, 2.0])
    for found, expected in (
        (array + weight, array + 0.5),
        (weight - array, 0.5 - array),
        (array / weight, array / 0.5),
        (array > weight, array > 0.5),
        (np.float32(2) / weight, 4.0),
        (np.sqrt(weight), np.sqrt(0.5)),
        (np.isfinite(weight), True),
        (np.add.reduce([weight, weight]), 1.0),
    ):
        np.testing.assert_array_equal(found, expected)
    for name in ("Dumper", "SafeDumper", "CDumper", "CSafeDumper"):
        if hasattr(yaml, name):
            assert yaml.dump({"a": weight}, Dumper=getattr(yaml, name)) == "a: 0.5\n"


def test_resume_is_exact(tmp_path):
    def run(epochs, ckpt=None):
        torch.manual_seed(0)
        callback = GradNormCallback(lr=0.1, summary=False)
        trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=epochs)
        trainer.fit(Library(weights_of(callback)), batches(6), ckpt_path=ckpt)
        return trainer, callback

    whole = run(2)[1]
    half, _ = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert run(2, tmp_path / "half.ckpt")[1].weights == whole.weights


def test_two_callbacks_have_weights_of_their_own(tmp_path):
    first, second = GradNormCallback(lr=0.1, summary=False), GradNormCallback(lr=0.1, summary=False)
    module = Library(weights_of(first))
    with pytest.raises(RuntimeError, match=r"never called total_loss\(\)"):
        quiet_trainer(tmp_path, callbacks=[second]).fit(module, batches(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quiet_trainer(tmp_path, callbacks=[first]).fit(module, batches(3))
    assert set(first.weights) == set(TASKS)


@pytest.mark.slow
def test_a_spawned_worker_weighs_and_comes_home(tmp_path):
    callback, own = GradNormCallback(lr=0.1, summary=False), GradNormCallback(lr=0.1, summary=False)
    fit(tmp_path, lambda: Library(weights_of(callback)), callback, strategy="ddp_spawn")
    fit(tmp_path, TrunkAndHeads, own, strategy="ddp_spawn")
    assert callback.weights == own.weights
    assert max(abs(weight - 1) for weight in callback.weights.values()) > 0.1


def test_manual_optimisation_takes_terms_too(tmp_path):
    def step(module, total):
        optimizer = module.optimizers()
        optimizer.zero_grad()
        module.manual_backward(total)
        optimizer.step()

    class Manual(Library):
        def __init__(self, weights):
            super().__init__(weights)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            step(self, self.total(batch))

    callback = GradNormCallback(lr=0.1, summary=False)
    found = fit(tmp_path, lambda: Manual(weights_of(callback)), callback)
    assert same(found, fit(tmp_path, TrunkAndHeads, GradNormCallback(lr=0.1, summary=False)))


def test_terms_and_a_total_of_other_tasks_are_one_step(tmp_path):
    class Both(Library):
        def total(self, batch):
            losses = self.losses(batch[0])
            last = {"odd": losses.pop("odd")}
            return sum(self.hparams["weights"][task] * losses[task] for task in losses) + total_loss(last)

    callback = GradNormCallback(lr=0.1, summary=False)
    found = fit(tmp_path, lambda: Both({task: callback.weight(task) for task in TASKS[:3]}), callback)
    expected = fit(tmp_path, TrunkAndHeads, GradNormCallback(lr=0.1, summary=False))
    assert same(found, expected)
