"""What the callback leaves behind at the end of a fit, also of an interrupted one, and among the run's hyperparameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.callbacks.lightning_api import (
    LightningModule,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
    setting_of,
)
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.report.figure import can_draw
from lightning_gradnorm.report.history import read_history
from lightning_gradnorm.report.run import RunReport, draw
from lightning_gradnorm.report.summary import RunSummary

_LOGGED = "_hparams_initial", "_log_hyperparams"  # what Lightning logs at the start of a fit


class Reporting:
    """Adds up the run, and writes table, file and figure.

    Args:
        enabled: whether to write anything at the end.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.summary = RunSummary()
        self._hidden: dict[str, Any] | None = None  # what was the module's own, while ours are lent to it

    def add(self, applied: Tensor, measurement: Measurement, epoch: int) -> None:
        """Take one optimiser step."""
        self.summary.add(applied, measurement, epoch)

    def report(self, balancer: LossBalancer) -> RunReport:
        """The statistics so far."""
        rows, summary = self.summary.rows(balancer.weights), self.summary
        name = f"{balancer.state_name} (monitor)" if balancer.frozen else balancer.state_name
        return RunReport(name, rows, summary.steps, summary.warmup_steps, balancer.settings())

    def write(self, trainer: Trainer, balancer: LossBalancer, *, folder: str | None) -> None:
        """Table to the console; file and figure into the log folder. Does nothing where there is nothing to tell.

        Args:
            trainer: whose fit it was.
            balancer: the method.
            folder: the log folder, which all ranks have asked for together.
        """
        if not self.enabled or setting_of(trainer, "fast_dev_run") or not trainer.is_global_zero:
            return
        report = self.report(balancer)
        if not report.rows:
            return
        report.print()
        if not trainer.loggers or folder is None:
            return
        rank_zero_info(f"Loss weights written to {report.write(Path(folder))}")
        self._draw(trainer, report, Path(folder))

    @staticmethod
    def _draw(trainer: Trainer, report: RunReport, folder: Path) -> None:
        if not can_draw():
            rank_zero_info("For a figure of the run: pip install matplotlib, then lightning-gradnorm report LOGDIR.")
            return
        for logger in trainer.loggers:
            logger.save()
            flush = getattr(getattr(logger, "experiment", None), "flush", None)
            if flush is not None:
                flush()
        try:
            history = read_history(folder)
        except (FileNotFoundError, ValueError):
            return  # a logger whose files are not ours to read, or nothing was logged
        rank_zero_info(f"Figure written to {draw(history, folder, report.heading)}")

    def write_what_there_is(self, trainer: Trainer, balancer: LossBalancer) -> None:
        """After an exception: as ``write``, and never in its way."""
        try:
            self.write(trainer, balancer, folder=trainer.log_dir if trainer.world_size == 1 else _folder_here(trainer))
        except Exception as error:
            rank_zero_warn(f"The report of the interrupted fit could not be written: {error}")

    def add_hyperparameters(self, pl_module: LightningModule, balancer: LossBalancer) -> None:
        """Have Lightning log the method and its settings with the module's own hyperparameters.

        They are lent to the module until ``take_back``, so that they stay out of its checkpoints.
        """
        self.take_back(pl_module)
        own = dict(pl_module.hparams_initial) if pl_module._log_hyperparams else {}
        settings = {f"loss_balancing/{name}": value for name, value in _flat(balancer.settings())}
        self._hidden = {name: vars(pl_module)[name] for name in _LOGGED if name in vars(pl_module)}
        vars(pl_module)["_hparams_initial"] = type(pl_module.hparams_initial)(
            own | {"loss_balancing/method": balancer.state_name} | settings
        )
        vars(pl_module)["_log_hyperparams"] = True

    def take_back(self, pl_module: LightningModule) -> None:
        """The module is as it was."""
        if self._hidden is not None:
            for name in _LOGGED:
                vars(pl_module).pop(name, None)
            vars(pl_module).update(self._hidden)
            self._hidden = None


def _folder_here(trainer: Trainer) -> str | None:
    """The log folder without asking the other ranks, which may be gone."""
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None) or logger.save_dir
        if folder is not None:
            return str(folder)
    return None


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Plain values, with what is nested spelled out: ``priorities/depth``."""
    flat: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat += [(f"{name}/{key}", inner) for key, inner in _flat(value)]
        else:
            flat.append((name, value if isinstance(value, str | int | float | bool) else str(value)))
    return flat
