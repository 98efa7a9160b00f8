"""An MPNN with six targets of unlike units, 30 % of their labels missing, of the last 90 %; ``--scaled`` standardises them."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from chemprop.nn import UnscaleTransform

from benchmarks.clients.measure import Client, main
from lightning_gradnorm import LossBalancingCallback
from tests.clients.test_chemprop import TARGETS, BalancedMSE, MoleculeDataset, build_dataloader, dataset, network

SCALED = "--scaled" in sys.argv
if SCALED:
    sys.argv.remove("--scaled")

KNOWN, ALL = dataset(), dataset(missing=0.0)  # the same molecules in the same order
TRAINING, HELD_OUT = MoleculeDataset(KNOWN.data[:448]), MoleculeDataset(ALL.data[448:])
SCALER = TRAINING.normalize_targets() if SCALED else None


def make(callback: LossBalancingCallback | None) -> tuple[Any, Iterable[Any]]:
    scale = UnscaleTransform.from_standard_scaler(SCALER) if SCALED else None
    module = network(BalancedMSE() if callback else None, seed=torch.initial_seed(), output_transform=scale)
    return module, build_dataloader(TRAINING, batch_size=32)


@torch.no_grad()
def errors(module: Any) -> Mapping[str, float]:
    """Of each target, the RMSE over the standard deviation, and their mean."""
    module.eval()
    [batch] = build_dataloader(HELD_OUT, batch_size=len(HELD_OUT), shuffle=False)
    found = (module(batch.bmg) - batch.Y).square().mean(0).sqrt() / torch.from_numpy(np.std(ALL.Y, axis=0))
    return dict(zip(TARGETS, found.tolist(), strict=True)) | {"mean": float(found.mean())}


CLIENT = Client("chemprop_scaled" if SCALED else "chemprop", ("chemprop", "lightning"), make, errors, steps=500)

if __name__ == "__main__":
    main(CLIENT)
