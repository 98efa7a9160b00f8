"""A module that hands over its losses past the Trainer, or not at all, or in vain: it is told."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from lightning_gradnorm import GradNormCallback, LossBalancingCallback, MultiTaskMixin, UncertaintyWeighting
from tests.callbacks.watching import OnTensors, Watch, loader
from tests.helpers import SCALES, TrunkAndHeads, batches, quiet_trainer


def fit(tmp_path, module, callback=None, data=None, **settings):
    callback = callback or GradNormCallback(lr=0.1, summary=False)
    quiet_trainer(tmp_path, callbacks=[callback, *settings.pop("callbacks", [])], **settings).fit(module, data or batches(4))
    return callback


# -- total_loss is never called ------------------------------------------------------------------------------------------


class Vendor(TrunkAndHeads):
    """Adds its losses up by itself."""

    def training_step(self, batch, batch_idx):
        return sum(self.losses(batch[0]).values())


class OnlyInName(Vendor, MultiTaskMixin):
    pass


@pytest.mark.feature(
    "a `training_step` that never calls `total_loss`", "refused", "after the first step: “never called total_loss(), …”"
)
def test_a_module_that_never_calls_total_loss_ends_after_the_first_step_with_what_to_write(tmp_path):
    module = OnlyInName()
    words = (
        r"training_step of OnlyInName never called total_loss\(\).*GradNormCallback.*Return self\.total_loss\(\{'task': loss"
    )
    with pytest.raises(RuntimeError, match=words):
        fit(tmp_path, module)
    assert module.trainer.global_step == 1


def test_so_it_does_after_the_first_window_of_accumulation_and_with_a_method_that_reads_no_gradients(tmp_path):
    module = OnlyInName()
    callback = LossBalancingCallback(UncertaintyWeighting(), summary=False)
    with pytest.raises(RuntimeError, match="never called total_loss"):
        fit(tmp_path, module, callback, accumulate_grad_batches=2)
    assert module.trainer.global_step == 1
    assert callback.balancer.steps == 0


def test_a_total_loss_of_the_vendors_own_is_named_as_the_reason(tmp_path):
    class WithTotal(Vendor):
        def total_loss(self, x):
            return sum(self.losses(x).values())

        def training_step(self, batch, batch_idx):
            return self.total_loss(batch[0])

    class Below(WithTotal, MultiTaskMixin):
        pass

    with pytest.raises(RuntimeError, match=r"has a total_loss of its own, from WithTotal"):
        fit(tmp_path, Below())


def test_a_manual_loop_that_never_calls_it_is_warned_once(tmp_path):
    class Manual(OnlyInName):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    with pytest.warns(UserWarning, match=r"training_step of Manual never called total_loss\(\)") as caught:
        callback = fit(tmp_path, Manual(), max_epochs=2)
    assert len([w for w in caught if "never called" in str(w.message)]) == 1
    assert callback.balancer.steps == 0


class Sparse(TrunkAndHeads):
    """Every other batch has no labels at all."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 == 0 else super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        return self.total_loss(self.losses(batch[0]))


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None")
def test_a_batch_without_labels_is_no_mistake_and_no_step_of_the_balancer(tmp_path):
    callback, module = GradNormCallback(lr=0.1, summary=False), Sparse()
    quiet_trainer(tmp_path, callbacks=[callback], num_sanity_val_steps=1).fit(module, batches(6), batches(2))
    assert callback.balancer.steps == 3
    assert callback.weights["small"] > 1


def test_the_extra_epoch_of_stochastic_weight_averaging_is_no_mistake(tmp_path):
    class Normed(TrunkAndHeads):
        def __init__(self):
            super().__init__()
            self.trunk.append(nn.BatchNorm1d(10))

    callback = GradNormCallback(lr=0.1, summary=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, Normed(), callback, callbacks=[StochasticWeightAveraging(1e-3, swa_epoch_start=1)], max_epochs=3)
    assert callback.balancer.steps == 12


def test_steps_without_a_total_are_not_counted(tmp_path):
    class Alternating(TrunkAndHeads):
        def training_step(self, batch, batch_idx):
            total = super().training_step(batch, batch_idx) if batch_idx % 2 == 0 else None
            return self.heads["odd"](self.trunk(batch[0])).square().mean() if total is None else total

    assert fit(tmp_path, Alternating(), data=batches(6)).balancer.steps == 3


# -- an optimiser that the Trainer does not see ----------------------------------------------------------------------------


class Unwrapped(OnTensors):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.total_loss(self.losses(batch)))
        optimizer.step()


@pytest.mark.feature(
    "an optimiser that the Trainer does not see (`use_pl_optimizer=False`)", "warned", "“trainer.global_step does not move”"
)
def test_an_unwrapped_optimiser_is_told_at_the_first_batch(tmp_path):
    module, seen = Unwrapped(), L.Callback()
    seen.on_train_batch_start = lambda trainer, *args: module.begun.append(trainer.global_step)
    module.begun = []
    words = r"trainer\.global_step does not move.*updates no weight.*self\.optimizers\(\)"
    with pytest.raises(UserWarning, match=words):  # warnings are errors here
        fit(tmp_path, module, data=loader(torch.randn(3, 8, 6)), callbacks=[seen])
    assert module.begun == [0]


def test_an_optimiser_that_changes_parameters_behind_autograds_back_is_told_at_the_end_of_the_epoch(tmp_path):
    class Behind(Unwrapped):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.total_loss(self.losses(batch)))
            for parameter in self.parameters():
                parameter.data -= 0.01 * parameter.grad
                parameter.grad = None

    with pytest.warns(UserWarning, match=r"trainer\.global_step does not move") as caught:
        callback = fit(tmp_path, Behind(), data=loader(torch.randn(3, 8, 6)))
    assert len([w for w in caught if "global_step" in str(w.message)]) == 1
    assert callback.balancer.steps == 0


def test_a_manual_loop_that_accumulates_is_not_told_so(tmp_path):
    class Accumulating(Unwrapped):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.total_loss(self.losses(batch)))
            if batch_idx % 3 == 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    assert fit(tmp_path, Accumulating(), data=loader(torch.randn(6, 8, 6))).balancer.steps == 2


# -- a step in which no task reaches W --------------------------------------------------------------------------------------


class Dropped(OnTensors):
    """The layer that is W is left out in some steps, for all tasks or for some."""

    def __init__(self, skipped=(2, 3), tasks=tuple(SCALES)):
        super().__init__()
        self.skipped, self.without, self.left_out = skipped, tasks, False
        self.step = -1

    def shared_layer(self):
        return self.trunk[2]

    def losses(self, x):
        self.step += 1
        with_layer, first = self.trunk(x), self.trunk[:2](x)
        out = self.step in self.skipped
        target = x[:, :2]
        return {
            task: SCALES[task] * (head(first if out and task in self.without else with_layer) - (k + 1) * target).pow(2).mean()
            for k, (task, head) in enumerate(self.heads.items())
        }


@pytest.mark.feature(
    "a step in which no task reaches the shared layer (LayerDrop, routing)", "supported", "skipped, and told once"
)
@pytest.mark.parametrize("skipped", [(2, 3), (0,)], ids=["later", "at the start"])
@pytest.mark.parametrize("settings", [{"engine": "joint"}, {"engine": "per_task"}, {"norm_of": "features"}], ids=str)
def test_a_step_in_which_no_task_reaches_the_shared_layer_is_skipped_with_a_word(tmp_path, settings, skipped):
    callback = Watch(**settings)
    module = Dropped(skipped)
    if "norm_of" in settings:
        module.trunk[:2].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"No task's loss reached the shared layer.*skipped") as caught:
        fit(tmp_path, module, callback, loader(torch.randn(6, 8, 6)))
    assert len([w for w in caught if "No task's loss" in str(w.message)]) == 1
    assert callback.balancer.steps == 6
    moved = [not torch.equal(a, b) for a, b in zip(callback.applied, callback.applied[1:], strict=False)]
    assert moved == [step not in skipped for step in range(5)]


@pytest.mark.parametrize("engine", ["joint", "per_task"])
def test_one_in_which_some_tasks_reach_it_and_some_do_not_is_an_error(tmp_path, engine):
    with pytest.raises(ValueError, match="The loss of task 'odd' does not reach the shared layer"):
        fit(tmp_path, Dropped(tasks=("odd",)), Watch(engine=engine), loader(torch.randn(6, 8, 6)))


# -- a given layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.feature("a given layer on which a task has no gradient", "warned", "at the first step, by the task's name")
def test_a_given_layer_that_a_task_has_no_gradient_on_is_told_at_the_first_step(tmp_path):
    class OnAHead(TrunkAndHeads):
        def shared_layer(self):
            return self.heads["odd"]

        def losses(self, x):
            z = self.features(x)
            whole = torch.cat([head(z) for head in self.heads.values()], dim=1)
            return {task: whole[:, 2 * k : 2 * k + 2].square().mean() for k, task in enumerate(self.heads)}

    class AfterOne(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise ValueError("after one step")

    words = r"took no part so far.*'small' in 1 step, 'middle' in 1 step, 'large' in 1 step.*depends on that layer at all"
    callbacks = [GradNormCallback(summary=False), AfterOne()]
    with pytest.warns(UserWarning, match=words), pytest.raises(ValueError, match="after one step"):
        quiet_trainer(tmp_path, callbacks=callbacks, log_every_n_steps=50).fit(OnAHead(), batches(3))
