"""The way home for what a callback learnt in a process that a launcher made for the fit, as ``ddp_spawn`` and notebooks do."""

import multiprocessing
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import torch

from lightning_gradnorm.callbacks.lightning_api import Trainer


class Homecoming:
    """Leaves the state in a file for the process that launched this one.

    Lightning brings parameters and metrics back from its worker processes, and nothing of a callback. The file's name is known
    to this object, and to those that a launcher makes of it, forked or spawned; any other copy has a name of its own.
    """

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex
        self._tidy()

    def _tidy(self) -> None:
        weakref.finalize(self, _remove, self._path(os.getpid()), os.getpid())

    def _path(self, home: int) -> Path:
        return Path(tempfile.gettempdir()) / f"lightning-gradnorm-{self._name}-{home}.pt"

    def send(self, trainer: Trainer, state: Callable[[], dict[str, Any]]) -> None:
        """From the first worker of a launcher, at the end of its fit; elsewhere nothing.

        Args:
            trainer: whose fit it was.
            state: gives what is to be brought home: plain tensors, numbers, strings, lists and dicts.
        """
        parent = multiprocessing.parent_process()
        launched = "MultiProcessing" in type(trainer.strategy.launcher).__name__
        if not launched or parent is None or parent.pid is None or not trainer.is_global_zero:
            return
        path = self._path(parent.pid)
        partial = path.with_suffix(".part")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            torch.save(state(), file)
        partial.replace(path)

    def receive(self) -> dict[str, Any] | None:
        """What a worker has left here since the last time."""
        path = self._path(os.getpid())
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        path.unlink()
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {"_name": self._name if get_spawning_popen() is not None else uuid.uuid4().hex}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._tidy()


def _remove(path: Path, home: int) -> None:
    if os.getpid() == home:
        path.unlink(missing_ok=True)


def mark_of(module: Any) -> list[float]:
    """Numbers by which a module is known again in another process: sums of its first and last parameters."""
    parameters = list(module.parameters())
    return [float(p.detach().cpu().double().abs().sum()) for p in (*parameters[:4], *parameters[-4:])]
