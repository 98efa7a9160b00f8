"""What is logged of whole epochs: the mean losses of training, and those of an evaluation."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed
from torch import Tensor

from lightning_gradnorm.callbacks.epoch_means import EpochMeans, Gather, MeanLosses, batch_size_of
from lightning_gradnorm.callbacks.lightning_api import LightningModule, Trainer, rank_zero_info, setting_of
from lightning_gradnorm.report.tags import UNWEIGHTED
from lightning_gradnorm.task_names import task_tag

_HOOK = "LossBalancing"


class EpochLog:
    """Adds up the losses of each batch, and logs their means at the end of an epoch, in ``barebones`` never.

    In training ``total_loss/unweighted`` is there for whoever monitors it: after an epoch the epoch's mean, after a
    validation within the epoch the mean so far.
    """

    def __init__(self) -> None:
        self._training = EpochMeans()
        self._evaluation: dict[int | None, EpochMeans] = {}
        self._noted: list[Mapping[str, Tensor]] = []
        self._adds_up = True
        self._has_told = False

    def reset(self) -> None:
        """Forget an epoch under way, which a fit before left when it broke off."""
        self._training.reset()
        self._evaluation.clear()
        self._noted.clear()

    # -- training --------------------------------------------------------------------------------------------------

    def start_epoch(self, trainer: Trainer) -> None:
        """An epoch of training begins, or goes on after a resume in its middle."""
        self._noted.clear()
        self._training.begin(trainer.current_epoch)
        self._adds_up = not trainer.barebones

    def note(self, losses: Mapping[str, Tensor]) -> None:
        """Take the detached losses of one total in a training batch, task → scalar."""
        if self._adds_up:
            self._noted.append(losses)

    def end_batch(self, batch: Any) -> None:
        """The training batch is over."""
        _add(self._training, self._noted, batch)
        self._noted.clear()

    def log_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of an epoch of training; all ranks."""
        means = self._training.means(_gather_of(trainer)) if self._adds_up else None
        self._training.reset()
        if means is None:
            return
        if setting_of(trainer, "log_every_n_steps"):
            self._log(trainer, pl_module, {UNWEIGHTED: means.total}, logger=False)
            total, per_task = f"{UNWEIGHTED}_epoch", "task_loss_epoch"
        else:  # the names of the steps are free
            total, per_task = UNWEIGHTED, "task_loss"
        self._log(trainer, pl_module, _tagged(means, total, per_task))

    def log_so_far(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of a validation within an epoch of training, for whoever monitors it there; all ranks."""
        means = self._training.means(_gather_of(trainer)) if self._adds_up else None
        if means is not None:
            self._log(trainer, pl_module, {UNWEIGHTED: means.total}, logger=False)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def start_evaluation(self) -> None:
        """An epoch of evaluation begins."""
        self._evaluation.clear()

    def add_evaluated(self, totals: Iterable[Mapping[str, Tensor]], batch: Any, dataloader_idx: int | None) -> None:
        """Take an evaluation batch.

        Args:
            totals: the detached losses of each of its totals, task → scalar.
            batch: counts by its size.
            dataloader_idx: which of several dataloaders it is from; ``None`` where there is one.
        """
        _add(self._evaluation.setdefault(dataloader_idx, EpochMeans()), totals, batch)

    def log_evaluation(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At the end of an epoch of evaluation: ``<stage>_total_loss``, ``<stage>_task_loss/<task>``; all ranks.

        Of several dataloaders each has its own, with Lightning's ``/dataloader_idx_<n>`` at the end.
        """
        evaluation, self._evaluation = self._evaluation, {}
        gather = _gather_of(trainer)
        loaders = {idx for rank in (gather(list(evaluation)) if gather else [list(evaluation)]) for idx in rank}
        for idx in sorted(loaders, key=lambda idx: -1 if idx is None else idx):
            means = evaluation.get(idx, EpochMeans()).means(gather)
            if means is not None and not (trainer.barebones or trainer.sanity_checking):
                suffix = "" if idx is None else f"/dataloader_idx_{idx}"
                values = _tagged(means, f"{stage}_total_loss", f"{stage}_task_loss", suffix)
                self._log(trainer, pl_module, self._without_the_modules(trainer, values))

    @staticmethod
    def _log(trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float], logger: bool = True) -> None:
        """As ``LightningModule.log`` in a hook of its own: what the module logs under one of the names stays apart."""
        results = trainer._results
        assert results is not None, "there are results in every loop but that of predict"
        for name, value in values.items():
            results.log(
                _HOOK,
                name,
                torch.tensor(value, dtype=torch.float32, device=pl_module.device),
                logger=logger,
                on_step=False,
                on_epoch=True,
                batch_size=1,
                add_dataloader_idx=False,
                sync_dist=trainer.world_size > 1,  # all ranks have the same; Lightning warns where it is not told to look
                sync_dist_fn=trainer.strategy.reduce,
            )

    def _without_the_modules(self, trainer: Trainer, values: Mapping[str, float]) -> dict[str, float]:
        """The module's own metrics of these names come first."""
        logged = () if trainer._results is None else trainer._results.values()
        own = {metric.meta.name for metric in logged if metric.meta.fx != _HOOK}
        taken = [name for name in values if name.partition("/dataloader_idx_")[0] in own]
        if taken and not self._has_told:
            self._has_told = True
            rank_zero_info(f"The module logs {', '.join(taken)} itself, so that the callback's are left out.")
        return {name: value for name, value in values.items() if name not in taken}

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The sums of an epoch under way."""
        return self._training.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``."""
        self._training.load_state_dict(state)


def _add(means: EpochMeans, totals: Iterable[Mapping[str, Tensor]], batch: Any) -> None:
    """Totals of different tasks in one batch are one total; one with a task that was there already is of another batch."""
    joined: list[Mapping[str, Tensor]] = []
    for losses in totals:
        if not joined or joined[-1].keys() & losses.keys():
            joined.append(losses)
        else:
            joined[-1] = {**joined[-1], **losses}
    for losses in joined:
        means.add(losses, batch_size_of(batch))


def _tagged(means: MeanLosses, total: str, per_task: str, suffix: str = "") -> dict[str, float]:
    values = {f"{per_task}/{task_tag(task)}{suffix}": mean for task, mean in sorted(means.tasks.items())}
    return {f"{total}{suffix}": means.total} | values


def _gather_of(trainer: Trainer) -> Gather | None:
    if trainer.world_size == 1:
        return None

    def gather(here: Any) -> list[Any]:
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, here)
        return gathered

    return gather
