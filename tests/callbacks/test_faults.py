"""What can go wrong in a run: after each, the weights are finite, positive, on their sum and within bounds."""

import gc
import os
import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_gradnorm import GradNorm, GradNormCallback, JointBackward, tap_losses
from tests.callbacks.watching import loader, train
from tests.helpers import TrunkAndHeads, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*weight update.* so far", "ignore:Tasks that took no part so far")
EVERY = pytest.mark.parametrize(
    "settings", [{}, {"residuals": ["small"]}, {"lr": 0.02}, {"update": "paper", "lr": 0.02}], ids=str
)


class Faulty(TrunkAndHeads):
    """``fault(losses, step)`` changes the losses of a step."""

    def __init__(self, fault, **settings):
        super().__init__(**settings)
        self.fault = fault

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch)
        return self.total_loss(self.fault(losses, batch_idx) or losses)

    def on_before_optimizer_step(self, optimizer):
        """The network's own protection, without which one NaN ends any training."""
        for parameter in self.parameters():
            parameter.grad = None if parameter.grad is None else parameter.grad.nan_to_num(0, 0, 0)


def whole(callback, tasks=4):
    weights = callback.weights
    assert len(weights) == tasks
    assert all(1e-8 <= w <= 1e8 for w in weights.values()), weights
    assert callback.balancer.update_rule != "paper" or sum(weights.values()) == pytest.approx(tasks)
    return weights


def bad_at(step, factor):
    def fault(losses, now):
        if now == step:
            losses["odd"] = losses["odd"] * factor

    return fault


def constant(losses, now):
    losses["odd"] = losses["odd"] / losses["odd"].detach()


def no_gradient_on_w(losses, now):
    losses["odd"] = losses["odd"] * 0 + 1


def late(losses, now):
    return losses if now >= 100 else {task: loss for task, loss in losses.items() if task != "odd"}


def gone(losses, now):
    return losses if now < 20 else {task: loss for task, loss in losses.items() if task != "odd"}


def far_apart(losses, now):
    losses["odd"], losses["small"] = losses["odd"] * 1e30, losses["small"] * 1e-30


FAULTS = {
    "one NaN": (bad_at(5, torch.nan), 30),
    "one NaN at the start": (bad_at(0, torch.nan), 30),
    "one Inf": (bad_at(5, torch.inf), 30),
    "a loss of exactly 0": (bad_at(5, 0.0), 30),
    "a loss that stays constant": (constant, 120),
    "a gradient of exactly 0 on W": (no_gradient_on_w, 30),
    "a task that appears after 100 steps": (late, 120),
    "a task that vanishes for good": (gone, 60),
}


@EVERY
@pytest.mark.parametrize(("fault", "steps"), FAULTS.values(), ids=FAULTS)
def test_training_goes_on_and_the_weights_stay_whole(tmp_path, fault, steps, settings):
    callback = GradNormCallback(summary=False, **settings)
    train(tmp_path, Faulty(fault, lr=0.0), loader(torch.randn(steps, 8, 6)), callback)
    weights = whole(callback)
    assert max(abs(w - 1) for w in weights.values()) > 0.05
    assert callback.balancer.steps == steps


def test_losses_sixty_decades_apart(tmp_path):
    module = Faulty(far_apart, lr=0.0)
    callback = GradNormCallback(summary=False)
    train(tmp_path, module, loader(torch.randn(60, 8, 6)), callback)
    weights = whole(callback)
    assert callback.balancer.skipped_updates == 0
    assert weights["odd"] <= 1 and weights["small"] > 1e7


@pytest.mark.parametrize("settings", [{}, {"update": "paper", "lr": 0.02}], ids=str)
@pytest.mark.parametrize("tasks", [1, 100])
def test_one_task_and_a_hundred(tmp_path, tasks, settings):
    scales = {f"task {k}": 1.0 + k for k in range(tasks)}
    callback = GradNormCallback(tasks=list(scales), summary=False, **settings)
    train(tmp_path, TrunkAndHeadsOfTensors(scales=scales), loader(torch.randn(20, 8, 6)), callback)
    weights = whole(callback, tasks)
    assert weights["task 0"] == 1 if tasks == 1 else weights["task 0"] > 1 > weights["task 99"]


class TrunkAndHeadsOfTensors(TrunkAndHeads):
    def training_step(self, batch, batch_idx):
        return self.total_loss(self.losses(batch))


KILLED = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tests.callbacks.test_faults import resumable
class Kill(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
resumable(sys.argv[1], [Kill()])
"""


def resumable(folder, callbacks=(), ckpt_path=None):
    torch.manual_seed(0)
    callback = GradNormCallback(lr=0.1, summary=False)
    every = ModelCheckpoint(folder, filename="last", every_n_train_steps=3, enable_version_counter=False)
    trainer = quiet_trainer(
        folder, callbacks=[callback, every, *callbacks], enable_checkpointing=True, max_steps=12, max_epochs=-1
    )
    x = torch.randn(12, 8, 6, generator=torch.Generator().manual_seed(1))
    module = TrunkAndHeadsOfTensors()
    rest = x[6:] if ckpt_path else x  # the checkpoint is of step 6; the loader itself keeps no state here
    trainer.fit(module, loader(rest), ckpt_path=ckpt_path)
    return callback, module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of resuming in mid-epoch
def test_a_killed_run_resumes_where_its_last_checkpoint_was(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 6
    assert state["callbacks"]["LossBalancing[GradNorm]"]["balancer"]["steps"] == 6
    resumed, module = resumable(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    uninterrupted, same = resumable(tmp_path / "again")
    assert resumed.balancer.steps == uninterrupted.balancer.steps == 12
    assert whole(resumed) == whole(uninterrupted)
    for ours, theirs in zip(module.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_soak():
    """50,000 steps of the bare loop: no more tensors, objects, graph nodes or hooks than after the first 200."""
    module, gradnorm = TrunkAndHeads(), GradNorm()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    x, weight = torch.randn(8, 6), module.trunk[2].weight

    def step():
        losses = tap_losses(module.losses(x))
        total = gradnorm.total(losses)
        reader = JointBackward(total, losses, [weight])
        nodes = graph_size(total.grad_fn)
        total.backward()
        gradnorm.update(reader.measurement())
        optimizer.step()
        optimizer.zero_grad()
        return nodes

    def graph_size(root):
        seen, stack = set(), [root]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack += [child for child, _ in node.next_functions]
        return len(seen)

    def census():
        gc.collect()
        things = gc.get_objects()
        hooks = sum(len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in module.parameters())
        return sum(issubclass(type(thing), torch.Tensor) for thing in things), len(things), step(), hooks

    for _ in range(200):
        step()
    tensors, objects, nodes, hooks = census()
    for _ in range(50_000):
        step()
    tensors_after, objects_after, nodes_after, hooks_after = census()
    assert (tensors_after, nodes_after, hooks_after) == (tensors, nodes, hooks)
    assert objects_after - objects < 500
    assert not gradnorm.weights_for(["small"]).requires_grad
