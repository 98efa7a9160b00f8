"""Epoch values on two ranks: the same on both, and those of all their batches together."""

import pytest
import torch

from tests.callbacks.epoch_worker import Absent, rows, work
from tests.callbacks.two_processes import on_two_processes
from tests.helpers import SCALES, TrunkAndHeads

pytestmark = pytest.mark.slow


def truth(stage, task_of_one_rank):
    """Plain means over the batches of both ranks: of the total, and of each task where it is."""
    module, per_task, total = Absent(), {task: [] for task in SCALES}, 0.0
    with torch.no_grad():
        for number, batch in enumerate(rows(stage)):
            losses = {task: loss.item() for task, loss in TrunkAndHeads.losses(module, batch).items()}
            if number % 2:
                del losses[task_of_one_rank]
            total += sum(losses.values())
            for task, loss in losses.items():
                per_task[task].append(loss)
    return total / len(rows(stage)), {task: sum(values) / len(values) for task, values in per_task.items()}


@pytest.mark.feature("epoch values under DDP", "supported", "means over all ranks, also of a task that one rank never has")
def test_epoch_values_are_those_of_all_ranks(tmp_path):
    first, second = on_two_processes(work, tmp_path)
    assert first == second
    train, val = truth("train", "odd"), truth("val", "middle")
    for name, suffixes in (("one loader", [""]), ("two loaders", ["/dataloader_idx_0", "/dataloader_idx_1"])):
        found = first[name]
        assert found["total_loss/unweighted"] == found["total_loss/unweighted_epoch"] == pytest.approx(train[0], rel=1e-5)
        for task in SCALES:
            assert found[f"task_loss_epoch/{task}"] == pytest.approx(train[1][task], rel=1e-5)
            for suffix in suffixes:
                assert found[f"val_task_loss/{task}{suffix}"] == pytest.approx(val[1][task], rel=1e-5)
        for suffix in suffixes:
            assert found[f"val_total_loss{suffix}"] == pytest.approx(val[0], rel=1e-5)
        assert len(list((tmp_path / name).rglob("loss_weights.yaml"))) == 1
