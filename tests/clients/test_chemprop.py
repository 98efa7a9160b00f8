"""chemprop: an ``MPNN`` as it is, six targets of unlike units, many labels missing; its criterion hands the losses over."""

from itertools import product

import pytest

pytest.importorskip("chemprop", reason="chemprop is not installed; make clients installs it apart")

import numpy as np
import torch
from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader
from chemprop.models import MPNN
from chemprop.nn import BondMessagePassing, MeanAggregation, RegressionFFN
from chemprop.nn.metrics import MSE
from rdkit.Chem import Crippen, Descriptors, MolFromSmiles, rdMolDescriptors

from lightning_gradnorm import GradNormCallback, MultiTaskMixin, total_loss
from tests.clients.oracle import Oracle, assert_moving, assert_same, fit

pytestmark = pytest.mark.client
TARGETS = {
    "weight": Descriptors.MolWt,
    "logP": Crippen.MolLogP,
    "polar_area": rdMolDescriptors.CalcTPSA,
    "refraction": Crippen.MolMR,
    "complexity": Descriptors.BertzCT,
    "sp3": rdMolDescriptors.CalcFractionCSP3,
}
ENDS = ("O", "N", "Cl", "C#N", "C(=O)O", "C(=O)N", "OC", "SC", "c1ccccc1", "c1ccncc1", "C1CCCC1", "C(F)(F)F")


def dataset(seed: int = 0, missing: float = 0.3) -> MoleculeDataset:
    """Chains with two ends, each target known of a share of them, the last of few."""
    random = np.random.default_rng(seed)
    smiles = [f"{'C' * length}C({first}){second}" for length, first, second in product(range(1, 5), ENDS, ENDS)]
    random.shuffle(smiles)
    values = np.array([[value(MolFromSmiles(one)) for value in TARGETS.values()] for one in smiles])
    values[random.random(values.shape) < [missing] * (len(TARGETS) - 1) + [missing and 0.9]] = np.nan
    return MoleculeDataset([MoleculeDatapoint.from_smi(one, row) for one, row in zip(smiles, values, strict=True)])


def terms(errors, weights, mask):
    """Of each target that has a label in the batch, its part of chemprop's loss."""
    parts = errors * weights.view(-1, 1) * mask / mask.sum()
    return {name: parts[:, k].sum() for k, name in enumerate(TARGETS) if mask[:, k].any()}


class BalancedMSE(MSE):
    """chemprop's, one loss per target."""

    def forward(self, preds, targets, mask, weights, *bounds):
        super().forward(preds.detach(), targets, mask, weights, *bounds)  # what chemprop logs
        return total_loss(terms(self._calc_unreduced_loss(preds, targets), weights, mask))


class SeenBy(Oracle):
    """Sees the losses through the criterion, from its own arithmetic."""

    def setup(self, trainer, pl_module, stage):
        def spy(criterion, given):
            preds, targets, mask, weights, *_ = given
            labels = [mask[:, k].nonzero()[:, 0] for k in range(len(TARGETS))]
            squares = [(preds[rows, k] - targets[rows, k]).square() * weights.view(-1)[rows] for k, rows in enumerate(labels)]
            self.see({name: s.sum() / mask.sum() for name, s in zip(TARGETS, squares, strict=True) if len(s)})

        pl_module.criterion.register_forward_pre_hook(spy)


class Subclassed(MultiTaskMixin, MPNN):
    """The same by a class of one's own."""

    def training_step(self, batch, batch_idx):
        graph, _, features, targets, weights, *_ = batch
        preds = self.predictor.train_step(self.fingerprint(graph, None, features))
        errors = MSE._calc_unreduced_loss(self.criterion, preds, targets.nan_to_num(nan=0.0))
        return self.total_loss(terms(errors, weights, targets.isfinite()))


def network(criterion=None, module_class=MPNN, seed=0, output_transform=None):
    torch.manual_seed(seed)
    encoder = BondMessagePassing(d_h=32, depth=2)
    heads = RegressionFFN(
        n_tasks=len(TARGETS), input_dim=32, hidden_dim=32, criterion=criterion, output_transform=output_transform
    )
    return module_class(encoder, MeanAggregation(), heads, warmup_epochs=1)


def train(module, balancing=None, oracle=None, **data):
    batches = build_dataloader(MoleculeDataset(dataset(**data).data[:96]), batch_size=8, shuffle=False)
    return fit(module, batches, balancing, oracle, max_epochs=2)


class TestCriterion:
    def test_the_norms_are_those_of_autograd_with_labels_missing(self):
        callback = GradNormCallback(summary=False)
        oracle = SeenBy(callback)
        trace = train(network(BalancedMSE()), callback, oracle)
        assert trace.error(oracle) < 1e-5
        assert any(len(norms) < len(TARGETS) for norms in oracle.expected), "in some batch a target has no label"
        assert callback.engine_used == "joint"

    def test_the_weights_move_and_the_layer_is_the_last_hidden_one(self):
        callback = GradNormCallback(summary=False)
        assert_moving(train(network(BalancedMSE()), callback, missing=0.0))
        assert callback.shared.names == ("predictor.ffn.0.0.weight",)

    def test_it_is_the_run_of_a_subclass_with_the_mixin(self):
        one, other = GradNormCallback(summary=False), GradNormCallback(summary=False)
        assert_same(train(network(BalancedMSE()), one), train(network(module_class=Subclassed), other))

    def test_a_monitored_run_is_chemprops_own_but_for_the_order_of_its_sum(self):
        callback = GradNormCallback(summary=False, mode="monitor")
        monitored, plain = train(network(BalancedMSE()), callback), train(network())
        assert monitored.parameters == pytest.approx(plain.parameters, rel=1e-3, abs=1e-5)
