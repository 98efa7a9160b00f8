"""Checks of settings that every method makes alike."""

import math
from collections.abc import Iterable


def check_that(name: str, value: object, holds: bool, rule: str) -> None:
    """Refuse a setting.

    Raises:
        ValueError: saying the rule and what came, unless it holds.
    """
    if not holds:
        raise ValueError(f"{name} is {rule}; got {value!r}.")


def check_range(
    name: str,
    value: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> float:
    """The value, if it is a number in its range.

    Raises:
        ValueError: naming the setting and its range.
    """
    bounds = [("at least", at_least), ("above", above), ("below", below), ("at most", at_most)]
    said = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
    holds = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    holds = holds and at_least <= value <= at_most and above < value < below
    check_that(name, value, holds, f"a finite number {said}".rstrip())
    return float(value)


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: naming them.
    """
    choices = tuple(choices)
    check_that(name, value, value in choices, f"one of {', '.join(map(repr, choices))}")
