"""Residual-based attention against a transcription of the paper's update, point by point."""

import math

import pytest
import torch

from lightning_gradnorm import ResidualAttentionPoints
from lightning_gradnorm.pointwise import NotedPoints
from tests.helpers import same_state
from tests.test_pointwise import learn, per_point


def test_the_weights_are_squares_of_the_papers_update():
    """λ_i ← γ λ_i + η |r_i| / max_j |r_j|, and the term is the mean of (λ_i r_i)²."""
    points, lambdas = ResidualAttentionPoints(decay=0.9, rate=0.05), [0.0] * 6
    for seed in range(30):
        residuals = [value - 0.6 for value in per_point(6, seed).tolist()]
        losses = torch.tensor([r**2 for r in residuals], dtype=torch.float64)
        greatest = max(map(abs, residuals))
        lambdas = [0.9 * weight + 0.05 * abs(r) / greatest for weight, r in zip(lambdas, residuals, strict=True)]
        expected = sum((weight * r) ** 2 for weight, r in zip(lambdas, residuals, strict=True)) / 6
        assert points.term(losses).item() == pytest.approx(expected, rel=1e-12)
        learn(points, [losses])


def test_where_the_residual_is_always_the_greatest_the_weight_comes_to_rest_at_its_bound():
    losses = torch.tensor([4.0, 1.0, 0.0])
    points = learn(ResidualAttentionPoints(decay=0.5, rate=0.25), [losses] * 60)
    assert points.weights_for(losses).tolist() == pytest.approx([0.25, 0.0625, 0.0])


def test_points_that_are_not_in_a_batch_keep_their_weights():
    index, losses = torch.tensor([5, 0, 3]), per_point(8)
    parts = learn(ResidualAttentionPoints(8, decay=0.5, rate=0.1), [losses[index]] * 3, index)
    alone = learn(ResidualAttentionPoints(decay=0.5, rate=0.1), [losses[index]] * 3)
    expected = torch.zeros(8, dtype=torch.float64).index_copy(0, index, alone.state_dict()["lambdas"])
    assert parts.state_dict()["lambdas"].tolist() == expected.tolist()
    assert parts.weights_for(losses[index], index).tolist() == alone.weights_for(losses[index]).tolist()


def test_ranks_share_one_greatest_residual():
    parts, whole = ResidualAttentionPoints(3), learn(ResidualAttentionPoints(3), [torch.tensor([2.0, 0.5, 4.0])])
    there = torch.tensor([[0.0, 0.0, 4.0], [0.0, 0.0, 1.0]])
    parts.update([NotedPoints(torch.tensor([2.0, 0.5]), torch.tensor([0, 1]))], lambda t: t + there, torch.device("cpu"))
    assert same_state(parts.state_dict(), whole.state_dict())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_point_whose_loss_is_not_finite_keeps_its_weight(bad):
    losses = torch.tensor([bad, 4.0, 1.0], dtype=torch.float64)
    points = learn(ResidualAttentionPoints(decay=0.5, rate=0.5), [losses])
    assert points.state_dict()["lambdas"].tolist() == [0.0, 0.5, 0.25]
    assert points.weights_for(losses).tolist() == [0.0, 0.5625, 0.140625]


def test_residuals_that_are_all_zero_change_nothing():
    points = learn(ResidualAttentionPoints(decay=0.5, rate=0.5), [torch.ones(3), torch.zeros(3)])
    assert points.weights_for(torch.zeros(3)).tolist() == [0.25] * 3


def test_a_restored_state_goes_on_as_if_uninterrupted():
    steps = [per_point(5, seed) for seed in range(9)]
    whole, second = learn(ResidualAttentionPoints(), steps), ResidualAttentionPoints(5)
    second.load_state_dict(learn(ResidualAttentionPoints(), steps[:4]).state_dict())
    assert same_state(learn(second, steps[4:]).state_dict(), whole.state_dict())
    whole.reset()
    assert same_state(whole.state_dict(), ResidualAttentionPoints().state_dict())


def test_what_does_not_fit_is_refused_in_the_methods_own_words():
    points = learn(ResidualAttentionPoints(4), [per_point(4)])
    with pytest.raises(
        ValueError, match="ResidualAttentionPoints has a weight for each of 4 fixed points, and this batch has 5"
    ):
        points.term(torch.ones(5))
    with pytest.raises(ValueError, match="weights of 4 points, and ResidualAttentionPoints was given num_points=5"):
        ResidualAttentionPoints(5).load_state_dict(points.state_dict())
    with pytest.raises(ValueError, match="ResidualAttentionPoints with an index needs to know how many points there are"):
        ResidualAttentionPoints().term(torch.ones(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="decay is a finite number at least 0 and below 1"):
        ResidualAttentionPoints(decay=1.0)
    with pytest.raises(ValueError, match="rate is a finite number above 0"):
        ResidualAttentionPoints(rate=0.0)
