"""The one door for names and numbers: plain ``str``, ``int`` and ``float`` of what numpy, pandas, enums and YAML give.

What is kept of them ends in checkpoints and YAML files, which take plain values only.
"""

import numbers
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from enum import Enum
from typing import Any, Protocol, TypeVar

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)

# A number that YAML 1.1 reads as text, for want of a dot or of the exponent's sign: 1e-3, 2.5e3.
_TEXT_IN_YAML = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class HasItems(Protocol[V_co]):
    """A mapping, or what gives pairs as one does: a pandas Series."""

    def items(self) -> Iterable[tuple[Any, V_co]]:
        """(task, value) pairs."""


def _scalar(value: Any) -> Any:
    """What a scalar or 0-d array of numpy, or a 0-d tensor, holds; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def plain_number(value: object) -> int | float | None:
    """The number that ``value`` stands for; ``None`` where it stands for none. A bool does not."""
    value = _scalar(value)
    if isinstance(value, str):
        return float(value) if _TEXT_IN_YAML.fullmatch(value) else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real | Decimal):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def plain_text(value: object) -> str | None:
    """The text that ``value`` stands for, an Enum member's that is a str included; ``None`` where it stands for none."""
    value = _scalar(value)
    return str.__str__(value) if isinstance(value, str) else None


def plain_name(task: object) -> str:
    """A task's name as a plain string.

    Raises:
        TypeError: if it is not a string.
    """
    if type(task) is str:
        return task
    text = plain_text(task)
    if text is None:
        way_out = " Take the member's .name or .value, or derive the Enum from str." if isinstance(task, Enum) else ""
        raise TypeError(
            f"A task's name is a string, got {task!r} ({type(task).__name__}). Name the tasks: {{'depth': loss, …}}.{way_out}"
        )
    return text


def plain_names(tasks: Iterable[object]) -> tuple[str, ...]:
    """Tasks' names as plain strings.

    Raises:
        TypeError: if one is not a string.
    """
    if type(tasks) is tuple and set(map(type, tasks)) == {str}:
        return tasks  # as they are in every step but a first one
    return tuple(map(plain_name, tasks))


def plain_keys(of_tasks: Mapping[Any, V] | HasItems[V]) -> dict[str, V]:
    """Task → value with plain names.

    Raises:
        TypeError: if a name is not a string.
    """
    return {plain_name(task): value for task, value in of_tasks.items()}


def flat_settings(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """As loggers take them: nested ones with a slash, ``priorities/depth``; what is no number, word or truth value as text."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": inner for key, inner in flat_settings(value).items()}
        else:
            flat[name] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
