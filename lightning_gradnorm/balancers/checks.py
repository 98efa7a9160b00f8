"""Checks of settings that every method makes alike; what passes comes back as plain strings and numbers."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from lightning_gradnorm.plain import plain_keys, plain_name, plain_number, plain_text

Choice = TypeVar("Choice", bound=str)


def check_that(name: str, value: object, holds: bool, rule: str) -> None:
    """Refuse a setting.

    Raises:
        ValueError: saying the rule and what came, unless it holds.
    """
    if not holds:
        raise ValueError(f"{name} is {rule}; got {value!r}.{_about_text(value)}")


def _about_text(value: object) -> str:
    text = plain_text(value)
    try:
        float(text or "")
    except ValueError:
        return ""
    return " That is text: write the number without quotes."


def check_number(name: str, value: object, holds: Callable[[float], bool], rule: str) -> float:
    """The value as a plain float, if it is a number for which ``holds``.

    Raises:
        ValueError: saying the rule and what came.
    """
    number = plain_number(value)
    check_that(name, value, number is not None and holds(number), rule)
    return float(number or 0)


def check_range(
    name: str,
    value: object,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> float:
    """The value as a plain float, if it is a finite number in its range.

    Raises:
        ValueError: naming the setting and its range.
    """
    bounds = [("at least", at_least), ("above", above), ("below", below), ("at most", at_most)]
    said = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))

    def holds(number: float) -> bool:
        return math.isfinite(number) and at_least <= number <= at_most and above < number < below

    return check_number(name, value, holds, f"a finite number {said}".rstrip())


def check_whole(name: str, value: object, rule: str, *, at_least: float = -math.inf) -> int:
    """The value as a plain int, if it is a whole number, 10.0 included.

    Raises:
        ValueError: saying the rule and what came.
    """
    number = plain_number(value)
    check_that(name, value, number is not None and number >= at_least and number % 1 == 0, rule)
    return int(number or 0)


def check_choice(name: str, value: object, choices: Iterable[Choice]) -> Choice:
    """The one of the choices that the value stands for.

    Raises:
        ValueError: naming them.
    """
    choices, text = tuple(choices), plain_text(value)
    found = [choice for choice in choices if choice == text]
    check_that(name, value, bool(found), f"one of {', '.join(map(repr, choices))}")
    return found[0]


def check_names(name: str, tasks: Any) -> tuple[str, ...]:
    """A list of tasks as plain names.

    Raises:
        TypeError: if it is no list, or a name is not a string.
    """
    text = plain_text(tasks)
    if text is not None:
        raise TypeError(f"{name} is a list of names, got the string {text!r}. Write {name}=[{text!r}].")
    if isinstance(tasks, bytes) or not isinstance(tasks, Iterable) or getattr(tasks, "shape", None) == ():
        raise TypeError(f"{name} is a list of names, got {tasks!r}. Write {name}=['depth', 'normals'].")
    return tuple(map(plain_name, tasks))


def check_per_task(name: str, values: Any, rule: str = "a dict of task name → number") -> dict[str, Any]:
    """A setting given per task, with plain names; none for ``None``.

    Raises:
        TypeError: if a name is not a string.
        ValueError: if it is not given per task.
    """
    if values is None:
        return {}
    check_that(name, values, is_per_task(values), rule)
    return plain_keys(values)


def is_per_task(values: object) -> bool:
    """Whether it gives (task, value) pairs, as a dict or a pandas Series does."""
    return isinstance(values, Mapping) or (hasattr(values, "items") and hasattr(values, "keys"))


def check_factory(name: str, factory: object) -> None:
    """Refuse what cannot make an optimiser.

    Raises:
        ValueError: saying what can.
    """
    rule = "an optimiser class or a functools.partial of one, called as optimizer([vector], lr=lr)"
    check_that(name, factory, callable(factory), rule)
