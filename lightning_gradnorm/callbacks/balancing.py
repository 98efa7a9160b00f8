"""``LossBalancingCallback``: what a user sets and looks at; its hooks are in ``hooks.py``."""

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.balancers.checks import check_choice, check_that
from lightning_gradnorm.callbacks.epoch_log import EpochLog
from lightning_gradnorm.callbacks.homecoming import Homecoming
from lightning_gradnorm.callbacks.hooks import TrainerHooks
from lightning_gradnorm.callbacks.log import BalancingLog
from lightning_gradnorm.callbacks.reporting import Reporting
from lightning_gradnorm.plain import plain_keys
from lightning_gradnorm.pointwise import PointWeighting
from lightning_gradnorm.report.run import RunReport
from lightning_gradnorm.session import BalancingSession, Engine, NormOf
from lightning_gradnorm.shared_layer import SharedLayer
from lightning_gradnorm.term_weight import TermWeight

Mode = Literal["balance", "monitor"]


class LossBalancingCallback(TrainerHooks):
    """Weighs the losses of a module by any ``LossBalancer``.

    The module hands its losses over by ``MultiTaskMixin``. Where somebody else wrote it, whatever code has them in one place
    does by the function ``lightning_gradnorm.total_loss``; a library that takes numbers to multiply its terms by is given
    ``callback.weight(task)`` for each; and where a submodule returns them as a dict, ``losses_of`` is its name.

    Automatic optimisation stays as it is. ``total_loss`` applies the weights; around the backward the tasks' gradients on
    the shared layer are read; once the optimiser has stepped, the balancer updates the weights for the next step.

    Logged, on the steps that ``log_every_n_steps`` asks for, as of the step itself (the weights that it applied): the
    tags of ``lightning_gradnorm.report.tags``. What the step did not measure (a task that is absent, a step that
    ``update_every`` left out) keeps the value last logged. Of each epoch of training and of evaluation the mean losses are
    logged too. At the end of ``fit`` a table goes to the console, ``loss_weights.yaml`` and a figure into the folder of each
    logger's run.

    A second ``fit`` of the same module object goes on with what was learnt; one of another module starts anew, unless a state
    was loaded. A copy has what its original had learnt, and shares nothing with it.

    Args:
        balancer: the method.
        shared_layer: the dotted name of the layer that the tasks share, or a list of names, of modules or parameters of the
            LightningModule; wins over the module's ``shared_layer()``. By default that is asked, or the layer is found.
        losses_of: the dotted name of a submodule whose forward returns a dict of losses in training, as torchvision's
            detectors do: these are weighed on their way out, and the module adds them up as before.
        engine: how the tasks' gradients are read. ``"joint"``: from the one backward; ``"per_task"``: by one
            ``autograd.grad`` per task, slower; ``"auto"``: the first, falling back to the second where the backward cannot
            be read.
        norm_of: ``"parameters"``: the norm of each task's gradient on the shared layer's parameters, the paper's;
            ``"features"``: at the layer's output, which costs nothing more and also serves layers whose parameters are sharded
            or compiled. ``shared_layer()`` has to name the layer then.
        log_cosines: whether to log the cosine between every two tasks' gradients; by default for up to four tasks.
        progress_bar: whether the progress bar shows the weights, of more than four tasks the smallest and the largest.
        points: task → how the single points of its term are weighed; its loss is a vector then, one entry per point.
        mode: ``"balance"``; ``"monitor"`` measures and logs everything and changes no weight: they stay the method's first
            ones, for GradNorm the plain sum.
        summary: whether to print the table and write ``loss_weights.yaml`` and a figure at the end of ``fit``, also of one that
            is interrupted.
        pictures: whether to draw that figure while training goes on as well, ever more rarely and for less than 0.5 % of the
            time, for the loggers that take images: TensorBoard's Images page, W&B, MLflow. Needs matplotlib.
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
        shared_layer: str | list[str] | None = None,
        losses_of: str | None = None,
        engine: Engine = "auto",
        norm_of: NormOf = "parameters",
        log_cosines: bool | None = None,
        progress_bar: bool = False,
        points: Mapping[str, PointWeighting] | None = None,
        mode: Mode = "balance",
        summary: bool = True,
        pictures: bool = True,
        untested_strategies: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(balancer, LossBalancer):
            raise TypeError(
                f"LossBalancingCallback takes a balancer, got {balancer!r}. Write LossBalancingCallback(GradNorm()), "
                "or GradNormCallback()."
            )
        check_choice("mode", mode, get_args(Mode))
        points = plain_keys(points or {})
        for task, weighting in points.items():
            if not isinstance(weighting, PointWeighting):
                raise TypeError(
                    f"points[{task!r}] is {weighting!r}; it is a task's way to weigh its points, such as SelfAdaptivePoints()."
                )
        balancer.frozen = balancer.frozen or mode == "monitor"
        self._session = BalancingSession(balancer, engine=engine, norm_of=norm_of, points=points)
        self._untested_strategies = untested_strategies
        self._shared_layer = _names_of(shared_layer)
        check_that("losses_of", losses_of, losses_of is None or isinstance(losses_of, str), "the dotted name of a submodule")
        self._losses_of = losses_of
        self._log = BalancingLog(log_cosines, progress_bar)
        self._epochs = EpochLog()
        self._reporting = Reporting(summary, pictures)
        self._homecoming = Homecoming()
        self._is_set_up, self._last_mark = False, None
        self._rest()

    def reset(self) -> None:
        """Forget all that was learnt: weights, L(0), masks. The next step starts anew, as for another problem.

        Between stages of one problem think twice: with α > 0 a loss that is small already gets a small new L(0), and with it
        a weight that runs up.
        """
        self.session.start_anew()

    def weight(self, task: str, factor: float = 1.0) -> TermWeight:
        """What to give a library that takes a number to multiply one of its losses by::

            energy_weight=callback.weight("energy", 0.01), force_weight=callback.weight("forces", 0.99)

        In training ``weight * loss`` hands ``factor · loss`` over as that task's loss, and is its share of the balanced total;
        everywhere else it is the number ``factor``. Copied or saved with hyperparameters it stays what it is to this callback,
        and a plain number to everyone else.

        Args:
            task: the term's name.
            factor: the number that the library would have been given.

        Raises:
            TypeError, ValueError: for a name or a number that cannot be used, or a method that has to see all losses of a step
                together.
        """
        return self.session.weight(task, factor)

    # -- what is known of the run ----------------------------------------------------------------------------------

    @property
    def balancer(self) -> LossBalancer:
        """The method."""
        return self.session.balancer

    @property
    def points(self) -> dict[str, PointWeighting]:
        """Task → how the single points of its term are weighed."""
        return self.session.points

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
        self._come_home()
        return dict(self._log.shown)

    @property
    def report(self) -> RunReport:
        """The run's statistics so far, as the table at the end of fit has them."""
        return self._reporting.report(self.balancer)

    @property
    def engine_used(self) -> str | None:
        """``"joint"`` or ``"per_task"``, once a step was measured."""
        return self.session.reading.engine.engine_used

    @property
    def shared(self) -> SharedLayer | None:
        """The shared layer W, once it is known."""
        return self.session.shared


def _names_of(given: object) -> list[str]:
    """Dotted names; a module itself would be copied and pickled with the callback.

    Raises:
        TypeError: for anything else.
    """
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else None
    if given is not None and (not names or not all(isinstance(name, str) for name in names)):
        raise TypeError(
            "shared_layer is the dotted name of a module or parameter of the LightningModule, or a list of names, got "
            f"{given!r}. Write shared_layer='model.trunk.2', as in named_modules()."
        )
    return [str(name) for name in names or ()]
