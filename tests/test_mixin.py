"""The mixin alone, under a Trainer, in validation, and when the module is copied in the middle of a step."""

import copy
import io
import pickle

import lightning as L
import pytest
import torch

from lightning_gradnorm import GradNormCallback, MultiTaskMixin
from tests.helpers import TrunkAndHeads, batches, quiet_trainer, same_state


class ByTaskLosses(TrunkAndHeads):
    """The other way of writing a module."""

    training_step = MultiTaskMixin.training_step

    def task_losses(self, batch, batch_idx):
        return self.losses(batch[0])


class Neither(TrunkAndHeads):
    training_step = MultiTaskMixin.training_step


def module(kind=TrunkAndHeads) -> TrunkAndHeads:
    torch.manual_seed(3)
    return kind()


def fitted(tmp_path, module, *callbacks, steps=4, **settings):
    quiet_trainer(tmp_path, callbacks=list(callbacks), **settings).fit(module, batches(steps))
    return module


def parameters(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# -- without a callback --------------------------------------------------------------------------------------------------


def test_alone_it_is_the_plain_sum_bit_for_bit():
    x, one, other = torch.randn(5, 6), module(), module()
    total = one.total_loss(one.losses(x))
    total.backward()
    plain = sum(other.losses(x).values())
    plain.backward()
    assert torch.equal(total, plain)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_alone_it_trains_as_without_the_mixin(tmp_path):
    class Plain(TrunkAndHeads):
        def training_step(self, batch, batch_idx):
            return sum(self.losses(batch[0]).values())

    expected = parameters(fitted(tmp_path, module(Plain)))
    assert torch.equal(parameters(fitted(tmp_path, module())), expected)
    assert not torch.equal(parameters(module()), expected)


@pytest.mark.parametrize("balanced", [False, True])
def test_both_ways_of_writing_a_module_train_alike(tmp_path, balanced):
    trained = []
    for kind in (TrunkAndHeads, ByTaskLosses):
        callbacks = [GradNormCallback()] if balanced else []
        trained.append((parameters(fitted(tmp_path, module(kind), *callbacks)), [c.weights for c in callbacks]))
    assert torch.equal(trained[0][0], trained[1][0])
    assert trained[0][1] == trained[1][1]
    assert all(len(set(weights.values())) == 4 for weights in trained[0][1])


@pytest.mark.parametrize("balanced", [False, True])
def test_a_module_that_says_nothing_of_its_losses_is_told_both_ways(tmp_path, balanced):
    with pytest.raises(NotImplementedError, match=r"Neither defines neither training_step nor task_losses.*total_loss"):
        fitted(tmp_path, module(Neither), *([GradNormCallback()] if balanced else []))


def test_losses_may_come_as_pairs_and_in_any_order():
    it = module()
    losses = it.losses(torch.randn(5, 6))
    assert torch.equal(it.total_loss(losses), it.total_loss(list(losses.items())))
    assert torch.equal(it.total_loss(losses.items()), it.total_loss(iter(losses.items())))


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=["no_grad", "inference", "grad in eval"]
)
def test_a_detached_loss_is_fine_in_evaluation_and_refused_in_training(mode):
    it = module().eval()
    detached = {task: loss.detach() for task, loss in it.losses(torch.randn(5, 6)).items()}
    with mode():
        assert torch.equal(it.total_loss(detached), sum(detached.values()))
    it.train()
    with pytest.raises(ValueError, match="loss of task 'small' is detached"):
        it.total_loss(detached)


def test_the_first_guess_of_the_shared_layer_is_to_look_for_it():
    assert module().shared_layer() is None


# -- in evaluation -------------------------------------------------------------------------------------------------------


class Validated(TrunkAndHeads):
    """Keeps what evaluation saw: the total, and the plain sum."""

    def validation_step(self, batch, batch_idx):
        balancer = self.callback.balancer
        before = copy.deepcopy((balancer.state_dict(), balancer.steps))
        losses = self.losses(batch[0])
        total = self.total_loss(losses)
        assert same_state(before, (balancer.state_dict(), balancer.steps))
        self.seen.append((total.item(), sum(losses.values()).item()))
        self.log("val/total", total)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        losses = self.losses(batch[0])
        self.seen.append((self.total_loss(losses).item(), sum(losses.values()).item()))
        return batch[0]


@pytest.mark.parametrize("inference_mode", [True, False])
def test_evaluation_has_the_plain_sum_as_its_yardstick_and_changes_nothing(tmp_path, inference_mode):
    callback = GradNormCallback(lr=0.1)
    it, alone = module(Validated), GradNormCallback(lr=0.1)
    it.seen, it.callback = [], callback
    settings = {"val_check_interval": 2, "num_sanity_val_steps": 1, "inference_mode": inference_mode}
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2, **settings)
    trainer.fit(it, batches(4), batches(2, seed=2))
    assert len(it.seen) == 1 + 4 * 2
    assert [total for total, _ in it.seen] == [plain for _, plain in it.seen]
    assert callback.balancer.steps == 8

    without = fitted(tmp_path, module(), alone, max_epochs=2)
    assert alone.weights == callback.weights, "as if there had been no validation"
    assert torch.equal(parameters(without), parameters(it))

    it.seen.clear()
    steps, state = callback.balancer.steps, copy.deepcopy(callback.balancer.state_dict())
    trainer.validate(it, batches(2, seed=2), verbose=False)
    trainer.test(it, batches(2, seed=2), verbose=False)
    trainer.predict(it, batches(2, seed=2))
    assert len(it.seen) == 6
    assert [total for total, _ in it.seen] == [plain for _, plain in it.seen]
    assert len(set(callback.weights.values())) == 4
    assert same_state(state, callback.balancer.state_dict())
    assert callback.balancer.steps == steps


# -- further terms -------------------------------------------------------------------------------------------------------


class WithPenalty(TrunkAndHeads):
    """A term that is not balanced, added on either side of the total: on W, and on what the losses are made from."""

    factor, first = 1.0, True

    def losses(self, x):
        z, target = self.trunk(x), x[:, :2]
        self.outputs = [head(z) for head in self.heads.values()]
        return {task: (y - k * target).pow(2).mean() for k, (task, y) in enumerate(zip(self.heads, self.outputs, strict=True))}

    def training_step(self, batch, batch_idx):
        total = self.total_loss(self.losses(batch[0]))
        penalty = self.factor * (sum(y.pow(2).sum() for y in self.outputs) + self.trunk[2].weight.pow(2).sum())
        return penalty + total if self.first else total + penalty


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("engine", ["joint", "per_task"])
@pytest.mark.usefixtures("float64")
def test_a_further_term_leaves_the_measured_norms_as_they_are(tmp_path, engine, first):
    measured, moved = [], []
    for factor in (1.0, 0.0):
        it, callback = module(WithPenalty), GradNormCallback(engine=engine)
        it.factor, it.first, start = factor, first, parameters(it)
        trainer = quiet_trainer(tmp_path, callbacks=[callback], max_steps=1, precision="64-true")
        trainer.fit(it, batches(1))
        measured.append({tag: v.item() for tag, v in trainer.callback_metrics.items() if tag.startswith("grad_")})
        moved.append(parameters(it) - start)
        assert callback.engine_used == engine
    assert len(measured[0]) == 4 + 6
    assert measured[0] == pytest.approx(measured[1], rel=1e-12)
    assert (moved[0] - moved[1]).abs().max() > 1e-3, "the term does train the network"


# -- copies and ends -----------------------------------------------------------------------------------------------------


class Copier(L.Callback):
    """Copies the module in the middle of a step, as averaging callbacks and checkpoint libraries do."""

    def __init__(self, how, hook):
        self.how, self.copies = how, []
        setattr(self, hook, lambda trainer, pl_module, *rest: self.take(pl_module))

    def take(self, pl_module):
        self.copies.append(self.how(pl_module))


def pickled(it):
    return pickle.loads(pickle.dumps(it))


def saved(it):
    file = io.BytesIO()
    torch.save(it, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


HOOKS = ["on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("how", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("copier_first", [True, False])
def test_a_copy_in_the_middle_of_a_step_is_a_plain_module(tmp_path, how, hook, copier_first):
    callback, copier = GradNormCallback(lr=0.1), Copier(how, hook)
    it = fitted(tmp_path, module(), *([copier, callback] if copier_first else [callback, copier]))
    assert len(copier.copies) == 4
    for made in copier.copies:
        assert made._loss_balancing is None
        assert made.state_dict().keys() == it.state_dict().keys()
        losses = made.losses(torch.randn(5, 6))
        assert torch.equal(made.total_loss(losses), sum(losses.values()))


class Failing(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise OSError("the disk is full")


@pytest.mark.parametrize("fails", [False, True])
def test_after_fit_the_module_is_as_it_was(tmp_path, fails):
    it = module()
    keys = list(it.state_dict())
    callback = GradNormCallback(lr=0.1)
    if fails:
        with pytest.raises(OSError, match="the disk is full"):
            fitted(tmp_path, it, callback, Failing())
    else:
        fitted(tmp_path, it, callback)
    assert len(set(callback.weights.values())) == 4
    assert it._loss_balancing is None
    assert list(it.state_dict()) == keys
    for made in (it, copy.deepcopy(it), pickled(it), saved(it)):
        losses = made.losses(torch.randn(5, 6))
        assert torch.equal(made.total_loss(losses), sum(losses.values())), "the plain sum again"


def test_during_fit_the_state_dict_has_nothing_of_ours(tmp_path):
    copier = Copier(lambda it: (list(it.state_dict()), list(it.buffers())), "on_before_backward")
    it = fitted(tmp_path, module(), GradNormCallback(), copier)
    assert copier.copies == [(list(module().state_dict()), [])] * 4
    assert list(it.state_dict()) == list(module().state_dict())
