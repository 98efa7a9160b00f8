"""What ``callback.weight`` refuses or tells, with the way out."""

import numpy as np
import pytest
import torch

from lightning_gradnorm import (
    AdaptiveNormalizedLoss,
    DynamicTaskPrioritization,
    GeometricLoss,
    GradNormCallback,
    LossBalancingCallback,
    SelfAdaptivePoints,
)
from tests.callbacks.library import Library, fit, weights_of


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
