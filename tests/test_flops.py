"""What a balanced step may cost, counted: no timing, no tolerance."""

import functools
from collections import Counter

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import workloads
from benchmarks.methods import DoubleBackward, PerTaskEngine, PlainSum, ProductPerTask
from benchmarks.overhead import flops
from lightning_gradnorm import GradNormCallback
from tests.helpers import SCALES, TrunkAndHeads, batches, quiet_trainer

BATCH, LENGTH, WIDTH, TASKS, RADIAL = 6, 8, 32, 10, 5
SMALL = {
    "conv": functools.partial(workloads.conv, batch=BATCH, size=32, width=8),
    "transformer": functools.partial(workloads.transformer, batch=BATCH, length=LENGTH, width=WIDTH, layers=2, vocabulary=50),
    "mlp": functools.partial(workloads.mlp, batch=BATCH, width=WIDTH, tasks=TASKS),
    "pinn": functools.partial(workloads.pinn, points=BATCH, width=WIDTH),
    "forces": functools.partial(workloads.potential, clusters=2, atoms=BATCH, width=WIDTH, radial=RADIAL),
}
# A weight gradient is one product: 2 x rows x inputs x outputs. For the convolution, rows are the 2x2 places of each image
# and inputs the 3x3 neighbours' channels.
T_GRADIENTS_OF_W = {
    "conv": 3 * 2 * (BATCH * 2 * 2) * (9 * 64) * 64,
    "transformer": 2 * 2 * (BATCH * LENGTH) * (4 * WIDTH) * WIDTH,
    "mlp": TASKS * 2 * BATCH * WIDTH * WIDTH,
    "pinn": 0,  # the losses meet only at the parameters: their gradients are read as they pass
    "forces": 2 * 2 * (2 * BATCH) * WIDTH * WIDTH,  # and the derivative's own use of W is the forces' alone
}


def steps(name, method, count=1, **settings):
    """FLOPs of each of ``count`` steps from the start."""
    torch.manual_seed(0)  # as many pairs of atoms in each
    workload = SMALL[name]()
    made = method(workload, torch.optim.SGD(workload.network.parameters(), lr=1e-3), **settings)
    return [flops(made.step) for _ in range(count)]


@pytest.mark.parametrize("name", SMALL)
def test_the_joint_engine_adds_one_gradient_of_w_per_task_and_nothing_else(name):
    (plain,) = steps(name, PlainSum)
    assert plain > 0
    assert [balanced - plain for balanced in steps(name, ProductPerTask, 3)] == [T_GRADIENTS_OF_W[name]] * 3


def test_losses_on_one_derivative_go_up_it_once_each_and_take_nothing_else_along():
    workload = workloads.potential(stress=True, clusters=2, atoms=BATCH, width=WIDTH, radial=RADIAL)
    (plain, balanced) = (
        flops(method(workload, torch.optim.SGD(workload.network.parameters(), lr=1e-3)).step)
        for method in (PlainSum, ProductPerTask)
    )
    pairs, atoms = workload.batch["pairs"].shape[1], 2 * BATCH
    filters = 3 * 2 * pairs * (RADIAL + WIDTH) * WIDTH
    within = (2 + 2 * 3 + 1) * 2 * atoms * WIDTH * WIDTH  # inward but for the first block, outward, readout
    of_w = (3 + 2) * 2 * atoms * WIDTH * WIDTH  # where the energy uses it, and where the derivative does
    assert balanced - plain == 2 * (filters + within) + of_w


@pytest.mark.parametrize("engine", [ProductPerTask, PerTaskEngine])
@pytest.mark.parametrize("name", SMALL)
def test_steps_that_are_not_due_add_nothing(name, engine):
    (plain,) = steps(name, PlainSum)
    first, *others = steps(name, engine, 6, update_every=3)
    due = first - plain
    assert [balanced - plain for balanced in others] == [0, due, 0, due, 0]


@pytest.mark.parametrize("name", SMALL)
def test_the_other_ways_cost_more(name):
    (joint,), (per_task,), (double,) = (steps(name, method) for method in (ProductPerTask, PerTaskEngine, DoubleBackward))
    assert joint < per_task < double


def test_the_counter_sees_products_that_a_hook_starts_inside_the_backward():
    a, b = torch.randn(4, 5, requires_grad=True), torch.randn(5, 6)
    plain, hooked = (a @ b).sum(), (a @ b).sum()

    def product(_):
        torch.mm(a.detach(), b)

    hooked.grad_fn.register_prehook(product)
    assert flops(hooked.backward) - flops(plain.backward) == 2 * 4 * 5 * 6


class CountOperations(L.Callback, TorchDispatchMode):
    """Operation → how often, per training batch from its start to the callbacks' end."""

    def __init__(self):
        super().__init__()
        TorchDispatchMode.__init__(self)
        self.batches = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.batches[-1][operation._schema.name] += 1
        return operation(*args, **(kwargs or {}))

    def on_train_batch_start(self, *args):
        self.batches.append(Counter())
        self.__enter__()

    def on_train_batch_end(self, *args):
        self.__exit__(None, None, None)


def operations(tmp_path, *callbacks):
    counted = CountOperations()
    quiet_trainer(tmp_path, callbacks=[*callbacks, counted], log_every_n_steps=50).fit(TrunkAndHeads(), batches(8))
    return counted.batches


def test_a_step_that_is_not_due_is_the_weighted_sum_and_nothing_else(tmp_path):
    plain = operations(tmp_path)
    balanced = operations(tmp_path, GradNormCallback(update_every=3, summary=False))
    of_all = {"stack", "dot", "clone", "promote_types", "_to_copy", "detach", "mul"}
    expected = Counter(of_all) + Counter({"select": len(SCALES)})
    for step in (3, 5, 6, 7):  # from 0; those at 0, 2 and 4 are measured
        more = {name.partition("::")[2]: count for name, count in (balanced[step] - plain[step]).items()}
        assert more == expected, "the losses as one vector, the weights cast, their product; backward each task's part of it"
    assert sum((balanced[4] - plain[4]).values()) > 100, "a step that is due"
