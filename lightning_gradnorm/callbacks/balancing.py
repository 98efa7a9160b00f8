"""``LossBalancingCallback``: everything between a balancer and Lightning's Trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_gradnorm.autograd_graph import is_built_from
from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.callbacks.link import BalancingLink
from lightning_gradnorm.callbacks.ranks import RankAgreement
from lightning_gradnorm.gradients import GradientReader, IncompleteBackwardError, JointBackward, PerTaskBackward
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.mixin import MultiTaskMixin
from lightning_gradnorm.report.summary import RunSummary
from lightning_gradnorm.report.table import print_table
from lightning_gradnorm.report.tags import custom_scalars_layout, per_pair, per_task, totals
from lightning_gradnorm.report.weights_file import write_weights
from lightning_gradnorm.shared_layer import SharedLayer, detect_shared_layer, resolve_shared_layer
from lightning_gradnorm.window import MeasurementWindow

Engine = Literal["auto", "joint", "per_task"]
_ENGINES: dict[str, type[GradientReader]] = {"auto": JointBackward, "joint": JointBackward, "per_task": PerTaskBackward}
_MOST_PAIRS = 45  # gradient cosines are logged without asking up to here: ten tasks


class LossBalancingCallback(pl.Callback):
    """Weighs the losses of a module with ``MultiTaskMixin`` by any ``LossBalancer``.

    Automatic optimisation stays as it is. ``total_loss`` applies the weights; around the backward the tasks' gradients on
    the shared layer are read; once the optimiser has stepped, the balancer updates the weights for the next step.

    Logged, on the steps that ``log_every_n_steps`` asks for, as of the step itself (the weights that it applied): the
    tags of ``lightning_gradnorm.report.tags``. What the step did not measure (a task that is absent, a step that
    ``update_every`` left out) keeps the value last logged. At the end of ``fit`` a table goes to the console and
    ``loss_weights.yaml`` into the log folder.

    Args:
        balancer: the method.
        engine: how the tasks' gradients are read. ``"joint"``: from the one backward; ``"per_task"``: by one
            ``autograd.grad`` per task, slower; ``"auto"``: the first, falling back to the second where the backward cannot
            be read.
        log_cosines: whether to log the cosine between every two tasks' gradients; by default for up to ten tasks.
        progress_bar: whether the progress bar shows the weights.
        summary: whether to print the table and write ``loss_weights.yaml`` at the end of ``fit``.

    Attributes:
        engine_used: ``"joint"`` or ``"per_task"``, once a step was measured.
        shared: the shared layer W that is in use, once it is known.
    """

    def __init__(
        self,
        balancer: LossBalancer,
        *,
        engine: Engine = "auto",
        log_cosines: bool | None = None,
        progress_bar: bool = False,
        summary: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(balancer, LossBalancer):
            raise TypeError(
                f"LossBalancingCallback takes a balancer, got {balancer!r}. Write LossBalancingCallback(GradNorm(alpha=1.5)), "
                "or GradNormCallback(alpha=1.5)."
            )
        if engine not in _ENGINES:
            raise ValueError(f"engine is one of {', '.join(map(repr, _ENGINES))}; got {engine!r}.")
        self.balancer = balancer
        self.engine, self.log_cosines, self.progress_bar, self.summary = engine, log_cosines, progress_bar, summary
        self.engine_used: str | None = None
        self.shared: SharedLayer | None = None
        self._reader_type = _ENGINES[engine]
        self._reader: GradientReader | None = None
        self._link = BalancingLink(balancer)
        self._window = MeasurementWindow()
        self._agreement = RankAgreement()
        self._summary = RunSummary()
        self._stage = "fit"
        self._last_global_step = 0
        self._read_in_batch = False
        self._shown: dict[str, Tensor] = {}  # tag → the last value logged
        self._told: set[str] = set()

    @property
    def weights(self) -> dict[str, float]:
        """Task → the weight that the next step will apply."""
        return self.balancer.weights

    @property
    def state_key(self) -> str:
        """Of the method, not of this class: a named subclass and the general callback find each other's state."""
        return f"LossBalancing[{self.balancer.state_name}]"

    # -- life of a fit ---------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stage = stage
        if not isinstance(pl_module, MultiTaskMixin):
            name = type(pl_module).__name__
            raise TypeError(
                f"{type(self).__name__} needs a module with MultiTaskMixin, and {name} has none. "
                f"Write class {name}(MultiTaskMixin, L.LightningModule) and return self.total_loss({{'task': loss, …}}) from "
                "training_step."
            )
        others = [callback for callback in _of(trainer, "callbacks") if isinstance(callback, LossBalancingCallback)]
        if len(others) > 1:
            raise ValueError(
                f"One callback weighs the losses, and the Trainer was given {len(others)}: "
                f"{', '.join(type(c).__name__ for c in others)}. Keep one of them."
            )
        _link_to(pl_module, self._link)
        if stage == "fit":
            self.shared = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()
        _link_to(pl_module, None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        self._link.stop()
        self._window = MeasurementWindow()
        if self._reader is not None:
            self._reader.discard()
            self._reader = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_global_step = trainer.global_step
        self._window, self._agreement = MeasurementWindow(), RankAgreement()
        _lay_out_charts(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.balancer.end_epoch()
        self._tell_skipped()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.summary or _of(trainer, "fast_dev_run"):
            return
        rows, folder = self._summary.rows(self.weights), trainer.log_dir  # every rank asks for the folder
        if rows and trainer.is_global_zero:
            name, steps = self.balancer.state_name, self._summary.steps
            print_table(rows, f"{name} after {steps} steps (w: weight, share: of the gradient norms on the shared layer)")
            if trainer.loggers and folder is not None:
                path = write_weights(Path(folder), rows, method=name, settings=self.balancer.settings(), steps=steps)
                rank_zero_info(f"Loss weights written to {path}")

    # -- one batch -------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._read_in_batch = False
        measures = self.balancer.due and self.balancer.needs_gradient_norms
        self._link.start(reads_gradients=measures, once_per_step=pl_module.automatic_optimization)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        noted = next((noted for noted in self._link.noted if is_built_from(loss, noted.losses)), None)
        if noted is None:
            if self._link.noted and pl_module.automatic_optimization:
                self._tell(
                    "unused",
                    "training_step called total_loss() but returned a loss that was not built from its result, so there is "
                    "nothing to "
                    "balance. Return what total_loss() gave, with further terms added if you like.",
                )
            return
        self._link.noted.remove(noted)
        if self._read_in_batch:
            return  # a closure evaluated again within one optimiser step
        self._read_in_batch = True
        self._window.add_losses({task: loss.detach() for task, loss in noted.losses.items()})
        if noted.tapped:
            if self.shared is None:
                self.shared = _shared_layer_of(pl_module, noted.losses)
                rank_zero_info(
                    f"{type(self).__name__} compares the tasks' gradients on {self.shared}. They are read by the "
                    f"{self._reader_type.engine!r} engine."
                )
            self._reader = self._reader_type(loss, noted.losses, self.shared.parameters)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reader, self._reader = self._reader, None
        if reader is None:
            return
        try:
            self._window.add_gradients(reader.gradients())
            self.engine_used = reader.engine
        except IncompleteBackwardError as error:
            self._window = MeasurementWindow()
            if self.engine == "joint":
                raise
            self._reader_type = PerTaskBackward
            self._tell(
                "engine", f"{error} From the next step on, {type(self).__name__} uses engine='per_task', which is slower."
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._link.stop()
        if trainer.global_step == self._last_global_step:
            return  # in the middle of an accumulation window
        self._last_global_step = trainer.global_step
        window, self._window = self._window, MeasurementWindow()
        due = self.balancer.due
        if trainer.world_size > 1 and due:
            self._reduce(trainer, window)
        measurement = window.measurement()
        if measurement is None:
            self.balancer.update(None)
            return
        applied = self.balancer.weights_for(measurement.tasks)
        self.balancer.update(measurement if due else None)
        if due:
            self._summary.add(applied, measurement, trainer.current_epoch)
        if self._is_written(trainer) and not trainer.barebones:
            self._log(pl_module, applied, measurement, window)

    def _reduce(self, trainer: pl.Trainer, window: MeasurementWindow) -> None:
        """The same measurement on every rank: one collective, which all ranks call whatever they have seen."""
        if not self._agreement.tasks:
            layer = self.shared.names if self.shared is not None else ()
            entries = sum(p.numel() for p in self.shared.parameters) if self.shared is not None else 0
            self._agreement.agree((*self.balancer.known_tasks, *window.tasks), layer, entries)
        self._agreement.check(window.tasks)
        if self._agreement.tasks:
            window.reduce(
                self._agreement.all_reduce, self._agreement.tasks, self._agreement.entries, trainer.strategy.root_device
            )

    # -- logging ---------------------------------------------------------------------------------------------------

    def _is_written(self, trainer: pl.Trainer) -> bool:
        """Whether what is logged on this step reaches a logger or the progress bar; logging costs more than measuring."""
        if self.progress_bar or len(trainer.optimizers) != 1:  # with several, global_step counts them all
            return True
        every = _of(trainer, "log_every_n_steps")
        return bool(every) and trainer.global_step % every == 0

    def _log(self, pl_module: pl.LightningModule, applied: Tensor, measurement: Measurement, window: MeasurementWindow) -> None:
        tasks, losses, _ = measurement
        values = per_task("task_loss", tasks, losses) | dict(totals(applied.to(losses), losses))
        for tag, vector in self.balancer.diagnostics.items():
            values |= per_task(tag, tasks, vector)
        pairs = len(tasks) * (len(tasks) - 1) // 2
        if self.log_cosines or (self.log_cosines is None and pairs <= _MOST_PAIRS):
            cosines = window.cosines()
            if cosines is not None:
                values |= per_pair("grad_cosine", tasks, cosines)
        weights = per_task("loss_weight", tasks, applied)
        # Lightning repeats what an earlier step of the epoch logged; so do we, across epochs and checkpoints as well.
        self._shown |= values | weights
        pl_module.log_dict(self._shown, on_step=True, on_epoch=False)
        if self.progress_bar:
            pl_module.log_dict({f"w/{tag.partition('/')[2]}": w for tag, w in weights.items()}, logger=False, prog_bar=True)
        self._tell_skipped()

    def _tell_skipped(self) -> None:
        skipped = int(self.balancer.skipped_updates.item())
        if skipped:
            self._tell(
                "skipped",
                f"{type(self).__name__} skipped {skipped} weight update{'s' if skipped > 1 else ''} so far: a task's loss or "
                "gradient was not finite, or all "
                "gradients on the shared layer were zero. The weights stayed as they were; the count is in "
                "balancer.skipped_updates.",
            )

    def _tell(self, about: str, message: str) -> None:
        """Warn once of each thing."""
        if about not in self._told:
            self._told.add(about)
            rank_zero_warn(message)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"balancer": self.balancer.state_dict(), "summary": self._summary.state_dict(), "shown": dict(self._shown)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage != "fit" and self.balancer.tasks:
            return  # testing a checkpoint does not touch the live weights
        self.balancer.load_state_dict(state_dict["balancer"])
        self._summary.load_state_dict(state_dict["summary"])
        self._shown = dict(state_dict["shown"])


def _of(trainer: pl.Trainer, setting: str) -> Any:
    """What Lightning's connectors put on the Trainer, where its type does not show it."""
    return getattr(trainer, setting)


def _link_to(module: Any, link: BalancingLink | None) -> None:
    module._loss_balancing = link


def _shared_layer_of(pl_module: Any, losses: Mapping[str, Tensor]) -> SharedLayer:
    spec = pl_module.shared_layer()
    return detect_shared_layer(losses, pl_module) if spec is None else resolve_shared_layer(spec, pl_module)


@rank_zero_only
def _lay_out_charts(trainer: pl.Trainer) -> None:
    """One chart with all tasks for each quantity, on TensorBoard's Custom Scalars page."""
    for logger in trainer.loggers:
        add_layout = getattr(getattr(logger, "experiment", None), "add_custom_scalars", None)
        if add_layout is not None:
            add_layout(custom_scalars_layout())
