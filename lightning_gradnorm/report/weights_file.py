"""``loss_weights.yaml``: what a run's weights were, to read and to retrain from."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_gradnorm.report.summary import TaskSummary

FILE_NAME = "loss_weights.yaml"


def write_weights(folder: Path, rows: Sequence[TaskSummary], *, method: str, settings: Mapping[str, Any], steps: int) -> Path:
    """Write the file.

    Args:
        folder: where to; made if it is not there.
        rows: one per task.
        method: the balancer's name.
        settings: its settings as plain values.
        steps: optimiser steps that the statistics are over.

    Returns:
        The file's path.
    """
    tasks = {
        row.task: {
            name: None if math.isnan(value) else value
            for name, value in (("final", row.final), ("mean", row.mean), ("std", row.std), ("loss_ratio", row.loss_ratio))
        }
        for row in rows
    }
    content = {"method": method, "settings": dict(settings), "steps": steps, "tasks": tasks}
    path = folder / FILE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    header = "# Loss weights of a training run. 'mean' is over all steps: train with it as fixed weights (GradNorm static).\n"
    path.write_text(header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
