"""TensorNet on clusters of eight atoms in a box: energies per atom, forces and stresses, in eV, eV/Å and GPa."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.clients.measure import Client, main
from lightning_gradnorm import LossBalancingCallback
from tests.clients.test_matgl import clusters, collate_fn_pes, potential, structure

TRAINING, HELD_OUT = ([structure(cluster) for cluster in clusters(count, seed)] for count, seed in ((64, 1), (32, 2)))


def make(callback: LossBalancingCallback | None) -> tuple[Any, Iterable[Any]]:
    weight_of = callback.weight if callback else lambda name: 1.0
    module = potential(weight_of, seed=torch.initial_seed())
    return module, DataLoader(TRAINING, batch_size=8, shuffle=True, collate_fn=collate_fn_pes)


def errors(module: Any) -> Mapping[str, float]:
    """Mean absolute errors."""
    module.eval()
    graph, lattice, state, energies, forces, stresses = collate_fn_pes(HELD_OUT)
    said = module(g=graph, lat=lattice, state_attr=state)
    pairs = {
        "energy per atom, MAE": (said[0] / 8, energies / 8),
        "force, MAE": (said[1], forces),
        "stress, MAE": (said[2], stresses),
    }
    return {name: float((mine - truth).abs().mean()) for name, (mine, truth) in pairs.items()}


CLIENT = Client("matgl", ("matgl", "lightning"), make, errors, steps=160)

if __name__ == "__main__":
    main(CLIENT)
