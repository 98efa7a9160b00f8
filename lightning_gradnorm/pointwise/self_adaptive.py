"""Points weighed by trained masks."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_choice, check_factory, check_range
from lightning_gradnorm.balancers.optimizer import OptimizerFactory, VectorOptimizer
from lightning_gradnorm.pointwise.fixed import FixedPoints

Mask = Literal["sigmoid", "polynomial"]


class SelfAdaptivePoints(FixedPoints):
    """Self-adaptive weights (McClenny and Braga-Neto, JCP 2023, arXiv 2009.04544): a trained mask m(λ_i) per fixed point.

    The network descends on the mean of m(λ_i) ℓ_i while the masks *ascend* on it, each by its own optimiser, so that points
    whose loss stays high count for more. The paper has a heuristic for it and no proof of convergence. It freezes the masks
    while L-BFGS runs, and so does the balancing callback; ``frozen`` does it by hand.

    The ascent is on m(λ_i) ℓ_i itself, without the 1/N of the mean and without the term's weight, so that neither meets the
    optimiser's epsilon.

    Points are fixed and known by index. Where every batch has all of them, in order, no index is needed; otherwise pass
    ``self.total_loss(losses, points={"residual": index})`` and give ``num_points``.

    Args:
        num_points: how many there are; learnt from the first batch if not given.
        mask: ``"sigmoid"``: m = 1 / (1 + e^{−λ}); ``"polynomial"``: m = c λ^q.
        lr: learning rate of λ (the paper: 5e-3).
        initial: λ at the start; by default 0 for the sigmoid (m = ½) and 1 for the polynomial (m = c).
        coefficient: c > 0 of the polynomial.
        exponent: q > 0 of the polynomial.
        optimizer: factory of the optimiser of λ, called as ``optimizer([λ], lr=lr)``.

    Attributes:
        frozen: while true, ``update`` changes nothing.

    Raises:
        ValueError: for a setting outside its range; at a step, for points whose number or index does not fit.
    """

    _of_each = "mask"

    def __init__(
        self,
        num_points: int | None = None,
        *,
        mask: Mask = "sigmoid",
        lr: float = 5e-3,
        initial: float | None = None,
        coefficient: float = 1.0,
        exponent: float = 2.0,
        optimizer: OptimizerFactory = torch.optim.Adam,
    ) -> None:
        self.mask: Mask = check_choice("mask", mask, get_args(Mask))
        polynomial = self.mask == "polynomial"
        start = float(polynomial) if initial is None else initial
        start = check_range("initial", start, above=0) if polynomial else check_range("initial", start)
        self.lr: float = check_range("lr", lr, at_least=0)
        self.coefficient: float = check_range("coefficient", coefficient, above=0)
        self.exponent: float = check_range("exponent", exponent, above=0)
        check_factory("optimizer", optimizer)
        self._factory = optimizer
        super().__init__(num_points, start)

    def reset(self) -> None:
        super().reset()
        self._optimizer = VectorOptimizer(self._factory, self.lr)

    @property
    def masks(self) -> Tensor:
        """m(λ) of all points, shape ``[num_points]``."""
        return self._mask(self._lambdas)

    def settings(self) -> dict[str, Any]:
        own: dict[str, Any] = {"mask": self.mask, "lr": self.lr, "initial": self.initial}
        polynomial = {"coefficient": self.coefficient, "exponent": self.exponent} if self.mask == "polynomial" else {}
        return own | polynomial | {"optimizer": self._optimizer.name}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._optimizer.load_state_dict(state["optimizer"])

    def _mask(self, lambdas: Tensor) -> Tensor:
        return torch.sigmoid(lambdas) if self.mask == "sigmoid" else self.coefficient * lambdas**self.exponent

    def _slope(self, lambdas: Tensor) -> Tensor:
        if self.mask == "sigmoid":
            return torch.sigmoid(lambdas) * torch.sigmoid(-lambdas)
        return self.coefficient * self.exponent * lambdas ** (self.exponent - 1)

    def _weights(self, lambdas: Tensor, losses: Tensor) -> Tensor:
        return self._mask(lambdas)

    def _learn(self, mean: Tensor) -> None:
        gradient = self._slope(self._lambdas) * mean
        self._lambdas = self._optimizer.step(self._lambdas, -gradient, gradient.isfinite())
