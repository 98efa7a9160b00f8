"""What is shown of updates that had other tasks than the step that is written."""

import math

import torch

from lightning_gradnorm.callbacks.last_update import LastUpdate


def test_each_task_has_the_last_that_was_computed_of_it():
    last = LastUpdate()
    assert last.of(("a", "b")) == {}
    last.take(("a", "b"), {"norm": torch.tensor([1.0, 2.0])})
    last.take(("b", "c"), {"norm": torch.tensor([3.0, 4.0])})
    assert last.of(("b", "c"))["norm"].tolist() == [3.0, 4.0]
    *known, unknown = last.of(("c", "a", "b", "d"))["norm"].tolist()
    assert known == [4.0, 1.0, 3.0]
    assert math.isnan(unknown)
