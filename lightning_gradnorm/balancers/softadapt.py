"""SoftAdapt (Heydari, Thompson, Mehmood 2019, arXiv 1912.12355)."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_choice, check_range
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.balancers.scale import softmax_weights
from lightning_gradnorm.measurement import Measurement

Variant = Literal["original", "normalized", "loss_weighted"]


class SoftAdapt(RuleBalancer):
    """w_i ∝ exp(β s_i), with s_i = L_i(t) − L_i(t − 1) the loss's rate of change; more for the losses that grow. Σ w = T.

    Deviations: the paper's weights sum to 1, and these to T, so that switching methods leaves the learning rate alone; the
    rate is the difference of two steps (the paper also allows longer stencils). The first two steps use weights of one.

    Source: Heydari, Thompson, Mehmood 2019, arXiv 1912.12355.

    Args:
        beta: β; with a negative one the losses that fall get more (the authors' code: 0.1).
        variant: ``"original"``; ``"normalized"``: of s_i / Σ_j ∣s_j∣, so that the losses' units do not matter;
            ``"loss_weighted"``: w_i ∝ L_i exp(β s_i).
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one is measured and updates the weights.

    Raises:
        ValueError: for a setting outside its range; for a negative loss with ``"loss_weighted"``.
    """

    _remembers = (("last_loss", torch.nan),)

    def __init__(
        self,
        beta: float = 0.1,
        *,
        variant: Variant = "original",
        tasks: Iterable[str] | None = None,
        update_every: int = 1,
    ) -> None:
        self.beta: float = check_range("beta", beta)
        self.variant: Variant = check_choice("variant", variant, get_args(Variant))
        self.needs_positive_losses: bool = self.variant == "loss_weighted"
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"beta": self.beta, "variant": self.variant}

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses, weights, last = measurement.losses, state["weights"], state["last_loss"]
        seen = ~last.isnan()
        rates = losses - torch.where(seen, last, losses)
        if self.variant == "normalized":
            rates = rates / rates.abs().sum().clamp_min(torch.finfo(rates.dtype).tiny)
        factors = losses if self.variant == "loss_weighted" else None
        self.diagnostics: dict[str, Tensor] = {"loss_change": rates}
        new = softmax_weights(self.beta * rates, weights.sum(), factors)
        return {"weights": torch.where(seen.all(), new, weights), "last_loss": losses}
