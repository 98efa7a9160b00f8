"""Several totals in one step of a manual loop: they are weighed together, as the micro-batches that they are."""

import copy

import pytest
import torch

from tests.callbacks.test_called_or_told import fit
from tests.callbacks.watching import OnTensors, Watch, assert_same_history, loader
from tests.helpers import SCALES


class Manual(OnTensors):
    """One step on all tasks, in as many totals and backward passes as ``parts`` says."""

    def __init__(self, parts=tuple((task,) for task in SCALES), *, backwards=None, step_each=False):
        super().__init__()
        self.automatic_optimization = False
        self.parts, self.together, self.step_each = parts, backwards == 1, step_each

    def shared_layer(self):
        return self.trunk[2]

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        losses = self.losses(batch)
        totals = [self.total_loss({task: losses[task] for task in part}) for part in self.parts]
        for total in [sum(totals)] if self.together else totals:
            self.manual_backward(total, retain_graph=True)
            if self.step_each:
                optimizer.step()
                optimizer.zero_grad()
                losses = self.losses(batch)
        if not self.step_each:
            optimizer.step()


PARTS = {
    "one total per task": {},
    "two totals": {"parts": (("small", "middle"), ("large", "odd"))},
    "one backward through all totals": {"backwards": 1},
}


@pytest.mark.parametrize("engine", ["joint", "per_task"])
@pytest.mark.parametrize("settings", PARTS.values(), ids=PARTS)
@pytest.mark.feature("several totals in one step of manual optimisation", "supported", "they are weighed together")
def test_several_totals_of_one_step_are_weighed_as_one(tmp_path, settings, engine):
    x, module = torch.randn(6, 8, 6), Manual(**settings)
    whole = Manual(parts=(tuple(SCALES),))
    whole.load_state_dict(module.state_dict())
    callback, expected = Watch(engine=engine), Watch(engine=engine)
    fit(tmp_path, module, callback, loader(x))
    fit(tmp_path, whole, expected, loader(x))
    assert_same_history(callback, expected)
    assert callback.balancer.steps == 6


def test_a_total_a_backward_and_an_optimiser_step_per_task_are_weighed_together(tmp_path):
    class StepEach(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for task in SCALES:
                optimizer.zero_grad()
                self.manual_backward(self.total_loss({task: self.losses(batch)[task]}))
                optimizer.step()

    callback = fit(tmp_path, StepEach(), Watch(), loader(torch.randn(6, 8, 6)))
    assert list(callback.weights) == list(SCALES)
    assert callback.balancer.steps == 6
    assert callback.weights["small"] > 1 > callback.weights["large"]


def test_micro_batches_inside_one_training_step_are_one_batch(tmp_path):
    class Micro(Manual):
        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            for part in batch.chunk(self.chunks):
                self.manual_backward(self.total_loss(self.losses(part)) / self.chunks)
            self.optimizers().step()

    x, one = torch.randn(4, 12, 6), Micro()
    other, one.chunks = copy.deepcopy(one), 1
    other.chunks = 3
    assert_same_history(fit(tmp_path, other, Watch(), loader(x)), fit(tmp_path, one, Watch(), loader(x)))


def test_one_backward_through_two_totals_of_one_task_is_refused(tmp_path):
    class Twice(Manual):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.total_loss(self.losses(batch)) + self.total_loss(self.losses(batch)))

    with pytest.raises(RuntimeError, match=r"One backward runs through two totals of task 'large', 'middle'.*once"):
        fit(tmp_path, Twice(), data=loader(torch.randn(2, 8, 6)))
