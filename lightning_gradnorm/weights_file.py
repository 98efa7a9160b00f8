"""``loss_weights.yaml``: what a run's weights were, to read and to retrain from."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FILE_NAME = "loss_weights.yaml"


def write_weights(
    folder: Path, tasks: Mapping[str, Mapping[str, float]], *, method: str, settings: Mapping[str, Any], steps: int, warmup: int
) -> Path:
    """Write the file.

    Args:
        folder: where to; made if it is not there.
        tasks: task → statistic → value; NaN is written as null.
        method: the balancer's name.
        settings: its settings as plain values.
        steps: optimiser steps that the statistics are over.
        warmup: how many of them, from the first, ``mean_after_warmup`` leaves out.

    Returns:
        The file's path.
    """
    rows = {task: {name: None if math.isnan(v) else v for name, v in row.items()} for task, row in tasks.items()}
    content = {"method": method, "settings": dict(settings), "steps": steps, "warmup_steps": warmup, "tasks": rows}
    path = folder / FILE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    header = "# Loss weights of a training run. To train with their mean: FixedWeights.from_file(…) (GradNorm static).\n"
    path.write_text(header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def read_weights(path: str | Path, statistic: str) -> dict[str, float]:
    """Task → that statistic of its weight.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not hold what such a file holds; the message says what is missing.
    """

    def wrong(what: str) -> ValueError:
        return ValueError(
            f"{path} is not a {FILE_NAME} as a balancing callback writes it at the end of fit: {what}. "
            "Give the weights as a dict, FixedWeights({'task': weight, …}), or run the fit again."
        )

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise wrong(f"it cannot be read as YAML ({error})") from error
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, dict) or not tasks:
        raise wrong("it has no 'tasks'")
    lacking = [task for task, row in tasks.items() if not isinstance(row, dict) or row.get(statistic) is None]
    if lacking:
        raise wrong(f"no {statistic!r} weight for {', '.join(map(repr, lacking))}")
    return {task: row[statistic] for task, row in tasks.items()}
