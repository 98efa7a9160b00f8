"""What the callback sends to the loggers, and when."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_gradnorm.callbacks.last_update import LastUpdate
from lightning_gradnorm.callbacks.lightning_api import LightningModule, Trainer, rank_zero_only, setting_of
from lightning_gradnorm.callbacks.step_values import StepValues
from lightning_gradnorm.report.tags import UNWEIGHTED, custom_scalars_layout, per_pair, per_pair_names, per_task, totals
from lightning_gradnorm.session import BalancedStep

_MOST_PAIRS = 6  # gradient cosines are logged without asking up to here: four tasks
_MOST_ON_THE_BAR = 4  # weights that the progress bar has room for
_DIGITS_ON_THE_BAR = 2  # of each, so that it keeps its length
_LOOK_EVERY = 50  # optimiser steps after which a step is looked at, whatever is logged
_RARE = 8  # where one step in so many is measured, its cosines are kept for the next step that is written


class BalancingLog:
    """Logs one optimiser step on the steps that ``log_every_n_steps`` asks for.

    Args:
        cosines: whether to log the cosines between the tasks' gradients; ``None`` for up to four tasks.
        progress_bar: whether the progress bar shows the weights.

    Attributes:
        last: what the weights' updates computed last: a step that is written need not be a measured one.
        shown: tag → what was logged last.
    """

    def __init__(self, cosines: bool | None, progress_bar: bool) -> None:
        self._cosines, self._progress_bar = cosines, progress_bar
        # Lightning repeats in a later step of the epoch what an earlier one logged; so do we, across epochs and checkpoints.
        self.start_anew()
        self._is_monitored = False
        self._has_charts = False
        self._values = StepValues()

    def start_anew(self) -> None:
        """Nothing is known of the run to come."""
        self.last: LastUpdate = LastUpdate()
        self.shown: dict[str, Tensor] = {}
        self._pairs: dict[str, Tensor] = {}  # gradient cosines, the last that were measured

    def start(self, trainer: Trainer) -> None:
        """Training begins: see who reads the step's value of ``total_loss/unweighted`` on steps that are not written."""
        self._has_charts = False
        schedulers = (c for c in trainer.lr_scheduler_configs if c.reduce_on_plateau and c.interval == "step")
        savers = (c for c in setting_of(trainer, "callbacks") if _saves_in_mid_epoch(c))
        self._is_monitored = any(reader.monitor == UNWEIGHTED for reader in (*schedulers, *savers))

    def start_epoch(self) -> None:
        """An epoch of training begins, or goes on."""
        self._values.start_epoch()

    def begin_batch(self, trainer: Trainer) -> None:
        """A batch of training begins."""
        self._values.put_aside(trainer)

    def end_batch(self, trainer: Trainer) -> None:
        """A batch of training is over, and ``write`` may follow."""
        self._values.bring_back(trainer)

    def is_wanted(self, trainer: Trainer, number: int) -> bool:
        """Whether the losses of the step of this number, from 1, go to anyone: they are written, looked at, or monitored."""
        return self.is_looked_at(trainer, number) or (self._is_monitored and not trainer.barebones)

    def is_looked_at(self, trainer: Trainer, number: int) -> bool:
        """Whether this step is kept for the figure and gives reason for concern: also where nothing is written."""
        return self.is_written(trainer, number) or not (trainer.barebones or number % _LOOK_EVERY)

    def may_ask_for_cosines(self, trainer: Trainer, interval: int, number: int) -> bool:
        """Whether the cosines of the step of this number, one of ``interval`` that is measured, may go anywhere."""
        if self._cosines is False or trainer.barebones:
            return False
        return interval >= _RARE or self.is_written(trainer, number)

    def is_written(self, trainer: Trainer, number: int) -> bool:
        """Whether what is logged on this step goes anywhere; logging costs more than measuring."""
        if trainer.barebones:
            return False
        if self._writes_all(trainer):
            return True
        every = setting_of(trainer, "log_every_n_steps")
        return bool(every) and number % every == 0

    def _writes_all(self, trainer: Trainer) -> bool:
        return self._progress_bar or len(trainer.optimizers) != 1  # with several, global_step counts them all

    def take(self, trainer: Trainer, step: BalancedStep, diagnostics: Mapping[str, Tensor]) -> None:
        """Take one measured step: it is shown until the next, on whichever steps are written.

        Args:
            trainer: says which these are.
            step: what it was.
            diagnostics: what the balancer's update computed of it, ``[T]`` each.
        """
        tasks = step.measurement.tasks
        if diagnostics:
            self.last.take(tasks, diagnostics)
        if self._wants_cosines(tasks) and self.may_ask_for_cosines(trainer, step.interval, trainer.global_step):
            cosines = step.window.cosines()
            self._pairs = {} if cosines is None else per_pair("grad_cosine", tasks, cosines)

    def _wants_cosines(self, tasks: Sequence[str]) -> bool:
        pairs = len(tasks) * (len(tasks) - 1) // 2
        return pairs > 0 and (pairs <= _MOST_PAIRS if self._cosines is None else self._cosines)

    def write(self, trainer: Trainer, pl_module: LightningModule, step: BalancedStep) -> None:
        """Log one step: all of it where it is written, else its total where that is monitored.

        Args:
            trainer: says which.
            pl_module: logs.
            step: what it was.
        """
        tasks, losses, applied = step.measurement.tasks, step.measurement.losses, step.applied
        if not self.is_written(trainer, trainer.global_step):
            if self._is_monitored:
                pl_module.log(UNWEIGHTED, losses.sum(), on_step=True, on_epoch=False)
            return
        weights = per_task("loss_weight", tasks, applied)
        values = weights | per_task("task_loss", tasks, losses) | dict(totals(applied.to(losses), losses))
        known = [task for task in tasks if self.last.has(task)]
        for tag, vector in self.last.of(known).items():
            values |= per_task(tag, known, vector)
        self.shown |= values | self._pairs
        pl_module.log_dict(dict(self.shown), on_step=True, on_epoch=False)
        if not self._has_charts:
            self._has_charts = True
            cosines = per_pair_names("grad_cosine", tasks) if self._wants_cosines(tasks) else ()
            lay_out_charts(trainer, {*self.shown, *cosines})
        if not self._writes_all(trainer):
            self._values.logged(tag for tag in self.shown if tag != UNWEIGHTED)  # which may be monitored
        if self._progress_bar:
            pl_module.log_dict(_on_the_bar(weights), logger=False, prog_bar=True)

    def state_dict(self) -> dict[str, Any]:
        """What was logged last, so that a resumed run goes on with it."""
        return {tag: value.clone() for tag, value in self.shown.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from ``state_dict``."""
        self.start_anew()
        self.shown = dict(state)


def _saves_in_mid_epoch(callback: Any) -> bool:
    """As ModelCheckpoint does with ``every_n_train_steps`` or ``train_time_interval``."""
    settings = "_every_n_train_steps", "_train_time_interval"
    return hasattr(callback, "monitor") and any(getattr(callback, name, None) for name in settings)


def _on_the_bar(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """``w/<task>`` → its weight to two digits; of more than four tasks the smallest and the largest."""
    values = {tag.partition("/")[2]: float(f"{weight:.{_DIGITS_ON_THE_BAR}g}") for tag, weight in weights.items()}
    if len(values) > _MOST_ON_THE_BAR:
        values = {"min": min(values.values()), "max": max(values.values())}
    return {f"w/{name}": value for name, value in values.items()}


@rank_zero_only
def lay_out_charts(trainer: Trainer, tags: Collection[str]) -> None:
    """One chart with all tasks for each quantity that is logged, on TensorBoard's Custom Scalars page."""
    for logger in trainer.loggers:
        add_layout = getattr(getattr(logger, "experiment", None), "add_custom_scalars", None)
        if add_layout is not None:
            add_layout(custom_scalars_layout(tags))
