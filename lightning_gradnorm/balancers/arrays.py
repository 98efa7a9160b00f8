"""One set of equations for tensors and for NumPy's arrays: on a few numbers, an operation of NumPy's costs a fifth of torch's.

Vectors on a CPU are seen as arrays over the tensors' own memory while an update is computed, and are tensors again where it
ends. On any other device they stay tensors, and nothing waits for the device. What both have under one name and meaning
(arithmetic, ``sum``, ``mean``, ``all``, ``any``, ``clip``, indexing) is written as it is; the rest is here.
"""

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_gradnorm.measurement import reading_is_free

Vector: TypeAlias = Any  # float64 or boolean, shape ``[T]`` or ``[]``: an array or a tensor, all of one update alike


def on_host(vector: Tensor) -> Vector:
    """The same memory as an array, where the CPU has it; else the tensor."""
    return vector.numpy() if reading_is_free(vector) else vector


def as_tensor(vector: Vector) -> Tensor:
    """The tensor of an array's memory; a tensor as it is."""
    if isinstance(vector, Tensor):
        return vector
    return torch.from_numpy(vector) if isinstance(vector, np.ndarray) else torch.tensor(vector)


def quiet() -> np.errstate:
    """A context in which NaN and infinity come about as silently as with tensors."""
    return np.errstate(all="ignore")


def log(vector: Vector) -> Vector:
    """The natural logarithm, entry by entry."""
    return vector.log() if isinstance(vector, Tensor) else np.log(vector)


def exp(vector: Vector) -> Vector:
    """The exponential function, entry by entry."""
    return vector.exp() if isinstance(vector, Tensor) else np.exp(vector)


def sign(vector: Vector) -> Vector:
    """-1, 0 or 1 for each entry."""
    return vector.sign() if isinstance(vector, Tensor) else np.sign(vector)


def isfinite(vector: Vector) -> Vector:
    """Which entries are no NaN and no infinity."""
    return vector.isfinite() if isinstance(vector, Tensor) else np.isfinite(vector)


def surely_all(condition: Vector) -> bool:
    """Whether all are known to be true; on a device that would have to be waited for, nothing is."""
    return (not isinstance(condition, Tensor) or reading_is_free(condition)) and bool(condition.all())


def where(condition: Vector, chosen: Vector, other: Vector) -> Vector:
    """The chosen entries where the condition holds, the others elsewhere."""
    return torch.where(condition, chosen, other) if isinstance(condition, Tensor) else np.where(condition, chosen, other)


def like(vector: Vector, values: list[float] | list[bool]) -> Vector:
    """These numbers, where the vector is."""
    dtype: Any = None if isinstance(values[0], bool) else vector.dtype
    return torch.tensor(values, dtype=dtype, device=vector.device) if isinstance(vector, Tensor) else np.array(values, dtype)


def placed(vector: Vector, positions: Vector, values: Vector) -> Vector:
    """A copy with these values at the positions."""
    if isinstance(vector, Tensor):
        return vector.index_copy(0, positions, values)
    copy = vector.copy()
    copy[positions] = values
    return copy
