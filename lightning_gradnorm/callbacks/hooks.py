"""What the Trainer's hooks are to a session: where a run, a batch, a backward and an optimiser's step begin and end."""

import weakref
from collections.abc import Callable
from contextvars import Token
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gradnorm.callbacks.concerns import Concerns
from lightning_gradnorm.callbacks.epoch_log import EpochLog
from lightning_gradnorm.callbacks.homecoming import Homecoming, mark_of
from lightning_gradnorm.callbacks.lightning_api import (
    Callback,
    LightningModule,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
    setting_of,
)
from lightning_gradnorm.callbacks.log import BalancingLog, lay_out_charts
from lightning_gradnorm.callbacks.loop_watch import LoopWatch
from lightning_gradnorm.callbacks.refusals import check_alone, check_module, check_strategy
from lightning_gradnorm.callbacks.reporting import Reporting
from lightning_gradnorm.door import close_door, open_door
from lightning_gradnorm.mixin import shared_layer_of
from lightning_gradnorm.session import BalancingSession, Loop, RankAgreement, TotalLink


class TrainerHooks(Callback):
    """Maps the Trainer's hooks to a ``BalancingSession``, and logs."""

    _session: BalancingSession
    _log: BalancingLog
    _epochs: EpochLog
    _reporting: Reporting
    _homecoming: Homecoming
    _untested_strategies: bool
    _shared_layer: list[str]  # names that win over the module's
    _is_set_up: bool
    _last_mark: list[float] | None  # of the module of the last fit, where that was in a process of its own
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
        self._stage: str | None = None
        self._last_global_step = 0
        self._last_module: Callable[[], Any] | None = None  # of the fit that the state is of
        self._link: TotalLink | None = None
        self._door: Token[Any] | None = None  # while it is open
        self._begin()

    def _begin(self) -> None:
        self._news = ""  # said when training starts, unless a checkpoint has made it untrue by then
        self._evaluated: list[dict[str, Tensor]] = []  # the losses of the evaluation batch under way
        self._concerns = Concerns()
        self._watch = LoopWatch(self._session, type(self).__name__)

    def _for_home(self, pl_module: LightningModule) -> dict[str, Any]:
        """The state, and what else a process that launched this one wants to know."""
        raise NotImplementedError

    # -- life of a fit ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage, self._is_set_up = stage, True
        name = type(self).__name__
        check_module(pl_module)
        check_strategy(setting_of(trainer, "strategy"), name, untested=self._untested_strategies)
        check_alone([callback for callback in setting_of(trainer, "callbacks") if isinstance(callback, TrainerHooks)])
        self._link = TotalLink(self._session.total)
        vars(pl_module)["_loss_balancing"] = self._link
        if stage == "fit":
            self._begin()
            self._epochs.reset()
            self._go_on_or_start_anew(pl_module)

    def _go_on_or_start_anew(self, pl_module: LightningModule) -> None:
        last, self._last_module = self._last_module, weakref.ref(pl_module)
        mark, self._last_mark = self._last_mark, None
        steps = self._session.balancer.steps
        if not steps:
            return
        if last() is pl_module if last is not None else mark in (None, mark_of(pl_module)):
            self._news = f"{type(self).__name__} goes on with what it learnt in {steps} steps; its reset() forgets that."
            return
        self._session.start_anew()
        self._reporting = Reporting(self._reporting.enabled)
        self._log.shown = {}
        self._news = (
            f"{type(self).__name__} starts anew, as this is another module than the one of its last fit. To go on with what it "
            "learnt there, fit the same module object, pass ckpt_path, or load this one's state_dict() into a new callback."
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)
        if stage == "fit":
            self._homecoming.send(trainer, lambda: self._for_home(pl_module))
        self._stage = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        fitting, self._stage = self._stage == "fit", None
        self._let_go(pl_module)
        if fitting:
            self._reporting.write(trainer, self._session.balancer, interrupted=True)
            self._homecoming.send(trainer, lambda: self._for_home(pl_module))

    def _let_go(self, pl_module: LightningModule) -> None:
        self._close_door()
        self._link = None
        self._session.close()
        vars(pl_module).pop("_loss_balancing", None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reporting.log_hyperparameters(trainer, pl_module, self._session.balancer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._news:
            rank_zero_info(self._news)
        self._last_global_step = trainer.global_step
        callbacks = setting_of(trainer, "callbacks")
        self._session.open(
            Loop(
                network=pl_module,
                shared_layer=self._shared_layer.copy if self._shared_layer else lambda: shared_layer_of(pl_module),
                giver=f"{type(self).__name__}(shared_layer=…)" if self._shared_layer else "shared_layer()",
                tell=self._tell,
                inform=rank_zero_info,
                name=type(self).__name__,
                one_total=pl_module.automatic_optimization,
                may_thaw=any(hasattr(callback, "freeze_before_training") for callback in callbacks),
                ranks=RankAgreement(trainer.strategy.root_device) if trainer.world_size > 1 else None,
            )
        )
        self._session.end_batch()
        self._log.start(trainer)
        lay_out_charts(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs.start_epoch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs.log_epoch(trainer, pl_module)
        self._session.end_epoch()
        self._watch.end_epoch(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reporting.write(trainer, self._session.balancer)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        self._end_evaluation_batch(batch, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        self._end_evaluation_batch(batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.on_evaluation = None
        self._epochs.log_evaluation(trainer, pl_module, "val")
        if self._stage == "fit" and not trainer.sanity_checking:
            self._epochs.log_so_far(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.on_evaluation = None
        self._epochs.log_evaluation(trainer, pl_module, "test")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._open_door()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._open_door()

    def _start_evaluation(self) -> None:
        self._epochs.start_evaluation()
        self._evaluated.clear()
        self._session.on_evaluation = self._evaluated.append

    def _end_evaluation_batch(self, batch: Any, dataloader_idx: int | None) -> None:
        self._close_door()
        self._epochs.add_evaluated(self._evaluated, batch, dataloader_idx)
        self._evaluated.clear()

    # -- one batch -------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._watch.begin_batch(trainer, pl_module)
        self._session.begin_batch()
        self._open_door()

    def _open_door(self) -> None:
        """``total_loss`` without a module leads here while a batch is under way."""
        self._close_door()
        if self._link is not None:
            self._door = open_door(self._link)

    def _close_door(self) -> None:
        if self._door is not None:
            close_door(self._door)
            self._door = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._watch.see_backward()
        losses = self._session.before_backward(loss)
        if losses:
            self._epochs.note(losses)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._session.before_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._close_door()
        if self._session.noted and not pl_module.automatic_optimization:
            self._session.tell(
                "raw backward",
                "training_step called total_loss(), but no manual_backward() of its result followed, so the weights are not "
                "updated. Call self.manual_backward(total) instead of total.backward().",
            )
        self._session.end_batch()
        self._epochs.end_batch(batch)
        self._watch.end_batch(trainer, pl_module)
        if trainer.global_step == self._last_global_step:
            return  # in the middle of an accumulation window
        self._last_global_step = trainer.global_step
        # On a step without the collective the ranks would log each its own losses.
        wanted = self._log.is_wanted(trainer) and (self._session.balancer.due or trainer.world_size == 1)
        lbfgs = any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers)
        step = self._session.step(describe=wanted, freeze_points=lbfgs)
        self._reporting.count_step()
        if step is None:
            return
        diagnostics = self._session.balancer.diagnostics
        if step.due:
            self._reporting.add(step.applied, step.measurement, trainer.current_epoch)
        if wanted:
            self._log.write(trainer, pl_module, step.applied, step.measurement, diagnostics, step.window)
        if wanted and self._log.is_looked_at(trainer):
            self._reporting.keep(step.applied, step.measurement, diagnostics)
            self._session.tell_counts()
            for about, message in self._concerns.of(trainer, self._session.balancer, step.measurement, step.applied):
                self._session.tell(about, message)

    def _tell(self, about: str, message: str) -> None:
        rank_zero_warn(message)
