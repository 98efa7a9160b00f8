"""What the ranks exchange of a step."""

import pytest
import torch

from lightning_gradnorm.window import MeasurementWindow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("has", [True, False], ids=["a rank with its tasks", "one without"])
def test_every_rank_sends_numbers_of_the_one_type(dtype, has):
    window, sent = MeasurementWindow(), []
    if has:
        losses = {"a": torch.tensor(1.0), "b": torch.tensor(2.0, dtype=torch.float64)}
        window.add_losses(losses, torch.ones(2, dtype=torch.float64))
    window.reduce(lambda vector: sent.append(vector) or vector, ("a", "b"), 0, torch.device("cpu"), dtype)
    (vector,) = sent
    assert (vector.dtype, vector.numel()) == (dtype, 4)
    assert vector.tolist() == ([1.0, 1.0, 2.0, 1.0] if has else [0.0] * 4)
