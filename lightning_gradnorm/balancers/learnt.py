"""Objects of other libraries inside a method: what they have learnt, and the random numbers that they draw."""

import collections
import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OF_MODULES = frozenset(vars(nn.Module()))  # what every module has, none of it learnt
_PLAIN = (bool, int, float, str, torch.dtype, torch.Size)
_TOLD = 16  # entries of a tensor up to which it is told among the settings


class Learnt:
    """What an object holds that it did not hold at first: numbers, texts, arrays, tensors, in its attributes and its parts'.

    So the settings that it was made with stay its own when a state is taken up. A plain function holds nothing.

    Args:
        owner: the object, as yet without experience.
    """

    def __init__(self, owner: Any) -> None:
        self._owner, self._device = owner, torch.device("cpu")
        self._first = {path: {name: _written(value) for name, value in _held(part)} for path, part in self._parts()}

    @property
    def description(self) -> str:
        """The object's class, with the numbers and texts that it was made with; a function's name."""
        name = getattr(self._owner, "__name__", type(self._owner).__name__)
        own = {key.lstrip("_"): _told(value) for key, value in self._first.get("", {}).items()}
        told = [f"{key}={value}" for key, value in own.items() if value is not None]
        return f"{name}({', '.join(told)})" if told else name

    def reset(self) -> None:
        """Forget what was learnt."""
        self.load_state_dict({path: {} for path in self._first})

    def state_dict(self) -> dict[str, Any]:
        """Path to a part → name → value, of what has changed."""
        return {
            path: {
                name: _written(value)
                for name, value in _held(part)
                if name not in self._first[path] or not _same(value, self._first[path][name])
            }
            for path, part in self._parts()
        }

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
        for path, part in parts.items():
            after = self._first[path] | dict(state[path])
            for name in [name for name, _ in _held(part) if name not in after]:
                _take_away(part, name)
            for name, value in after.items():
                _put(part, name, _read(value, self._device))

    def move(self, device: torch.device) -> None:
        """All that is held, to where the numbers are."""
        self._device = device
        self.load_state_dict(self.state_dict())

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
    """What is drawn inside from PyTorch or NumPy depends on the seed alone, and nothing outside on what is drawn."""
    devices = [device] if device.type == "cuda" else []
    of_numpy = np.random.get_state()  # noqa: NPY002 (the global numbers are what others draw from)
    try:
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device
            np.random.seed(seed)  # noqa: NPY002 (as above)
            for each in devices:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002 (as above)


def _held(part: Any) -> Iterator[tuple[str, Any]]:
    own = getattr(part, "__dict__", {})
    if isinstance(part, nn.Module):
        own = {name: value for name, value in own.items() if name not in _OF_MODULES} | part._buffers | part._parameters
    return ((name, value) for name, value in list(own.items()) if _can_be_written(value))


def _can_be_written(value: Any) -> bool:
    if type(value) in (tuple, list, collections.deque):
        return all(map(_can_be_written, value))
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _can_be_written(entry) for key, entry in value.items())
    return value is None or isinstance(value, (*_PLAIN, Tensor, np.ndarray, np.generic, torch.device, torch.Generator))


def _written(value: Any) -> Any:
    """As what a checkpoint holds that is loaded without running code: what it has no kind for is under the kind's name."""
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.copy())}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.Generator):
        return {"generator": value.get_state()}
    if isinstance(value, collections.deque):
        return {"deque": [_written(entry) for entry in value], "maxlen": value.maxlen}
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {"dict": {key: _written(entry) for key, entry in value.items()}}
    return type(value)(map(_written, value)) if type(value) in (tuple, list) else copy.deepcopy(value)


def _read(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if type(value) in (tuple, list):
        return type(value)(_read(entry, device) for entry in value)
    if not isinstance(value, dict):
        return copy.deepcopy(value)
    if "array" in value:
        return value["array"].cpu().numpy().copy()
    if "device" in value:
        return torch.device(value["device"])
    if "deque" in value:
        return collections.deque((_read(entry, device) for entry in value["deque"]), value["maxlen"])
    if "dict" in value:
        return {key: _read(entry, device) for key, entry in value["dict"].items()}
    return value  # of a generator, which takes up its state


def _same(value: Any, written: Any) -> bool:
    """Whether a value is what it was when it was written."""
    return _alike(_written(value), written)


def _alike(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


def _told(value: Any) -> Any:
    """A setting in words, ``None`` if it is not to be told."""
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= _TOLD else None
    return value if isinstance(value, bool | int | float | str) else None


def _put(part: Any, name: str, value: Any) -> None:
    parameter = part._parameters.get(name) if isinstance(part, nn.Module) else None
    if parameter is not None:
        with torch.no_grad():
            parameter.copy_(value)
    elif isinstance(value, dict) and "generator" in value:
        part.__dict__.setdefault(name, torch.Generator()).set_state(value["generator"].cpu())
    elif isinstance(part, nn.Module) and name in part._buffers:
        part._buffers[name] = value
    else:
        part.__dict__[name] = value


def _take_away(part: Any, name: str) -> None:
    """What was not there: an attribute, a buffer."""
    for place in (part.__dict__, getattr(part, "_buffers", {}), getattr(part, "_parameters", {})):
        place.pop(name, None)
