"""When the tasks' cotangents are carried on: as soon as nothing else is waited for, and where that must not be, in step."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm import JointBackward, tap_losses


def weight():
    return torch.linspace(0.1, 0.5, 3, dtype=torch.float64).requires_grad_()


def known_at(node, losses, w):
    """Whether W's gradients are known as the engine comes to the node; checks them."""
    losses = tap_losses(losses)
    expected = torch.stack([torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses.values()])
    total, known = sum(losses.values()), []
    node.register_prehook(lambda _: known.append(all(row[0] is not None for row in reader._arrivals.gradients)))
    reader = JointBackward(total, losses, [w])
    total.backward()
    torch.testing.assert_close(reader.gradients().flat(), expected)
    return known


def test_from_where_tasks_meet_all_is_carried_on_at_once():
    w = weight()
    low = w.exp()
    z = low.tanh()
    assert known_at(low.grad_fn, {"a": z.sin().sum(), "b": z.cos().sum()}, w) == [True]


def test_a_task_that_comes_in_below_is_carried_on_from_there_at_once():
    w = weight()
    low = w.exp()
    z = low.tanh()
    assert known_at(low.grad_fn, {"a": z.sin().sum(), "b": z.cos().sum(), "c": low.sum()}, w) == [True]


@pytest.mark.parametrize("last", ["high", "low"])
def test_each_way_of_a_task_is_waited_for(last):
    w = weight()
    low = w.exp()
    z = low.tanh()
    ways = {"high": lambda: z.cos().sum(), "low": lambda: (2 * low).sum()}
    of_both = sum(ways[way]() for way in sorted(ways, key=lambda way: way == last))
    assert known_at(low.grad_fn, {"a": z.sin().sum(), "b": of_both}, w) == [True]


def test_with_other_processes_nothing_runs_ahead_of_the_engine(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    w = weight()
    low = w.exp()
    z = low.tanh()
    assert known_at(low.grad_fn, {"a": z.sin().sum(), "b": z.cos().sum()}, w) == [False]


def test_a_checkpoint_is_run_when_the_engine_comes_to_it():
    w = weight()
    region = checkpoint(lambda x: x.exp().tanh(), w, use_reentrant=False)
    z = region.sinh()
    assert known_at(region.grad_fn, {"a": z.sin().sum(), "b": z.cos().sum()}, w) == [False]
