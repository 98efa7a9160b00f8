"""``callback.weight``: where a library multiplies a term by a number, and where nobody may change how."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm import (
    GradNormCallback,
)
from tests.callbacks.library import FACTORS, TASKS, Library, Scaled, fit, same, weights_of
from tests.helpers import TrunkAndHeads, batches, quiet_trainer


@pytest.mark.feature(
    "a library that takes loss weights as numbers",
    "supported",
    "`callback.weight(task)` in the place of each; equal to the mixin",
)
@pytest.mark.parametrize("settings", [{}, {"update_every": 2}, {"engine": "per_task"}], ids=str)
def test_numbers_of_a_library_are_weighed_as_a_dict_of_ones_own(tmp_path, settings):
    callback = GradNormCallback(lr=0.1, summary=False, **settings)
    found = fit(tmp_path, lambda: Library(weights_of(callback)), callback)
    expected = fit(tmp_path, TrunkAndHeads, GradNormCallback(lr=0.1, summary=False, **settings))
    assert same(found, expected)
    assert max(abs(weight - 1) for weight in found.weights[-1].values()) > 0.1


def test_the_factor_is_a_part_of_the_loss(tmp_path):
    callback = GradNormCallback(0, lr=0.1, summary=False)
    found = fit(tmp_path, lambda: Library(weights_of(callback, FACTORS)), callback)
    assert same(found, fit(tmp_path, Scaled, GradNormCallback(0, lr=0.1, summary=False)))


def test_without_the_callback_it_is_the_number(tmp_path):
    weights = weights_of(GradNormCallback(), FACTORS)
    found = fit(tmp_path, lambda: Library(weights), None)
    expected = fit(tmp_path, lambda: Library(FACTORS), None)
    assert all(map(torch.equal, found.parameters, expected.parameters))


def test_evaluation_has_the_plain_number_and_logs_the_term(tmp_path):
    class Evaluated(Library):
        def validation_step(self, batch, batch_idx):
            self.log("own", self.total(batch))

    callback = GradNormCallback(lr=0.1, summary=False)
    module = Evaluated(weights_of(callback))
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.fit(module, batches(6), batches(2))
    with torch.no_grad():
        losses = [module.losses(batch[0]) for batch in batches(2)]
    for task in TASKS:
        torch.testing.assert_close(
            trainer.callback_metrics[f"val_task_loss/{task}"], torch.stack([loss[task] for loss in losses]).mean()
        )
    torch.testing.assert_close(trainer.callback_metrics["own"], trainer.callback_metrics["val_total_loss"])


def test_what_is_added_to_a_term_in_place_leaves_the_loss_as_it_is(tmp_path):
    class Adds(Library):
        def validation_step(self, batch, batch_idx):
            losses, weights = self.losses(batch[0]), self.hparams["weights"]
            total = weights["small"] * losses["small"]
            total += weights["odd"] * losses["odd"]
            self.log("own", losses["small"])

    callback = GradNormCallback(lr=0.1, summary=False)
    module = Adds(weights_of(callback))
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.fit(module, batches(6), batches(1))
    with torch.no_grad():
        small = module.losses(next(iter(batches(1)))[0])["small"]
    assert trainer.callback_metrics["own"] == trainer.callback_metrics["val_task_loss/small"] == small


def test_a_term_that_is_switched_off_or_detached_is_absent(tmp_path):
    class Sometimes(Library):
        def training_step(self, batch, batch_idx):
            losses, weights = self.losses(batch[0]), self.hparams["weights"]
            logged = weights["large"] * losses["large"].detach()
            assert logged == losses["large"]
            losses["odd"] = (0.0, torch.zeros(()), losses["odd"])[batch_idx % 3]
            return sum(weights[task] * losses[task] for task in losses)

    class Own(TrunkAndHeads):
        def training_step(self, batch, batch_idx):
            losses = self.losses(batch[0])
            return self.total_loss(losses if batch_idx % 3 == 2 else {t: loss for t, loss in losses.items() if t != "odd"})

    callback = GradNormCallback(lr=0.1, summary=False)
    found = fit(tmp_path, lambda: Sometimes(weights_of(callback)), callback)
    assert same(found, fit(tmp_path, Own, GradNormCallback(lr=0.1, summary=False)))


@pytest.mark.parametrize(
    "settings", [{"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}], ids=str
)
def test_what_the_trainer_does_with_the_total_stays_as_it_was(tmp_path, settings):
    callback = GradNormCallback(lr=0.1, summary=False)
    found = fit(tmp_path, lambda: Library(weights_of(callback)), callback, **settings)
    assert same(found, fit(tmp_path, TrunkAndHeads, GradNormCallback(lr=0.1, summary=False), **settings))


def test_a_line_search_weighs_each_evaluation(tmp_path):
    def lbfgs(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    searched, own = type("Searched", (Library,), {"configure_optimizers": lbfgs}), type("Own", (TrunkAndHeads,), {})
    own.configure_optimizers = lbfgs
    callback = GradNormCallback(lr=0.1, summary=False)
    found = fit(tmp_path, lambda: searched(weights_of(callback)), callback)
    assert same(found, fit(tmp_path, own, GradNormCallback(lr=0.1, summary=False)))


@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
def test_a_compiled_step_is_weighed(tmp_path):
    callback = GradNormCallback(lr=0.1, summary=False)

    def compiled():
        module = Library(weights_of(callback))
        module.training_step = torch.compile(module.training_step, backend="eager")
        return module

    found = fit(tmp_path, compiled, callback)
    expected = fit(tmp_path, TrunkAndHeads, GradNormCallback(lr=0.1, summary=False))
    assert found.weights[-1] == pytest.approx(expected.weights[-1], rel=1e-5)


# -- ways in which libraries write a product ---------------------------------------------------------------------------

WAYS = {
    "weight * loss": lambda weight, loss: weight * loss,
    "loss * weight": lambda weight, loss: loss * weight,
    "torch.mul": lambda weight, loss: torch.mul(weight, loss),
    "loss.mul": lambda weight, loss: loss.mul(weight),
    "torch.multiply": lambda weight, loss: torch.multiply(loss, weight),
    "a number between": lambda weight, loss: (weight * 2) * loss / 2,
    "a numpy number between": lambda weight, loss: (np.float64(2) * weight / 2) * loss,
    "minus": lambda weight, loss: -(-weight * loss),
    "a copy": lambda weight, loss: copy.deepcopy([weight])[0] * loss,
    "one entry": lambda weight, loss: torch.cat([weight * loss.reshape(1)]),
    "numpy's product": lambda weight, loss: np.multiply(weight, np.float32(2)) * loss / 2,
    "a subclass": lambda weight, loss: weight * loss.as_subclass(type("Labelled", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_the_product_is_seen(tmp_path, way):
    if way == "a numpy number between" and np.lib.NumpyVersion(np.__version__) < "2.1.0":
        pytest.skip("NumPy before 2.1 does not ask the other factor; the callback says that the weight was read as a number")

    class Written(Library):
        def total(self, batch):
            losses = self.losses(batch[0])
            return sum(WAYS[way](self.hparams["weights"][task], losses[task]).sum() for task in losses)

    callback = GradNormCallback(0, lr=0.1, summary=False)
    found = fit(tmp_path, lambda: Written(weights_of(callback)), callback)
    expected = fit(tmp_path, TrunkAndHeads, GradNormCallback(0, lr=0.1, summary=False))
    assert found.weights[-1] == pytest.approx(expected.weights[-1], rel=1e-5)


def test_divided_by_what_has_a_gradient_it_trains_that_too(tmp_path):
    class Uncertain(Library):
        def __init__(self, weights):
            super().__init__(weights)
            self.spread = torch.nn.Parameter(torch.ones(()))

        def total(self, batch):
            losses, weights = self.losses(batch[0]), self.hparams["weights"]
            return sum(weights[task] / (1 / losses[task]) for task in losses if task != "odd") + weights["odd"] / self.spread

    callback = GradNormCallback(summary=False)
    found = fit(tmp_path, lambda: Uncertain(weights_of(callback)), None)
    expected = fit(tmp_path, lambda: Uncertain(dict.fromkeys(TASKS, 1.0)), None)
    assert all(map(torch.equal, found.parameters, expected.parameters))


def test_a_checkpointed_forward_that_runs_again_is_no_second_loss(tmp_path):
    class Checkpointed(Library):
        def total(self, batch):
            return checkpoint(super().total, batch, use_reentrant=False)

    callback = GradNormCallback(lr=0.1, summary=False)
    found = fit(tmp_path, lambda: Checkpointed(weights_of(callback)), callback)
    assert same(found, fit(tmp_path, TrunkAndHeads, GradNormCallback(lr=0.1, summary=False)))


def test_in_place_is_out_of_place(tmp_path):
    class InPlace(Library):
        def total(self, batch):
            total = 0
            for task, loss in self.losses(batch[0]).items():
                loss *= self.hparams["weights"][task]
                total = total + loss
            return total

    callback = GradNormCallback(lr=0.1, summary=False)
    found = fit(tmp_path, lambda: InPlace(weights_of(callback)), callback)
    assert same(found, fit(tmp_path, TrunkAndHeads, GradNormCallback(lr=0.1, summary=False)))
