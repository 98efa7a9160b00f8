"""Points weighed by their own gradient norms."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradnorm.balancers.checks import check_range, check_whole
from lightning_gradnorm.measurement import widest_float
from lightning_gradnorm.pointwise.weighting import PointWeighting


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
        self.chunk_size: int = check_whole("chunk_size", chunk_size, "a whole number, 1 or more", at_least=1)
        self.max_weight: float = check_range("max_weight", max_weight, at_least=1)
        self.residual = residual

    def settings(self) -> dict[str, Any]:
        return {"max_weight": self.max_weight}

    def gradient_norms(self, points: Tensor, network: nn.Module) -> Tensor:
        """g_i, shape ``[N]``.

        Args:
            points: coordinates, ``[N, …]``.
            network: what is trained.
        """
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
