"""``GradNormCallback``: GradNorm in one line of a Trainer."""

from collections.abc import Mapping

from lightning_gradnorm.balancers.gradnorm import GradNorm, Update, UpdateEvery
from lightning_gradnorm.balancers.initial_losses import InitialLosses
from lightning_gradnorm.balancers.optimizer import OptimizerFactory
from lightning_gradnorm.balancers.scale import ScaleRule
from lightning_gradnorm.callbacks.balancing import LossBalancingCallback, Mode
from lightning_gradnorm.pointwise import PointWeighting
from lightning_gradnorm.session import Engine, NormOf


class GradNormCallback(LossBalancingCallback):
    """Balances a multi-task module's losses with GradNorm (Chen et al., ICML 2018)::

        trainer = L.Trainer(callbacks=[GradNormCallback()])

    It is ``LossBalancingCallback(GradNorm(…))`` with flat arguments: up to ``tasks`` they are the method's, about which
    ``GradNorm`` says more; from ``shared_layer`` on the callback's, about which ``LossBalancingCallback`` does.

    Args:
        alpha: α ≥ 0: 0, the default, makes all weighted norms alike; larger favours tasks that train slowly.
        lr: the least share of its way that a weight goes in a step. By default the rate falls by itself.
        residuals: in physics-informed networks the tasks that are residuals of equations: they keep weight 1.
        update: ``"average"``, the default; ``"paper"``: Algorithm 1 as printed, with Σ w = T.
        optimizer: factory of the weights' optimiser, called as ``optimizer([weights], lr=lr)``.
        initial_losses: L_i(0): ``"first"``, the mean of the first N, or given per task.
        update_every: ``"auto"``: the first 100 steps are measured, then ever fewer; n: one step in n.
        min_weight: least weight that is applied, above 0 and at most 1.
        max_weight: greatest weight that is applied, at least 1; ``None`` for no bound.
        priorities: task → relative importance, a factor of the targets; 1 for tasks not named.
        tasks: all tasks' names, if they are to be fixed from the start.
        shared_layer: dotted name of the layer that the tasks share, or a list of names; by default it is found.
        losses_of: dotted name of a submodule whose forward returns a dict of losses in training.
        engine: ``"joint"``: gradients from the one backward; ``"per_task"``: by one each; ``"auto"``: the first that works.
        norm_of: ``"parameters"`` of the shared layer, or its ``"features"``, for sharded or compiled layers.
        log_cosines: whether to log the cosines between gradients; by default for up to four tasks.
        progress_bar: whether the progress bar shows the weights.
        points: task → how the single points of its term are weighed.
        mode: ``"balance"``; ``"monitor"`` measures and logs everything and changes no weight.
        summary: whether a table, ``loss_weights.yaml`` and a figure come at the end of ``fit``.
        pictures: whether that figure is drawn while training goes on, for loggers that take images.
        untested_strategies: whether to run under strategies of the Trainer that were not tested.
        scale: deprecated, as in ``GradNorm``.
        reference: deprecated: write ``residuals``.
        ema_decay: deprecated, as in ``GradNorm``.

    Raises:
        ValueError, TypeError: for a setting outside its range; see ``GradNorm``.
    """

    def __init__(
        self,
        alpha: float | None = None,
        lr: float | None = None,
        *,
        residuals: list[str] | None = None,
        update: Update | None = None,
        optimizer: OptimizerFactory | None = None,
        initial_losses: InitialLosses = "first",
        update_every: UpdateEvery = "auto",
        min_weight: float = 1e-8,
        max_weight: float | None = 1e8,
        priorities: Mapping[str, float] | None = None,
        tasks: list[str] | None = None,
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
        scale: ScaleRule | None = None,
        reference: str | None = None,
        ema_decay: float | None = None,
    ) -> None:
        balancer = GradNorm(
            alpha,
            lr,
            residuals=residuals,
            update=update,
            optimizer=optimizer,
            initial_losses=initial_losses,
            update_every=update_every,
            min_weight=min_weight,
            max_weight=max_weight,
            priorities=priorities,
            tasks=tasks,
            scale=scale,
            reference=reference,
            ema_decay=ema_decay,
        )
        super().__init__(
            balancer,
            shared_layer=shared_layer,
            losses_of=losses_of,
            engine=engine,
            norm_of=norm_of,
            log_cosines=log_cosines,
            progress_bar=progress_bar,
            points=points,
            mode=mode,
            summary=summary,
            pictures=pictures,
            untested_strategies=untested_strategies,
        )
