"""``loss_weights.yaml``: what a run's weights were, to read and to retrain from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_gradnorm.folders import Folder

FILE_NAME = "loss_weights.yaml"


def write_weights(
    folder: str | Path,
    tasks: Mapping[str, Mapping[str, float | str]],
    *,
    method: str,
    settings: Mapping[str, Any],
    steps: int,
    warmup: int,
    measured: int | None = None,
    held_out: Mapping[str, float] | None = None,
    note: str = "",
) -> str | Path:
    """Write the file.

    Args:
        folder: where to, a path or a URL that fsspec knows; made if it is not there.
        tasks: task → statistic → value; NaN is written as null.
        method: the balancer's name.
        settings: its settings as plain values.
        steps: optimiser steps of the run.
        warmup: how many of the measured ones, from the first, ``mean_after_warmup`` leaves out.
        measured: how many of the steps were measured, which is what the statistics are over; by default all.
        held_out: metric of the last validation → its value.
        note: a line for people, as a comment.

    Returns:
        The file's path.
    """
    rows = {task: {name: None if v != v else v for name, v in row.items()} for task, row in tasks.items()}
    counts = {"steps": steps} | ({} if measured is None else {"measured_steps": measured}) | {"warmup_steps": warmup}
    content = {"method": method, "settings": dict(settings), **counts, "tasks": rows}
    content |= {"held_out": dict(held_out)} if held_out else {}
    header = "# Loss weights of a training run. To train with their mean: FixedWeights.from_file(…) (GradNorm static).\n"
    header += f"# {note}\n" if note else ""
    text = header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return Folder(folder).write(FILE_NAME, text.encode())


def _wrong(path: str | Path, what: str) -> ValueError:
    return ValueError(
        f"{path} is not a {FILE_NAME} as a balancing callback writes it at the end of fit: {what}. "
        "Give the weights as a dict, FixedWeights({'task': weight, …}), or run the fit again."
    )


def read_file(path: str | Path) -> dict[str, Any]:
    """The file's content, with its ``tasks``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not hold what such a file holds; the message says what is missing.
    """
    try:
        folder, name = Folder.of_file(path)
        content = yaml.safe_load(folder.read(name).decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _wrong(path, f"it cannot be read as YAML ({error})") from error
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, dict) or not tasks:
        raise _wrong(path, "it has no 'tasks'")
    odd = [task for task, row in tasks.items() if not isinstance(row, dict)]
    if odd:
        raise _wrong(path, f"no statistics for {', '.join(map(repr, odd))}")
    return dict(content)


def read_weights(path: str | Path, statistic: str) -> dict[str, float]:
    """Task → that statistic of its weight.

    Raises:
        FileNotFoundError, ValueError: as ``read_file`` does.
    """
    tasks = read_file(path)["tasks"]
    lacking = [task for task, row in tasks.items() if row.get(statistic) is None]
    if lacking:
        raise _wrong(path, f"no {statistic!r} weight for {', '.join(map(repr, lacking))}")
    return {task: row[statistic] for task, row in tasks.items()}
