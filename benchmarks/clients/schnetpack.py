"""SchNet on clusters of eight atoms: energies and forces, in eV and eV/Å."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.clients.measure import Client, main
from lightning_gradnorm import FixedWeights, GradNormCallback, LossBalancingCallback
from tests.clients.test_schnetpack import AtomsLoader, clusters, structure, task

TRAINING, HELD_OUT = ([structure(cluster) for cluster in clusters(count, seed)] for count, seed in ((128, 1), (64, 2)))


def make(callback: LossBalancingCallback | None) -> tuple[Any, Iterable[Any]]:
    weight_of = callback.weight if callback else lambda name: 1.0
    return task(weight_of, seed=torch.initial_seed()), AtomsLoader(TRAINING, batch_size=8, shuffle=True)


def errors(module: Any) -> Mapping[str, float]:
    """Mean absolute errors."""
    module.eval()
    [batch] = AtomsLoader(HELD_OUT, batch_size=len(HELD_OUT))
    truth = {name: batch[name].clone() for name in ("energy", "forces")}
    said = module(batch)
    return {f"{name}, MAE": float((said[name] - value).abs().mean()) for name, value in truth.items()}


METHODS = {
    "plain": lambda: None,
    "0.01 : 0.99": lambda: LossBalancingCallback(FixedWeights({"energy": 0.01, "forces": 0.99}), summary=False),
    "GradNorm": lambda: GradNormCallback(summary=False),
}
CLIENT = Client("schnetpack", ("schnetpack", "pytorch-lightning"), make, errors, steps=400, methods=METHODS, trainer=pl.Trainer)

if __name__ == "__main__":
    main(CLIENT)
