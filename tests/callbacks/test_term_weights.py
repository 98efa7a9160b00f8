"""``callback.weight``: where a library multiplies a term by a number, and where nobody may change how."""

import copy
import warnings

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm import (
    AdaptiveNormalizedLoss,
    DynamicTaskPrioritization,
    GeometricLoss,
    GradNormCallback,
    LossBalancingCallback,
    SelfAdaptivePoints,
    total_loss,
)
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

    features, losses = TrunkAndHeads.features, TrunkAndHeads.losses

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


# -- what cannot be --------------------------------------------------------------------------------------------------------


def test_two_losses_of_one_task_are_refused(tmp_path):
    class Twice(Library):
        def total(self, batch):
            losses = self.losses(batch[0])
            return self.hparams["weights"]["small"] * losses["small"] + self.hparams["weights"]["small"] * losses["large"]

    callback = GradNormCallback(summary=False)
    with pytest.raises(RuntimeError, match=r"'small' multiplied two losses in one step.*weight\('small 2'\).*total_loss\("):
        fit(tmp_path, lambda: Twice(weights_of(callback)), callback)


@pytest.mark.parametrize(
    ("callback", "why"),
    [
        (LossBalancingCallback(GeometricLoss()), "GeometricLoss depend on all losses"),
        (LossBalancingCallback(AdaptiveNormalizedLoss()), "AdaptiveNormalizedLoss depend on all losses"),
        (LossBalancingCallback(DynamicTaskPrioritization()), "DynamicTaskPrioritization needs each task's key performance"),
        (GradNormCallback(points={"a": SelfAdaptivePoints()}), "points of this task are weighed one by one"),
    ],
    ids=["geometric", "amnl", "dtp", "points"],
)
def test_a_method_that_sees_all_losses_together_says_so(callback, why):
    with pytest.raises(ValueError, match=rf"weight\('a'\).*{why}.*total_loss\("):
        callback.weight("a")
    assert not callback.session.handed_out


def test_bad_names_and_numbers_are_refused():
    callback = GradNormCallback(tasks=["a", "b"])
    with pytest.raises(ValueError, match="Unknown task 'c'"):
        callback.weight("c")
    with pytest.raises(TypeError, match="A task's name is a string, got 3"):
        callback.weight(3)
    with pytest.raises(TypeError, match="factor of task 'a' is the number"):
        callback.weight("a", "heavy")
    with pytest.raises(ValueError, match="factor of task 'a' is a finite number, got nan"):
        callback.weight("a", float("nan"))
    assert callback.weight("a", np.float32(0.5)) == 0.5


def test_a_vector_is_refused_with_the_way_out(tmp_path):
    class Vector(Library):
        def total(self, batch):
            return (self.hparams["weights"]["small"] * self.features(batch[0]).square().mean(1)).mean()

    callback = GradNormCallback(summary=False)
    with pytest.raises(ValueError, match=r"loss of task 'small' has shape \(8,\); every loss is a scalar"):
        fit(tmp_path, lambda: Vector(weights_of(callback)), callback)


def test_numbers_that_were_read_once_are_told_at_the_first_step(tmp_path):
    class Reads(Library):
        def total(self, batch):
            return sum(torch.tensor(self.hparams["weights"][task]) * loss for task, loss in self.losses(batch[0]).items())

    callback = GradNormCallback(summary=False)
    with pytest.raises(
        RuntimeError, match=r"never called total_loss\(\).*'large', 'middle', 'odd', 'small' was handed out, but no"
    ):
        fit(tmp_path, lambda: Reads(weights_of(callback)), callback)


def test_one_number_that_was_read_once_is_told_at_the_end_of_the_epoch(tmp_path):
    callback = GradNormCallback(summary=False)
    with pytest.warns(UserWarning, match=r"No loss that was multiplied by the weight of 'odd' went backward in this epoch"):
        fit(tmp_path, lambda: Library(weights_of(callback) | {"odd": float(callback.weight("odd"))}), callback)
    assert set(callback.weights) == {"small", "middle", "large"}


def test_a_loss_that_is_not_built_from_the_terms_is_told(tmp_path):
    class Forgets(Library):
        def training_step(self, batch, batch_idx):
            self.total(batch)
            return self.features(batch[0]).square().mean()

    callback = GradNormCallback(summary=False)
    with pytest.warns(UserWarning, match="handed losses over to be balanced, but returned a loss that was not built from"):
        fit(tmp_path, lambda: Forgets(weights_of(callback)), callback)


# -- hyperparameters and lives ----------------------------------------------------------------------------------------------


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
