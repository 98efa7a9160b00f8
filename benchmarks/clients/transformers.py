"""A BERT-like encoder with three heads, of unlike losses: a tag per word, a count in units of a tenth, a yes or no."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.clients.measure import Client, main
from lightning_gradnorm import GradNormCallback, LossBalancingCallback
from tests.clients.test_transformers import Reader, WithTotalLoss, batches

TRAINING, HELD_OUT = (batches(count, seed=seed).dataset for count, seed in ((512, 1), (128, 2)))


def make(callback: LossBalancingCallback | None) -> tuple[Reader, DataLoader]:
    return WithTotalLoss(), DataLoader(TRAINING, batch_size=32, shuffle=True)


@torch.no_grad()
def errors(module: Any) -> Mapping[str, float]:
    words, tags, number, seen = HELD_OUT.tensors
    module.eval()
    states = module.encoder(input_ids=words).last_hidden_state
    return {
        "tags wrong": float((module.tag(states).argmax(-1) != tags).float().mean()),
        "number, RMSE": float((module.number(states[:, 0])[:, 0] - number).square().mean().sqrt()),
        "seen wrong": float((module.seen(states[:, 0]).argmax(-1) != seen).float().mean()),
    }


METHODS = {
    "plain": lambda: None,
    "GradNorm": lambda: GradNormCallback(summary=False),
    "GradNorm, max_weight=10": lambda: GradNormCallback(max_weight=10, summary=False),
}
CLIENT = Client("transformers", ("transformers", "lightning"), make, errors, steps=600, methods=METHODS, longer=1500)

if __name__ == "__main__":
    main(CLIENT)
