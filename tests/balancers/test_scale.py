"""The projection onto a scale rule's set and the bounds at once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradnorm.balancers.scale import scale_to_reference, scale_to_sum, scale_towards_gradient


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("weights", "total", "bounds", "expected"),
    [
        ([1.0, 3.0], 2.0, (0.0, math.inf), [0.5, 1.5]),  # no bound binds: the paper's w · T / Σ w
        ([1.0, 3.0], 2.0, (0.0, 1.2), [0.8, 1.2]),  # the large one is cut, the small one takes the rest
        ([1.0, 3.0], 2.0, (0.7, math.inf), [0.7, 1.3]),
        ([1.0, 1.0, 100.0], 3.0, (0.5, 1.5), [0.75, 0.75, 1.5]),
        ([1.0, 2.0, 100.0], 3.0, (0.5, 1.5), [0.5, 1.0, 1.5]),
        ([1e-12, 1.0], 2.0, (0.9, 1.1), [0.9, 1.1]),
        ([1.0, 5.0], 2.0, (1.0, 9.0), [1.0, 1.0]),  # one point is all there is
        ([1.0, 5.0], 2.0, (0.1, 1.0), [1.0, 1.0]),
    ],
)
def test_by_hand(weights, total, bounds, expected):
    torch.testing.assert_close(scale_to_sum(vector(*weights), total, *bounds), vector(*expected))


positive = st.floats(1e-9, 1e9)


@given(
    st.lists(positive, min_size=1, max_size=12),
    st.floats(1e-8, 1.0),
    st.one_of(st.just(math.inf), st.floats(1.0, 1e3)),
)
def test_it_meets_the_sum_and_the_bounds_and_keeps_free_ratios(weights, low, high):
    w = vector(*weights)
    v = scale_to_sum(w, float(len(w)), low, high)
    assert (v >= low * (1 - 1e-12)).all() and (v <= high * (1 + 1e-12)).all()
    torch.testing.assert_close(v.sum(), vector(len(w))[0], rtol=1e-9, atol=0)
    # v = clamp(c w): c is the same wherever no bound binds, and consistent where one does
    c = v / w
    free = (v > low * (1 + 1e-9)) & (v < high * (1 - 1e-9))
    if free.any():
        torch.testing.assert_close(c[free], c[free].mean().expand(int(free.sum())), rtol=1e-6, atol=0)
        assert (c[v <= low] >= c[free].mean() * (1 - 1e-6)).all()
        assert (c[v >= high] <= c[free].mean() * (1 + 1e-6)).all()


def test_reference():
    assert scale_to_reference(vector(2.0, 4.0, 0.001), 0, 0.01, 1.5).tolist() == [1.0, 1.5, 0.01]


def test_towards_the_gradients_size_by_hand():
    """Σ n = 12, Σ w n = 6: a factor of 2, of which a rate of ½ takes the root."""
    weights, norms = vector(1.0, 0.25), vector(4.0, 8.0)
    torch.testing.assert_close(scale_towards_gradient(weights, norms, 1.0), vector(2.0, 0.5))
    torch.testing.assert_close(scale_towards_gradient(weights, norms, 0.5), vector(2**0.5, 2**0.5 / 4))
    torch.testing.assert_close(scale_towards_gradient(weights, norms, 1.0, 0.6, 1.9), vector(1.9, 0.6))


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-6, 1e6)), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_every_step_closes_the_same_part_of_the_gap(rows, rate):
    w, n = (vector(*column) for column in zip(*rows, strict=True))
    gap = ((w * n).sum() / n.sum()).log()
    v = scale_towards_gradient(w, n, rate)
    torch.testing.assert_close(((v * n).sum() / n.sum()).log(), (1 - rate) * gap, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(v / w, (v / w)[0].expand(len(w)), rtol=1e-12, atol=0)
