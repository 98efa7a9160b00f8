"""Runs as their log folders tell of them: which method, which settings, what came of it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_gradnorm.folders import Folder
from lightning_gradnorm.plain import flat_settings
from lightning_gradnorm.report.history import LOGS, History, read_history
from lightning_gradnorm.weights_file import FILE_NAME, read_file

_HPARAMS = "hparams.yaml"  # which Lightning's own loggers write
_OURS = "loss_balancing/"
_REPEAT = re.compile(r"(^|[/_-]*)(seed|version|run|fold|repeat)?[_-]?\d+$", re.IGNORECASE)
PLAIN = "plain sum"


class RecordedRun(NamedTuple):
    """One run.

    Attributes:
        name: its folder, relative to the one that was asked for.
        method: the balancer's name; of a run without one what its folder is called.
        settings: its hyperparameters, the method's and the module's.
        history: its curves; empty where there are none of ours.
        held_out: metric → its last value.
    """

    name: str
    method: str
    settings: dict[str, Any]
    history: History
    held_out: dict[str, float]


def folders_of_runs(folder: str | Path) -> list[str]:
    """Folders below this one, or this one itself as ``"."``, in which a run left logs or weights; in their natural order."""
    found = {path.rpartition("/")[0] or "." for path in Folder(folder).find(*LOGS, FILE_NAME, below=True)}
    return sorted(found, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)])


def read_runs(folder: str | Path, names: Sequence[str]) -> tuple[list[RecordedRun], list[str]]:
    """The runs in these folders, and a line for each that cannot be read."""
    runs, notes = [], []
    for name in names:
        place = Folder(folder).path(name)
        try:
            runs.append(_read(name, place))
        except (OSError, ValueError) as error:
            notes.append(f"Left out: {name}. {error}")
    return runs, notes


def groups_of(runs: Sequence[RecordedRun]) -> dict[str, list[RecordedRun]]:
    """Label → the runs that differ in their seed alone: the method's name, with what runs of this method differ in."""
    groups: dict[str, list[RecordedRun]] = {}
    for run in runs:
        alike = [other.settings for other in runs if other.method == run.method]
        telling = {
            name.removeprefix(_OURS): value
            for name, value in run.settings.items()
            if any(other.get(name) != value for other in alike) and not _is_seed(name)
        }
        label = ", ".join([run.method, *(f"{name}={value}" for name, value in sorted(telling.items()))])
        groups.setdefault(label, []).append(run)
    return groups


def _is_seed(name: str) -> bool:
    return "seed" in name.lower() or name == f"{_OURS}settings"  # the settings in one line


def _read(name: str, place: str | Path) -> RecordedRun:
    folder = Folder(place)
    written = read_file(folder.path(FILE_NAME)) if folder.has(FILE_NAME) else {}
    try:
        history = read_history(place, needs_weights=False)
    except FileNotFoundError:  # as W&B's and MLflow's folders, which hold no curves that can be read here
        history = History({})
    hyperparameters = _hyperparameters(folder)
    method = str(hyperparameters.pop(f"{_OURS}method", "") or written.get("method", ""))
    settings = {f"{_OURS}{key}": value for key, value in flat_settings(written.get("settings") or {}).items()} | hyperparameters
    held_out = dict(sorted({**history.held_out, **(written.get("held_out") or {})}.items()))
    return RecordedRun(name, method or _label(name), settings, history, held_out)


def _hyperparameters(folder: Folder) -> dict[str, Any]:
    """What is plain in the run's hparams.yaml."""
    if not folder.has(_HPARAMS):
        return {}
    try:
        content = yaml.safe_load(folder.read(_HPARAMS).decode())
    except (yaml.YAMLError, UnicodeDecodeError):  # objects of the user's own
        return {}
    return {str(name): value for name, value in content.items()} if isinstance(content, dict) else {}


def _label(name: str) -> str:
    label = _REPEAT.sub("", name).strip("/._-")
    return PLAIN if label in ("", "lightning_logs") else label
