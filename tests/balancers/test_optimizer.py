"""The weights' own optimiser equals torch's; refused entries and steps leave no trace."""

import functools

import pytest
import torch

from lightning_gradnorm.balancers.optimizer import VectorOptimizer
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
