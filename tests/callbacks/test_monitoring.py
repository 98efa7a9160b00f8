"""Monitor mode, hyperparameters, and what is told while training."""

import random
import re
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_gradnorm import (
    DynamicWeightAverage,
    EqualWeights,
    GradNorm,
    GradNormCallback,
    GramianWeighting,
    LossBalancingCallback,
    LossRatioBalancing,
    Measurement,
    ReLoBRaLo,
    SoftOptimalUncertainty,
    UncertaintyWeighting,
)
from lightning_gradnorm.callbacks.concerns import Concerns
from lightning_gradnorm.session import BalancedStep
from tests.helpers import MemoryLogger, TrunkAndHeads, batches, quiet_trainer, same_state

# -- monitor mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"update": "paper"}, {"residuals": ["odd"]}])
def test_monitoring_trains_as_without_the_callback(tmp_path, settings):
    plain, watched = TrunkAndHeads(), TrunkAndHeads()
    watched.load_state_dict(plain.state_dict())
    callback = GradNormCallback(mode="monitor", summary=False, **settings)
    quiet_trainer(tmp_path, max_epochs=2).fit(plain, batches(6))
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[callback]).fit(watched, batches(6))
    assert same_state(plain.state_dict(), watched.state_dict())
    assert set(callback.weights.values()) == {1.0}


def test_monitoring_logs_the_norms_targets_and_cosines(tmp_path):
    logger, callback = MemoryLogger(), GradNormCallback(mode="monitor", summary=False)
    quiet_trainer(tmp_path, callbacks=[callback], logger=logger).fit(TrunkAndHeads(), batches(4))
    _, last = logger.logged[-1]
    for tag in ("grad_norm/small", "target_norm/small", "loss_ratio/odd", "inverse_rate/odd", "grad_cosine/small_odd"):
        assert tag in last
    assert last["grad_norm/large"] > 10 * last["grad_norm/small"]
    assert last["total_loss/weighted"] == pytest.approx(last["total_loss/unweighted"])
    assert callback.report.method == "GradNorm (monitor)"


def test_a_frozen_balancer_goes_on_from_where_it_was(tmp_path):
    """Weights frozen for a phase, as for L-BFGS, and free again."""
    callback = GradNormCallback(lr=0.1, summary=False)
    module = TrunkAndHeads()
    quiet_trainer(tmp_path, callbacks=[callback]).fit(module, batches(4))
    before, callback.balancer.frozen = callback.weights, True
    quiet_trainer(tmp_path, callbacks=[callback]).fit(module, batches(4))
    assert callback.weights == before
    callback.balancer.frozen = False
    quiet_trainer(tmp_path, callbacks=[callback]).fit(module, batches(4))
    assert callback.weights != before


def test_a_mode_that_is_none():
    with pytest.raises(ValueError, match="mode is one of 'balance', 'monitor'; got 'watch'"):
        GradNormCallback(mode="watch")


# -- what is told ----------------------------------------------------------------------------------------------------


def told(balancer, course, every=50, first=0):
    """What is said over a course of (weight, ratio) of task ``a`` beside a quiet task ``b``; each thing once."""
    concerns, said = Concerns(), {}
    for k, (weight, ratio) in enumerate(course):
        found = concerns.of_step(balancer, ("a", "b"), (weight, max(2 - weight, 0.1)), (ratio, 0.5), first + every * k)
        said |= {about: message for about, message in found if about not in said}
    return said


def test_a_weight_that_sits_at_its_bound_is_told():
    balancer = GradNorm(max_weight=1.5)
    said = told(balancer, [(min(1 + 0.1 * k, 1.5), 0.9**k) for k in range(40)])
    assert re.search(r"weight of task 'a' has been at max_weight=1.5 for \d+ steps.*Loosen the bound", said["bound a"])
    assert told(balancer, [(1.5 if k % 8 else 1.2, 0.9**k) for k in range(40)]).keys() & {"bound a"} == set()


def with_negative_weights():
    return GramianWeighting(lambda gramian: gramian, allow_negative=True)


def test_a_method_without_bounds_sits_at_none():
    assert told(SoftOptimalUncertainty(), [(0.0 if k else 0.1, 0.9**k) for k in range(40)]) == {}
    assert told(with_negative_weights(), [(-0.5 - 0.1 * k, 0.9**k) for k in range(40)]) == {}


def test_a_negative_weight_that_stands_still_has_not_moved():
    assert told(with_negative_weights(), [(-0.5, 0.9**k) for k in range(40)]).keys() == {"still"}


def test_a_negative_weight_that_goes_to_0_does_not_run_up():
    assert told(with_negative_weights(), [(-(0.8**k), 1.0) for k in range(60)]) == {}


STUCK = [1.0 + 0.03 * (-1) ** k for k in range(48)]  # of the first loss, batch by batch


def running_up(k):
    """A weight that grows with the steps, as where a target grows because all others learn."""
    return (1.0 + 0.2 * k) ** 1.5


def test_a_task_that_cannot_be_learnt_is_told():
    said = told(GradNorm(0.5), [(running_up(k), ratio) for k, ratio in enumerate(STUCK)])
    assert said.keys() == {"vain a"}
    assert re.match(r"The weight of task 'a' keeps rising, from [\d.]+ to [\d.]+ and [\d.]+ in \d{4} steps", said["vain a"])
    assert re.search(r"while its loss stays where it was \((1|0\.99\d|1\.0\d) of the first\)", said["vain a"])
    assert said["vain a"].endswith("check its labels and its head, or lower alpha, or set max_weight.")


@pytest.mark.parametrize(
    "course",
    [
        [(running_up(k), 0.985**k) for k in range(60)],
        [(running_up(k), 1.0 - 0.1 * min(k / 10, 1)) for k in range(60)],
        [(running_up(k), 1.0 + 0.03 * k) for k in range(60)],
        [(min(1 + k, 20.0), 1.0) for k in range(60)],
        [(1 + 0.04 * k, 1.0) for k in range(60)],
        [(running_up(k), 1.0) for k in range(15)],
        [(running_up(k), 1.6 if k < 8 else 1.0) for k in range(60)],
    ],
    ids=["learns", "has learnt a little", "its loss rises", "has settled", "hardly rises", "is young", "its loss came back"],
)
def test_a_weight_at_its_work_is_nobodys_concern(course):
    """Physics-informed runs are of every one of these kinds."""
    assert told(GradNorm(0.5), course) == {}


@pytest.mark.parametrize(
    ("balancer", "end"),
    [
        (GradNorm(0), "It may be a task that cannot be learnt: check its labels and its head, or set max_weight."),
        (
            LossRatioBalancing(),
            "keeps raising the weight of a task that cannot be learnt: check its labels and its head, or lower alpha.",
        ),
        (ReLoBRaLo(), "It may be a task that cannot be learnt: check its labels and its head."),
    ],
)
def test_only_what_the_method_has_is_a_way_out(balancer, end):
    assert told(balancer, [(running_up(k), 1.0) for k in range(48)])["vain a"].endswith(end)


def test_weights_that_never_move_are_told():
    said = told(GradNorm(), [(1.0, 0.9)] * 30)
    assert re.search("have not moved in 500 steps. Is too little measured, or is a learning rate", said["still"])
    balancer = GradNorm()
    balancer.skipped_updates += 30
    said = told(balancer, [(1.0, 0.9)] * 30)
    assert re.search("have not moved in 500 steps. 30 updates were skipped, as a loss .*: see balancer.skipped", said["still"])
    assert told(EqualWeights(), [(1.0, 0.9)] * 30) == {}
    assert told(DynamicWeightAverage(), [(1.0, 0.9)] * 30) == {}, "its first weights stand for two epochs"
    frozen = GradNorm()
    frozen.frozen = True
    assert told(frozen, [(1.0, 0.9)] * 30) == {}
    alone = Concerns()
    assert not [found for k in range(30) for found in alone.of_step(GradNorm(), ("a",), (1.0,), (0.9,), 50 * k)]


def test_an_average_that_is_resumed_late_is_given_the_time_to_move():
    assert told(GradNorm(), [(1.0, 0.9)] * 30, first=5000) == {}
    assert "have not moved in 5000 steps" in told(GradNorm(), [(1.0, 0.9)] * 30, every=500, first=5000)["still"]


@pytest.mark.parametrize("every", [0, 50, 10_000])
def test_a_fit_in_which_weights_stand_still_says_so_once(tmp_path, every):
    callback = GradNormCallback(update="paper", lr=0.0, summary=False)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=12, log_every_n_steps=every)
    with pytest.warns(UserWarning, match="The loss weights have not moved in") as caught:
        trainer.fit(TrunkAndHeads(lr=1e-4), batches(50))
    assert sum("have not moved" in str(warning.message) for warning in caught) == 1


class Logging(TrunkAndHeads):
    """Logs its total under a name of its own; steps on a plateau of what ``plateau`` names."""

    def __init__(self, plateau=None):
        super().__init__()
        self.plateau = plateau

    def training_step(self, batch, batch_idx):
        total = super().training_step(batch, batch_idx)
        self.log("train_loss", total)
        self.log("elsewhere", total * 0 + self.global_step)
        return total

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.plateau is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.plateau, "interval": "step"}}


MOVING = {
    "EarlyStopping": lambda name: ([EarlyStopping(name, check_on_train_epoch_end=True)], None),
    "ModelCheckpoint": lambda name: ([ModelCheckpoint(monitor=name)], None),
    "ReduceLROnPlateau": lambda name: ([], name),
}


@pytest.mark.parametrize("who", MOVING)
@pytest.mark.parametrize("name", ["total_loss/weighted", "train_loss"])
def test_whoever_monitors_the_weighted_total_is_told_that_it_moves(tmp_path, who, name):
    others, plateau = MOVING[who](name)
    callbacks = [GradNormCallback(lr=0.1, summary=False), *others]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=who == "ModelCheckpoint")
    with pytest.warns(UserWarning, match=rf"{who} monitors '{name}', which is the weighted total: it moves"):
        trainer.fit(Logging(plateau), batches(8))


@pytest.mark.parametrize("name", ["total_loss/unweighted", "elsewhere"])
def test_other_yardsticks_are_left_alone(tmp_path, name):
    callbacks = [GradNormCallback(lr=0.1, summary=False), EarlyStopping(name, check_on_train_epoch_end=True)]
    quiet_trainer(tmp_path, callbacks=callbacks).fit(Logging(), batches(8))


def test_uncertainty_weighting_is_watched_too(tmp_path):
    callback = LossBalancingCallback(UncertaintyWeighting(lr=0.0), summary=False)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=11, log_every_n_steps=50)
    with pytest.warns(UserWarning, match="have not moved"):
        trainer.fit(TrunkAndHeads(lr=1e-4), batches(60))


# -- weights that shrink the whole gradient ----------------------------------------------------------------------------


class Lopsided(TrunkAndHeads):
    """One loss 1,000 times the others."""

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch[0])
        return self.total_loss({"huge": 1000 * losses["large"], "small": losses["small"]})


SHRUNK = r"weight of task 'huge' has come to .*shrunk to .* of the plain sum's\. Adam \(β₂ = 0\.999\).*update='paper'"


def said_of_scale(tmp_path, optimizer, **settings):
    callback = GradNormCallback(alpha=0, lr=0.1, summary=False, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(tmp_path, callbacks=[callback], logger=MemoryLogger()).fit(Lopsided(optimizer, lr=1e-6), batches(80))
    return [str(warning.message) for warning in caught if "shrunk" in str(warning.message)]


def test_a_gradient_that_the_weights_have_shrunk_under_adam_is_told_once(tmp_path):
    (said,) = said_of_scale(tmp_path, torch.optim.Adam, update="paper")
    assert re.search(SHRUNK, said)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(torch.optim.SGD, {"update": "paper"}), (torch.optim.Adam, {}), (torch.optim.Adam, {"residuals": ["huge"]})],
    ids=["SGD remembers nothing", "its size is kept", "the large one keeps its weight"],
)
def test_other_gradients_are_left_alone(tmp_path, optimizer, settings):
    assert said_of_scale(tmp_path, optimizer, **settings) == []


def test_a_gradient_that_was_small_from_the_start_is_nobodys_concern(tmp_path):
    concerns = Concerns()
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.optimizers = [torch.optim.Adam([torch.zeros(1, requires_grad=True)])]

    def say(share):
        return list(concerns.of_scale(trainer, ("a", "b"), (share, share), (1.0, 3.0)))

    for share in (1e-3, 2e-3, *[2e-4] * 30):
        assert say(share) == [], "a twentieth of the largest is the limit"
    assert [len(say(2e-5)) for _ in range(12)] == [0] * 6 + [1] * 6
    assert list(concerns.of_scale(trainer, ("a",), (1e-9,), (0.0,))) == []


def said_of_scale_alone(tmp_path, balancer, course, skipped=0):
    """What is said of the scale of two tasks' weights, step by step, where their gradients stay as they are."""
    concerns, said = Concerns(), {}
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.optimizers = [torch.optim.Adam([torch.zeros(1, requires_grad=True)])]
    balancer.skipped_updates += skipped
    for balancer.steps, weights in enumerate(course, start=1):
        ones, applied = torch.ones(2), torch.tensor(weights)
        step = BalancedStep(Measurement(("a", "b"), ones, gradient_norms=ones), applied, True, None, 1)
        said |= dict(concerns.of(trainer, balancer, step, None))
    return said


@pytest.mark.parametrize("ones", [1, 3])
def test_weights_of_one_before_the_first_update_are_no_size_to_compare_with(tmp_path, ones):
    balancer = GramianWeighting(lambda gramian: gramian)
    course = [(1.0, 1.0)] * ones + [(0.04, 0.041)] * 40
    assert said_of_scale_alone(tmp_path, balancer, course, skipped=ones - 1) == {}
    course[-20:] = [(0.001, 0.002)] * 20
    said = said_of_scale_alone(tmp_path, GramianWeighting(lambda gramian: gramian), course)
    assert said.keys() == {"shrunk"}


def test_negative_weights_do_not_make_the_gradient_small(tmp_path):
    balancer = with_negative_weights()
    assert said_of_scale_alone(tmp_path, balancer, [(1.0, 1.0)] * 20 + [(1.0, -1.0)] * 40) == {}
    said = said_of_scale_alone(tmp_path, balancer, [(1.0, -1.0)] * 20 + [(0.001, -0.01)] * 40)
    assert "The weight of task 'a' has come to 0.001, and" in said["shrunk"]


def test_a_noisy_batch_is_nobodys_concern(tmp_path):
    """One batch against the largest single one was a twentieth on most seeds of the digits."""
    concerns, draw = Concerns(), random.Random(0)
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.optimizers = [torch.optim.Adam([torch.zeros(1, requires_grad=True)])]
    for _ in range(2000):
        share = draw.lognormvariate(0, 1.0)
        assert not list(concerns.of_scale(trainer, ("a", "b"), (share, share), (1.0, 3.0)))
