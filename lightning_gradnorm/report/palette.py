"""One colour per task, the same in every figure and on the console."""

from collections.abc import Sequence
from typing import Any, NamedTuple

# Okabe and Ito's, which people with any kind of colour vision tell apart; their yellow is darkened to be seen on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7F00")
# Of many: from dark to light through matplotlib's "viridis", whose lightness alone tells one end from the other.
_ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (200, 205, 40))
_MOST_OF_ONE_KIND = 2 * len(_COLOURS)
GREY = "#B8B8B8"  # of tasks that are not named


class Style(NamedTuple):
    """How a task's line looks.

    Attributes:
        colour: ``#RRGGBB``.
        dash: matplotlib's sign of its dashes.
    """

    colour: str
    dash: Any = "-"


def styles(tasks: Sequence[str]) -> dict[str, Style]:
    """Task → its style: colours that are told apart for eight, with dashes for sixteen; of more, shades in the given order."""
    if len(tasks) > _MOST_OF_ONE_KIND:
        return {task: Style(_shade(place / (len(tasks) - 1))) for place, task in enumerate(tasks)}
    solid = len(_COLOURS)
    return {task: Style(_COLOURS[i % solid], "-" if i < solid else (0, (3, 1.2))) for i, task in enumerate(tasks)}


def has_shades(count: int) -> bool:
    """Whether so many tasks are told apart by shades, which are best given in the order of the weights."""
    return count > _MOST_OF_ONE_KIND


def _shade(place: float) -> str:
    """Between the anchors, 0 the first and 1 the last."""
    at = place * (len(_ANCHORS) - 1)
    left = min(int(at), len(_ANCHORS) - 2)
    mixed = (round(a + (at - left) * (b - a)) for a, b in zip(_ANCHORS[left], _ANCHORS[left + 1], strict=True))
    return "#" + "".join(f"{part:02X}" for part in mixed)
