"""What a balanced step may cost, counted: no timing, no tolerance."""

import functools

import pytest
import torch

from benchmarks import workloads
from benchmarks.methods import DoubleBackward, JointEngine, PerTaskEngine, PlainSum
from benchmarks.overhead import flops

BATCH, LENGTH, WIDTH, TASKS = 6, 8, 32, 10
SMALL = {
    "conv": functools.partial(workloads.conv, batch=BATCH, size=32, width=8),
    "transformer": functools.partial(workloads.transformer, batch=BATCH, length=LENGTH, width=WIDTH, layers=2, vocabulary=50),
    "mlp": functools.partial(workloads.mlp, batch=BATCH, width=WIDTH, tasks=TASKS),
    "pinn": functools.partial(workloads.pinn, points=BATCH, width=WIDTH),
}
# A weight gradient is one product: 2 x rows x inputs x outputs. For the convolution, rows are the 2x2 places of each image
# and inputs the 3x3 neighbours' channels.
T_GRADIENTS_OF_W = {
    "conv": 3 * 2 * (BATCH * 2 * 2) * (9 * 64) * 64,
    "transformer": 2 * 2 * (BATCH * LENGTH) * (4 * WIDTH) * WIDTH,
    "mlp": TASKS * 2 * BATCH * WIDTH * WIDTH,
    "pinn": 0,  # the losses meet only at the parameters: their gradients are read as they pass
}


def steps(name, method, count=1, **settings):
    """FLOPs of each of ``count`` steps from the start."""
    workload = SMALL[name]()
    made = method(workload, torch.optim.SGD(workload.network.parameters(), lr=1e-3), **settings)
    return [flops(made.step) for _ in range(count)]


@pytest.mark.parametrize("name", SMALL)
def test_the_joint_engine_adds_one_gradient_of_w_per_task_and_nothing_else(name):
    (plain,) = steps(name, PlainSum)
    assert plain > 0
    assert [balanced - plain for balanced in steps(name, JointEngine, 3)] == [T_GRADIENTS_OF_W[name]] * 3


@pytest.mark.parametrize("engine", [JointEngine, PerTaskEngine])
@pytest.mark.parametrize("name", SMALL)
def test_steps_that_are_not_due_add_nothing(name, engine):
    (plain,) = steps(name, PlainSum)
    first, *others = steps(name, engine, 6, update_every=3)
    due = first - plain
    assert [balanced - plain for balanced in others] == [0, due, 0, 0, due]


@pytest.mark.parametrize("name", SMALL)
def test_the_other_ways_cost_more(name):
    (joint,), (per_task,), (double,) = (steps(name, method) for method in (JointEngine, PerTaskEngine, DoubleBackward))
    assert joint < per_task < double


def test_the_counter_sees_products_that_a_hook_starts_inside_the_backward():
    a, b = torch.randn(4, 5, requires_grad=True), torch.randn(5, 6)
    plain, hooked = (a @ b).sum(), (a @ b).sum()

    def product(_):
        torch.mm(a.detach(), b)

    hooked.grad_fn.register_prehook(product)
    assert flops(hooked.backward) - flops(plain.backward) == 2 * 4 * 5 * 6
