"""The projection onto a scale rule's set and the bounds at once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradnorm.balancers.scale import scale_to_reference, scale_to_sum


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


def test_with_coefficients_by_hand():
    """Σ a w = 1·w0 + 3·w1 = 4, w1 at most 1.1."""
    scaled = scale_to_sum(vector(1.0, 4.0), 4.0, 0.1, 1.1, coefficients=vector(1.0, 3.0))
    torch.testing.assert_close(scaled, vector(0.7, 1.1))


positive = st.floats(1e-9, 1e9)


@given(
    st.lists(st.tuples(positive, positive), min_size=1, max_size=12),
    st.floats(1e-8, 1.0),
    st.one_of(st.just(math.inf), st.floats(1.0, 1e3)),
    st.booleans(),
)
def test_it_meets_the_sum_and_the_bounds_and_keeps_free_ratios(rows, low, high, with_coefficients):
    w, a = (vector(*column) for column in zip(*rows, strict=True))
    a = a if with_coefficients else torch.ones_like(w)
    total = a.sum()
    v = scale_to_sum(w, total, low, high, coefficients=a if with_coefficients else None)
    assert (v >= low * (1 - 1e-12)).all() and (v <= high * (1 + 1e-12)).all()
    torch.testing.assert_close((a * v).sum(), total, rtol=1e-9, atol=0)
    # v = clamp(c w): c is the same wherever no bound binds, and consistent where one does
    c = v / w
    free = (v > low * (1 + 1e-9)) & (v < high * (1 - 1e-9))
    if free.any():
        torch.testing.assert_close(c[free], c[free].mean().expand(int(free.sum())), rtol=1e-6, atol=0)
        assert (c[v <= low] >= c[free].mean() * (1 - 1e-6)).all()
        assert (c[v >= high] <= c[free].mean() * (1 + 1e-6)).all()


def test_reference():
    assert scale_to_reference(vector(2.0, 4.0, 0.001), 0, 0.01, 1.5).tolist() == [1.0, 1.5, 0.01]
