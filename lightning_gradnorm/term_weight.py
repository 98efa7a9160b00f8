"""``TermWeight``: stands where a library takes a number by which it multiplies one of its loss terms."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.context import get_spawning_popen
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_gradnorm.plain import plain_number

_PRODUCTS: frozenset[Any] = frozenset({torch.mul, torch.multiply, Tensor.mul, Tensor.multiply})


class Weighs(Protocol):
    """Whoever weighs the losses of a run."""

    def term(self, task: str, loss: Tensor) -> Tensor:
        """The weighed loss; ``loss`` itself where nothing is weighed."""


class TermWeight(float):
    """A number that a library multiplies one of its losses by: ``weight * loss`` is that task's share of the balanced total.

    In training ``weight * loss`` notes ``factor · loss`` as the task's loss, and is w · factor · loss with the balancer's
    present weight w. Everywhere else, and to whoever reads it, it is the number ``factor``. Multiplied or divided by a number
    it is a weight of that factor. A copy is the same weight; what is pickled, and so what a checkpoint holds of saved
    hyperparameters, is the plain number.

    Args:
        factor: the number that the library would have been given.
        task: the term's name.
        weighs: the session that balances; another session knows nothing of it.

    Raises:
        TypeError: if the factor is no number.
        ValueError: if it is not finite.
    """

    task: str
    _weighs: Weighs
    _of: Callable[[Tensor], Tensor]

    def __new__(cls, factor: float, task: str, weighs: Weighs) -> "TermWeight":
        number = plain_number(factor)
        if number is None:
            raise TypeError(f"The factor of task {task!r} is the number that its loss is multiplied by, got {factor!r}.")
        if not math.isfinite(number):
            raise ValueError(f"The factor of task {task!r} is a finite number, got {factor!r}.")
        weight = super().__new__(cls, number)
        weight.task, weight._weighs = task, weighs
        disable: Any = torch.compiler.disable  # a compiled step breaks its graph there
        weight._of = disable(partial(_share, float(number), task, weighs))
        return weight

    def _times(self, other: Any) -> Any:
        if isinstance(other, Tensor):
            return self._of(other)
        if isinstance(other, TermWeight):
            return NotImplemented
        number = plain_number(other)
        return float(self) * other if number is None else TermWeight(float(self) * number, self.task, self._weighs)

    def __mul__(self, other: Any) -> Any:
        return self._times(other)

    def __rmul__(self, other: Any) -> Any:
        return self._times(other)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc.__name__ == "multiply" and method == "__call__" and len(inputs) == 2 and not kwargs:
            return self * (inputs[1] if inputs[0] is self else inputs[0])
        return getattr(ufunc, method)(*without_weights(inputs), **without_weights(kwargs))

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, Tensor) and other.requires_grad:
            return self * other.reciprocal()
        number = plain_number(other)
        return TermWeight(float(self) / number, self.task, self._weighs) if number else float(self) / other

    def __neg__(self) -> Any:
        return self * -1

    def __pos__(self) -> Any:
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        in_place = func is Tensor.mul_ and args[0].requires_grad  # as `loss *= weight` is read
        if (func in _PRODUCTS or in_place) and len(args) == 2 and not kwargs:
            weight, loss = args if isinstance(args[0], cls) else args[::-1]
            return weight._of(loss)
        return func(*without_weights(args), **without_weights(kwargs or {}))

    def __copy__(self) -> "TermWeight":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "TermWeight":
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if get_spawning_popen() is not None:  # to a worker of the same fit, with its callback
            return TermWeight, (float(self), self.task, self._weighs)
        return float, (float(self),)


def _share(factor: float, task: str, weighs: Weighs, loss: Tensor) -> Tensor:
    scaled = loss if factor == 1 else factor * loss
    share = weighs.term(task, scaled) if factor else scaled
    return factor * loss if share is loss else share  # a product is a tensor of its own: others are added to it in place


def without_weights(held: Any) -> Any:
    """The same with plain numbers in the place of weights, in dicts, lists and tuples of any depth."""
    return tree_map(lambda value: float(value) if isinstance(value, TermWeight) else value, held)


_DUMPERS = "Dumper", "SafeDumper", "CDumper", "CSafeDumper"  # as which Lightning and others write hyperparameters
for _dumper in (getattr(yaml, name) for name in _DUMPERS if hasattr(yaml, name)):
    yaml.add_representer(TermWeight, lambda dumper, weight: dumper.represent_float(float(weight)), Dumper=_dumper)
