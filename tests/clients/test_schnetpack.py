"""SchNetPack: energies and forces of an ``AtomisticTask`` as it is, under the Trainer of ``pytorch_lightning``."""

# ruff: noqa: E402 (a name has to be put back before SchNetPack is imported)

import pytest
from torch.utils.data import dataloader

# A name that torch once had and SchNetPack before 2.2, which is for Python 3.12, asks for.
dataloader.T_co = getattr(dataloader, "T_co", dataloader._T_co)

pytest.importorskip("schnetpack", reason="SchNetPack is not installed; make clients installs it apart")

import pytorch_lightning as pl
import schnetpack as spk
import torch
from schnetpack import properties
from schnetpack.data import AtomsLoader
from torch import nn

from lightning_gradnorm import GradNormCallback, MultiTaskMixin
from tests.clients.clusters import clusters
from tests.clients.oracle import Oracle, assert_moving, assert_same, fit

pytestmark = pytest.mark.client
TASKS = ("energy", "forces")
CUTOFF = 5.0


class SeenBy(Oracle):
    """Sees each output's loss where SchNetPack has made it, before its weight."""

    def setup(self, trainer, pl_module, stage):
        for output in pl_module.outputs:
            output.loss_fn.register_forward_hook(lambda _, __, loss, name=output.name: self.see({name: loss}))


class Subclassed(MultiTaskMixin, spk.task.AtomisticTask):
    """The same by a class of one's own."""

    def loss_fn(self, pred, batch):
        return self.total_loss({output.name: output.calculate_loss(pred, batch) for output in self.outputs})


def structure(cluster):
    """What SchNetPack's loader takes, every atom the neighbour of every other."""
    count = len(cluster.positions)
    first, second = (~torch.eye(count, dtype=torch.bool)).nonzero(as_tuple=True)
    return {
        properties.Z: torch.full((count,), 18),
        properties.R: cluster.positions.clone(),
        properties.cell: torch.zeros(1, 3, 3),
        properties.pbc: torch.zeros(3, dtype=torch.bool),
        properties.n_atoms: torch.tensor([count]),
        properties.idx_i: first,
        properties.idx_j: second,
        properties.offsets: torch.zeros(len(first), 3),
        properties.energy: cluster.energy.reshape(1),
        properties.forces: cluster.forces,
    }


def task(weight_of=lambda name: 1.0, task_class=spk.task.AtomisticTask, seed=0):
    torch.manual_seed(seed)
    radial = spk.nn.GaussianRBF(n_rbf=8, cutoff=CUTOFF)
    model = spk.model.NeuralNetworkPotential(
        representation=spk.representation.SchNet(16, 2, radial, cutoff_fn=spk.nn.CosineCutoff(CUTOFF)),
        input_modules=[spk.atomistic.PairwiseDistances()],
        output_modules=[spk.atomistic.Atomwise(n_in=16, output_key="energy"), spk.atomistic.Forces()],
    )
    outputs = [spk.task.ModelOutput(name, loss_fn=nn.MSELoss(), loss_weight=weight_of(name), metrics={}) for name in TASKS]
    return task_class(model, outputs, optimizer_cls=torch.optim.Adam, optimizer_args={"lr": 1e-3})


def train(module, balancing=None, oracle=None, **settings):
    batches = AtomsLoader([structure(cluster) for cluster in clusters(24)], batch_size=4)
    return fit(module, batches, balancing, oracle, trainer=pl.Trainer, **settings)


class TestLossWeights:
    def test_the_norms_are_those_of_autograd(self):
        callback = GradNormCallback(summary=False)
        oracle = SeenBy(callback)
        assert train(task(callback.weight), callback, oracle).error(oracle) < 1e-5
        assert callback.engine_used == "joint"

    def test_the_weights_move_and_the_layer_is_the_last_hidden_one(self):
        callback = GradNormCallback(summary=False)
        assert_moving(train(task(callback.weight), callback))
        assert callback.shared.names == ("model.output_modules.0.outnet.0.weight",)

    def test_it_is_the_run_of_a_subclass_with_the_mixin(self):
        one, other = GradNormCallback(summary=False), GradNormCallback(summary=False)
        assert_same(train(task(one.weight), one), train(task(task_class=Subclassed), other))

    def test_a_monitored_run_is_the_plain_one(self):
        callback = GradNormCallback(summary=False, mode="monitor")
        assert torch.equal(train(task(callback.weight), callback).parameters, train(task()).parameters)

    def test_a_hand_tuned_weight_is_a_factor_of_the_task(self):
        one, other = GradNormCallback(summary=False), GradNormCallback(summary=False)
        by_hand = {"energy": 0.01, "forces": 0.99}
        balanced = train(task(lambda name: one.weight(name, by_hand[name])), one)
        assert_same(balanced, train(task(by_hand.get, Subclassed), other))

    def test_a_checkpoint_holds_plain_numbers(self, tmp_path):
        callback = GradNormCallback(summary=False)
        module = task(lambda name: 1.0)
        for output in module.outputs:
            output.loss_weight = callback.weight(output.name)
        assert train(module, callback).weights[-1] != {"energy": 1.0, "forces": 1.0}
        module.trainer.save_checkpoint(tmp_path / "task.ckpt")
        saved = torch.load(tmp_path / "task.ckpt", weights_only=False)["hyper_parameters"]["outputs"]
        assert [type(output.loss_weight) for output in saved] == [float, float]
