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

    It is ``LossBalancingCallback(GradNorm(…))`` with flat arguments; see ``GradNorm`` for the method's, and
    ``LossBalancingCallback`` for ``shared_layer``, ``losses_of``, ``engine``, ``norm_of``, ``log_cosines``, ``progress_bar``,
    ``points``, ``mode``, ``summary`` and ``untested_strategies``.
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
            untested_strategies=untested_strategies,
        )
