"""Which backward passes of a run are read, and what those of one optimiser step add up to."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.gradients import UnreachedSharedLayerError
from lightning_gradnorm.measurement import widest_float
from lightning_gradnorm.session.loop import Loop
from lightning_gradnorm.session.noted import NotedLosses
from lightning_gradnorm.session.ranks import RankAgreement
from lightning_gradnorm.session.shared import SharedReading, hides_parameters
from lightning_gradnorm.session.telling import alone
from lightning_gradnorm.shared_layer import SharedLayer
from lightning_gradnorm.task_gradients import TaskGradients
from lightning_gradnorm.window import MeasurementWindow

Tell = Callable[[str, str], None]


class Measuring:
    """Measures the steps of one run.

    Args:
        reading: finds W and reads the gradients on it.
        balancer: the method, which says what it needs.

    Attributes:
        window: the sums of the step under way.
        traces: task → that of its tangent kernel in the micro-batch whose backward comes next, if it is needed.
    """

    window: MeasurementWindow
    _acts: bool  # the backward under way puts the tasks' gradients together anew

    def __init__(self, reading: SharedReading, balancer: LossBalancer) -> None:
        self.reading: SharedReading = reading
        self._balancer = balancer
        self._besides = [field for field in ("kpis", "ntk_traces") if field in balancer.needs]
        self._pairs = "gramian" in balancer.needs
        self._keeps = "gradient_means" in balancer.needs
        self._reached: set[str] = set()  # the tasks whose gradient on W was read before
        self.new_window()

    def new_window(self) -> None:
        """Another optimiser step."""
        self.window = self._window()
        self._acts = False
        self.traces: dict[str, Tensor] = {}
        self._batches = 0
        self._left_out = False  # the rest of the step, which cannot be measured

    def _window(self) -> MeasurementWindow:
        of_features = self.reading.norm_of == "features"
        return MeasurementWindow(of_features=of_features, besides=self._besides, pairs=self._pairs)

    def before_backward(self, root: Tensor, noted: NotedLosses, loop: Loop, tell: Tell) -> bool:
        """Get ready for the backward of ``root``.

        Args:
            root: scalar that ``backward()`` will be called on.
            noted: the tapped losses that it was built from.
            loop: whose network it is.
            tell: takes what is to be warned of.

        Returns:
            Whether the backward will be read.

        Raises:
            UnreachedSharedLayerError: if some of the tasks reach W and others do not.
            CompiledSharedLayerError, HiddenUseError: if residuals are to be read in a graph that cannot be walked twice.
            ScatteredTasksError: if the method acts in the backward, and the tasks meet at several places.
            ValueError: if there is no W.
        """
        losses = noted.losses
        if not self._find_layer(losses, loop, tell) or self._left_out:
            return False
        if self.window.has_let_go:
            # A step of several batches where the loop has one: what the first brought is gone. From now on it is kept.
            self._keeps = True
            self.new_window()
            self._left_out = True
            return False
        self._read_traces(noted.residuals, loop)
        self._acts = self._balancer.acts_in_backward and (len(losses) > 1 or loop.ranks is not None)
        if self._balancer.acts_in_backward and not self._acts:
            tell("alone", alone(*losses))
        weigh = functools.partial(self._weigh, noted, loop.ranks) if self._acts else None
        try:
            keep = self._keeps or not loop.norms_suffice()
            there = self.reading.before_backward(root, losses, keep=keep, pairs=self._pairs, weigh=weigh)
        except UnreachedSharedLayerError as error:
            only_others = bool(self._reached) and self._reached.isdisjoint(losses)
            if len(error.tasks) < len(losses) or only_others or hides_parameters(root):
                raise
            tell(
                "unreached",
                f"No task's loss reached the shared layer ({self.reading.layer}) in this step. Such steps are skipped: "
                "they leave the weights as they are. That is as it should be where the layer is left out at random, or sees "
                f"some batches only. {error}",
            )
            return False
        if not there:
            tell(
                "frozen",
                f"The shared layer ({self.reading.layer}) is frozen or was not used in this step: the weights stay as they are "
                "until it is trained.",
            )
        return there

    def add_losses(self, noted: NotedLosses) -> None:
        """Take the losses of a batch whose backward is to come; with the weights that it applies, if these are known by now."""
        if not (self._acts and noted.tapped):
            self.window.add_losses(noted.values, noted.weights, self._beside(noted))

    def _beside(self, noted: NotedLosses) -> dict[str, Mapping[str, Tensor]]:
        return {"kpis": noted.kpis, "ntk_traces": self.traces if noted.tapped else {}}

    def _weigh(self, noted: NotedLosses, ranks: RankAgreement | None, gradients: TaskGradients) -> list[float]:
        """Inside the backward of a batch: the weights under which its own gradients, of all ranks, are put together.

        Raises:
            ValueError: if the ranks have not all the same tasks.
        """
        batch = self._window()
        batch.add_losses(noted.values, noted.weights, self._beside(noted))
        batch.add_gradients(gradients)
        if ranks is not None:
            self.reduce(batch, ranks, measures=True)
            ranks.check_complete(noted.losses, batch.counts)
        measurement = batch.measurement()
        assert measurement is not None, "it has losses"
        weights = dict(zip(measurement.tasks, self._balancer.weigh(measurement).tolist(), strict=True))
        self.window.join(batch, weights)
        return [weights[task] for task in gradients.tasks]

    def _read_traces(self, residuals: Mapping[str, Tensor], loop: Loop) -> None:
        """With other signs in each step, on each rank and in each micro-batch, and the same after a resume."""
        rank = 0 if loop.ranks is None else loop.ranks.rank
        self.traces = self.reading.ntk_traces(residuals, self._balancer.steps, rank, self._batches)
        self._batches += 1

    def _find_layer(self, losses: Mapping[str, Tensor], loop: Loop, tell: Tell) -> bool:
        before = self.reading.layer
        try:
            known = self.reading.find(losses)
        except ValueError as error:
            # A finetuning callback freezes now what it will train later; anywhere else it is a mistake.
            if not loop.may_thaw:
                raise
            tell("frozen", f"The weights stay as they are while a finetuning callback keeps the layer frozen. {error}")
            return False
        if self.reading.layer is not before:
            self._announce(before, loop)
        return known

    def _announce(self, before: SharedLayer | None, loop: Loop) -> None:
        if self.reading.layer is not None:
            where = "at the output of" if self.reading.norm_of == "features" else "on"
            loop.inform(
                f"{loop.name} compares the tasks' gradients {where} {self.reading.layer}. They are read by the "
                f"{self.reading.engine.engine_to_use!r} engine."
            )
        if before is None:
            return
        if loop.ranks is not None:
            raise ValueError(
                f"A task that came later does not reach the shared layer that the ranks agreed on ({before}). Name one that "
                "all tasks reach with shared_layer(), or declare all tasks: tasks=[…]."
            )
        loop.inform(f"A task that came later does not reach what was the shared layer until now ({before}).")
        # What this step has read already is of the other layer.
        changed = bool(self.window)
        self.new_window()
        self._left_out = changed
        self._reached.clear()

    def after_backward(self) -> None:
        """Take what the backward brought.

        Raises:
            IncompleteBackwardError: if it could not be read.
        """
        gradients = self.reading.engine.finish()
        if gradients is not None:
            self._reached.update(gradients.tasks)
            if not self._acts:
                self.window.add_gradients(gradients)

    def reduce(self, window: MeasurementWindow, ranks: RankAgreement, *, measures: bool) -> None:
        """The same measurement on every rank: one collective, which all ranks call whatever they have seen.

        Args:
            window: this rank's part of the step.
            ranks: what they agree on.
            measures: whether the step's gradients on W are wanted.
        """
        if window.is_whole:
            return
        layer = self.reading.layer
        if not ranks.tasks or (measures and not ranks.entries):
            ranks.agree((*self._balancer.known_tasks, *window.tasks), () if layer is None else layer.names, window.entries)
            if layer is None and ranks.layer and self.reading.norm_of == "parameters":
                self.reading.adopt(ranks.layer, "as another rank found it; name another by shared_layer")
        ranks.check(window.tasks)
        if ranks.tasks and (ranks.entries or not measures):
            entries = ranks.entries if measures else 0
            window.reduce(ranks.all_reduce, ranks.tasks, entries, ranks.device, self._dtype_of(ranks.device))

    def _dtype_of(self, device: torch.device) -> torch.dtype:
        """What the gradients on W come in, or their squared norms, at least float32."""
        if self.reading.norm_of == "features":
            return widest_float(device)
        parameters = () if self.reading.layer is None else self.reading.layer.parameters
        return functools.reduce(torch.promote_types, (parameter.dtype for parameter in parameters), torch.float32)
