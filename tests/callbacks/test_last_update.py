"""What is shown of updates that had other tasks than the step that is written."""

import math

import torch

from lightning_gradnorm.callbacks.last_update import LastUpdate
from lightning_gradnorm.callbacks.log import BalancingLog


def test_each_task_has_the_last_that_was_computed_of_it():
    last = LastUpdate()
    assert last.of(("a", "b")) == {}
    last.take(("a", "b"), {"norm": torch.tensor([1.0, 2.0])})
    last.take(("b", "c"), {"norm": torch.tensor([3.0, 4.0])})
    assert last.of(("b", "c"))["norm"].tolist() == [3.0, 4.0]
    *known, unknown = last.of(("c", "a", "b", "d"))["norm"].tolist()
    assert known == [4.0, 1.0, 3.0]
    assert math.isnan(unknown)
    assert [last.has(task) for task in "abcd"] == [True, True, True, False]


def test_a_state_taken_up_knows_nothing_of_the_run_before():
    log = BalancingLog(cosines=None, progress_bar=False)
    log.last.take(("a",), {"norm": torch.tensor([1.0])})
    log.load_state_dict({"loss_weight/a": torch.tensor(2.0)})
    assert log.last.of(("a",)) == {} and not log.last.has("a")
    assert log.shown == {"loss_weight/a": torch.tensor(2.0)}
