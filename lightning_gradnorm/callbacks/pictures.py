"""The figure of the run so far, on the pages of the loggers that take images, while training goes on."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from lightning_gradnorm.callbacks.lightning_api import Trainer, rank_zero_warn, setting_of
from lightning_gradnorm.report.figure import Picture, can_draw

TAG = "loss_balancing"
_SHARE = 0.004  # of the fit's time, that drawing may take
_GROWTH = 1.25  # from one picture's time to the next one's: some twenty in a fit of any length
_FIRST, _COLD = 0.5, 1.5  # seconds that the first one is taken to need, and where matplotlib has to be imported for it


class Pictures:
    """Says when a picture is due, and sends it. Nothing here but the clock decides, and only the first process asks it.

    Args:
        enabled: whether any is drawn while training.
        clock: seconds, of which differences count.

    Attributes:
        count: pictures that were drawn in this fit, before its end.
        spent: seconds that they took.
    """

    def __init__(self, enabled: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self.enabled = enabled
        self._clock = clock
        self._refused: set[int] = set()
        self.start()

    def start(self) -> None:
        """A fit begins."""
        self._began, self._last, self._needed = self._clock(), 0.0, 0.0
        self.count: int = 0
        self.spent: float = 0.0
        self._refused.clear()
        self._is_stopped = False

    def stop(self) -> None:
        """Something went wrong: no more in this fit."""
        self._is_stopped = True

    def is_due(self, trainer: Trainer) -> bool:
        """Whether there is somebody to show a picture to, and time enough has passed to afford it."""
        if not self.enabled or self._is_stopped or not trainer.is_global_zero:
            return False
        elapsed = self._clock() - self._began
        needs = self._needed or (_FIRST if "matplotlib.figure" in sys.modules else _COLD)
        if elapsed * _SHARE < self.spent + needs or elapsed < _GROWTH * self._last:
            return False
        return can_draw() and self.has_takers(trainer)

    def has_takers(self, trainer: Trainer) -> bool:
        """Whether a logger takes images; in a trial run none is sent, nor after a failure."""
        return not self._is_stopped and not setting_of(trainer, "fast_dev_run") and any(map(self._taker, trainer.loggers))

    def draw_and_send(self, trainer: Trainer, draw: Callable[[], Picture | None]) -> None:
        """Send what ``draw`` gives, and take the time."""
        before = self._clock()
        picture = draw()
        if picture is not None:
            self.send(trainer, picture)
        now = self._clock()
        self._last, self._needed = now - self._began, now - before
        self.count += 1
        self.spent += self._needed

    def send(self, trainer: Trainer, picture: Picture) -> None:
        """To every logger that takes images; one that fails to is asked no more."""
        pixels = torch.frombuffer(bytearray(picture.pixels), dtype=torch.uint8).reshape(picture.shape).numpy()
        for logger in trainer.loggers:
            take = self._taker(logger)
            if take is None:
                continue
            try:
                take(pixels, trainer.global_step)
            except Exception as error:
                self._refused.add(id(logger))
                rank_zero_warn(
                    f"{type(logger).__name__} did not take the figure of the loss weights: {type(error).__name__}: {error} "
                    "The fit goes on, and no more are sent there; pictures=False sends none."
                )

    def _taker(self, logger: Any) -> Callable[[Any, int], None] | None:
        return None if id(logger) in self._refused else _taker_of(logger)


def _taker_of(logger: Any) -> Callable[[Any, int], None] | None:
    """What a logger has to log an image with, by its own interface: (pixels, step) → nothing; ``None`` where it has nothing.

    Loggers with a ``log_image`` of their own, as W&B's; TensorBoard's writer; MLflow's client.
    """
    if hasattr(logger, "log_image"):
        return lambda pixels, step: logger.log_image(key=TAG, images=[pixels], step=step)
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):
        return lambda pixels, step: experiment.add_image(TAG, pixels, step, dataformats="HWC")
    if hasattr(experiment, "log_image") and hasattr(logger, "run_id"):
        return lambda pixels, step: experiment.log_image(logger.run_id, pixels, key=TAG, step=step)
    return None
