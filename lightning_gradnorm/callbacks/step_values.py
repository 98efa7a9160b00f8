"""What a step logged, out of the Trainer's way until the next step that goes to the loggers."""

from collections.abc import Iterable
from typing import Any

from lightning_gradnorm.callbacks.lightning_api import Trainer, setting_of


class StepValues:
    """Puts aside what was logged in ``on_train_batch_end``, and brings it back.

    After every batch a Trainer goes through all that its epoch has logged so far, which takes longer than the rest of a
    balanced step, and with a thousand tasks longer than the network's. ``callback_metrics`` keeps the values meanwhile, and a
    step that goes to the loggers shows them again, as without this.
    """

    def __init__(self) -> None:
        self._keys: tuple[str, ...] = ()  # of what is among the Trainer's results
        self._aside: dict[str, Any] = {}

    def start_epoch(self) -> None:
        """The Trainer has forgotten what was logged before."""
        self._keys, self._aside = (), {}

    def logged(self, tags: Iterable[str]) -> None:
        """These have just been logged."""
        self._keys = tuple(f"on_train_batch_end.{tag}" for tag in tags)

    def put_aside(self, trainer: Trainer) -> None:
        """A batch begins."""
        if not self._keys:
            return
        results = trainer._results
        if results is not None:
            self._aside = {key: results.pop(key) for key in self._keys if key in results}
            self._keys = ()

    def bring_back(self, trainer: Trainer) -> None:
        """A batch is over, and before anything is logged of it: where its values go to the loggers, so do the last ones."""
        if self._aside and _goes_to_loggers(trainer):
            results = trainer._results
            assert results is not None, "there are results in every loop but that of predict"
            results.update({key: value for key, value in self._aside.items() if key not in results})
            self._keys, self._aside = tuple(self._aside), {}


def _goes_to_loggers(trainer: Trainer) -> bool:
    """What Lightning's own ``should_update_logs`` will say, at a hundredth of its price."""
    every = setting_of(trainer, "log_every_n_steps")
    number = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
    return bool(every) and (number % every == 0 or trainer.should_stop or bool(setting_of(trainer, "fast_dev_run")))
