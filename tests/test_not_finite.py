"""Losses and norms that are not finite: the step is skipped and counted, and the fit goes on."""

import math
import warnings

import lightning as L
import pytest
import torch

from lightning_gradnorm import GradNorm, GradNormCallback
from tests.helpers import TrunkAndHeads, batches, of_version_0_1, quiet_trainer, same_state
from tests.test_bad_input import TASKS, live, measured

NAN, INF = math.nan, math.inf
pytestmark = of_version_0_1


METHODS = [
    {},
    {"residuals": ["a"]},
    {"update": "log"},
    {"update": "paper"},
    {"update": "closed_form"},
    {"scale": "gradient"},
    {"alpha": 0.0},
]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_a_later_update_is_skipped_and_counted(settings, position, value):
    for what in ("losses", "norms"):
        numbers = {"losses": [1.0, 1.0, 1.0], "norms": [1.0, 2.0, 3.0]}
        numbers[what][position] = value
        balancer, other = live(**settings), live(**settings)
        before = balancer.state_dict()
        balancer.update(measured(**numbers))
        after = balancer.state_dict()
        assert same_state(after, before | {"steps": 3, "skipped_updates": torch.tensor(1)})
        for it in (balancer, other):
            it.update(measured(losses=[0.5, 1.0, 2.0]))
        assert balancer.weights == other.weights, "the optimiser's memory is the same"
        balancer.update(measured(TASKS[position:], losses=[value] * (3 - position)))
        assert balancer.skipped_updates == 2
        assert balancer.weights == other.weights, "likewise with tasks absent"


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("what", ["losses", "norms"])
@pytest.mark.parametrize("update", ["average", "log", "paper", "closed_form"])
def test_a_first_update_is_skipped_and_counted(update, what, position, value):
    numbers = {"losses": [1.0, 2.0, 3.0], "norms": [1.0, 2.0, 4.0]}
    numbers[what][position] = value
    balancer, fresh = GradNorm(update=update), GradNorm(update=update)
    balancer.update(measured(**numbers))
    assert balancer.weights == dict.fromkeys(TASKS, 1.0)
    assert balancer.state_dict()["optimizer"]["state"] == {}
    for losses in ([3.0, 2.0, 1.0], [0.5, 1.0, 2.9], [0.4, 0.5, 0.1]):
        for it in (balancer, fresh):
            it.update(measured(losses=losses))
        assert what == "norms" or balancer.weights == fresh.weights, "as if training had begun one step later"
    assert len(set(balancer.weights.values())) == 3
    assert balancer.skipped_updates == 1


class NotFinite(TrunkAndHeads):
    """One task's loss, or only its gradient, is not finite on some steps; the network itself is kept from harm."""

    def __init__(self, task, value, steps):
        super().__init__()
        self.task, self.value, self.steps = task, value, steps

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch[0])
        if batch_idx in self.steps:
            bad = (losses[self.task] * 0).sqrt() if self.value is None else losses[self.task] * self.value
            losses[self.task] = losses[self.task].detach() + bad
        return self.total_loss(losses)

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


@pytest.mark.parametrize("steps", [(0,), (2,), (1, 3)], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, None], ids=["loss nan", "loss inf", "gradient"])
@pytest.mark.parametrize("task", ["small", "odd"])
@pytest.mark.parametrize("settings", [{}, {"engine": "per_task", "log_cosines": False}], ids=["joint", "per task"])
def test_the_fit_goes_on_and_warns_once(tmp_path, settings, task, value, steps):
    callback, weights = GradNormCallback(summary=False, **settings), []
    watch = L.pytorch.callbacks.LambdaCallback(on_train_batch_end=lambda *_: weights.append(callback.weights))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet_trainer(tmp_path, callbacks=[callback, watch], max_epochs=2).fit(NotFinite(task, value, steps), batches(5))
    about = [str(warning.message) for warning in told if "skipped" in str(warning.message)]
    assert len(about) == 1
    assert "GradNormCallback skipped 1 weight update so far: a task's loss or gradient was not finite" in about[0]
    assert callback.balancer.steps == 10
    assert callback.balancer.skipped_updates == 2 * len(steps)
    ones = dict.fromkeys(("small", "middle", "large", "odd"), 1.0)
    moved = [i for i, (now, before) in enumerate(zip(weights, [ones, *weights], strict=False)) if now != before]
    assert moved == [i for i in range(10) if i % 5 not in steps]
