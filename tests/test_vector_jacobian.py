"""One node run by hand: what is asked for is right, and what is not asked for is not computed."""

from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradnorm.vector_jacobian import VectorJacobianProduct


def slope_of(activation):
    """(x, z) → the derivative of the activation at x, times z."""

    def slope(x, z):
        (found,) = torch.autograd.grad(activation(x), x, z, create_graph=True)
        return found

    return slope


def numbers(*shape, dtype=torch.float64):
    draws = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=draws, requires_grad=True)


COMPLEX = torch.complex128
KINDS = {
    "MmBackward0": lambda: numbers(3, 4) @ numbers(4, 5),
    "AddmmBackward0": lambda: torch.addmm(numbers(5), numbers(3, 4), numbers(4, 5), beta=2, alpha=3),
    "BmmBackward0": lambda: torch.bmm(numbers(2, 3, 4), numbers(2, 4, 5)),
    "BmmBackward0, complex": lambda: torch.bmm(numbers(2, 3, 4, dtype=COMPLEX), numbers(2, 4, 5, dtype=COMPLEX)),
    "MulBackward0": lambda: numbers(4) * numbers(3, 4),
    "MulBackward0, complex": lambda: numbers(3, 4) * numbers(4, dtype=COMPLEX),
    "MulBackward0, of two precisions": lambda: numbers(3, 4) * numbers(4, dtype=torch.float32),
    "ConvolutionBackward0": lambda: F.conv1d(numbers(2, 3, 9), numbers(4, 3, 3), numbers(4)),
    "EluBackwardBackward0": lambda: slope_of(F.celu)(numbers(3, 4), numbers(3, 4)),
    "SoftplusBackwardBackward0": lambda: slope_of(lambda x: F.softplus(x, beta=2))(numbers(3, 4), numbers(3, 4)),
    "TanhBackwardBackward0": lambda: slope_of(torch.tanh)(numbers(3, 4), numbers(3, 4)),
    "TanhBackwardBackward0, complex": lambda: slope_of(torch.tanh)(numbers(3, 4, dtype=COMPLEX), numbers(3, 4, dtype=COMPLEX)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_alone_gets_what_it_gets_beside_the_others(kind):
    y = KINDS[kind]()
    node, held = y.grad_fn, {0: torch.randn_like(y)}
    assert type(node).__name__ == kind.partition(",")[0]
    ways = len(node.next_functions)
    with torch.no_grad():
        together = [gradient for _, _, gradient in VectorJacobianProduct(node, [True] * ways)(held)]
        for way in range(ways):
            ((child, number, alone),) = VectorJacobianProduct(node, [other == way for other in range(ways)])(held)
            assert (child, number) == node.next_functions[way]
            assert alone.dtype == together[way].dtype
            torch.testing.assert_close(alone, together[way], rtol=1e-14, atol=1e-14)


class Work(TorchDispatchMode):
    """Counts the entries of what operations return."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            self.made[operation] += 0 if tensor is None or tensor._is_view() else tensor.numel()
        return result


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "," not in kind])
def test_the_way_on_costs_nothing_but_itself(kind):
    y = KINDS[kind]()
    ways = len(y.grad_fn.next_functions)
    on = 1 if kind == "AddmmBackward0" else 0
    made = []
    for wanted in ([way == on for way in range(ways)], [True] * ways):
        with torch.no_grad(), Work() as work:
            list(VectorJacobianProduct(y.grad_fn, wanted)({0: torch.ones_like(y)}))
        made.append(work.made.total() - y.numel())
    assert made[0] < made[1]


def test_a_node_of_which_nothing_is_asked_does_not_run():
    y = numbers(3, 4) / numbers(4)
    held = {0: torch.ones_like(y)}
    with torch.no_grad(), Work() as work:
        assert list(VectorJacobianProduct(y.grad_fn, [False, False])(held)) == []
    assert not work.made
