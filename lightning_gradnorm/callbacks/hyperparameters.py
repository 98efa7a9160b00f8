"""Method, settings and held-out metrics among the run's hyperparameters."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.callbacks.lightning_api import LightningModule, Trainer, rank_zero_info, setting_of
from lightning_gradnorm.callbacks.telling import telling
from lightning_gradnorm.plain import flat_settings
from lightning_gradnorm.weights_file import FILE_NAME

_GROUP = "loss_balancing"
_telling = telling("The loss balancing could not be logged among the hyperparameters", f"The fit goes on; {FILE_NAME} has it.")


class Hyperparameters:
    """Logs the method and its settings with the run's own hyperparameters, before Lightning logs those.

    TensorBoard's HParams page takes from a run what it logs first: so all go together, and the metrics that its table is to
    have a column for with them. Which these are is known after the first validation; until then a TensorBoardLogger's are
    kept back. And of all runs it takes the columns from one: so there it is the method, the settings in one line, which every
    run has, and in columns of their own those alone that are not the method's usual ones. hparams.yaml has them all.
    """

    def __init__(self) -> None:
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {"held_out": dict(self.held_out)}  # loggers and the module's hyperparameters are of a fit under way

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.held_out: dict[str, float] = state.get("held_out", {})
        """Held-out metric → its value in the last validation."""
        self._all: dict[str, Any] = {}
        self._on_page: dict[str, Any] = {}
        self._resumed: dict[str, float] = {}
        self._waiting: list[Any] = []

    def go_on(self, held_out: Mapping[str, float]) -> None:
        """The run that the next fit goes on with had these held-out metrics at its last validation."""
        self.held_out = dict(held_out)
        self._resumed = dict(held_out)

    @_telling
    def log(self, trainer: Trainer, pl_module: LightningModule, balancer: LossBalancer) -> None:
        """Log them, on every rank. They are no part of the module, and so of no checkpoint.

        A logger that does not take them (MLflow's do not change within a run) says so, and the fit goes on.
        """
        self.held_out, self._resumed, self._waiting = self._resumed, {}, []
        owners = [
            owner for owner in (pl_module, setting_of(trainer, "datamodule")) if getattr(owner, "_log_hyperparams", False)
        ]
        own = {name: value for owner in owners for name, value in owner.hparams_initial.items() if name != "_class_path"}
        told = _unusual(balancer)
        ours = {"method": balancer.state_name, "settings": ", ".join(f"{k}={v}" for k, v in told.items()) or "default"}
        self._on_page = own | {f"{_GROUP}/{name}": value for name, value in (*ours.items(), *flat_settings(told).items())}
        self._all = self._on_page | {f"{_GROUP}/{name}": value for name, value in flat_settings(balancer.settings()).items()}
        loggers: list[Any] = trainer.loggers
        for logger in loggers:
            if _has_metrics(logger):
                logger._default_hp_metric = False  # with nothing to go with them, they go to hparams.yaml alone
                self._waiting.append(logger)
            self._log(logger, self._all)
        if not trainer.enable_validation:
            self.complete(trainer)

    @_telling
    def end_validation(self, trainer: Trainer) -> None:
        """A validation within training is over: its metrics are the held-out ones."""
        found = {} if trainer._results is None else trainer._results
        names = {name for result in found.values() for name in (result.meta.name,) if result.meta.logger}
        values = {
            name: float(value) for name, value in setting_of(trainer, "callback_metrics").items() if _loaderless(name) in names
        }
        self.held_out |= dict(sorted(values.items()))
        self.complete(trainer)

    @_telling
    def complete(self, trainer: Trainer) -> None:
        """Log what was kept back, with the metrics that there are."""
        waiting, self._waiting = self._waiting, []
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # where Lightning puts the validation's metrics
        metrics = {name: value for name, value in self.held_out.items() if math.isfinite(value)} or {"hp_metric": -1.0}
        for logger in waiting:
            logger._default_hp_metric = True
            self._log(logger, self._on_page, metrics=metrics, step=step)

    @staticmethod
    def _log(logger: Any, values: Mapping[str, Any], **metrics: Any) -> None:
        try:
            logger.log_hyperparams(dict(values), **metrics)
        except Exception as error:
            rank_zero_info(
                f"{type(logger).__name__} did not take the loss balancing's method and settings as hyperparameters: "
                f"{type(error).__name__}: {error} The fit goes on; {FILE_NAME} has them."
            )


def _loaderless(name: str) -> str:
    return name.partition("/dataloader_idx_")[0]


def _has_metrics(logger: Any) -> bool:
    """Whether its page of hyperparameters has columns for metrics; a user who turned them off logs metrics there himself."""
    return (
        getattr(logger, "_default_hp_metric", False) is True and "step" in inspect.signature(logger.log_hyperparams).parameters
    )


def _unusual(balancer: LossBalancer) -> dict[str, Any]:
    """The settings that are not those that the method has by default; all of them where it has no default."""
    try:
        usual = type(balancer)().settings()
    except Exception:  # of the user's own, one may ask for a file
        usual = {}
    return {
        name: value for name, value in balancer.settings().items() if name not in usual or not _are_equal(usual[name], value)
    }


def _are_equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # of arrays each number would be compared
        return False
