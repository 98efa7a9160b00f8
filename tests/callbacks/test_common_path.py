"""What a step costs that is neither measured nor logged, as most are: Python's calls and torch's operations, counted."""

import sys

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradnorm import BalancingSession, GradNorm, GradNormCallback, LossBalancingCallback
from lightning_gradnorm.callbacks.step_values import StepValues
from tests.helpers import MemoryLogger, TrunkAndHeads, batches, quiet_trainer, same_state

FIRST, LAST = 55, 75  # of the batches that are looked at: between what is looked at every 50 steps


class Calls(L.Callback):
    """Counts the Python functions that are entered between two batches, by the file that they are in."""

    def __init__(self):
        self.of = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in (FIRST, LAST):
            sys.setprofile(self.count if batch_idx == FIRST else None)

    def count(self, frame, event, argument):
        if event == "call":
            self.of[frame.f_code.co_filename] = self.of.get(frame.f_code.co_filename, 0) + 1

    def per_step(self, part=""):
        return sum(calls for file, calls in self.of.items() if part in file) / (LAST - FIRST)


def calls(tmp_path, tasks, *callbacks):
    counted = Calls()
    module = TrunkAndHeads(scales={f"task {k}": 1.0 for k in range(tasks)})
    quiet_trainer(tmp_path, callbacks=[counted, *callbacks], log_every_n_steps=50).fit(module, batches(80))
    return counted


def rarely():
    return LossBalancingCallback(GradNorm(update_every=1000), summary=False)


def test_a_step_that_is_neither_measured_nor_logged_enters_few_functions(tmp_path):
    plain, idle, ours = (calls(tmp_path, 4, *callbacks) for callbacks in ([], [L.Callback()], [rarely()]))
    dispatch = idle.per_step() - plain.per_step()  # what Lightning spends on a callback that does nothing
    assert 0 < dispatch < 100
    assert ours.per_step() - idle.per_step() <= 135  # 129; 275 where all that was logged stayed in the Trainer's way


def test_tasks_add_no_calls_of_ours_to_such_a_step(tmp_path):
    few, many = (calls(tmp_path, tasks, rarely()).per_step() - calls(tmp_path, tasks).per_step() for tasks in (4, 24))
    assert many == pytest.approx(few, abs=0.9), "one call for each task would be twenty more; Python itself makes one at times"


class Operations(TorchDispatchMode):
    """Counts what runs, forward and backward."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        self.number += 1
        return function(*arguments, **settings or {})


@pytest.mark.parametrize("tasks", [2, 5, 50])
def test_such_a_step_adds_a_fixed_number_of_operations(tasks):
    torch.manual_seed(0)
    module = TrunkAndHeads(scales={f"task {k}": 1.0 for k in range(tasks)})
    session = BalancingSession(GradNorm(update_every=1000), module)
    (batch,) = next(iter(batches(1)))

    def step(total, before=lambda root: None, after=lambda: None):
        losses = module.losses(batch)
        with Operations() as operations:
            root = total(losses)
            before(root)
            root.backward()
        after()
        return operations.number

    def balanced():
        session.begin_batch()
        number = step(session.total, session.before_backward, session.after_backward)
        session.step()
        return number

    balanced()
    plain = step(lambda losses: sum(losses.values()))
    assert balanced() - plain <= 8  # 7: weights, one vector of the losses, its product with them; and backward


# -- what was logged stays where it was, for everyone ------------------------------------------------------------------------


class Sometimes(TrunkAndHeads):
    """Hands its losses over in two batches of three; the others train on one of them."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if (batch_idx + 1) % 3 else self.losses(batch[0])["small"]

    def validation_step(self, batch, batch_idx):
        self.log("held_out", self.losses(batch[0])["small"])


class ByHand(Sometimes):
    """Steps its optimiser in every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(TrunkAndHeads.training_step(self, batch, batch_idx))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Reads(L.Callback):
    """What callbacks find while training, and after a validation."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, *rest):
        self.found.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer, *rest):
        self.on_train_batch_end(trainer)


WAYS = {
    "every 4th step": (Sometimes, {"log_every_n_steps": 4}),
    "accumulated": (Sometimes, {"log_every_n_steps": 3, "accumulate_grad_batches": 2}),
    "validated within": (Sometimes, {"log_every_n_steps": 4, "val_check_interval": 5}),
    "by hand": (ByHand, {"log_every_n_steps": 4}),
    "stopped": (Sometimes, {"log_every_n_steps": 7, "max_steps": 25}),
    "a dry run": (Sometimes, {"fast_dev_run": 5}),
    "with a bar": (Sometimes, {"log_every_n_steps": 4, "progress_bar": True}),
    "no steps": (Sometimes, {"log_every_n_steps": 0}),
}


def logged(tmp_path, way):
    torch.manual_seed(0)
    make, settings = WAYS[way]
    settings = {"max_epochs": 2, **settings}
    logger, reads = MemoryLogger(), Reads()
    callback = GradNormCallback(update_every=3, summary=False, progress_bar=settings.pop("progress_bar", False))
    trainer = quiet_trainer(tmp_path, logger=logger, callbacks=[callback, reads], **settings)
    trainer.fit(make(), batches(18), batches(2, seed=2))
    return logger.logged, logger.epochs, reads.found, {name: float(value) for name, value in trainer.callback_metrics.items()}


def ordered(found):
    """The same with every dict's keys sorted: among the rows' own, the order means nothing."""
    if isinstance(found, dict):
        return {key: found[key] for key in sorted(found)}
    return [ordered(one) for one in found] if isinstance(found, list | tuple) else found


@pytest.mark.parametrize("way", WAYS)
def test_what_is_put_aside_between_the_steps_is_missed_by_nobody(tmp_path, monkeypatch, way):
    found = logged(tmp_path, way)
    monkeypatch.setattr(StepValues, "put_aside", lambda self, trainer: None)
    assert same_state(*map(ordered, (found, logged(tmp_path, way))))
    assert any("loss_weight/small" in read for read in found[2]) == (way != "no steps")


def test_between_the_steps_that_are_written_the_trainer_has_nothing_of_ours_to_go_through(tmp_path):
    seen = []

    class Looks(L.Callback):
        def on_before_backward(self, trainer, *rest):
            seen.append(sum("loss_weight/" in key for key in trainer._results))

    callbacks = [GradNormCallback(summary=False), Looks()]
    quiet_trainer(tmp_path, callbacks=callbacks, log_every_n_steps=4).fit(TrunkAndHeads(), batches(12))
    assert seen == [0] * 12


def test_losses_of_the_half_type_that_autocast_has_not(tmp_path):
    class Halves(TrunkAndHeads):
        def training_step(self, batch, batch_idx):
            return self.total_loss({task: loss.half() for task, loss in self.losses(batch[0]).items()})

    callback = GradNormCallback(update_every=4, summary=False)
    quiet_trainer(tmp_path, callbacks=[callback], precision="bf16-mixed").fit(Halves(), batches(6))
    assert callback.balancer.steps == 6
