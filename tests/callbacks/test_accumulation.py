"""Steps of several micro-batches are those of one batch as large."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn

from tests.callbacks.watching import OnTensors, Watch, assert_same_history, loader, norms_by_hand, train
from tests.helpers import SCALES

# -- accumulation ------------------------------------------------------------------------------------------------------


@pytest.mark.feature(
    "`accumulate_grad_batches=N`",
    "supported",
    "one update per optimiser step, from the norm of the mean gradient: equal to one batch N times as large",
)
def test_accumulation_equals_one_batch_n_times_as_large(tmp_path):
    x, module = torch.randn(6, 12, 6), OnTensors()
    large = train(tmp_path, copy.deepcopy(module), loader(x))
    small = train(tmp_path, copy.deepcopy(module), loader(x.view(18, 4, 6)), accumulate_grad_batches=3)
    assert_same_history(small, large)


@pytest.mark.feature("`accumulate_grad_batches=N`", "supported", "the weights are constant inside the window")
def test_weights_are_constant_inside_the_window(tmp_path):
    callback = train(tmp_path, OnTensors(), loader(torch.randn(8, 4, 6)), accumulate_grad_batches=4)
    assert callback.inside[:4] == [callback.inside[0]] * 4
    assert callback.inside[4:] == [callback.inside[4]] * 4
    assert callback.inside[0] != callback.inside[4]


@pytest.mark.feature("a last short accumulation window", "supported", "its norms are its own")
def test_a_last_short_window_is_measured_as_what_it_is(tmp_path):
    """5 batches in twos: the last one alone. Its norms are its own, though Lightning divides its loss by two."""
    x, module = torch.randn(5, 4, 6), OnTensors(lr=0.0)
    callback = train(tmp_path, module, loader(x), accumulate_grad_batches=2)
    assert len(callback.norms) == 3
    expected = norms_by_hand(module.trunk[2].weight, module.losses(x[4]).values())
    torch.testing.assert_close(callback.norms[2].float(), expected)


@pytest.mark.feature("`GradientAccumulationScheduler`", "supported")
def test_accumulation_scheduler(tmp_path):
    x, module = torch.randn(4, 4, 6), OnTensors(lr=0.0)
    callback = train(tmp_path, module, loader(x), callbacks=[GradientAccumulationScheduler({0: 1, 1: 4})], max_epochs=2)
    assert len(callback.norms) == 5
    expected = norms_by_hand(module.trunk[2].weight, module.losses(x.reshape(16, 6)).values())
    torch.testing.assert_close(callback.norms[4].float(), expected)


@pytest.mark.feature('`norm_of="features"` with accumulation', "supported")
def test_features_accumulate_as_one_batch_too(tmp_path):
    class Named(OnTensors):
        def shared_layer(self):
            return "trunk.2"

    x, module = torch.randn(6, 12, 6), Named()
    large = train(tmp_path, copy.deepcopy(module), loader(x), Watch(norm_of="features"))
    small = train(
        tmp_path, copy.deepcopy(module), loader(x.view(18, 4, 6)), Watch(norm_of="features"), accumulate_grad_batches=3
    )
    assert_same_history(small, large)
    z = module.trunk[:3](x[0])
    losses = [
        SCALES[task] * (head(z.tanh()) - (k + 1) * x[0][:, :2]).pow(2).mean()
        for k, (task, head) in enumerate(module.heads.items())
    ]
    expected = norms_by_hand(z, losses)
    torch.testing.assert_close(large.norms[0].float(), expected)


@pytest.mark.feature(
    "`nn.ReLU(inplace=True)` right after the shared layer",
    "supported",
    "what is read is the gradient at the layer's own output",
)
@pytest.mark.parametrize("norm_of", ["parameters", "features"])
def test_an_activation_in_place_changes_no_norm(tmp_path, norm_of):
    class Rectified(OnTensors):
        def __init__(self, inplace):
            super().__init__()
            self.trunk[3] = nn.ReLU(inplace=inplace)

        def shared_layer(self):
            return self.trunk[2]

    x, module = torch.randn(6, 2, 6), Rectified(inplace=False)
    in_place = Rectified(inplace=True)
    in_place.load_state_dict(module.state_dict())
    expected = train(tmp_path, module, loader(x), Watch(norm_of=norm_of))
    assert_same_history(train(tmp_path, in_place, loader(x), Watch(norm_of=norm_of)), expected)
