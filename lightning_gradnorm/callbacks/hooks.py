"""What the Trainer's hooks are to a session: where a run, a batch, a backward and an optimiser's step begin and end."""

import weakref
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.callbacks.concerns import Concerns
from lightning_gradnorm.callbacks.homecoming import mark_of
from lightning_gradnorm.callbacks.kept_state import KeptState
from lightning_gradnorm.callbacks.lightning_api import (
    LightningModule,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
    setting_of,
)
from lightning_gradnorm.callbacks.loop_watch import LoopWatch
from lightning_gradnorm.callbacks.refusals import check_alone, check_module, check_strategy
from lightning_gradnorm.callbacks.reporting import Reporting
from lightning_gradnorm.door import Door
from lightning_gradnorm.mixin import shared_layer_of
from lightning_gradnorm.session import Loop, RankAgreement, TotalLink


class TrainerHooks(KeptState):
    """Maps the Trainer's hooks to a ``BalancingSession``, and logs."""

    _untested_strategies: bool
    _shared_layer: list[str]  # names that win over the module's
    _losses_of: str | None

    def _rest(self) -> None:
        """No fit under way, and none known of."""
        self._stage: str | None = None
        self._last_global_step = 0
        self._last_module = None
        self._link: TotalLink | None = None
        self._door = Door()
        self._begin()

    def _begin(self) -> None:
        self._news = ""  # said when training starts, unless a checkpoint has made it untrue by then
        self._evaluated: list[dict[str, Tensor]] = []
        self._concerns = Concerns()
        self._watch = LoopWatch(self._session, type(self).__name__)

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
        self._reporting = Reporting(self._reporting.enabled, self._reporting.pictures.enabled)
        self._log.start_anew()
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
            self._reporting.hyperparameters.complete(trainer)
            self._reporting.write(trainer, self._session.balancer, interrupted=True)
            self._homecoming.send(trainer, lambda: self._for_home(pl_module))

    def _let_go(self, pl_module: LightningModule) -> None:
        self._door.close()
        self._link = None
        self._session.close()
        vars(pl_module).pop("_loss_balancing", None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reporting.hyperparameters.log(trainer, pl_module, self._session.balancer)
        self._reporting.pictures.start()

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
                losses_of=self._losses_of,
                may_thaw=any(hasattr(callback, "freeze_before_training") for callback in callbacks),
                ranks=RankAgreement(trainer.strategy.root_device) if trainer.world_size > 1 else None,
                norms_suffice=lambda: self._norms_suffice(trainer, pl_module),
            )
        )
        self._session.end_batch()
        self._log.start(trainer)

    def _norms_suffice(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        whole = pl_module.automatic_optimization and trainer.accumulate_grad_batches == 1 and trainer.world_size == 1
        interval, number = self._session.balancer.interval, trainer.global_step + 1
        return whole and not self._log.may_ask_for_cosines(trainer, interval, number)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs.start_epoch(trainer)
        self._log.start_epoch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs.log_epoch(trainer, pl_module)
        self._session.end_epoch()
        self._watch.end_epoch(trainer, pl_module)
        self._reporting.show(trainer, self._session.balancer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stage == "fit" and not trainer.sanity_checking:
            self._reporting.hyperparameters.end_validation(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reporting.hyperparameters.complete(trainer)
        self._reporting.write(trainer, self._session.balancer)

    # -- one batch -------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._log.begin_batch(trainer)
        self._watch.begin_batch(trainer, pl_module)
        self._session.begin_batch()
        self._open_door()

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
        self._door.close()
        if self._session.noted and not pl_module.automatic_optimization:
            self._session.tell(
                "raw backward",
                "training_step handed losses over to be balanced, but no manual_backward() of the result followed, so the "
                "weights are not updated. Call self.manual_backward(total) instead of total.backward().",
            )
        self._session.end_batch()
        self._epochs.end_batch(batch)
        number = trainer.global_step
        self._watch.end_batch(number, pl_module)
        self._log.end_batch(trainer)
        if number == self._last_global_step:
            return  # in the middle of an accumulation window
        self._last_global_step = number
        wanted = self._log.is_wanted(trainer, number)
        lbfgs = bool(self._session.points) and any(isinstance(o, torch.optim.LBFGS) for o in trainer.optimizers)
        step = self._session.step(describe=wanted, freeze_points=lbfgs)
        self._reporting.count_step()
        if step is None:
            return
        if step.due:
            self._log.take(trainer, step, self._session.balancer.diagnostics)
            self._reporting.add(step.applied, step.measurement, trainer.current_epoch, step.interval)
        if wanted:
            self._log.write(trainer, pl_module, step)
        if wanted and self._log.is_looked_at(trainer, number):
            found = self._log.last.of(step.measurement.tasks)
            self._reporting.keep(step.applied, step.measurement, found)
            self._session.tell_counts()
            for about, message in self._concerns.of(trainer, self._session.balancer, step, found.get("loss_ratio")):
                self._session.tell(about, message)
            self._reporting.show(trainer, self._session.balancer)

    def _tell(self, about: str, message: str) -> None:
        rank_zero_warn(message)
