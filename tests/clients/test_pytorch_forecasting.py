"""A Temporal Fusion Transformer, as it comes, with two targets in their own units."""

import pytest

pytest.importorskip("pytorch_forecasting", reason="pytorch-forecasting is not installed; make clients installs it apart")

import numpy as np
import pandas as pd
import torch
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import GroupNormalizer, MultiNormalizer
from pytorch_forecasting.metrics import MAE, MultiLoss, QuantileLoss
from torch import nn

from lightning_gradnorm import GradNormCallback, MultiTaskMixin, total_loss
from tests.clients.oracle import Oracle, assert_moving, assert_same, fit

pytestmark = pytest.mark.client

TARGETS = "visitors", "sales"
QUANTILES = [0.1, 0.5, 0.9]


def series(shops: int, days: int) -> pd.DataFrame:
    """Two seasonal series per shop: one of a few tens, one of some thousands."""
    draws, day = np.random.default_rng(1), np.arange(days)
    frames = []
    for shop in range(shops):
        visitors = 20 + 5 * shop + 6 * np.sin(2 * np.pi * day / 7) + draws.normal(size=days)
        sales = 3000 + 90 * visitors + 300 * draws.normal(size=days)
        frames.append(pd.DataFrame({"day": day, "shop": str(shop), "visitors": visitors, "sales": sales}))
    return pd.concat(frames, ignore_index=True)


def dataset(frame: pd.DataFrame) -> TimeSeriesDataSet:
    return TimeSeriesDataSet(
        frame,
        time_idx="day",
        target=list(TARGETS),
        group_ids=["shop"],
        max_encoder_length=14,
        max_prediction_length=7,
        static_categoricals=["shop"],
        time_varying_known_reals=["day"],
        time_varying_unknown_reals=list(TARGETS),
        target_normalizer=MultiNormalizer([GroupNormalizer(groups=["shop"]) for _ in TARGETS]),
    )


def metrics() -> list[nn.Module]:
    return [QuantileLoss(QUANTILES), MAE()]


def network(data: TimeSeriesDataSet, loss: nn.Module, kind: type = TemporalFusionTransformer, lr: float = 1e-3):
    sizes = {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 4, "output_size": [len(QUANTILES), 1]}
    return kind.from_dataset(data, loss=loss, learning_rate=lr, log_interval=-1, **sizes)


class BalancedLoss(MultiLoss):
    """The same losses, handed over where they are added up."""

    hand_over = staticmethod(total_loss)

    def forward(self, y_pred, y_actual, **kwargs):
        values, times = y_actual
        return self.hand_over({n: m(p, (y, times)) for n, m, p, y in zip(TARGETS, self.metrics, y_pred, values, strict=True)})


class WithMixin(MultiTaskMixin, TemporalFusionTransformer):
    def setup(self, stage):
        self.loss.hand_over = self.total_loss


def trained(make_loss, kind=TemporalFusionTransformer, mode: str | None = "balance"):
    """With a callback in that mode, or none; ``make_loss`` is called with the metrics and the callback."""
    callback = GradNormCallback(mode=mode, summary=False) if mode else None
    oracle = Oracle(callback) if mode else None
    torch.manual_seed(0)
    data = dataset(series(shops=4, days=40))
    module = network(data, make_loss(metrics(), callback), kind)
    if oracle:
        for target, metric in zip(TARGETS, module.loss.metrics, strict=True):
            metric.register_forward_hook(lambda metric, args, loss, target=target: oracle.see({target: loss}))
    batches = data.to_dataloader(train=True, batch_size=16)
    return callback, oracle, fit(module, batches, callback, oracle, gradient_clip_val=0.1)


def by_weights(metrics, callback):
    return MultiLoss(metrics, weights=[callback.weight(target) for target in TARGETS])


def by_total_loss(metrics, callback):
    return BalancedLoss(metrics)


def plain(metrics, callback):
    return MultiLoss(metrics)


def test_a_network_that_nobody_touched_is_balanced_by_the_weights_of_its_multi_loss():
    callback, oracle, trace = trained(by_weights)
    assert trace.error(oracle) < 1e-6
    assert callback.shared.names == ("pre_output_gate_norm.glu.fc.weight",)
    assert callback.engine_used == "joint"
    assert_moving(trace)


def test_weights_the_function_and_the_mixin_are_one_run():
    one = trained(by_weights)[2]
    assert_same(one, trained(by_total_loss)[2])
    assert_same(one, trained(by_total_loss, WithMixin)[2])


def test_watching_leaves_the_plain_run_as_it_is():
    watched, untouched = trained(by_weights, mode="monitor")[2], trained(plain, mode=None)[2]
    assert torch.equal(watched.parameters, untouched.parameters)


def test_a_checkpoint_of_the_network_holds_plain_numbers_and_forecasts_the_same(tmp_path):
    callback, data = GradNormCallback(summary=False), dataset(series(shops=4, days=40))
    module = network(data, by_weights(metrics(), callback))
    batches = data.to_dataloader(train=False, batch_size=16)
    fit(module, batches, callback)
    module.trainer.save_checkpoint(tmp_path / "network.ckpt")
    again = TemporalFusionTransformer.load_from_checkpoint(tmp_path / "network.ckpt", weights_only=False)
    assert [type(weight) for weight in again.loss.weights] == [float, float]
    forecasts = [network.predict(batches, trainer_kwargs={"logger": False}) for network in (module, again)]
    assert all(torch.equal(one, other) for one, other in zip(*forecasts, strict=True))
