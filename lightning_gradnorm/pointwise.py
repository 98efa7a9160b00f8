"""Weights for the single points of one loss term: points within the term, while a balancer weighs terms against each other."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_gradnorm.balancers.checks import check_choice, check_factory, check_range, check_whole
from lightning_gradnorm.balancers.optimizer import OptimizerFactory, VectorOptimizer
from lightning_gradnorm.measurement import widest_float

Mask = Literal["sigmoid", "polynomial"]


class NotedPoints(NamedTuple):
    """What one batch had of a term.

    Attributes:
        losses: detached, one per point, shape ``[N]``.
        points: what identifies them, as it was given.
    """

    losses: Tensor
    points: Tensor | None


class PointWeighting(ABC):
    """Weighs the points of one term: its loss is the mean of m_i ℓ_i over the points.

    In a bare loop, ``term`` gives the scalar loss to put into the loss dict, and ``update`` is called once per step.
    """

    def term(self, losses: Tensor, points: Tensor | None = None, network: nn.Module | None = None) -> Tensor:
        """The mean of m_i ℓ_i, scalar; changes no state.

        Args:
            losses: ℓ, one per point, shape ``[N]``.
            points: what identifies the points; see the method.
            network: what the losses were computed with.

        Raises:
            ValueError: if the points are not what the method needs.
        """
        return (self.weights_for(losses, points, network).to(losses) * losses).mean()

    @abstractmethod
    def weights_for(self, losses: Tensor, points: Tensor | None = None, network: nn.Module | None = None) -> Tensor:
        """m_i of these points, shape ``[N]``, detached."""

    def update(
        self,
        noted: Sequence[NotedPoints],
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Learn from an optimiser step's batches.

        Args:
            noted: the batches, none if the step had nothing of this term.
            all_reduce: sums a tensor over the ranks of a distributed run.
            device: where that works.
        """

    def reset(self) -> None:
        """Forget all that was learnt."""

    def settings(self) -> dict[str, Any]:
        """The method's settings as plain values."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that was learnt, as plain tensors, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``."""


class UniformPoints(PointWeighting):
    """m_i = 1: the plain mean, to compare with by one word."""

    def weights_for(self, losses: Tensor, points: Tensor | None = None, network: nn.Module | None = None) -> Tensor:
        return torch.ones_like(losses, requires_grad=False)


class SelfAdaptivePoints(PointWeighting):
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
        rule = "a whole number of points, 1 or more, or None"
        self._given = None if num_points is None else check_whole("num_points", num_points, rule, at_least=1)
        self.mask = check_choice("mask", mask, get_args(Mask))
        polynomial = self.mask == "polynomial"
        start = float(polynomial) if initial is None else initial
        self.initial = check_range("initial", start, above=0) if polynomial else check_range("initial", start)
        self.lr = check_range("lr", lr, at_least=0)
        self.coefficient, self.exponent = (
            check_range("coefficient", coefficient, above=0),
            check_range("exponent", exponent, above=0),
        )
        check_factory("optimizer", optimizer)
        self._factory = optimizer
        self.frozen = False
        self.reset()

    def reset(self) -> None:
        self._lambdas = torch.full((self._given or 0,), self.initial, dtype=torch.float64)
        self._optimizer = VectorOptimizer(self._factory, self.lr)

    @property
    def num_points(self) -> int | None:
        """How many fixed points there are, once that is known."""
        return len(self._lambdas) or None

    @property
    def masks(self) -> Tensor:
        """m(λ) of all points, shape ``[num_points]``."""
        return self._mask(self._lambdas)

    def settings(self) -> dict[str, Any]:
        own: dict[str, Any] = {"mask": self.mask, "lr": self.lr, "initial": self.initial}
        polynomial = {"coefficient": self.coefficient, "exponent": self.exponent} if self.mask == "polynomial" else {}
        return own | polynomial | {"optimizer": self._optimizer.name}

    def state_dict(self) -> dict[str, Any]:
        return {"lambdas": self._lambdas.clone(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._given is not None and len(state["lambdas"]) not in (0, self._given):
            raise ValueError(
                f"The checkpoint has masks of {len(state['lambdas'])} points, and SelfAdaptivePoints was given "
                f"num_points={self._given}. Masks belong to fixed points: go on with the same ones."
            )
        self._lambdas = state["lambdas"].clone()
        self._optimizer.load_state_dict(state["optimizer"])

    def _mask(self, lambdas: Tensor) -> Tensor:
        return torch.sigmoid(lambdas) if self.mask == "sigmoid" else self.coefficient * lambdas**self.exponent

    def _slope(self, lambdas: Tensor) -> Tensor:
        if self.mask == "sigmoid":
            return torch.sigmoid(lambdas) * torch.sigmoid(-lambdas)
        return self.coefficient * self.exponent * lambdas ** (self.exponent - 1)

    def _index(self, losses: Tensor, points: Tensor | None) -> Tensor | None:
        """Which points these are; ``None`` for all, in order."""
        known = self.num_points
        if points is None:
            if known not in (None, len(losses)):
                raise ValueError(
                    f"SelfAdaptivePoints has a mask for each of {known} fixed points, and this batch has {len(losses)} losses "
                    "and no index. Say which points they are: total_loss(losses, points={'task': index})."
                )
            return None
        if points.shape != losses.shape or points.is_floating_point() or points.dtype == torch.bool:
            raise ValueError(
                f"The index of {len(losses)} fixed points is a tensor of whole numbers of shape ({len(losses)},); got "
                f"{points.dtype} of shape {tuple(points.shape)}."
            )
        if known is None:
            raise ValueError("SelfAdaptivePoints with an index needs to know how many points there are: give num_points=….")
        if points.device.type == "cpu" and len(points) and not 0 <= int(points.min()) <= int(points.max()) < known:
            raise ValueError(
                f"The index goes from {int(points.min())} to {int(points.max())}; the fixed points are 0 to {known - 1}."
            )
        return points

    @torch.no_grad()
    def weights_for(self, losses: Tensor, points: Tensor | None = None, network: nn.Module | None = None) -> Tensor:
        index = self._index(losses, points)
        if self.num_points is None:
            return self._mask(losses.new_full((len(losses),), self.initial, dtype=widest_float(losses.device)))
        lambdas = self._lambdas.to(losses.device)
        return self._mask(lambdas if index is None else lambdas[index])

    @torch.no_grad()
    def update(
        self,
        noted: Sequence[NotedPoints],
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if self.frozen or (not noted and all_reduce is None):
            return
        if self.num_points is None:
            if all_reduce is not None:
                raise ValueError("In a distributed run SelfAdaptivePoints needs num_points=…, the same on every rank.")
            self._lambdas = torch.full((len(noted[0].losses),), self.initial, dtype=torch.float64)
        where = device if all_reduce is not None and device is not None else noted[0].losses.device
        self._lambdas = self._lambdas.to(where, widest_float(where))
        sums = self._lambdas.new_zeros(2, len(self._lambdas))  # of losses, and how many there were
        for losses, points in noted:
            index = self._index(losses, points)
            added = torch.stack([losses, torch.ones_like(losses)]).to(sums)
            sums = sums + added if index is None else sums.index_add(1, index.to(where), added)
        if all_reduce is not None:
            sums = all_reduce(sums)
        mean = sums[0] / sums[1]
        gradient = self._slope(self._lambdas) * mean
        self._lambdas = self._optimizer.step(self._lambdas, -gradient, gradient.isfinite())


class GradientNormPoints(PointWeighting):
    """m_i = max_j g_j / g_i, with g_i = ‖∇_θ r(x_i; θ)‖ the gradient norm of the point's residual: all points pull alike.

    Tutorials present this as the method of Wang, Teng and Perdikaris (2021), which weighs terms and not points. Norms come
    from ``torch.func``, at each step and for the points of the batch, so the points may be redrawn at will::

        points = {"residual": GradientNormPoints(lambda module, x: module.residual(x))}
        self.total_loss({"residual": residual.square(), …}, points={"residual": x})

    Args:
        residual: ``(network, x) → r``, with ``x`` one point of the coordinates given (shape ``[…]`` without the batch) and
            ``r`` a scalar; derivatives in it by ``torch.func``. The network is the LightningModule.
        max_weight: greatest m_i, at least 1: a point whose gradient vanishes would have an infinite one.
        chunk_size: points that are worked on at once; each takes as much memory as the network's parameters.

    Raises:
        ValueError: for a setting outside its range; at a step, without coordinates.
    """

    def __init__(
        self, residual: Callable[[nn.Module, Tensor], Tensor], *, max_weight: float = 100.0, chunk_size: int = 256
    ) -> None:
        if not callable(residual):
            raise TypeError(
                f"GradientNormPoints takes the residual of one point, a function (network, x) → r; got {residual!r}."
            )
        self.chunk_size = check_whole("chunk_size", chunk_size, "a whole number, 1 or more", at_least=1)
        self.max_weight = check_range("max_weight", max_weight, at_least=1)
        self.residual = residual

    def settings(self) -> dict[str, Any]:
        return {"max_weight": self.max_weight}

    def gradient_norms(self, points: Tensor, network: nn.Module) -> Tensor:
        """g_i, shape ``[N]``, of coordinates ``[N, …]``."""
        whole = _WithResidual(network, self.residual)
        parameters = {name: p.detach() for name, p in whole.named_parameters() if p.requires_grad}

        def residual(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            value: Tensor = torch.func.functional_call(whole, parameters, (x,))
            return value.reshape(())

        per_point = torch.func.vmap(torch.func.grad(residual), in_dims=(None, 0), chunk_size=self.chunk_size, randomness="same")
        gradients = per_point(parameters, points.detach())
        squares = [g.flatten(1).to(widest_float(g.device)).square().sum(1) for g in gradients.values()]
        return torch.stack(squares).sum(0).sqrt()

    @torch.no_grad()
    def weights_for(self, losses: Tensor, points: Tensor | None = None, network: nn.Module | None = None) -> Tensor:
        if points is None or network is None or len(points) != len(losses):
            given = "none" if points is None else f"{len(points)}"
            raise ValueError(
                f"GradientNormPoints needs the coordinates of each of the {len(losses)} points; got {given}. Pass them with "
                "the losses: total_loss(losses, points={'task': x})."
            )
        norms = self.gradient_norms(points, network)
        return (norms.max() / norms).clamp(max=self.max_weight).nan_to_num(nan=1.0)


class _WithResidual(nn.Module):
    """The network, with the residual of one point as its forward pass, as ``functional_call`` wants it."""

    def __init__(self, network: nn.Module, residual: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self._residual = network, residual

    def forward(self, x: Tensor) -> Tensor:
        return self._residual(self.network, x)
