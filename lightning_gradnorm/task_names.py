"""Tasks' names, and what becomes of them in a logger's tags."""

import functools
import re
from collections.abc import Iterable

from lightning_gradnorm.plain import plain_name

# What tensorboardX, which Lightning's TensorBoardLogger can use as well, turns into "_" in a tag.
_REPLACED_IN_TAGS = re.compile(r"[^-/\w.]")


def task_tag(task: str) -> str:
    """The task's name as it stands in a logger's tag.

    Raises:
        TypeError: if the name is not a string.
        ValueError: if the name cannot be part of a tag.
    """
    return _tag(plain_name(task))


@functools.lru_cache(maxsize=4096)
def _tag(task: str) -> str:
    if not task.strip("/ ") or task != task.strip("/ ") or not task.isprintable() or "/dataloader_idx_" in task:
        raise ValueError(
            f"The task name {task!r} cannot be part of a logger's tag. A name is one line of printable characters, "
            "not empty, with no space or slash at its ends, and without '/dataloader_idx_'."
        )
    return _REPLACED_IN_TAGS.sub("_", task)


def check_task_names(tasks: Iterable[str]) -> None:
    """Refuse names that cannot be tags, and two names for one tag.

    Raises:
        TypeError: if a name is not a string.
        ValueError: if a name cannot be a tag, or two tasks would share one.
    """
    _check(tuple(map(plain_name, tasks)))


@functools.lru_cache(maxsize=64)  # the same in nearly every step
def _check(tasks: tuple[str, ...]) -> None:
    by_tag: dict[str, str] = {}
    for task in tasks:
        tag = _tag(task)
        if tag in by_tag:
            same = "twice" if by_tag[tag] == task else f"and {by_tag[tag]!r} (both are {tag!r} in a logger's tag)"
            raise ValueError(f"Two tasks with one name: {task!r} {same}. Give every task a name of its own.")
        by_tag[tag] = task
