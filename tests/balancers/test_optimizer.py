"""The weights' own optimiser equals torch's; refused entries and steps leave no trace."""

import functools
import warnings

import numpy as np
import pytest
import torch

from lightning_gradnorm import GradNorm, Measurement, SelfAdaptivePoints, UncertaintyWeighting
from lightning_gradnorm.balancers.optimizer import VectorOptimizer
from lightning_gradnorm.pointwise import NotedPoints
from tests.helpers import same_state

FACTORIES = {
    "Adam": torch.optim.Adam,
    "AMSGrad": functools.partial(torch.optim.Adam, amsgrad=True),
    "SGD": torch.optim.SGD,
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
}
factories = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
YES, NO = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)


def gradients(steps):
    return torch.randn(steps, 3, dtype=torch.float64)


@factories
def test_equals_the_plain_optimiser(factory):
    plain = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = factory([plain], lr=0.1)
    ours, values = VectorOptimizer(factory, 0.1), torch.ones(3, dtype=torch.float64)
    for gradient in gradients(20):
        plain.grad = gradient.clone()
        optimizer.step()
        values = ours.step(values, gradient, YES)
        assert torch.equal(values, plain.detach())


OTHER_FORMS = {
    "quick Adam": functools.partial(torch.optim.Adam, betas=(0.5, 0.9), eps=1e-3),
    "maximising": functools.partial(torch.optim.Adam, maximize=True),
}


@pytest.mark.parametrize("factory", [*FACTORIES.values(), *OTHER_FORMS.values()], ids=(*FACTORIES, *OTHER_FORMS))
def test_numbers_on_the_host_take_the_same_steps(factory):
    plain = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = factory([plain], lr=0.1)
    ours, values = VectorOptimizer(factory, 0.1), np.ones(3)
    for step, gradient in enumerate(gradients(40)):
        plain.grad = gradient.clone()
        optimizer.step()
        if step % 7 == 3:  # those that come as tensors, or with a mask, go on with the same memory
            values = ours.step(torch.from_numpy(values), gradient, YES).numpy()
        else:
            values = ours.step(values, gradient.numpy(), YES.numpy() if step % 7 == 5 else None)
        np.testing.assert_allclose(values, plain.detach().numpy(), rtol=1e-12)
    for name, value in optimizer.state[plain].items():
        torch.testing.assert_close(ours.state_dict()["state"][0][name], value, rtol=1e-12, atol=0)


@factories
def test_a_refused_step_leaves_no_trace(factory):
    ours, values = VectorOptimizer(factory, 0.1), torch.ones(3, dtype=torch.float64)
    for gradient in gradients(5):
        values = ours.step(values, gradient, YES)
    before = ours.state_dict()
    refused = ours.step(values, torch.full((3,), torch.nan, dtype=torch.float64), NO)
    assert torch.equal(refused, values) and same_state(ours.state_dict(), before)


@factories
def test_a_refused_entry_keeps_its_value_and_memory(factory):
    accept = torch.tensor([True, False, True])
    ours, values = VectorOptimizer(factory, 0.1), torch.ones(3, dtype=torch.float64)
    values = ours.step(values, gradients(1)[0], YES)
    before, memory = values, ours.state_dict()["state"].get(0, {})
    values = ours.step(values, torch.tensor([1.0, torch.nan, -1.0], dtype=torch.float64), accept)
    assert values[1] == before[1] and (values != before)[[0, 2]].all()
    for key, value in ours.state_dict()["state"].get(0, {}).items():
        if isinstance(value, torch.Tensor) and value.shape == (3,):
            assert value[1] == memory[key][1] and value.isfinite().all()


@factories
def test_it_grows_and_new_entries_have_no_memory(factory):
    two, three = VectorOptimizer(factory, 0.1), VectorOptimizer(factory, 0.1)
    a = torch.ones(2, dtype=torch.float64)
    b = torch.ones(3, dtype=torch.float64)
    for gradient in gradients(4):
        a = two.step(a, gradient[:2], YES[:2])
        b = three.step(b, torch.cat([gradient[:2], gradient.new_zeros(1)]), YES)
    (last,) = gradients(1)
    grown = two.step(torch.cat([a, a.new_ones(1)]), last, YES)
    torch.testing.assert_close(grown, three.step(b, last, YES))


@factories
def test_state_survives_a_safe_checkpoint(factory, tmp_path):
    ours, values = VectorOptimizer(factory, 0.1), torch.ones(3, dtype=torch.float64)
    steps = gradients(6)
    for gradient in steps[:3]:
        values = ours.step(values, gradient, YES)
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    restored, again = VectorOptimizer(factory, 0.1), values.clone()
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for gradient in steps[3:]:
        values, again = ours.step(values, gradient, YES), restored.step(again, gradient, YES)
    assert torch.equal(values, again)


def test_the_constructors_learning_rate_wins_over_the_checkpoints():
    old, new = VectorOptimizer(torch.optim.SGD, 0.1), VectorOptimizer(torch.optim.SGD, 0.5)
    values = old.step(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), YES)
    new.load_state_dict(old.state_dict())
    assert (new.step(values, torch.ones_like(values), YES) - values).tolist() == [-0.5] * 3


# -- a checkpoint of another optimiser ------------------------------------------------------------------------------------


def stepped(factory, steps=4):
    ours, values = VectorOptimizer(factory, 0.1), torch.ones(3, dtype=torch.float64)
    for gradient in gradients(steps):
        values = ours.step(values, gradient, YES)
    return ours, values


OTHER = [(old, new) for old in FACTORIES for new in FACTORIES if old != new]


@pytest.mark.parametrize(("old", "new"), OTHER)
@pytest.mark.parametrize("named", [True, False], ids=["", "of 0.1"])
def test_the_memory_of_another_optimiser_is_left_and_told(old, new, named):
    """Where it is another class, or it lacks what this one remembers."""
    before, values = stepped(FACTORIES[old])
    state = before.state_dict()
    if not named:
        del state["optimizer"]
    after, fresh = VectorOptimizer(FACTORIES[new], 0.1), VectorOptimizer(FACTORIES[new], 0.1)
    remembers = any(state["state"].values())
    same_class = {old, new} in ({"SGD", "momentum"}, {"Adam", "AMSGrad"})
    lacks = (old, new) == ("Adam", "AMSGrad")
    if not (lacks or not same_class if named else remembers):
        after.load_state_dict(state)
    else:
        was = before.name if named else "one that remembers "
        words = f"optimiser in the checkpoint is {was}.*now it is {after.name}, .*memory starts anew, and the weights go on"
        with pytest.warns(UserWarning, match=words):
            after.load_state_dict(state)
        (gradient,) = gradients(1)
        assert torch.equal(after.step(values, gradient, YES), fresh.step(values, gradient, YES))
    assert after.step(values, gradients(1)[0], YES).isfinite().all()
    again = VectorOptimizer(FACTORIES[new], 0.1)
    again.load_state_dict(after.state_dict())  # and it is told once


def test_a_state_without_a_step_is_nobodys_memory():
    again = VectorOptimizer(torch.optim.Adagrad, 0.1)
    again.load_state_dict(VectorOptimizer(torch.optim.Adagrad, 0.1).state_dict())
    assert again.step(torch.ones(3, dtype=torch.float64), gradients(1)[0], YES).isfinite().all()


@pytest.mark.parametrize("old", FACTORIES)
@pytest.mark.parametrize("new", FACTORIES)
def test_gradnorm_and_its_kin_resume_with_another_optimiser(old, new):
    measurement = Measurement(("a", "b"), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]))
    for make in (GradNorm, UncertaintyWeighting):
        before, after = make(optimizer=FACTORIES[old]), make(optimizer=FACTORIES[new])
        before.update(measurement)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            after.load_state_dict(before.state_dict())
        assert after.weights == before.weights
        after.update(measurement)
        assert after.weights != before.weights and after.skipped_updates == 0
        assert after.settings()["optimizer"] == after.state_dict()["optimizer"]["optimizer"]


def test_masks_of_points_resume_with_another_optimiser():
    before, after = SelfAdaptivePoints(3), SelfAdaptivePoints(3, optimizer=torch.optim.Adagrad)
    before.update([NotedPoints(torch.rand(3), None)])
    with pytest.warns(UserWarning, match="checkpoint is Adam, and now it is Adagrad"):
        after.load_state_dict(before.state_dict())
    assert torch.equal(after.masks, before.masks)
    after.update([NotedPoints(torch.rand(3), None)])
    assert (after.masks > before.masks).all()
