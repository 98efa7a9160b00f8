"""Event files read back: exactly what the callback held, step by step, no step twice and none missing."""

import struct

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gradnorm import GradNormCallback
from lightning_gradnorm.report.history import read_history
from tests.callbacks.test_resume import StatefulLoader
from tests.helpers import TrunkAndHeads, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Holding(L.Callback):
    """After every optimiser step: its number, and the applied weights and losses that the callback held."""

    def __init__(self, balancing):
        self.balancing, self.held, self.last = balancing, {}, 0

    def on_train_start(self, trainer, pl_module):
        self.last = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.last:
            self.last = trainer.global_step
            self.held[trainer.global_step - 1] = {tag: float(value) for tag, value in self.balancing.logged.items()}


def fit(folder, loggers, *, max_steps=12, ckpt_path=None, **settings):
    torch.manual_seed(7)
    callback = GradNormCallback(lr=0.1, summary=False)
    holding = Holding(callback)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
    trainer = quiet_trainer(
        folder,
        callbacks=[callback, holding, saving],
        logger=loggers,
        max_epochs=-1,
        max_steps=max_steps,
        enable_checkpointing=True,
        **settings,
    )
    trainer.fit(TrunkAndHeads(torch.optim.Adam), StatefulLoader(), ckpt_path=ckpt_path)
    return holding.held


def as_float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def assert_holds(folder, held, steps):
    """Each of our tags at these steps and no others, with the value that was held there."""
    files = sorted(folder.glob("events.*"), key=lambda file: file.stat().st_mtime_ns)
    events = [EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload() for file in files]
    tags = set(held[steps[0]])
    assert len(tags) == 32
    assert all(tags <= set(file.Tags()["scalars"]) for file in events)
    for tag in tags:
        read = [event for file in events for event in file.Scalars(tag)]
        assert [event.step for event in read] == steps, tag
        assert [event.value for event in read] == [as_float32(held[step][tag]) for step in steps], tag


CASES = {
    "every step": ({}, list(range(12))),
    "every third": ({"log_every_n_steps": 3}, [2, 5, 8, 11]),
    "accumulation": ({"accumulate_grad_batches": 2}, list(range(12))),
    "accumulation, every second": ({"accumulate_grad_batches": 3, "log_every_n_steps": 2}, [1, 3, 5, 7, 9, 11]),
}


@pytest.mark.parametrize(("settings", "steps"), CASES.values(), ids=CASES)
def test_two_loggers_hold_what_the_callback_held(tmp_path, settings, steps):
    loggers = [TensorBoardLogger(tmp_path, name="tb", version=0), CSVLogger(tmp_path, name="csv", version=0)]
    held = fit(tmp_path, loggers, **settings)
    assert_holds(tmp_path / "tb" / "version_0", held, steps)
    table = read_history(tmp_path / "csv" / "version_0").of("loss_weight")
    assert table.keys() == {"small", "middle", "large", "odd"}
    for task, curve in table.items():
        assert curve.steps == steps
        assert curve.values == pytest.approx([held[step][f"loss_weight/{task}"] for step in steps], rel=1e-6)


@pytest.mark.parametrize(("stop", "every"), [(5, 1), (6, 1), (7, 2)])
def test_a_resumed_run_goes_on_in_the_same_folder_without_a_gap(tmp_path, stop, every):
    """Stopped in mid-epoch and at its end, and resumed into the same log folder."""
    first, second = (TensorBoardLogger(tmp_path, name="tb", version=0) for _ in range(2))
    first = fit(tmp_path, first, max_steps=stop, log_every_n_steps=every)
    second = fit(tmp_path, second, ckpt_path=tmp_path / f"step={stop}.ckpt", log_every_n_steps=every)
    assert set(first) | set(second) == set(range(12))
    assert not set(first) & set(second)
    assert_holds(tmp_path / "tb" / "version_0", first | second, [step for step in range(12) if (step + 1) % every == 0])


@pytest.mark.parametrize("settings", [{"fast_dev_run": 3}, {"max_epochs": 1, "logger": False}])
def test_without_a_logger_nothing_is_written_and_the_weights_move(tmp_path, settings):
    callback = GradNormCallback(lr=0.1)
    quiet_trainer(tmp_path, callbacks=[callback], **settings).fit(TrunkAndHeads(), StatefulLoader())
    assert max(abs(weight - 1) for weight in callback.weights.values()) > 0.01
    assert list(tmp_path.rglob("*")) == []
