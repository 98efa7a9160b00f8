"""What the Trainer's hooks of evaluation are to a session: its losses are the plain ones, and their means are logged."""

from typing import Any

from torch import Tensor

from lightning_gradnorm.callbacks.epoch_log import EpochLog
from lightning_gradnorm.callbacks.lightning_api import Callback, LightningModule, Trainer
from lightning_gradnorm.door import Door
from lightning_gradnorm.session import BalancingSession, TotalLink


class EvaluationHooks(Callback):
    """Collects the losses of each batch of validation and test."""

    _session: BalancingSession
    _epochs: EpochLog
    _stage: str | None
    _link: TotalLink | None
    _door: Door
    _evaluated: list[dict[str, Tensor]]  # the losses of the evaluation batch under way

    def _open_door(self) -> None:
        """``total_loss`` without a module leads here while a batch is under way."""
        if self._link is not None:
            self._door.open(self._link)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs.start_evaluation()
        self._evaluated.clear()
        self._session.on_evaluation = self._evaluated.append

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._open_door()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        self._door.close()
        self._epochs.add_evaluated(self._evaluated, batch, dataloader_idx)
        self._evaluated.clear()

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.on_evaluation = None
        self._epochs.log_evaluation(trainer, pl_module, "val")
        if self._stage == "fit" and not trainer.sanity_checking:
            self._epochs.log_so_far(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.on_evaluation = None
        self._epochs.log_evaluation(trainer, pl_module, "test")
