"""Inner products of the tasks' gradients out of their factors: right to 1e-6 of the two norms, in single precision too."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.overhead import flops, peak_bytes
from lightning_gradnorm import JointBackward, tap_losses
from lightning_gradnorm.factors import WeightFactors
from lightning_gradnorm.gram import Gram

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 1e-6}
SIZES = [1e-25, 1e-12, 1.0, 1e12, 1e20]


@pytest.fixture(autouse=True)
def always_gram(monkeypatch):
    """Whatever the operations say."""
    monkeypatch.setattr("lightning_gradnorm.weight_products._gram_is_less", lambda *sizes: True)


def cotangents(tasks, shape, dtype):
    """Some that conflict, some all but parallel, the others on their own, as they are to arrive at the output."""
    draws = torch.Generator().manual_seed(1)
    own = [torch.randn(shape, generator=draws, dtype=torch.float64) for _ in range(tasks)]
    for k in range(1, tasks):
        own[k] = {0: own[k], 1: -own[k - 1] + 1e-1 * own[k], 2: own[k - 1] + 1e-4 * own[k]}[k % 3]
    return [10.0 ** (k % 4) * cotangent.to(dtype) for k, cotangent in enumerate(own)]


def read(weights, losses, **settings):
    losses = tap_losses(losses)
    root = sum(losses.values())
    reader = JointBackward(root, losses, weights, **settings)
    root.backward(retain_graph=True)
    return reader.gradients()


def losses_of(outputs, deltas, size=1.0):
    """Whose gradients at the output are these Δ_i times the size."""
    return {f"task{i}": (outputs * (size * delta).to(outputs)).sum().to(torch.float32) for i, delta in enumerate(deltas)}


def oracle(layer, x, deltas):
    """One autograd.grad per task, in float64, for what arrives at the output."""
    weight = layer.weight.detach().double().requires_grad_()
    outputs = torch.func.functional_call(layer.double(), {"weight": weight}, (x.double(),))
    rows = [torch.autograd.grad(outputs, weight, delta.double(), retain_graph=True)[0].flatten() for delta in deltas]
    return torch.stack(rows) @ torch.stack(rows).T


def assert_right(found, expected, tolerance):
    norms = expected.diagonal().sqrt()
    off = (found - expected).abs() / torch.outer(norms, norms)
    assert found.dtype == torch.float64
    assert off.max() <= tolerance


LAYERS = {
    "linear": (lambda: nn.Linear(60, 40), (20, 60)),
    "linear, many strips": (lambda: nn.Linear(600, 500), (150, 600)),
    "convolution": (lambda: nn.Conv2d(16, 24, 3), (2, 16, 7, 6)),
    "grouped": (lambda: nn.Conv2d(16, 24, 3, groups=4), (2, 16, 7, 6)),
}


@pytest.mark.parametrize("kind", TOLERANCE, ids=str)
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("tasks", [2, 12])
def test_of_tasks_that_conflict_and_that_are_all_but_parallel(tasks, make, shape, kind):
    torch.manual_seed(0)
    layer, x = make().to(kind), torch.randn(shape).relu().to(kind)
    outputs = layer(x)
    deltas = cotangents(tasks, outputs.shape, kind)
    found = read([layer.weight], losses_of(outputs, deltas))
    assert found.factors
    assert_right(found.gramian(), oracle(layer, x, deltas), TOLERANCE[kind])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_of_gradients_of_any_size(size, kind):
    torch.manual_seed(0)
    layer, x = nn.Linear(60, 40).to(kind), torch.randn(20, 60).to(kind)
    outputs = layer(x)
    deltas = [(size * delta).to(kind) for delta in cotangents(4, outputs.shape, torch.float64)]
    found = read([layer.weight], losses_of(outputs, deltas))
    assert_right(found.gramian(), oracle(layer, x, deltas), TOLERANCE[kind])


def test_of_gradients_of_sizes_far_apart():
    torch.manual_seed(0)
    layer, x = nn.Linear(60, 40), torch.randn(20, 60)
    outputs = layer(x)
    deltas = [size * torch.randn(20, 40) for size in SIZES]
    found = read([layer.weight], losses_of(outputs, deltas))
    assert_right(found.gramian(), oracle(layer, x, deltas), TOLERANCE[torch.float32])


@pytest.mark.parametrize("kind", TOLERANCE, ids=str)
def test_of_a_weight_that_is_used_twice(kind):
    """The second time by one task less."""
    torch.manual_seed(0)
    layer, x = nn.Linear(30, 20).to(kind), torch.randn(9, 30).to(kind)
    outputs, deltas = layer(x), cotangents(3, (9, 20), kind)
    once, again = layer(x[:5]), cotangents(2, (5, 20), kind)
    first, second = losses_of(outputs, deltas), losses_of(once, again)
    found = read([layer.weight], {task: loss + second.get(task, 0.0) for task, loss in first.items()})
    assert len(found.factors[0]._deltas) == 2
    both = [torch.cat([delta, *([again[i]] if i < 2 else [torch.zeros(5, 20)])]) for i, delta in enumerate(deltas)]
    assert_right(found.gramian(), oracle(layer, torch.cat([x, x[:5]]), both), TOLERANCE[kind])


def test_a_task_that_does_not_use_a_weight_has_zeros():
    torch.manual_seed(0)
    first, second, x = nn.Linear(30, 20).double(), nn.Linear(20, 10).double(), torch.randn(9, 30).double()
    middle = first(x)
    losses = {f"task{i}": (second(middle.tanh()) * torch.randn(9, 10)).sum() for i in range(2)}
    losses = {"alone": (middle * torch.randn(9, 20)).sum()} | losses
    expected = [torch.autograd.grad(loss, first.weight, retain_graph=True)[0].flatten() for loss in losses.values()]
    found = read([first.weight, second.weight], losses)
    assert list(found.factors) == [0]
    assert_right(found.factors[0].inner(), torch.stack(expected) @ torch.stack(expected).T, 1e-10)
    factors = WeightFactors(3, second.weight, turned=True)
    factors._inputs, factors._deltas = [middle.detach()], [{1: torch.randn(9, 10), 2: torch.randn(9, 10)}]
    assert not factors.inner()[0].any()
    assert not factors.inner()[:, 0].any()
    assert factors.inner().diagonal()[1:].all()


@pytest.mark.parametrize("rows", [40, 1024])
def test_equal_numbers_are_not_all_rounded_one_way(rows):
    """As the mean over all outputs sends them down; nothing but what the rows of the input have in common counts then."""
    torch.manual_seed(0)
    layer, x = nn.Linear(70, 50), torch.randn(rows, 70).relu()
    deltas = [torch.full((rows, 50), size) for size in (1 / 3, -0.1)]
    found = read([layer.weight], losses_of(layer(x), deltas))
    assert_right(found.gramian(), oracle(layer, x, deltas), 1e-6)


@pytest.mark.parametrize(("mean", "along"), [(0.0, 1e-1), (0.0, 1e-3), (30.0, 1e-3), (1e4, 1e-3)])
def test_what_nearly_cancels_is_computed_again(mean, along):
    """The rows' common part, or one task's rows are all but orthogonal to those of the input."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(30, 30)).Q
    x = mean + q[:, :3] @ torch.randn(3, 60)
    deltas = [q[:, 3:8] @ torch.randn(5, 50) + along * q[:, :3] @ torch.randn(3, 50), torch.randn(30, 50)]
    assert_computed_again(x, [delta - delta.mean(0) for delta in deltas])


def test_what_rounding_can_turn_one_way_is_computed_again():
    """A batch of two different rows, each with the same said to all of them: there are few different numbers to round."""
    torch.manual_seed(0)
    signs = torch.where(torch.arange(1024) < 528, 1.0, -1.0).unsqueeze(1)
    assert_computed_again(signs * torch.randn(60), [torch.full((1024, 50), 1 / 3), torch.randn(1024, 50)])


def assert_computed_again(x, deltas):
    gram = Gram(x)
    assert not gram.trusts_inner(gram.inner(deltas), deltas)
    factors = WeightFactors(2, torch.empty(50, 60), turned=True)
    factors._inputs, factors._deltas = [x], [dict(enumerate(deltas))]
    rows = torch.stack([(delta.double().T @ x.double()).flatten() for delta in deltas])
    assert_right(factors.inner(), rows @ rows.T, 1e-10)


@pytest.mark.parametrize(("rows", "outputs"), [(0, 5), (3, 0), (0, 0)])
def test_of_nothing_they_are_zero(rows, outputs):
    factors = WeightFactors(2, torch.empty(outputs, 6), turned=True)
    factors._inputs, factors._deltas = [torch.ones(rows, 6)], [{0: torch.ones(rows, outputs), 1: torch.ones(rows, outputs)}]
    assert factors.inner().tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_where_nobody_waits_and_nothing_is_wider_factors_are_scaled(size, monkeypatch):
    """As on Apple's chips: one try in float32 has to do."""
    torch.manual_seed(0)
    x, deltas = torch.randn(8, 300), [torch.randn(8, 200), 1e-3 * torch.randn(8, 200)]
    rows = torch.stack([(delta.double().T @ x.double()).flatten() for delta in deltas])
    for room, name in itertools.product(("gram", "factors"), ("can_wait", "widest_float")):
        answer = {"can_wait": lambda device: False, "widest_float": lambda device: torch.float32}[name]
        monkeypatch.setattr(f"lightning_gradnorm.{room}.{name}", answer)
    for a, b in ((size, 1.0), (1.0, size), (size**0.5, size**0.5)):
        factors = WeightFactors(2, torch.empty(200, 300), turned=True)
        factors._inputs, factors._deltas = [a * x], [{i: b * delta for i, delta in enumerate(deltas)}]
        assert_right(factors.inner().double() / size**2, rows @ rows.T, 1e-6)


# -- operations and memory, counted ----------------------------------------------------------------------------------

ROWS, INPUTS, OUTPUTS, TASKS = 256, 512, 320, 6


@pytest.fixture
def found():
    torch.manual_seed(0)
    layer, x = nn.Linear(INPUTS, OUTPUTS, bias=False), torch.randn(ROWS, INPUTS).relu()
    outputs = layer(x)
    weights = [torch.randn(ROWS, OUTPUTS) for _ in range(TASKS)]
    return read([layer.weight], {f"task{i}": F.mse_loss(outputs.relu(), w) for i, w in enumerate(weights)})


def test_they_take_the_operations_of_the_norms_and_those_between_the_tasks(found):
    """One try, and half of what is symmetric."""
    triangles = 2 * ROWS * ROWS * (INPUTS + TASKS * OUTPUTS) * 5 // 8
    between = 2 * TASKS * TASKS * OUTPUTS * (ROWS + 1)
    common = 2 * ROWS * INPUTS + 2 * TASKS * ROWS * OUTPUTS
    assert flops(found.gramian) == triangles + between + common


def test_they_bring_the_norms_with_them():
    layer, x = nn.Linear(INPUTS, OUTPUTS), torch.randn(ROWS, INPUTS)

    def measured():
        outputs = layer(x)
        losses = tap_losses({f"task{i}": (outputs * (i + 1)).square().mean() for i in range(TASKS)})
        root = sum(losses.values())
        reader = JointBackward(root, losses, [layer.weight])
        root.backward()
        return reader

    measurements = []
    reader = measured()
    operations = flops(lambda: measurements.append(reader.measurement(gramian=True)))
    assert operations == flops(measured().gradients().gramian)
    assert measurements[0].gradient_norms.tolist() == measurements[0].gramian.diagonal().sqrt().tolist()


def test_the_factors_are_not_copied_all_at_once():
    layer, x = nn.Linear(64, 1 << 14), torch.randn(64, 64)
    outputs = layer(x)
    found = read([layer.weight], losses_of(outputs, [torch.randn(outputs.shape) for _ in range(4)]))
    factors = 4 * 4 * outputs.numel()  # bytes
    assert peak_bytes(found.gramian) < factors / 2


@pytest.mark.parametrize("kind", ["linear", "grouped"])
@pytest.mark.parametrize("used", [1, 2])
def test_the_factors_are_let_go_of_once_all_are_there(used, kind):
    """While the backward is still on its way; what is made of them is the same."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    seen = []

    def read_with(**settings):
        inputs = x.tanh()
        inputs.register_hook(lambda gradient: seen.append([factors.is_empty for factors in reader._factors.values()]))
        outputs = sum(layer(inputs * (i + 1)).tanh() for i in range(used))
        draws = torch.Generator().manual_seed(0)
        targets = [torch.randn(outputs.shape, generator=draws, dtype=torch.float64) for _ in range(3)]
        losses = tap_losses({f"task{i}": (outputs - target).square().mean() for i, target in enumerate(targets)})
        root = sum((i + 1) * loss for i, loss in enumerate(losses.values()))
        reader = JointBackward(root, losses, layer.parameters(), **settings)
        root.backward()
        return reader.gradients()

    kept, gone = read_with(), read_with(keep=False, pairs=True)
    assert seen == [[False], [True]]
    for ask in ("gramian", "cosines", "norms"):
        torch.testing.assert_close(getattr(gone, ask)(), getattr(kept, ask)(), rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match=r"Read them with keep=True; for inner products, pairs=True is enough"):
        gone.flat()


def test_of_tasks_that_do_not_all_come_the_factors_wait_to_the_end():
    torch.manual_seed(0)
    layer, x = nn.Linear(30, 20, bias=False), torch.randn(9, 30)
    first, second = layer(x), layer(x[:5])
    losses = {f"both {i}": (first.square() * i).sum() + second.square().sum() for i in (1, 2)} | {"first": first.sum()}
    kept, waiting = (read([layer.weight], losses, **settings) for settings in ({}, {"keep": False, "pairs": True}))
    assert not waiting.factors[0].is_empty
    assert_right(waiting.gramian(), kept.gramian(), TOLERANCE[torch.float32])
