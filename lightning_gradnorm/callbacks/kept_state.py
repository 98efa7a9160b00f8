"""What a callback keeps beyond a fit: in checkpoints, in copies, and from processes that a launcher makes for the fit."""

from collections.abc import Callable
from typing import Any, ClassVar

from lightning_gradnorm.callbacks.evaluation import EvaluationHooks
from lightning_gradnorm.callbacks.homecoming import Homecoming, mark_of
from lightning_gradnorm.callbacks.lightning_api import LightningModule, Trainer
from lightning_gradnorm.callbacks.log import BalancingLog
from lightning_gradnorm.callbacks.reporting import Reporting
from lightning_gradnorm.session import BalancingSession
from lightning_gradnorm.shared_layer import SharedLayer
from lightning_gradnorm.term_weight import without_weights


class KeptState(EvaluationHooks):
    """The state of session, report and log, on its ways out and home."""

    _log: BalancingLog
    _reporting: Reporting
    _homecoming: Homecoming
    _is_set_up: bool
    _last_mark: list[float] | None  # of the module of the last fit, where that was in a process of its own
    _last_module: Callable[[], Any] | None  # of the fit that the state is of
    # Not for a copy: bound methods of the module that the Trainer puts here, and what belongs to a fit under way.
    _of_a_fit: ClassVar[frozenset[str]] = frozenset(
        {
            "log",
            "log_dict",
            "_stage",
            "_news",
            "_concerns",
            "_watch",
            "_evaluated",
            "_last_global_step",
            "_last_module",
            "_link",
            "_door",
        }
    )

    def _rest(self) -> None:
        """No fit under way, and none known of."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self._of_a_fit} | {"_is_set_up": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._rest()

    @property
    def session(self) -> BalancingSession:
        """The core, which drives balancer, shared layer and engine."""
        self._come_home()
        return self._session

    @property
    def state_key(self) -> str:
        """Of the method, not of this class: a named subclass and the general callback find each other's state."""
        key = f"LossBalancing[{self._session.balancer.state_name}]"
        # Until setup, a Trainer asks for keys only to refuse two equal ones, without a word of the way out; setup says it.
        return key if self._is_set_up else f"{key} of {id(self)}"

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return self.session.state_dict() | {
            "summary": self._reporting.state_dict(),
            "log": self._log.state_dict(),
            "epoch": self._epochs.state_dict(),
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for key in ("hyper_parameters", "datamodule_hyper_parameters"):
            if key in checkpoint:
                checkpoint[key] = without_weights(checkpoint[key])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage not in (None, "fit") and self.session.balancer.tasks:
            return  # testing a checkpoint does not touch the live weights
        self._load(state_dict)
        self._news = ""
        if self._stage is None:
            self._last_module = self._last_mark = None  # the next fit goes on from here, of whatever module it is

    def _load(self, state: dict[str, Any]) -> None:
        self._session.load_state_dict(state)
        self._reporting.load_state_dict(state["summary"])
        self._log.load_state_dict(state["log"])
        if "epoch" in state:  # not in those of 0.1
            self._epochs.load_state_dict(state["epoch"])

    # -- processes that a launcher makes for the fit -----------------------------------------------------------------

    def _for_home(self, pl_module: LightningModule) -> dict[str, Any]:
        layer = self.session.shared
        return self.state_dict() | {
            "set_up": self._is_set_up,
            "mark": mark_of(pl_module),
            "engine_used": self.session.reading.engine.engine_used,
            "layer": None if layer is None else {"names": list(layer.names), "reason": layer.reason},
        }

    def _come_home(self) -> None:
        """Take what a worker process has learnt, where there is news."""
        found = self._homecoming.receive()
        if found is None:
            return
        self._load(found)
        self._is_set_up, self._last_module, self._last_mark = found["set_up"], None, found["mark"]
        reading, layer = self._session.reading, found["layer"]
        reading.engine.engine_used = found["engine_used"]
        reading.layer = None if layer is None else SharedLayer(tuple(layer["names"]), (), layer["reason"])
