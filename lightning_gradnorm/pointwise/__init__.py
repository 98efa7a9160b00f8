"""Weights for the single points of one loss term: points within the term, while a balancer weighs terms against each other."""

from lightning_gradnorm.pointwise.attention import ResidualAttentionPoints
from lightning_gradnorm.pointwise.gradient_norms import GradientNormPoints
from lightning_gradnorm.pointwise.self_adaptive import Mask, SelfAdaptivePoints
from lightning_gradnorm.pointwise.weighting import NotedPoints, PointWeighting, UniformPoints

__all__ = [
    "GradientNormPoints",
    "Mask",
    "NotedPoints",
    "PointWeighting",
    "ResidualAttentionPoints",
    "SelfAdaptivePoints",
    "UniformPoints",
]
