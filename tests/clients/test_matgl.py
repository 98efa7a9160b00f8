"""MatGL: energies, forces and stresses of a ``PotentialLightningModule`` as it is, whose constructor takes three weights."""

from itertools import cycle

import pytest

pytest.importorskip("matgl", reason="MatGL is not installed; make clients installs it apart")

import torch
from matgl.ext.pymatgen import Structure2Graph
from matgl.graph.data import collate_fn_pes
from matgl.models import TensorNet
from matgl.utils.training import PotentialLightningModule
from pymatgen.core import Lattice, Structure
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_gradnorm import GradNormCallback, MultiTaskMixin
from tests.clients.clusters import clusters
from tests.clients.oracle import Oracle, assert_moving, assert_same, fit

pytestmark = pytest.mark.client
TASKS = ("energy", "force", "stress")
BOX, CUTOFF = 12.0, 5.0  # Å: no atom sees its image


class SeenBy(Oracle):
    """Sees each term where MatGL has made it, in MatGL's order."""

    def setup(self, trainer, pl_module, stage):
        tasks = cycle(TASKS)

        def spy(label, prediction):
            loss = F.mse_loss(label, prediction)
            self.see({next(tasks): loss})
            return loss

        pl_module.loss = spy


class Subclassed(MultiTaskMixin, PotentialLightningModule):
    """The same by a class of one's own."""

    def loss_fn(self, loss, labels, preds, num_atoms=None):
        per_atom = [(labels[0] / num_atoms, preds[0] / num_atoms), *zip(labels[1:], preds[1:], strict=True)]
        total = self.total_loss({task: loss(*pair) for task, pair in zip(TASKS, per_atom, strict=True)})
        return super().loss_fn(loss, labels, preds, num_atoms) | {"Total_Loss": total}


def structure(cluster):
    """What MatGL's loader takes."""
    cell = Structure(Lattice.cubic(BOX), ["Ar"] * len(cluster.positions), cluster.positions.numpy(), coords_are_cartesian=True)
    graph, lattice, state = Structure2Graph(("Ar",), CUTOFF).get_graph(cell)
    stress = -cluster.positions.T @ cluster.forces / BOX**3 * 160.21766208  # GPa
    return graph, lattice, torch.tensor(state), {"energies": cluster.energy, "forces": cluster.forces, "stresses": stress}


def potential(weight_of=lambda name: 1.0, module_class=PotentialLightningModule, seed=0):
    torch.manual_seed(seed)
    model = TensorNet(element_types=("Ar",), units=16, nblocks=1, num_rbf=8, cutoff=CUTOFF, is_intensive=False)
    return module_class(model, lr=1e-3, **{f"{task}_weight": weight_of(task) for task in TASKS})


def train(module, balancing=None, oracle=None):
    batches = DataLoader([structure(cluster) for cluster in clusters(24)], batch_size=4, collate_fn=collate_fn_pes)
    return fit(module, batches, balancing, oracle)


class TestWeights:
    def test_the_norms_are_those_of_autograd(self):
        callback = GradNormCallback(summary=False)
        oracle = SeenBy(callback)
        assert train(potential(callback.weight), callback, oracle).error(oracle) < 1e-5
        assert callback.engine_used == "joint"

    def test_the_weights_move_and_the_layer_is_the_last_of_the_gate(self):
        callback = GradNormCallback(summary=False)
        assert_moving(train(potential(callback.weight), callback))
        assert callback.shared.names == ("model.model.final_layer.gated.gates.4.weight",)

    def test_it_is_the_run_of_a_subclass_with_the_mixin(self):
        one, other = GradNormCallback(summary=False), GradNormCallback(summary=False)
        assert_same(train(potential(one.weight), one), train(potential(module_class=Subclassed), other))

    def test_a_monitored_run_is_the_plain_one(self):
        callback = GradNormCallback(summary=False, mode="monitor")
        assert torch.equal(train(potential(callback.weight), callback).parameters, train(potential()).parameters)

    def test_the_saved_hyperparameters_are_plain_numbers(self):
        module = potential(GradNormCallback(summary=False).weight)
        assert {name: module.hparams[f"{name}_weight"] for name in TASKS} == dict.fromkeys(TASKS, 1.0)
