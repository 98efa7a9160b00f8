"""PINA: a solver of its own, whose weighting takes a number per condition."""

from functools import partial

import pytest

pytest.importorskip("pina", reason="PINA is not installed; make clients installs it apart")

import lightning as L
import torch
from pina.model import FeedForward
from pina.problem.zoo import Poisson2DSquareProblem
from pina.solver import (
    GradientPhysicsInformedSingleModelSolver,
    PhysicsInformedSingleModelSolver,
    RBAPhysicsInformedSingleModelSolver,
)
from pina.trainer import Trainer
from pina.weighting import ScalarWeighting
from torch import nn

from lightning_gradnorm import GradNormCallback, MultiTaskMixin
from tests.clients.oracle import Oracle, Trace, assert_moving, assert_same, fit

pytestmark = pytest.mark.client
CONDITIONS = ("boundary", "D")
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class SeenBy(Oracle):
    """Sees each condition's loss where PINA has made it."""

    def setup(self, trainer, pl_module, stage):
        compute = pl_module._compute_condition_loss

        def spy(condition, data, batch_idx):
            loss = compute(condition, data, batch_idx)
            self.see({next(name for name, one in pl_module.problem.conditions.items() if one is condition): loss})
            return loss

        pl_module._compute_condition_loss = spy


class Solving(Trainer):
    """PINA's, whose ``fit`` is called ``train``, and which logs no step where a batch is all points unless one insists."""

    def fit(self, module, batches):
        self.log_every_n_steps = 1
        self.train()


class Subclassed(MultiTaskMixin, PhysicsInformedSingleModelSolver):
    """The same by a class of one's own: PINA's weighting is passed by."""

    def batch_evaluation_step(self, batch, batch_idx):
        losses = {
            name: self._compute_condition_loss(self.problem.conditions[name], dict(data), batch_idx) for name, data in batch
        }
        return self.total_loss(losses)


def solver(weighting=None, solver_class=PhysicsInformedSingleModelSolver):
    L.seed_everything(0, verbose=False)  # PINA shuffles its points by Python's random numbers
    problem = Poisson2DSquareProblem()
    problem.discretise_domain(n=64, mode="random", domains=["D"])
    problem.discretise_domain(n=32, mode="random", domains=["boundary"])
    return solver_class(problem, FeedForward(2, 1, layers=[16, 16], func=nn.Tanh), weighting=weighting)


def train(module, balancing=None, oracle=None, **settings) -> Trace:
    return fit(module, None, balancing, oracle, trainer=partial(Solving, module), **({"max_epochs": 30} | settings))


def balanced(callback, solver_class=PhysicsInformedSingleModelSolver):
    return solver(ScalarWeighting({name: callback.weight(name) for name in CONDITIONS}), solver_class)


class TestWeighting:
    @pytest.mark.parametrize(
        "solver_class",
        [
            PhysicsInformedSingleModelSolver,
            GradientPhysicsInformedSingleModelSolver,
            RBAPhysicsInformedSingleModelSolver,
        ],
    )
    def test_the_norms_are_those_of_autograd(self, solver_class):
        callback = GradNormCallback(summary=False)
        oracle = SeenBy(callback)
        trace = train(balanced(callback, solver_class), callback, oracle)
        assert trace.error(oracle) < 1e-5
        assert callback.engine_used == "joint"

    def test_the_weights_move_and_the_layer_is_the_last_hidden_one(self):
        callback = GradNormCallback(summary=False)
        assert_moving(train(balanced(callback), callback))
        assert callback.shared.names == ("_pina_models.0.model.2.weight",)

    def test_it_is_the_run_of_a_subclass_with_the_mixin(self):
        one, other = GradNormCallback(summary=False), GradNormCallback(summary=False)
        assert_same(train(balanced(one), one), train(solver(solver_class=Subclassed), other))

    def test_a_monitored_run_is_the_plain_one(self):
        callback = GradNormCallback(summary=False, mode="monitor")
        assert torch.equal(train(balanced(callback), callback).parameters, train(solver()).parameters)

    def test_a_test_run_is_weighed_by_nothing(self):
        callback = GradNormCallback(summary=False)
        module = balanced(callback)
        trainer = Trainer(module, train_size=0.8, test_size=0.2, max_epochs=30, callbacks=[callback], **QUIET)
        trainer.train()
        assert callback.weights["boundary"] != 1
        [found] = trainer.test()
        assert found["test_loss"] == pytest.approx(found["boundary_loss"] + found["D_loss"])
