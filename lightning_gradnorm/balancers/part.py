"""What a balancer is put together from."""

from collections.abc import Mapping
from typing import Any, Protocol


class Part(Protocol):
    """A piece of a method that learns: reset, saved and restored with it."""

    def reset(self) -> None:
        """Forget what was learnt."""

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as plain tensors, numbers, strings, lists and dicts."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``."""
