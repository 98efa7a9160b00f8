"""Per-point weights through the Trainer, with any balancer between the terms."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradnorm import (
    EqualWeights,
    GradientNormPoints,
    GradNorm,
    GradNormCallback,
    LossBalancingCallback,
    Measurement,
    SelfAdaptivePoints,
    UncertaintyWeighting,
    UniformPoints,
)
from lightning_gradnorm.pointwise import NotedPoints
from tests.helpers import TrunkAndHeads, quiet_trainer, same_state

POINTS = 12


class Curve(TrunkAndHeads):
    """Two terms: a curve through fixed points, one loss per point, and the slope at the ends."""

    def __init__(self, optimizer=torch.optim.SGD, lr=0.05):
        torch.manual_seed(4)
        super().__init__(optimizer, lr, scales={"curve": 1.0, "ends": 1.0})
        self.trunk = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1))

    def shared_layer(self):
        return self.trunk[2].weight

    def curve(self, x):
        return (self.trunk(x) - torch.tanh(10 * x)).squeeze(1)

    def terms(self, x):
        return {"curve": self.curve(x).square(), "ends": self.trunk(torch.ones(1, 1)).square().mean()}

    def training_step(self, batch, batch_idx):
        x, index = batch
        return self.total_loss(self.terms(x), points={"curve": index})


def loader(batch_size=POINTS):
    x = torch.linspace(-1, 1, POINTS).unsqueeze(1)
    return DataLoader(TensorDataset(x, torch.arange(POINTS)), batch_size=batch_size)


def balancing(points, balancer=None, **settings):
    return LossBalancingCallback(balancer or EqualWeights(), points={"curve": points}, summary=False, **settings)


@pytest.mark.parametrize("batch_size", [POINTS, 4])
@pytest.mark.parametrize("make", [EqualWeights, GradNorm, UncertaintyWeighting])
def test_masks_and_weights_as_in_a_loop_written_by_hand(tmp_path, make, batch_size):
    module = Curve()
    by_hand, masks, balancer = copy.deepcopy(module), SelfAdaptivePoints(POINTS, lr=0.1), make()
    callback = balancing(SelfAdaptivePoints(POINTS, lr=0.1), make())
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=4).fit(module, loader(batch_size))
    optimizer = by_hand.configure_optimizers()
    for _ in range(4):
        for x, index in loader(batch_size):
            losses = by_hand.terms(x)
            vector = losses["curve"].detach()
            losses["curve"] = masks.term(losses["curve"], index)
            norms = [
                torch.autograd.grad(loss, by_hand.trunk[2].weight, retain_graph=True)[0].norm() for loss in losses.values()
            ]
            optimizer.zero_grad()
            balancer.total(losses).backward()
            optimizer.step()
            from_step = torch.stack([loss.detach() for loss in losses.values()])
            balancer.update(Measurement(tuple(losses), from_step.double(), torch.stack(norms).double()))
            masks.update([NotedPoints(vector, index)])
    torch.testing.assert_close(callback.points["curve"].masks, masks.masks, rtol=1e-4, atol=1e-6)
    assert callback.weights == pytest.approx(balancer.weights, rel=1e-4)
    assert masks.masks.std() > 1e-4  # Adam's first steps are of one size for all points


def test_uniform_points_train_like_the_mean(tmp_path):
    class Mean(Curve):
        def terms(self, x):
            return {task: loss.mean() for task, loss in super().terms(x).items()}

    ours, theirs = Curve(), Mean()
    callbacks = balancing(UniformPoints(), GradNorm()), GradNormCallback(summary=False)
    for module, callback in zip((ours, theirs), callbacks, strict=True):
        quiet_trainer(tmp_path, callbacks=[callback], max_epochs=3).fit(module, loader())
    assert callbacks[0].weights == callbacks[1].weights
    assert same_state(ours.state_dict(), theirs.state_dict())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_masks_survive_a_checkpoint_in_mid_epoch(tmp_path):
    def fit(max_steps, ckpt_path=None):
        torch.manual_seed(0)
        callback = balancing(SelfAdaptivePoints(POINTS, lr=0.1), GradNorm())
        saving = ModelCheckpoint(
            tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
        )
        trainer = quiet_trainer(
            tmp_path, callbacks=[callback, saving], max_epochs=-1, max_steps=max_steps, enable_checkpointing=True
        )
        trainer.fit(Curve(torch.optim.Adam), loader(4), ckpt_path=ckpt_path)
        return callback.state_dict()

    whole = fit(9)
    assert same_state(fit(9, tmp_path / "step=6.ckpt"), whole)


def test_masks_are_frozen_while_lbfgs_runs(tmp_path):
    callback, module = balancing(SelfAdaptivePoints(POINTS, lr=0.1)), Curve()
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=3).fit(module, loader())
    before = callback.points["curve"].state_dict()
    module.make_optimizer, module.lr = torch.optim.LBFGS, 0.5
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=3).fit(module, loader())
    assert same_state(callback.points["curve"].state_dict(), before)


def test_outside_training_a_term_is_the_plain_mean(tmp_path):
    """Validation points are others than those that have masks."""

    class Validated(Curve):
        def validation_step(self, batch, batch_idx):
            self.log("val", self.total_loss(self.terms(batch[0][:5])))

    callback = balancing(SelfAdaptivePoints(POINTS, lr=0.1))
    module, trainer = Validated(), quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2)
    trainer.fit(module, loader(), loader())
    x = next(iter(loader()))[0][:5]
    expected = sum(loss.mean() for loss in module.terms(x).values())
    assert trainer.callback_metrics["val"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_accumulated_batches_move_the_masks_once(tmp_path):
    whole, parts = (balancing(SelfAdaptivePoints(POINTS, lr=0.1)) for _ in range(2))
    modules = Curve(), Curve()
    quiet_trainer(tmp_path, callbacks=[whole], max_epochs=3).fit(modules[0], loader())
    quiet_trainer(tmp_path, callbacks=[parts], max_epochs=3, accumulate_grad_batches=3).fit(modules[1], loader(4))
    torch.testing.assert_close(whole.points["curve"].masks, parts.points["curve"].masks, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(modules[0].trunk[0].weight, modules[1].trunk[0].weight, rtol=1e-4, atol=1e-6)


def test_gradient_norm_points_even_out_the_points_pull(tmp_path):
    """The weighted gradients of the residuals have one norm for all points, as far as the bound lets them."""
    points = GradientNormPoints(lambda module, x: module.curve(x.unsqueeze(0))[0], max_weight=1e9)
    seen = []

    class Seeing(Curve):
        def training_step(self, batch, batch_idx):
            x, _ = batch
            seen.append(points.weights_for(self.terms(x)["curve"], x, self) * points.gradient_norms(x, self))
            return self.total_loss(self.terms(x), points={"curve": x})

    callback = balancing(points, GradNorm())
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2).fit(Seeing(), loader())
    for pulls in seen:
        assert (pulls / pulls[0]).tolist() == pytest.approx([1.0] * POINTS)
    assert set(callback.weights) == {"curve", "ends"}


WRONG = {
    "no method": ({}, {}, r"loss of task 'curve' has shape \(12,\).*scalar.*points={'curve': SelfAdaptivePoints"),
    "a scalar": ({"ends": UniformPoints(), "curve": UniformPoints()}, {}, "loss of task 'ends' has shape .*weighed one by one"),
    "another length": ({"curve": SelfAdaptivePoints(5)}, {}, "index goes from 0 to 11; the fixed points are 0 to 4"),
    "no coordinates": ({"curve": GradientNormPoints(lambda m, x: x.sum())}, {"points": {}}, "coordinates of each of the 12"),
}


@pytest.mark.parametrize(("points", "passed", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_stops_the_fit_and_changes_nothing(tmp_path, points, passed, words):
    class Wrong(Curve):
        def training_step(self, batch, batch_idx):
            return self.total_loss(self.terms(batch[0]), **({"points": {"curve": batch[1]}} | passed))

    callback = LossBalancingCallback(EqualWeights(), points=points, summary=False)
    before = callback.state_dict()
    with pytest.raises(ValueError, match=words):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(Wrong(), loader())
    assert same_state(callback.state_dict(), before)


def test_without_a_callback_a_vector_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"loss of task 'curve' has shape \(12,\).*Reduce it"):
        quiet_trainer(tmp_path).fit(Curve(), loader())


def test_points_are_given_as_objects():
    with pytest.raises(TypeError, match=r"points\['curve'\] is 'sigmoid'; it is a task's way to weigh its points"):
        GradNormCallback(points={"curve": "sigmoid"})


def test_reset_forgets_weights_and_masks(tmp_path):
    callback = balancing(SelfAdaptivePoints(POINTS, lr=0.1), GradNorm(lr=0.1))
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=3).fit(Curve(), loader())
    assert callback.weights
    assert callback.points["curve"].masks.max() > 0.5
    callback.reset()
    assert callback.weights == {}
    assert callback.points["curve"].masks.tolist() == [0.5] * POINTS
