"""# Energies and forces

An interatomic potential learns an energy, and the forces, which are the energy's slopes. The two losses come in
different units, and what weight the forces should have is a question that every such program asks its user. This page
lets it be measured.

Run it: `python docs/tutorials/forces.py`, a minute on one core; with `--quick` some seconds.
"""

import sys
import warnings

import lightning as L
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradnorm import FixedWeights, GradNormCallback, LossBalancingCallback, MultiTaskMixin

QUICK = "--quick" in sys.argv
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec)")
torch.set_num_threads(1)

# %%
# ## The data
#
# Clusters of seven atoms, shaken; the truth is a Morse potential between every two of them. Energies are of the whole
# cluster, in electronvolts; forces in electronvolts per ångström, one vector per atom.

ATOMS = 7
PAIRS = torch.triu_indices(ATOMS, ATOMS, 1)


def distances(positions):
    return (positions[:, PAIRS[0]] - positions[:, PAIRS[1]]).norm(dim=2)


def morse(positions):
    near = (-1.5 * (distances(positions) - 2.5)).exp()
    return (0.8 * (near.square() - 2 * near)).sum(1)


def with_slopes(energy_of, positions, create_graph=False):
    positions = positions.requires_grad_()
    energy = energy_of(positions)
    (slopes,) = torch.autograd.grad(energy.sum(), positions, create_graph=create_graph)
    return energy, -slopes


torch.manual_seed(0)
places = torch.tensor([[0, 0, 0], *([2.6 * s if i == j else 0 for j in range(3)] for i in range(3) for s in (1, -1))])
positions = places + 0.25 * torch.randn(1200, ATOMS, 3)
energies, forces = (part.detach() for part in with_slopes(morse, positions))
positions = positions.detach()
learnt = TensorDataset(positions[:1000], energies[:1000] - energies[:1000].mean(), forces[:1000])
held = positions[1000:], energies[1000:] - energies[:1000].mean(), forces[1000:]
print(f"deviation of the energies {held[1].std():.2f} eV, of the forces {held[2].std():.2f} eV/Å")

# %%
# ## The module
#
# Each atom is described by how many neighbours it has at which distance, and a small network makes an energy of that. The
# forces' loss goes through the graph of a derivative; nothing has to be said about that.


class Potential(MultiTaskMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.register_buffer("centres", torch.linspace(1, 6, 24))
        self.energy = nn.Sequential(nn.Linear(24, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))

    def energy_of(self, positions):
        shells = (-8 * (distances(positions)[:, :, None] - self.centres).square()).exp()
        around = shells.new_zeros(len(positions), ATOMS, 24).index_add(1, PAIRS[0], shells).index_add(1, PAIRS[1], shells)
        return self.energy(around).sum((1, 2))

    def training_step(self, batch, batch_idx):
        positions, energies, forces = batch
        energy, force = with_slopes(self.energy_of, positions, create_graph=True)
        return self.total_loss({"energy": mse_loss(energy, energies), "forces": mse_loss(force, forces)})

    def configure_optimizers(self):
        adam = torch.optim.Adam(self.parameters(), lr=2e-3)
        steps = 32 * (2 if QUICK else 60)
        return {
            "optimizer": adam,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps), "interval": "step"},
        }


# %%
# ## Three trainings
#
# The plain sum; a factor for the forces as one might guess it; GradNorm, which is told nothing.

callback = GradNormCallback(summary=False)
ways = {
    "plain sum": [],
    "forces × 100": [LossBalancingCallback(FixedWeights({"energy": 1, "forces": 100}), summary=False)],
    "GradNorm": [callback],
}
quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
for name, callbacks in ways.items():
    torch.manual_seed(0)
    module = Potential()
    trainer = L.Trainer(max_epochs=2 if QUICK else 60, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(module, DataLoader(learnt, batch_size=32, shuffle=True))
    energy, force = with_slopes(module.energy_of, held[0])
    errors = mse_loss(energy, held[1]).sqrt(), mse_loss(force, held[2]).sqrt()
    print(f"{name}: energies {1000 * errors[0]:.0f} meV off, forces {1000 * errors[1]:.0f} meV/Å off")
print("weights:", {task: float(f"{weight:.3g}") for task, weight in callback.weights.items()})

# %%
# ## What to take from it
#
# GradNorm's weights are what makes the two losses' gradients on the readout's last hidden weight alike. The guess of a
# hundred is better on the energies and GradNorm on the forces, both far better than the plain sum; nobody had to guess a
# factor, or to guess another one for other units. Energies and forces are nearly free to measure; stresses beside them are
# not. What it costs, and how often to measure: [energies, forces, stresses](../forces.md). In a library that takes loss
# weights as numbers: [SchNetPack](../recipes/schnetpack.md), [MatGL](../recipes/matgl.md).
