"""SGD and Adam in their plain form on a few numbers: what torch's do, without the time that they take to begin."""

import math
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from lightning_gradnorm.balancers.arrays import Vector

_OFF = {
    SGD: ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "differentiable"),
    Adam: ("weight_decay", "amsgrad", "maximize", "capturable", "differentiable"),
}


def plain_step(optimizer: Optimizer, parameter: Tensor, values: Vector, gradient: Vector) -> Vector | None:
    """One step of an optimiser of one vector on the CPU; what it remembers is changed in its own state, as if it had stepped.

    Args:
        optimizer: of ``parameter`` alone.
        parameter: shape ``[T]``; left as it is.
        values: where the step starts, shape ``[T]``.
        gradient: shape ``[T]``.

    Returns:
        The new values, shape ``[T]``; ``None``, and nothing done, where the optimiser is another one, or not in its plain form,
        or has no memory yet.
    """
    group: dict[str, Any] = optimizer.param_groups[0]
    kind = type(optimizer)
    if kind not in _OFF or any(group[name] for name in _OFF[kind]) or isinstance(group["lr"], Tensor):
        return None
    if kind is SGD:
        return values - group["lr"] * gradient
    memory = optimizer.state.get(parameter)
    if not memory:
        return None
    step, mean, square = memory["step"].numpy(), memory["exp_avg"].numpy(), memory["exp_avg_sq"].numpy()
    beta, beta_square = group["betas"]
    step += 1
    mean += (1 - beta) * (gradient - mean)
    square *= beta_square
    square += (1 - beta_square) * gradient * gradient
    count = float(step)
    size = np.sqrt(square) / math.sqrt(1 - beta_square**count) + group["eps"]
    return values - group["lr"] / (1 - beta**count) * mean / size
