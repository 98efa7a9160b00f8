"""A Temporal Fusion Transformer with two targets: visitors, a few tens, and sales, some thousands, each in its own units."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pytorch_forecasting import TimeSeriesDataSet
from pytorch_forecasting.metrics import MultiLoss

from benchmarks.clients.measure import Client, main
from lightning_gradnorm import FixedWeights, GradNormCallback, LossBalancingCallback
from tests.clients.test_pytorch_forecasting import TARGETS, by_weights, dataset, metrics, network, series

DAYS, HELD_OUT = 140, 28
ALL = series(shops=12, days=DAYS)
TRAINING = dataset(ALL[ALL.day < DAYS - HELD_OUT])
LATER = TimeSeriesDataSet.from_dataset(TRAINING, ALL, min_prediction_idx=DAYS - HELD_OUT, stop_randomization=True)


def make(callback: LossBalancingCallback | None) -> tuple[Any, Iterable[Any]]:
    loss = by_weights(metrics(), callback) if callback else MultiLoss(metrics())
    return network(TRAINING, loss, lr=1e-2), TRAINING.to_dataloader(train=True, batch_size=32)


def errors(module: Any) -> Mapping[str, float]:
    """Mean absolute errors, in the targets' units."""
    loader = LATER.to_dataloader(train=False, batch_size=64)
    said = module.predict(loader, return_y=True, trainer_kwargs={"logger": False, "enable_progress_bar": False})
    pairs = zip(TARGETS, said.output, said.y[0], strict=True)
    return {f"{target}, MAE": float((torch.as_tensor(y_hat) - y).abs().mean()) for target, y_hat, y in pairs}


METHODS = {
    "plain": lambda: None,
    "sales divided by 90": lambda: LossBalancingCallback(FixedWeights({"visitors": 1, "sales": 1 / 90}), summary=False),
    "GradNorm": lambda: GradNormCallback(summary=False),
}
CLIENT = Client(
    "pytorch_forecasting",
    ("pytorch-forecasting", "lightning"),
    make,
    errors,
    steps=250,
    methods=METHODS,
    settings={"gradient_clip_val": 0.1},
)

if __name__ == "__main__":
    main(CLIENT)
