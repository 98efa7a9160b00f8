"""Objects of other libraries inside a method: what they have learnt, and the random numbers that they draw."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OF_MODULES = frozenset(vars(nn.Module()))  # what every module has, none of it learnt
_PLAIN = (bool, int, float, str, torch.dtype, torch.Size)


class Learnt:
    """The numbers, texts, arrays and tensors that an object holds, in its attributes or, of a module, in those of its parts.

    A plain function holds none.

    Args:
        owner: the object, as yet without experience.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._first = self.state_dict()

    def reset(self) -> None:
        """Forget what was learnt."""
        self.load_state_dict(self._first)

    def state_dict(self) -> dict[str, Any]:
        """Path to a part → name → value."""
        return {path: {name: _written(value) for name, value in _held(part)} for path, part in self._parts()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``.

        Raises:
            ValueError: if it is of an object with other parts.
        """
        parts = dict(self._parts())
        if set(parts) != set(state):
            raise ValueError(
                f"{type(self._owner).__name__} has the parts {sorted(parts)}, and the state is of one with {sorted(state)}. "
                "Load it into the method that it is from, or start anew without it."
            )
        for path, values in state.items():
            for name, value in values.items():
                _put(parts[path], name, _read(value))

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """What is learnt inside is forgotten at the end."""
        before = self.state_dict()
        try:
            yield
        finally:
            self.load_state_dict(before)

    def _parts(self) -> list[tuple[str, Any]]:
        return list(self._owner.named_modules()) if isinstance(self._owner, nn.Module) else [("", self._owner)]


@contextlib.contextmanager
def random_numbers_of(seed: int, device: torch.device) -> Iterator[None]:
    """What is drawn inside depends on the seed alone, and nothing outside on what is drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield


def _held(part: Any) -> Iterator[tuple[str, Any]]:
    own = getattr(part, "__dict__", {})
    if isinstance(part, nn.Module):
        own = {name: value for name, value in own.items() if name not in _OF_MODULES} | part._buffers | part._parameters
    return ((name, value) for name, value in own.items() if _can_be_written(value))


def _can_be_written(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_can_be_written, value))
    if type(value) is dict:
        return all(isinstance(key, str | int) and _can_be_written(entry) for key, entry in value.items())
    return value is None or isinstance(value, (*_PLAIN, Tensor, np.ndarray, torch.device))


def _written(value: Any) -> Any:
    """As what a checkpoint holds that is loaded without running code: an array is a tensor, under its kind."""
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.copy())}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.deepcopy(value)


def _read(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"array"}:
        return value["array"].numpy().copy()
    if isinstance(value, dict) and set(value) == {"device"}:
        return torch.device(value["device"])
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _put(part: Any, name: str, value: Any) -> None:
    parameter = part._parameters.get(name) if isinstance(part, nn.Module) else None
    if parameter is not None:
        with torch.no_grad():
            parameter.copy_(value)
    elif isinstance(part, nn.Module) and name in part._buffers:
        part._buffers[name] = value
    else:
        part.__dict__[name] = value
