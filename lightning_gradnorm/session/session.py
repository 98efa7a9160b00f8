"""``BalancingSession``: one training run in which a balancer weighs the losses, whatever loop drives it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gradnorm.autograd_graph import nodes_met
from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.gradients import IncompleteBackwardError
from lightning_gradnorm.pointwise import NotedPoints, PointWeighting
from lightning_gradnorm.reading import Engine
from lightning_gradnorm.session.loop import BalancedStep, Loop
from lightning_gradnorm.session.losses_of import weigh_losses_of
from lightning_gradnorm.session.measuring import Measuring
from lightning_gradnorm.session.noted import NotedLosses
from lightning_gradnorm.session.ranks import RankAgreement
from lightning_gradnorm.session.shared import NormOf, SharedReading
from lightning_gradnorm.session.telling import evaluated_again, plain_step, unused
from lightning_gradnorm.session.totals import Totals
from lightning_gradnorm.session.words import Words
from lightning_gradnorm.shared_layer import SharedLayer, SharedLayerSpec
from lightning_gradnorm.window import MeasurementWindow


class BalancingSession(Totals):
    """Weighs the losses of a training run, reads the tasks' gradients and updates the weights, in any loop::

        session = BalancingSession(GradNorm(), network)
        for x, y in batches:
            with session.batch():
                total = total_loss({"a": loss_a(network(x), y), "b": loss_b(network(x), y)})
                session.before_backward(total)
                total.backward()
                session.after_backward()
            optimizer.step()
            optimizer.zero_grad()
            session.step()

    ``total_loss`` may be called anywhere, deep in somebody else's code. Where the session is at hand its ``total`` is the same,
    and ``batch`` can then be left out of a loop with one batch per step. Several batches before one ``step`` are its
    micro-batches: the norms are those of the mean gradient. Under ``torch.no_grad`` a total is the plain sum.

    In a distributed run the ranks agree on the tasks and the layer, and hold the same weights: each calls ``step`` at the same
    steps, whatever its batches had.

    Args:
        balancer: the method.
        network: what is trained, where it is trained: on its device, once the process group is there, and not in a wrapper that
            renames its parameters. Without it, ``open`` begins a run.
        shared_layer: the layer on which gradients are compared; found from the graph if it is not given.
        engine: how the tasks' gradients are read: ``"joint"``, ``"per_task"``, or ``"auto"``.
        norm_of: ``"parameters"`` of the shared layer, or its ``"features"``: the layer's output.
        points: task → how the single points of its term are weighed.
        losses_of: the dotted name of a submodule that returns a dict of losses, which are weighed on their way out.

    Attributes:
        balancer: the method.
        points: as given.
        reading: W, and the engine.
        on_evaluation: called with the losses of a total outside training, task → detached scalar.
        totals: how many totals this run has weighed so far.
        words: says what this run has to say.
    """

    words: Words
    _hook: RemovableHandle | None  # on the submodule that returns the losses

    def __init__(
        self,
        balancer: LossBalancer,
        network: nn.Module | None = None,
        *,
        shared_layer: SharedLayerSpec | None = None,
        engine: Engine = "auto",
        norm_of: NormOf = "parameters",
        points: Mapping[str, PointWeighting] | None = None,
        losses_of: str | None = None,
    ) -> None:
        self.balancer: LossBalancer = balancer
        self.points: dict[str, PointWeighting] = dict(points or {})
        self.handed_out: set[str] = set()
        self.reading: SharedReading = SharedReading(engine, norm_of, balancer)
        self._close()
        if network is not None:
            self.open(Loop(network, lambda: shared_layer, losses_of=losses_of, ranks=RankAgreement.of(network)))

    # -- life ------------------------------------------------------------------------------------------------------

    def open(self, loop: Loop) -> None:
        """Begin a run: W is looked for, the ranks agree, warnings speak again; what was learnt stays.

        Args:
            loop: what drives it.
        """
        self.close()
        if loop.losses_of is not None and self.balancer.needs_residuals:
            raise ValueError(
                f"losses_of={loop.losses_of!r} takes a scalar for each loss, and {type(self.balancer).__name__} needs the loss "
                "of each point. Hand them over where they are made: total_loss({'task': residual.square(), …})."
            )
        if loop.losses_of is not None:
            self._hook = weigh_losses_of(loop.losses_of, loop.network, self.terms)
        self._loop, self.words = loop, Words(self.balancer, loop, type(self).__name__)
        self.reading.open(loop.network, loop.shared_layer, self.balancer.known_tasks, loop.giver)
        self.begin_batch()

    def close(self) -> None:
        """End the run: no graph, network or hook is held; totals are the plain sum from now on."""
        self.drop()
        self.reading.close()
        if self._hook is not None:
            self._hook.remove()
        self._close()

    def _close(self) -> None:
        self._loop = None
        self._hook = None
        self.words = Words(self.balancer, None, type(self).__name__)
        self._has_measured = False
        self._measuring = Measuring(self.reading, self.balancer)
        self._note_nothing()
        self._new_window()

    def _new_window(self) -> None:
        self._measuring.new_window()
        self._noted_points: dict[str, list[NotedPoints]] = {}
        self._balanced: set[str] = set()  # tasks whose total went backward in this step
        self._stepping = False
        self._in_backward = False

    def start_anew(self) -> None:
        """Forget all that was learnt: weights, L(0), masks, W. The next step starts as on another problem."""
        self.balancer.reset()
        for weighting in self.points.values():
            weighting.reset()
        self.reading.known_names = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("balancer", "points", "reading", "handed_out")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """All that was learnt, as plain tensors, numbers, strings, lists and dicts."""
        return {
            "balancer": self.balancer.state_dict(),
            "shared_layer": list(self.reading.known_names) if self.balancer.steps else [],
            "points": {task: weighting.state_dict() for task, weighting in self.points.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``; further entries are left alone.

        Args:
            state: what it gave.
        """
        self.balancer.load_state_dict(state["balancer"])
        self.reading.known_names = list(state["shared_layer"])
        for task, weighting in self.points.items():
            if task in state["points"]:
                weighting.load_state_dict(state["points"][task])

    # -- around the backward ---------------------------------------------------------------------------------------

    def before_backward(self, root: Tensor) -> Mapping[str, Tensor]:
        """Get ready to read the backward of ``root``: a total, scaled or with further terms as the case may be.

        Args:
            root: what ``backward()`` will be called on.

        Returns:
            The losses that it takes to the step, task → detached scalar; none of a root that is no total's, or of a closure
            that is evaluated again.

        Raises:
            UnreachedSharedLayerError: if some of the tasks reach W and others do not.
            ScatteredTasksError: if the method acts in the backward, and the tasks meet at several places.
            RuntimeError: if it does, and a closure is evaluated again.
            ValueError: if there is no W.
        """
        loop, self._in_backward = self._loop, True
        met = nodes_met(root, {loss.grad_fn for noted in self.noted for loss in noted.roots})
        built = [noted for noted in self.noted if noted.is_met_by(met)]
        if loop is None or not built:
            if self.noted and loop is not None and loop.one_total:
                self.tell("unused", unused())
            return {}
        noted = built[0] if len(built) == 1 else NotedLosses.joined(built)
        self.noted: list[NotedLosses] = [other for other in self.noted if all(other is not one for one in built)]
        if self._stepping and not self._balanced.isdisjoint(noted.losses):
            if self.balancer.acts_in_backward:
                raise RuntimeError(evaluated_again())
            return {}
        self._balanced.update(noted.losses)
        self.words.take(noted.losses, measured=noted.tapped)
        losses = noted.values
        if not noted.tapped or self._measuring.before_backward(root, noted, loop, self.tell):
            self._measuring.add_losses(noted)
            for task, points in noted.points.items():
                self._noted_points.setdefault(task, []).append(points)
        elif self.balancer.acts_in_backward:
            self.tell("plain step", plain_step())
        return losses

    def after_backward(self) -> None:
        """Take what the backward brought.

        Raises:
            IncompleteBackwardError: if it could not be read, and the engine is not chosen by itself.
        """
        self._in_backward = False
        try:
            self._measuring.after_backward()
        except IncompleteBackwardError:
            self.drop()
            if self.reading.engine.engine != "auto" or self.balancer.acts_in_backward:
                raise
        while self.reading.engine.words:
            word = self.reading.engine.words.pop(0)
            self.tell(word, word)

    # -- the optimiser's step --------------------------------------------------------------------------------------

    def drop(self) -> None:
        """Forget the step under way."""
        self._end_step()
        self.balancer.drop_step()

    def _end_step(self) -> None:
        self.reading.drop()
        self._new_window()

    def before_step(self) -> None:
        """The optimiser begins to step; a closure that it evaluates again is no further micro-batch."""
        self._stepping = bool(self._balanced)

    def step(self, *, describe: bool = False, freeze_points: bool = False) -> BalancedStep | None:
        """The optimiser has stepped: update the weights for the next step.

        Args:
            describe: whether the step is wanted also where the balancer does not learn from it; on all ranks alike.
            freeze_points: whether the points' masks stay as they are: a line search needs an objective that stays.

        Returns:
            The step; ``None`` where nothing was measured.
        """
        window, points, balanced = self._measuring.window, {} if freeze_points else self._noted_points, self._balanced
        due, ranks = self.balancer.due, self._loop.ranks if self._loop is not None else None
        self._end_step()
        if self._recording:
            self.begin_batch()
        if ranks is None and not balanced:
            return None  # a step of something else
        if ranks is not None and (due or describe):
            self._measuring.reduce(window, ranks, measures=due and self.balancer.needs_gradients)
        magnitudes = due and "gradient_means" in self.balancer.needs
        measurement = window.measurement(magnitudes=magnitudes) if due or describe else None
        for task, weighting in self.points.items():
            all_reduce, device = (ranks.all_reduce, ranks.device) if ranks is not None else (None, None)
            weighting.update(points.pop(task, []), all_reduce, device)
        if measurement is None:
            self.balancer.update(None)
            return None
        applied, interval = self._applied(measurement.tasks, window.applied), self.balancer.interval
        self.balancer.update(measurement if due else None)
        self.reading.remember()
        if due and self.reading.is_given and not self._has_measured:
            self.tell_counts()  # of a layer that was found, every task was seen to have a gradient
        self._has_measured |= due
        return BalancedStep(measurement, applied, due, window, interval)

    def _applied(self, tasks: tuple[str, ...], here: Mapping[str, Tensor]) -> Tensor:
        """The weights that the step applied, ``[T]``; of a task that only other ranks had, those that it would have had."""
        if tasks == tuple(here):
            return torch.stack(list(here.values()))
        would = zip(tasks, self.balancer.weights_for(tasks).unbind(), strict=True)
        return torch.stack([here.get(task, weight).to(weight) for task, weight in would])

    def end_epoch(self) -> None:
        """An epoch of training is over; for methods that compare epochs, and for what is worth a word by then."""
        if not self.balancer.frozen:
            self.balancer.end_epoch()
        looks = self.shared is None and self.reading.was_looked_for
        self.words.end_epoch(self.handed_out, looks_for_layer=looks)

    # -- what there is -----------------------------------------------------------------------------------------------

    @property
    def shared(self) -> SharedLayer | None:
        """The shared layer W, once it is known."""
        return self.reading.layer

    @property
    def window(self) -> MeasurementWindow:
        """The sums of the optimiser step under way."""
        return self._measuring.window

    def tell(self, about: str, message: str) -> None:
        """Warn of something, once in a run.

        Args:
            about: names the matter.
            message: for people.
        """
        self.words.tell(about, message)

    def tell_counts(self) -> None:
        """Warn of updates that were skipped and of tasks that took no part; asks the device, so not for every step."""
        self.words.tell_counts()
