"""``LossBalancingCallback``: everything between a balancer and Lightning's Trainer."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_gradnorm.autograd_graph import is_built_from
from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.balancers.checks import check_choice
from lightning_gradnorm.callbacks.concerns import Concerns, values_of
from lightning_gradnorm.callbacks.epoch_log import EpochLog
from lightning_gradnorm.callbacks.lightning_api import (
    Callback,
    LightningModule,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
    setting_of,
)
from lightning_gradnorm.callbacks.link import BalancingLink
from lightning_gradnorm.callbacks.log import BalancingLog, lay_out_charts
from lightning_gradnorm.callbacks.measuring import Engine, Measuring, NormOf
from lightning_gradnorm.callbacks.ranks import RankAgreement
from lightning_gradnorm.callbacks.reporting import Reporting
from lightning_gradnorm.gradients import IncompleteBackwardError
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.mixin import MultiTaskMixin
from lightning_gradnorm.pointwise import NotedPoints, PointWeighting
from lightning_gradnorm.report.run import RunReport
from lightning_gradnorm.shared_layer import SharedLayer

_TESTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")

Mode = Literal["balance", "monitor"]


class LossBalancingCallback(Callback):
    """Weighs the losses of a module with ``MultiTaskMixin`` by any ``LossBalancer``.

    Automatic optimisation stays as it is. ``total_loss`` applies the weights; around the backward the tasks' gradients on
    the shared layer are read; once the optimiser has stepped, the balancer updates the weights for the next step.

    Logged, on the steps that ``log_every_n_steps`` asks for, as of the step itself (the weights that it applied): the
    tags of ``lightning_gradnorm.report.tags``. What the step did not measure (a task that is absent, a step that
    ``update_every`` left out) keeps the value last logged. Of each epoch of training and of evaluation the mean losses are
    logged too. At the end of ``fit`` a table goes to the console, ``loss_weights.yaml`` and a figure into the folder of each
    logger's run.

    Args:
        balancer: the method.
        engine: how the tasks' gradients are read. ``"joint"``: from the one backward; ``"per_task"``: by one
            ``autograd.grad`` per task, slower; ``"auto"``: the first, falling back to the second where the backward cannot
            be read.
        norm_of: ``"parameters"``: the norm of each task's gradient on the shared layer's parameters, the paper's;
            ``"features"``: at the layer's output, which costs nothing more and also serves layers whose parameters are sharded
            or compiled. ``shared_layer()`` has to name the layer then.
        log_cosines: whether to log the cosine between every two tasks' gradients; by default for up to ten tasks.
        progress_bar: whether the progress bar shows the weights.
        points: task → how the single points of its term are weighed; its loss is a vector then, one entry per point.
        mode: ``"balance"``; ``"monitor"`` measures and logs everything and changes no weight: they stay the method's first
            ones, for GradNorm the plain sum.
        summary: whether to print the table and write ``loss_weights.yaml`` and a figure at the end of ``fit``, also of one that
            is interrupted.
        untested_strategies: whether to run under Trainer strategies other than a single device, DDP, and
            ``ModelParallelStrategy`` with FSDP2.

    Attributes:
        engine_used: ``"joint"`` or ``"per_task"``, once a step was measured.
        shared: the shared layer W that is in use, once it is known.
    """

    def __init__(
        self,
        balancer: LossBalancer,
        *,
        engine: Engine = "auto",
        norm_of: NormOf = "parameters",
        log_cosines: bool | None = None,
        progress_bar: bool = False,
        points: Mapping[str, PointWeighting] | None = None,
        mode: Mode = "balance",
        summary: bool = True,
        untested_strategies: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(balancer, LossBalancer):
            raise TypeError(
                f"LossBalancingCallback takes a balancer, got {balancer!r}. Write LossBalancingCallback(GradNorm()), "
                "or GradNormCallback()."
            )
        check_choice("mode", mode, get_args(Mode))
        self.balancer, self._untested_strategies = balancer, untested_strategies
        balancer.frozen = balancer.frozen or mode == "monitor"
        self.points = dict(points or {})
        for task, weighting in self.points.items():
            if not isinstance(weighting, PointWeighting):
                raise TypeError(
                    f"points[{task!r}] is {weighting!r}; it is a task's way to weigh its points, such as SelfAdaptivePoints()."
                )
        self._noted_points: dict[str, list[NotedPoints]] = {}
        self._measuring = Measuring(engine, norm_of, balancer.needs)
        self._log = BalancingLog(log_cosines, progress_bar)
        self._link = BalancingLink(balancer, self.points)
        self._epochs = EpochLog()
        self._reporting = Reporting(summary)
        self._concerns = Concerns()
        self._stage, self._is_set_up = "fit", False
        self._last_global_step = 0
        self._read_in_batch = False
        self._told: set[str] = set()

    def reset(self) -> None:
        """Forget all that was learnt: weights, L(0), masks. The next step starts anew, as for another problem.

        Between stages of one problem think twice: with α > 0 a loss that is small already gets a small new L(0), and with it
        a weight that runs up.
        """
        self.balancer.reset()
        for weighting in self.points.values():
            weighting.reset()

    @property
    def weights(self) -> dict[str, float]:
        """Task → the weight that the next step will apply."""
        return self.balancer.weights

    @property
    def mean_weights(self) -> dict[str, float]:
        """Task → mean of the weights that the steps applied: what ``FixedWeights`` takes to retrain (GradNorm static)."""
        return {row.task: row.mean for row in self.report.rows}

    @property
    def logged(self) -> dict[str, Tensor]:
        """Tag → what was logged last; see ``lightning_gradnorm.report.tags``."""
        return dict(self._log.shown)

    @property
    def report(self) -> RunReport:
        """The run's statistics so far, as the table at the end of fit has them."""
        return self._reporting.report(self.balancer)

    @property
    def engine_used(self) -> str | None:
        """``"joint"`` or ``"per_task"``, once a step was measured."""
        return self._measuring.engine_used

    @property
    def shared(self) -> SharedLayer | None:
        """The shared layer W, once it is known."""
        return self._measuring.shared

    @property
    def state_key(self) -> str:
        """Of the method, not of this class: a named subclass and the general callback find each other's state."""
        key = f"LossBalancing[{self.balancer.state_name}]"
        # Until setup, a Trainer asks for keys only to refuse two equal ones, without a word of the way out; setup says it.
        return key if self._is_set_up else f"{key} of {id(self)}"

    # -- life of a fit ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage, self._is_set_up = stage, True
        if not isinstance(pl_module, MultiTaskMixin):
            name = type(pl_module).__name__
            raise TypeError(
                f"{type(self).__name__} needs a module with MultiTaskMixin, and {name} has none. "
                f"Write class {name}(MultiTaskMixin, L.LightningModule) and return self.total_loss({{'task': loss, …}}) from "
                "training_step."
            )
        self._check_strategy(setting_of(trainer, "strategy"))
        others = [callback for callback in setting_of(trainer, "callbacks") if isinstance(callback, LossBalancingCallback)]
        if len(others) > 1:
            raise ValueError(
                f"One callback weighs the losses, and the Trainer was given {len(others)}: "
                f"{', '.join(type(c).__name__ for c in others)}. Keep one of them."
            )
        pl_module._loss_balancing = self._link
        if stage == "fit":
            self._epochs.reset()

    def _check_strategy(self, strategy: Any) -> None:
        names = [cls.__name__ for cls in type(strategy).__mro__]
        tested = any(name in _TESTED_STRATEGIES for name in names) and not any("DeepSpeed" in name for name in names)
        found = names[0]
        if tested and "ModelParallelStrategy" in names:
            tensor_parallel = strategy.device_mesh["tensor_parallel"].size()
            tested, found = tensor_parallel == 1, f"{found}(tensor_parallel_size={tensor_parallel})"
        if not (tested or self._untested_strategies):
            raise ValueError(
                f"{type(self).__name__} is tested with one device, with DDP, and with FSDP2 by "
                f"ModelParallelStrategy(data_parallel_size=…, tensor_parallel_size=1); not with {found}. Use one of these; or "
                "try it with untested_strategies=True, best with norm_of='features', which needs no parameter gradient."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)
        if self._stage == "fit":
            self._reporting.write(trainer, self.balancer, interrupted=True)

    def _let_go(self, pl_module: LightningModule) -> None:
        self._link.stop()
        self._measuring.let_go()
        self._noted_points.clear()
        vars(pl_module).pop("_loss_balancing", None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reporting.log_hyperparameters(trainer, pl_module, self.balancer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_global_step = trainer.global_step
        self._measuring.restart()
        self._log.start(trainer)
        lay_out_charts(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs.start_epoch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs.log_epoch(trainer, pl_module)
        if not self.balancer.frozen:
            self.balancer.end_epoch()
        self._tell_skipped()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reporting.write(trainer, self.balancer)

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
        self._link.evaluated = None
        self._epochs.log_evaluation(trainer, pl_module, "val")
        if self._stage == "fit" and not trainer.sanity_checking:
            self._epochs.log_so_far(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._link.evaluated = None
        self._epochs.log_evaluation(trainer, pl_module, "test")

    def _start_evaluation(self) -> None:
        self._epochs.start_evaluation()
        self._link.evaluated = []

    def _end_evaluation_batch(self, batch: Any, dataloader_idx: int | None) -> None:
        self._epochs.add_evaluated(self._link.evaluated or (), batch, dataloader_idx)
        self._link.evaluated = []

    # -- one batch -------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._read_in_batch = False
        measures = self.balancer.due and self.balancer.needs_gradients
        if measures:
            self._measuring.watch(pl_module)
        self._link.start(reads_gradients=measures, once_per_step=pl_module.automatic_optimization)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        noted = next((noted for noted in self._link.noted if is_built_from(loss, noted.losses)), None)
        if noted is None:
            if self._link.noted and pl_module.automatic_optimization:
                self._tell(
                    "unused",
                    "training_step called total_loss() but returned a loss that was not built from its result, so there is "
                    "nothing to balance. Return what total_loss() gave, with further terms added if you like.",
                )
            return
        self._link.noted.remove(noted)
        if self._read_in_batch:
            return  # a closure evaluated again within one optimiser step
        self._read_in_batch = True
        measuring = self._measuring
        if noted.tapped:
            if measuring.shared is None and not self._find_layer(trainer, pl_module, noted.losses):
                return
            if not measuring.before_backward(loss, noted):
                self._tell(
                    "frozen",
                    f"The shared layer ({measuring.shared}) is frozen or was not used in this step: the weights stay as they "
                    "are "
                    "until it is trained.",
                )
                return
        losses = {task: loss.detach() for task, loss in noted.losses.items()}
        measuring.window.add_losses(losses, noted.weights, noted.kpis)
        self._epochs.note(losses)
        for task, points in noted.points.items():
            self._noted_points.setdefault(task, []).append(points)

    def _find_layer(self, trainer: Trainer, pl_module: LightningModule, losses: dict[str, Tensor]) -> bool:
        try:
            self._measuring.find_layer(pl_module, losses)
        except ValueError as error:
            # A finetuning callback freezes now what it will train later; anywhere else it is a mistake.
            if not any(hasattr(callback, "freeze_before_training") for callback in setting_of(trainer, "callbacks")):
                raise
            self._tell("frozen", f"The weights stay as they are while a finetuning callback keeps the layer frozen. {error}")
            return False
        where = "at the output of" if self._measuring.norm_of == "features" else "on"
        rank_zero_info(
            f"{type(self).__name__} compares the tasks' gradients {where} {self.shared}. They are read by the "
            f"{self._measuring.reader_type.engine!r} engine."
        )
        return True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self._measuring.after_backward()
        except IncompleteBackwardError as error:
            if self._measuring.engine != "auto":
                raise
            self._tell(
                "engine", f"{error} From the next step on, {type(self).__name__} uses engine='per_task', which is slower."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._link.noted and not pl_module.automatic_optimization:
            self._tell(
                "raw backward",
                "training_step called total_loss(), but no manual_backward() of its result followed, so the weights are not "
                "updated. Call self.manual_backward(total) instead of total.backward().",
            )
        self._link.stop()
        self._measuring.stop_watching()
        self._epochs.end_batch(batch)
        if trainer.global_step == self._last_global_step:
            return  # in the middle of an accumulation window
        self._last_global_step = trainer.global_step
        self._reporting.count_step()
        window, due = self._measuring.finish(), self.balancer.due
        if trainer.world_size > 1 and due:
            self._measuring.reduce(window, self.balancer.known_tasks, trainer.strategy.root_device)
        # On a step without the collective the ranks would log each its own losses.
        wanted = self._log.is_wanted(trainer) and (due or trainer.world_size == 1)
        measurement = window.measurement(magnitudes=self._measuring.magnitudes and due) if due or wanted else None
        self._update_points(trainer)
        if measurement is None:
            self.balancer.update(None)
            return
        applied = self._applied(measurement.tasks, window.applied)
        self.balancer.update(measurement if due else None)
        if due:
            self._reporting.add(applied, measurement, trainer.current_epoch)
        if wanted:
            self._log.write(trainer, pl_module, applied, measurement, self.balancer.diagnostics, window)
        if wanted and self._log.is_looked_at(trainer):
            self._reporting.keep(applied, measurement, self.balancer.diagnostics)
            self._tell_skipped()
            self._tell_concerns(trainer, applied, measurement)

    def _applied(self, tasks: tuple[str, ...], here: Mapping[str, Tensor]) -> Tensor:
        """The weights that the step applied, ``[T]``; of a task that only other ranks had, those that it would have had."""
        if tasks == tuple(here):
            return torch.stack(list(here.values()))
        would = zip(tasks, self.balancer.weights_for(tasks).unbind(), strict=True)
        return torch.stack([here.get(task, weight).to(weight) for task, weight in would])

    def _update_points(self, trainer: Trainer) -> None:
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            self._noted_points.clear()  # the masks are frozen: a line search needs an objective that stays
        distributed = trainer.world_size > 1
        for task, weighting in self.points.items():
            all_reduce = RankAgreement.all_reduce if distributed else None
            weighting.update(
                self._noted_points.pop(task, []), all_reduce, trainer.strategy.root_device if distributed else None
            )

    # -- what is told once -----------------------------------------------------------------------------------------

    def _tell_skipped(self) -> None:
        skipped = int(self.balancer.skipped_updates.item())
        if skipped:
            self._tell(
                "skipped",
                f"{type(self).__name__} skipped {skipped} weight update{'s' if skipped > 1 else ''} so far: a task's loss or "
                "gradient was not finite, or all gradients on the shared layer were zero. The weights stayed as they were; the "
                "count is in balancer.skipped_updates.",
            )

    def _tell_concerns(self, trainer: Trainer, applied: Tensor, measurement: Measurement) -> None:
        weights, losses = applied.tolist(), measurement.losses.tolist()
        ratios = values_of(self.balancer.diagnostics, "loss_ratio", len(weights))
        found = list(self._concerns.of_step(self.balancer, measurement.tasks, weights, ratios, self.balancer.steps))
        if measurement.gradient_norms is not None and not self.balancer.frozen:
            found += self._concerns.of_scale(trainer, measurement.tasks, weights, measurement.gradient_norms.tolist())
        weighted = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        for about, message in (*found, *self._concerns.of_monitors(trainer, weighted, sum(losses))):
            self._tell(about, message)

    def _tell(self, about: str, message: str) -> None:
        if about not in self._told:
            self._told.add(about)
            rank_zero_warn(message)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "balancer": self.balancer.state_dict(),
            "shared_layer": list(self._measuring.known_names) if self.balancer.steps else [],
            "summary": self._reporting.state_dict(),
            "log": self._log.state_dict(),
            "epoch": self._epochs.state_dict(),
            "points": {task: weighting.state_dict() for task, weighting in self.points.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage != "fit" and self.balancer.tasks:
            return  # testing a checkpoint does not touch the live weights
        self.balancer.load_state_dict(state_dict["balancer"])
        self._measuring.known_names = list(state_dict["shared_layer"])
        self._reporting.load_state_dict(state_dict["summary"])
        self._log.load_state_dict(state_dict["log"])
        if "epoch" in state_dict:  # not in those of 0.1
            self._epochs.load_state_dict(state_dict["epoch"])
        for task, weighting in self.points.items():
            if task in state_dict["points"]:
                weighting.load_state_dict(state_dict["points"][task])
