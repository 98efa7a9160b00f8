"""Matrix products and convolutions have their factors kept: equal to one autograd.grad per task, whichever way it is done."""

import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.overhead import flops
from lightning_gradnorm import JointBackward, LayerWatch, tap_losses
from lightning_gradnorm.factors import WeightFactors
from lightning_gradnorm.gram import Gram
from tests.helpers import in_another_thread, use_up_node_numbers

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

LAYERS = {
    "linear, few rows": (lambda: nn.Linear(30, 40), (5, 30), "gram"),
    "linear, many rows": (lambda: nn.Linear(3, 4), (50, 3), "product"),
    "linear, many strips": (lambda: nn.Linear(600, 500), (150, 600), "gram"),
    "linear, odd strips": (lambda: nn.Linear(600, 500, bias=False), (131, 600), "gram"),
    "linear without bias": (lambda: nn.Linear(3, 4, bias=False), (20, 3), "product"),
    "linear on sequences": (lambda: nn.Linear(40, 30), (2, 3, 40), "gram"),
    "linear on one vector": (lambda: nn.Linear(8, 5), (8,), "gram"),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 9, 8), "product"),
    "convolution, few places": (lambda: nn.Conv2d(64, 64, 3, padding="same"), (2, 64, 3, 3), "gram"),
    "strided, dilated, grouped": (lambda: nn.Conv2d(4, 6, 3, 2, 1, dilation=2, groups=2), (2, 4, 11, 9), "product"),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 4, 4), "product"),
    "grouped, few places": (lambda: nn.Conv2d(64, 32, 3, groups=2, bias=False), (1, 64, 4, 4), "gram"),
    "one dimension": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (2, 4, 9), "product"),
    "one dimension, even kernel": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (2, 4, 13), "product"),
    "three dimensions": (lambda: nn.Conv3d(2, 4, (2, 3, 1), (1, 2, 1), (0, 1, 0)), (2, 2, 5, 6, 4), "product"),
    "reflected, no batch": (lambda: nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 6, 6), "product"),
    "valid": (lambda: nn.Conv2d(2, 4, 3, padding="valid"), (2, 2, 6, 6), "product"),
}


def tasks(z, count=3):
    """Losses of a shared output, of other size each; all its places count."""
    draws = torch.Generator().manual_seed(1)
    weights = [torch.randn(z.shape, generator=draws, dtype=torch.float64).to(z.dtype) for _ in range(count)]
    return {f"task{i}": 100.0**i * (z.tanh() * w).pow(2).mean() for i, w in enumerate(weights)}


def oracle(losses, parameters):
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses.values()]
    return torch.stack(
        [
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(row, parameters, strict=True)])
            for row in rows
        ]
    )


def read(parameters, make_losses, scale=1.0, keep=True):
    """What is read around one backward."""
    losses = tap_losses(make_losses())
    root = sum((i + 0.5) * loss for i, loss in enumerate(losses.values())) * scale
    reader = JointBackward(root, losses, parameters, keep=keep)
    root.backward()
    return reader.gradients()


def assert_equal(found, expected):
    torch.testing.assert_close(found.norms(), expected.norm(dim=1), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.flat(), expected, rtol=1e-9, atol=1e-12 * expected.abs().max())
    cosines = F.cosine_similarity(expected[:, None], expected[None], dim=2)
    torch.testing.assert_close(found.cosines(), cosines, rtol=0, atol=1e-10)
    gramian, norms = expected @ expected.T, expected.norm(dim=1)
    torch.testing.assert_close(
        found.gramian() / torch.outer(norms, norms), gramian / torch.outer(norms, norms), rtol=0, atol=1e-10
    )
    assert found.entries == expected.shape[1]


@pytest.mark.parametrize("scale", [1.0, 2.0**40, 2.0**-40])
@pytest.mark.parametrize(("make", "shape", "form"), LAYERS.values(), ids=LAYERS)
def test_equal_to_one_autograd_grad_per_task(make, shape, form, scale):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    found = read(layer.parameters(), lambda: tasks(layer(x)), scale)
    assert bool(found.factors) == (form == "gram")
    assert_equal(found, oracle(tasks(layer(x)), list(layer.parameters())))


@pytest.fixture
def always_gram(monkeypatch):
    """Whatever the operations say."""
    monkeypatch.setattr("lightning_gradnorm.weight_products._gram_is_less", lambda *sizes: True)


@pytest.mark.usefixtures("always_gram")
@pytest.mark.parametrize(("make", "shape", "form"), LAYERS.values(), ids=LAYERS)
def test_the_gram_form_is_right_where_it_would_not_be_chosen_too(make, shape, form):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    found = read(layer.parameters(), lambda: tasks(layer(x)))
    assert list(found.factors) == [0]
    assert_equal(found, oracle(tasks(layer(x)), list(layer.parameters())))


@pytest.mark.usefixtures("always_gram")
@pytest.mark.parametrize(("make", "shape", "form"), LAYERS.values(), ids=LAYERS)
def test_each_factor_may_go_once_it_has_its_part(make, shape, form):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    found = read(layer.parameters(), lambda: tasks(layer(x)), keep=False)
    assert found.factors[0].is_empty
    expected = oracle(tasks(layer(x)), list(layer.parameters()))
    torch.testing.assert_close(found.norms(), expected.norm(dim=1), rtol=1e-10, atol=0)


@pytest.mark.usefixtures("always_gram")
def test_factors_of_several_products_are_kept_until_all_are_there():
    layer, a, b = nn.Linear(6, 6), torch.randn(4, 6), torch.randn(3, 6)
    found = read(layer.parameters(), lambda: tasks(torch.cat([layer(a), layer(b)])), keep=False)
    assert not found.factors[0].is_empty
    expected = oracle(tasks(torch.cat([layer(a), layer(b)])), list(layer.parameters()))
    torch.testing.assert_close(found.norms(), expected.norm(dim=1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("part", ["weight", "bias and weight"])
def test_w_may_be_the_weight_alone_or_in_another_order(part):
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    parameters = [layer.weight] if part == "weight" else [layer.bias, layer.weight]
    found = read(parameters, lambda: tasks(layer(x)))
    assert_equal(found, oracle(tasks(layer(x)), parameters))


@pytest.mark.usefixtures("always_gram")
def test_a_layer_called_several_times_adds_up():
    layer, a, b = nn.Linear(6, 6), torch.randn(4, 6), torch.randn(3, 6)

    def losses():
        first, second = layer(layer(a).tanh()), layer(b)
        of_both = tasks(torch.cat([first, second]))
        return of_both | {"first alone": first.pow(2).mean()}

    found = read(layer.parameters(), losses)
    assert len(found.factors[0]._deltas) == 3
    assert_equal(found, oracle(losses(), list(layer.parameters())))


@pytest.mark.usefixtures("always_gram")
def test_an_output_that_is_changed_in_place_is_read_as_the_layer_gave_it():
    layer, x = nn.Linear(6, 6), torch.randn(4, 6)
    found = read(layer.parameters(), lambda: tasks(F.relu(layer(x), inplace=True) + 1))
    assert found.factors
    assert_equal(found, oracle(tasks(layer(x).relu() + 1), list(layer.parameters())))


@pytest.mark.usefixtures("always_gram")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_respect_to", ["input", "output"])
def test_a_derivative_uses_the_weight_too(with_respect_to, bias):
    layer, head, x = nn.Linear(6, 6, bias=bias), nn.Linear(6, 1), torch.randn(4, 6, requires_grad=True)

    def losses():
        y = layer(x)
        u = head(y.tanh())
        slopes = torch.autograd.grad(u.sum(), x if with_respect_to == "input" else y, create_graph=True)[0]
        return {"slopes": slopes.square().mean(), "u": (u - 1).square().mean()}

    found = read(layer.parameters(), losses)
    assert bool(found.factors) == (with_respect_to == "output")  # else one task alone uses the weight once more
    assert_equal(found, oracle(losses(), list(layer.parameters())))


@pytest.mark.usefixtures("always_gram")
def test_nodes_that_another_thread_has_numbered_are_found():
    use_up_node_numbers()
    layer, head, x = nn.Linear(6, 6), nn.Linear(6, 1), torch.randn(4, 6)

    def losses():
        features = layer(x)
        u = head(features.tanh())
        slopes = in_another_thread(lambda: torch.autograd.grad(u.sum(), features, create_graph=True)[0])
        assert slopes.grad_fn._sequence_nr() < features.grad_fn._sequence_nr()
        return {"slopes": slopes.square().mean() + u.square().mean(), "u": (u - 1).square().mean()}

    found = read(layer.parameters(), losses)
    assert found.factors
    assert_equal(found, oracle(losses(), list(layer.parameters())))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("size", [1e-25, 1e-20, 1e-12, 1.0, 1e12, 1e20])
def test_gradients_of_any_size_have_their_norms(size, keep):
    torch.manual_seed(0)
    layer, x = nn.Linear(300, 200).float(), torch.randn(8, 300, dtype=torch.float32)
    found = read(layer.parameters(), lambda: {t: size * loss for t, loss in tasks(layer(x), 2).items()}, keep=keep)
    expected = oracle(tasks(layer(x), 2), list(layer.parameters())).double()
    assert found.factors
    torch.testing.assert_close(found.norms() / size, expected.norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.usefixtures("always_gram")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize(("make", "shape", "form"), LAYERS.values(), ids=LAYERS)
def test_gradients_of_half_as_many_digits_have_their_norms(make, shape, form, size, keep):
    """bfloat16: the factors are what they are, and their product is not rounded once more."""
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    layer, x = layer.bfloat16(), x.bfloat16()
    found = read([layer.weight], lambda: {t: size * loss.float() for t, loss in tasks(layer(x), 2).items()}, keep=keep)
    outputs = layer(x)
    deltas = [torch.autograd.grad(size * loss.float(), outputs, retain_graph=True)[0] for loss in tasks(outputs, 2).values()]
    wide = make()
    wide.load_state_dict(layer.state_dict())
    products = [torch.autograd.grad(wide(x.double()), wide.weight, delta.double())[0] for delta in deltas]
    expected = torch.stack([product.norm() for product in products])
    assert found.factors
    # Each cotangent comes times its task's coefficient, and is rounded to bfloat16 with it.
    torch.testing.assert_close(found.norms(), expected, rtol=1e-2, atol=0)


def test_a_gradient_of_zero_has_norm_zero():
    layer, x = nn.Linear(30, 40), torch.randn(4, 30)
    found = read(layer.parameters(), lambda: tasks(layer(x), 2) | {"none": 0.0 * layer(x).sum() + tasks(layer(x))["task0"] * 0})
    assert found.norms()[2] == 0


# -- which uses have factors, and which are read in the general way ---------------------------------------------------

factored, general = {}, {}


def case(make, of=None):
    of[make.__name__.replace("_", " ")] = make
    return make


@functools.partial(case, of=factored)
def used_without_calling_it():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    return layer, lambda: tasks(layer(x) + F.linear(x, layer.weight))


@functools.partial(case, of=factored)
def a_kind_of_its_own():
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    layer, x = Mine(6, 5), torch.randn(4, 6)
    return layer, lambda: tasks(layer(x))


@functools.partial(case, of=factored)
def a_hook_that_changes_the_output():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    layer.register_forward_hook(lambda module, inputs, output: output * 3)
    return layer, lambda: tasks(layer(x))


@functools.partial(case, of=factored)
def called_by_keyword():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    return layer, lambda: tasks(layer(input=x))


@functools.partial(case, of=factored)
def called_in_vain_too():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    return layer, lambda: (layer(x + 1), tasks(layer(x)))[1]


@functools.partial(case, of=factored)
def with_substituted_parameters_that_are_its_own():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    return layer, lambda: tasks(functional_call(layer, dict(layer.named_parameters()), (x,)))


@functools.partial(case, of=factored)
def with_a_forward_of_its_own():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    layer.forward = lambda x: F.linear(2 * x, layer.weight, layer.bias)
    return layer, lambda: tasks(layer(x))


@functools.partial(case, of=factored)
def multiplied_from_the_right():
    layer, x = nn.Linear(6, 5, bias=False), torch.randn(4, 5)
    return layer, lambda: tasks(x @ layer.weight)


@functools.partial(case, of=general)
def a_term_on_the_weight_itself():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    return layer, lambda: tasks(layer(x)) | {"decay": layer.weight.pow(2).sum() + layer(x).sum()}


@functools.partial(case, of=general)
def every_task_with_calls_of_its_own():
    """Nothing merges above W: the gradients pass by on their way to it, and cost nothing to read there."""
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    return layer, lambda: {f"task{i}": layer(x + i).pow(2).mean() for i in range(3)}


@functools.partial(case, of=general)
def parametrised():
    layer, x = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), torch.randn(4, 6)
    return layer, lambda: tasks(layer(x))


@functools.partial(case, of=general)
def another_kind():
    layer, x = nn.Bilinear(6, 6, 5), torch.randn(4, 6)
    return layer, lambda: tasks(layer(x, x))


@functools.partial(case, of=general)
def transposed():
    layer, x = nn.ConvTranspose2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    return layer, lambda: tasks(layer(x))


@functools.partial(case, of=general)
def with_substituted_parameters():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    return layer, lambda: tasks(functional_call(layer, {"weight": 2 * layer.weight, "bias": layer.bias}, (x,)))


@functools.partial(case, of=general)
def both_turned_and_not():
    layer, x = nn.Linear(6, 6, bias=False), torch.randn(4, 6)
    return layer, lambda: tasks(x @ layer.weight + layer(x))


@functools.partial(case, of=general)
def scaled_as_it_is_added():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    return layer, lambda: tasks(torch.addmm(layer.bias, x, layer.weight.T, alpha=2))


@functools.partial(case, of=general)
def transposed_by_another_node():
    layer, x = nn.Linear(6, 5, bias=False), torch.randn(4, 6)
    return layer, lambda: tasks(x @ layer.weight.transpose(0, 1))


@functools.partial(case, of=general)
def in_a_checkpoint():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    return layer, lambda: tasks(checkpoint(layer, x, use_reentrant=False))


@pytest.mark.usefixtures("always_gram")
@pytest.mark.parametrize("make", factored.values(), ids=factored)
def test_uses_as_the_operand_of_a_product_have_factors(make):
    layer, losses = make()
    found = read(layer.parameters(), losses)
    assert found.factors
    assert_equal(found, oracle(losses(), list(layer.parameters())))


@pytest.mark.usefixtures("always_gram")
@pytest.mark.parametrize("make", general.values(), ids=general)
def test_other_uses_are_read_in_the_general_way_and_right(make):
    layer, losses = make()
    found = read(layer.parameters(), losses)
    assert not found.factors
    assert_equal(found, oracle(losses(), list(layer.parameters())))


def test_a_complex_layer_is_read_in_the_general_way():
    layer, x = nn.Linear(30, 40, dtype=torch.complex128), torch.randn(4, 30, dtype=torch.complex128)

    def losses():
        z = layer(x)
        return {"a": z.abs().square().mean(), "b": (z.real * 3 - z.imag).square().mean()}

    found = read(layer.parameters(), losses)
    assert not found.factors
    expected = [torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True) for loss in losses().values()]
    norms = torch.stack([sum(g.abs().square().sum() for g in row).sqrt() for row in expected])
    torch.testing.assert_close(found.norms(), norms)


def test_a_batch_without_rows_has_norms_of_zero():
    layer, x = nn.Linear(30, 40), torch.randn(0, 30)
    found = read(layer.parameters(), lambda: {"a": layer(x).sum(), "b": layer(x).square().sum()})
    assert found.norms().tolist() == [0, 0]


def test_the_watch_of_the_version_before_says_what_to_write():
    layer, x = nn.Linear(30, 40), torch.randn(4, 30)
    with pytest.warns(DeprecationWarning, match=r"Write JointBackward\(total, losses, layer.parameters\(\)\)"):
        watch = LayerWatch(layer)
    watch.start()
    losses = tap_losses(tasks(layer(x)))
    root = sum(losses.values())
    reader = watch.reader(root, losses)
    root.backward()
    watch.stop()
    assert_equal(reader.gradients(), oracle(tasks(layer(x)), list(layer.parameters())))


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1.0, 30.0, 300.0, 1000.0])
@pytest.mark.parametrize("kind", ["linear", "convolution", "grouped"])
def test_a_large_common_part_of_the_inputs_does_not_drown_the_rest(kind, mean):
    """A normalisation over the rows follows, so that the common part has no say in the gradient."""
    torch.manual_seed(0)
    layer, x = {
        "linear": lambda: (nn.Linear(60, 50), mean + torch.randn(32, 60)),
        "convolution": lambda: (nn.Conv2d(48, 64, 3), mean + torch.randn(4, 48, 5, 5)),
        "grouped": lambda: (nn.Conv2d(96, 64, 3, groups=2), mean + torch.randn(4, 96, 5, 5)),
    }[kind]()
    norm = nn.BatchNorm1d(50) if kind == "linear" else nn.BatchNorm2d(64)
    x = x.float().double()
    for module in (layer, norm):
        module.float().double()
    expected = oracle(tasks(norm(layer(x)), 2), [layer.weight]).norm(dim=1)
    for module in (layer, norm):
        module.float()
    found = read([layer.weight], lambda: tasks(norm(layer(x.float())), 2))
    assert found.factors
    torch.testing.assert_close(found.norms(), expected, rtol=1e-4, atol=0)


def test_what_float32_cannot_hold_is_computed_again():
    """Nothing normalises here: the rows' common part has its say, and nearly cancels."""
    torch.manual_seed(0)
    x, delta = 1e4 + torch.randn(30, 60).float(), torch.randn(30, 50).float()
    delta = delta - delta.mean(0)
    factors = WeightFactors(1, torch.empty(50, 60), turned=True)
    factors._inputs, factors._deltas = [x], [{0: delta}]
    expected = (delta.double().T @ x.double()).square().sum()
    torch.testing.assert_close(factors.squares()[0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("keep", [True, False])
def test_a_factor_stays_until_its_square_is_beyond_doubt(keep):
    """Here one task's rows are all but orthogonal to those of the input."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(30, 30)).Q
    x = (q[:, :3] @ torch.randn(3, 60)).float()
    deltas = [(q[:, 3:8] @ torch.randn(5, 50) + 1e-3 * q[:, :3] @ torch.randn(3, 50)).float(), torch.randn(30, 50).float()]
    factors, node = WeightFactors(2, torch.empty(50, 60), turned=True, keep=keep), (x @ _weight_of_product()).grad_fn
    for task, delta in enumerate(deltas):
        factors.add(node, task, delta)
    assert list(factors._deltas[0]) == ([0, 1] if keep else [0])
    expected = torch.stack([(delta.double().T @ x.double()).square().sum() for delta in deltas])
    torch.testing.assert_close(factors.squares(), expected, rtol=1e-4, atol=0)


def _weight_of_product():
    return torch.ones(60, 50, dtype=torch.float32).requires_grad_()


def test_inputs_that_lie_on_a_line_are_trusted_without_another_try():
    """The cheap bound is too wide there; what probes tell is not."""
    torch.manual_seed(0)
    rows, outputs = 1024, 512
    x = torch.randn(rows, 1) * torch.randn(1, 600)
    gram, delta = Gram(x.float()), torch.randn(rows, outputs).float()
    gram.take(delta)
    squares = gram.squares()
    assert gram._size * delta.norm() ** 2 > 1e-4 * squares[0]
    assert gram.trusts(squares, [delta])
    exact = (delta.double().T @ x).square().sum()
    torch.testing.assert_close(squares[0], exact, rtol=1e-4, atol=0)


def test_a_task_that_brings_nothing_needs_no_other_try():
    gram, deltas = Gram(torch.randn(4, 6).float()), [torch.randn(4, 5).float(), torch.zeros(4, 5).float()]
    for delta in deltas:
        gram.take(delta)
    squares = gram.squares()
    assert squares[1] == 0
    assert gram.trusts(squares, deltas)


@pytest.mark.parametrize("size", [1e-22, 1e-20, 1.0, 1e19])
def test_where_nobody_waits_factors_are_scaled_before_they_are_squared(size, monkeypatch):
    """As elsewhere than on the CPU: one try in float32 has to do."""
    torch.manual_seed(0)
    x, delta = torch.randn(8, 300).float(), torch.randn(8, 200).float()
    expected = (delta.double().T @ x.double()).norm() * size
    for room in ("gram", "factors"):
        monkeypatch.setattr(f"lightning_gradnorm.{room}.can_wait", lambda device: False)
    for a, b in ((size, 1.0), (1.0, size), (size**0.5, size**0.5)):
        factors = WeightFactors(1, torch.empty(200, 300), turned=True)
        factors._inputs, factors._deltas = [a * x], [{0: b * delta}]
        torch.testing.assert_close(factors.squares()[0].sqrt(), expected, rtol=1e-4, atol=0)


# -- operations, counted ---------------------------------------------------------------------------------------------

ROWS, INPUTS, OUTPUTS, TASKS = 8, 64, 32, 5


def extra_flops(rows, read_norms):
    """FLOPs that the norms add to a step: the plain step's are taken off."""
    torch.manual_seed(0)
    layer, x = nn.Linear(INPUTS, OUTPUTS), torch.randn(rows, INPUTS, requires_grad=True)

    def plain():
        sum(tasks(layer(x), TASKS).values()).backward()

    def balanced():
        found = read(layer.parameters(), lambda: tasks(layer(x), TASKS))
        read_norms(found)

    return flops(balanced) - flops(plain)


def common(rows, inputs, outputs):
    """What the rows have in common, taken out: X̃ μ once; two columns times Δᵀ per task, and these with each other."""
    return 2 * rows * inputs + TASKS * (2 * rows * outputs * 2 + 2 * outputs * 2 * 2)


def test_few_rows_take_the_gram_form_and_its_operations():
    gram = 2 * ROWS * ROWS * INPUTS + TASKS * 2 * ROWS * ROWS * OUTPUTS + common(ROWS, INPUTS, OUTPUTS)
    assert extra_flops(ROWS, lambda found: found.norms()) == gram < TASKS * 2 * ROWS * INPUTS * OUTPUTS


def test_symmetry_saves_a_part_where_rows_are_many_enough():
    rows, inputs, outputs = 128, 512, 256
    layer, x = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
    found = read(layer.parameters(), lambda: tasks(layer(x), TASKS))
    triangles = 2 * rows * rows * (inputs + TASKS * outputs) * 5 // 8
    assert flops(found.norms) == triangles + common(rows, inputs, outputs)


def test_many_rows_take_one_product_per_task():
    rows = 64
    assert extra_flops(rows, lambda found: found.norms()) == TASKS * 2 * rows * INPUTS * OUTPUTS
