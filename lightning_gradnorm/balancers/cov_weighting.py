"""CoV-weighting (Groenendijk, Karaoglu, Gevers, Mensink, WACV 2021, arXiv 2009.01717)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.measurement import Measurement

_LEAST_VARIANCE = 1e-8  # of the authors' program, beside the variance


class CoVWeighting(RuleBalancer):
    """w_i ∝ σ_i / μ_i, the coefficient of variation of the loss ratio L_i(t) / (mean of L_i before t); Σ w = T.

    A loss that has come to rest is taken to be learnt, and one that still varies gets the weight. Mean and standard deviation
    are over all steps so far, so that the weights settle; what varies from batch to batch counts among it. Nothing moves until
    each task of the step has been measured twice.

    It is made for several losses of one task. The weights know nothing of the losses' sizes and do not even them out: a loss
    in larger units has the larger part of the gradient, as with equal weights.

    Deviation: Σ w is T as everywhere here, where the paper has 1.

    Source: Groenendijk, Karaoglu, Gevers, Mensink, WACV 2021, arXiv 2009.01717.

    Args:
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one enters the means.

    Raises:
        ValueError: for a negative loss.
    """

    needs_positive_losses = True
    _remembers = (("measured", 0.0), ("mean_loss", 0.0), ("mean_ratio", 0.0), ("squares", 0.0))

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses, measured = measurement.losses, state["measured"] + 1
        ratios = torch.where(state["mean_loss"] > 0, losses / state["mean_loss"], 1.0)
        mean_loss = state["mean_loss"] + (losses - state["mean_loss"]) / measured
        from_before = ratios - state["mean_ratio"]
        mean_ratio = state["mean_ratio"] + from_before / measured
        squares = state["squares"] + from_before * (ratios - mean_ratio)
        variation = (squares / measured + _LEAST_VARIANCE).sqrt() / mean_ratio
        weights = variation * (state["weights"].sum() / variation.sum())
        return {
            "weights": torch.where((measured > 1).all(), weights, state["weights"]),
            "measured": measured,
            "mean_loss": mean_loss,
            "mean_ratio": mean_ratio,
            "squares": squares,
        }
