"""What the callback shows of a fit while it goes on, and leaves behind at its end, also of an interrupted one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.callbacks.hyperparameters import Hyperparameters
from lightning_gradnorm.callbacks.lightning_api import Trainer, rank_zero_info, rank_zero_warn, setting_of
from lightning_gradnorm.callbacks.pictures import Pictures
from lightning_gradnorm.callbacks.run_folders import run_folder
from lightning_gradnorm.callbacks.telling import telling
from lightning_gradnorm.folders import Folder
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.report.figure import FILE_NAME as FIGURE
from lightning_gradnorm.report.figure import Picture, can_draw, picture_of
from lightning_gradnorm.report.history import History
from lightning_gradnorm.report.kept import KeptCurves
from lightning_gradnorm.report.run import RunReport, with_ways
from lightning_gradnorm.report.summary import RunSummary
from lightning_gradnorm.report.tags import per_task_names
from lightning_gradnorm.weights_file import FILE_NAME as WEIGHTS


class Reporting:
    """Adds up the run, shows its figure, and writes table, file and figure. Nothing that goes wrong here ends a fit.

    Args:
        enabled: whether to write anything at the end.
        pictures: whether to show the figure while the fit goes on.
    """

    def __init__(self, enabled: bool, pictures: bool = True) -> None:
        self.enabled = enabled
        self.pictures: Pictures = Pictures(pictures)
        self.hyperparameters: Hyperparameters = Hyperparameters()
        self.summary: RunSummary = RunSummary()
        self._curves = KeptCurves()
        self._own_folders: set[str] = set()  # with files of this run in them, which may be replaced
        self._is_resumed = False

    def count_step(self) -> None:
        """One more optimiser step, measured or not."""
        self.summary.count_step()

    def add(self, applied: Tensor, measurement: Measurement, epoch: int, interval: int = 1) -> None:
        """Take one measured optimiser step, of so many."""
        self.summary.add(applied, measurement, epoch, interval)

    def keep(self, applied: Tensor, measurement: Measurement, diagnostics: Mapping[str, Tensor]) -> None:
        """Keep for the figure what the step that was counted last has to show; on the steps that are looked at.

        Args:
            applied: the weights that it applied, of ``measurement.tasks``, shape ``[T]``.
            measurement: what it measured.
            diagnostics: what the balancer's update computed of it, ``[T]`` each.
        """
        if not (self.enabled or self.pictures.enabled) or self._curves.skips_next():
            return
        vectors = {"loss_weight": applied, "task_loss": measurement.losses, **diagnostics}
        tags = [name for kind in vectors for name in per_task_names(kind, measurement.tasks)]
        values = torch.cat([vector.to(measurement.losses) for vector in vectors.values()])
        self._curves.add(self.summary.steps - 1, tags, values)

    def report(self, balancer: LossBalancer, history: History | None = None) -> RunReport:
        """The statistics so far.

        Args:
            balancer: the method.
            history: the curves that are kept, where these are at hand.
        """
        curves, summary = self._curves.history() if history is None else history, self.summary
        rows = with_ways(summary.rows(balancer.weights), curves)
        name = f"{balancer.state_name} (monitor)" if balancer.frozen else balancer.state_name
        settings = balancer.settings()
        held_out = self.hyperparameters.held_out
        return RunReport(
            name, rows, summary.steps, summary.warmup_steps, settings, measured=summary.measured, held_out=held_out
        )

    def show(self, trainer: Trainer, balancer: LossBalancer) -> None:
        """Send the figure of the run so far to the loggers that take images, if it is time to."""
        with telling("The figure of the fit so far could not be shown", "The fit goes on without any."):
            if self.pictures.is_due(trainer):
                self.pictures.draw_and_send(trainer, lambda: self._picture_so_far(balancer))
            return
        self.pictures.stop()

    def _picture_so_far(self, balancer: LossBalancer) -> Picture | None:
        history = self._curves.history()
        return picture_of(history, self.report(balancer, history).heading) if history.tasks else None

    def write(self, trainer: Trainer, balancer: LossBalancer, *, interrupted: bool = False) -> None:
        """Table to the console; file and figure into the folder of each logger's run. Says where, or why nothing is written.

        Args:
            trainer: whose fit it was.
            balancer: the method.
            interrupted: whether an exception ended it.
        """
        if not self.enabled or not trainer.is_global_zero:
            return
        which = "interrupted fit" if interrupted else "fit"
        with telling(f"The report of the {which} could not be written", "callback.report has what there is of it."):
            history = self._curves.history()
            report = self.report(balancer, history)
            if setting_of(trainer, "fast_dev_run"):
                rank_zero_info("There is no report of this fit's loss weights: fast_dev_run leaves nothing behind.")
            elif not report.rows:
                rank_zero_info("There is no report of this fit's loss weights: no optimiser step was measured.")
            else:
                with telling(f"The table of the {which} could not be printed", "callback.report has its rows."):
                    report.print()
                self._write_files(trainer, report, history, which)

    def _write_files(self, trainer: Trainer, report: RunReport, history: History, which: str) -> None:
        figure = self._figure(report, history, which)
        with telling(f"The figure of the {which} could not be shown", "Its files are written without."):
            if figure is not None and self.pictures.enabled and self.pictures.has_takers(trainer):
                self.pictures.send(trainer, figure)
        folders: set[str] = set()
        for logger in trainer.loggers:
            place = f"the folder of {type(logger).__name__}'s run"
            try:
                folder = run_folder(logger)
                if folder is not None and folder not in folders:
                    place = folder
                    folders.add(place)
                    self._write_into(folder, report, figure)
            except Exception as error:
                folders.add(place)
                rank_zero_warn(
                    f"The report of the {which} could not be written: {type(error).__name__}: {error}. It was to go into "
                    f"{place}. Make that a folder that can be written; callback.report.write('another folder') writes the "
                    "weights now, for FixedWeights.from_file to read."
                )
        if not folders:
            loggers = ", ".join(type(logger).__name__ for logger in trainer.loggers)
            why = f"no folder is known of {loggers}" if loggers else "the Trainer has no logger"
            rank_zero_info(
                f"{WEIGHTS} and the figure are not written: {why}. callback.report.write('folder') writes the weights."
            )

    def _write_into(self, folder: str, report: RunReport, figure: Picture | None) -> None:
        place = Folder(folder)
        if not (self._is_resumed or folder in self._own_folders):
            for name in (WEIGHTS, FIGURE):
                place.set_aside(name)
        self._own_folders.add(folder)
        rank_zero_info(f"Loss weights written to {report.write(folder)}")
        if figure is not None:
            rank_zero_info(f"Figure written to {place.write(FIGURE, figure.png)}")

    def _figure(self, report: RunReport, history: History, which: str) -> Picture | None:
        """The figure, or a word why there is none."""
        if can_draw() and history.tasks:
            with telling(f"The figure of the {which} could not be drawn", "The rest of its report is written without."):
                return picture_of(history, report.heading)
        elif not can_draw():
            rank_zero_info("For a figure of the run: pip install matplotlib, then lightning-gradnorm report LOGDIR.")
        else:
            rank_zero_info("No figure is drawn: it shows the steps that were logged and every 50th, and this run had neither.")
        return None

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings, lists and dicts."""
        held_out = dict(self.hyperparameters.held_out)
        return {**self.summary.state_dict(), "curves": self._curves.state_dict(), "held_out": held_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``: the run goes on, and its files are this one's to replace."""
        self.summary.load_state_dict(state)
        if "curves" in state:  # not in those of 0.1
            self._curves.load_state_dict(state["curves"])
        self.hyperparameters.go_on(state.get("held_out", {}))
        self._is_resumed = True
