"""Mean losses of whole epochs: of training for whoever monitors them, and of an evaluation."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradnorm import GradNormCallback
from tests.callbacks.test_resume import StatefulLoader
from tests.helpers import SCALES, MemoryLogger, TrunkAndHeads, batches, quiet_trainer

UNWEIGHTED = "total_loss/unweighted"
LOG_EVERY = [0, 1, 7, 50]


class Truth(TrunkAndHeads):
    """Logs the plain sum of its losses as a user would, and what an evaluation returns."""

    def __init__(self, plateau=None, **settings):
        super().__init__(**settings)
        self.plateau, self.sums = plateau, []

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch[0])
        self.sums.append(sum(loss.item() for loss in losses.values()))
        self.log("truth", sum(losses.values()), on_step=False, on_epoch=True, batch_size=len(batch[0]))
        for task, loss in losses.items():
            self.log(f"truth/{task}", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return self.total_loss(losses)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.plateau is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": UNWEIGHTED, **self.plateau}}


class Metrics(L.Callback):
    """What EarlyStopping would read, where it would."""

    def __init__(self):
        self.after_epoch, self.after_validation = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.after_epoch.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer, pl_module):
        self.after_validation.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def uneven(rows=20 * 8 + 3):
    return DataLoader(TensorDataset(torch.randn(rows, 6, generator=torch.Generator().manual_seed(3))), batch_size=8)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", LOG_EVERY)
@pytest.mark.parametrize(
    ("settings", "callback"),
    [({}, {}), ({"accumulate_grad_batches": 3}, {}), ({}, {"update_every": 4}), ({"logger": False}, {})],
    ids=["plain", "accumulation", "update_every", "no logger"],
)
def test_the_epochs_mean_is_there_whatever_is_logged(tmp_path, every, settings, callback):
    metrics, memory = Metrics(), MemoryLogger()
    callbacks = [GradNormCallback(lr=0.1, summary=False, **callback), metrics]
    settings = {"logger": memory, "max_epochs": 2, "log_every_n_steps": every} | settings
    quiet_trainer(tmp_path, callbacks=callbacks, **settings).fit(Truth(), uneven())
    assert len(metrics.after_epoch) == 2
    for seen in metrics.after_epoch:
        assert seen[UNWEIGHTED] == pytest.approx(seen["truth"], rel=1e-6)
    if settings["logger"]:
        total, per_task = (f"{UNWEIGHTED}_epoch", "task_loss_epoch") if every else (UNWEIGHTED, "task_loss")
        rows = [row for _, row in memory.logged + memory.epochs if "truth" in row]
        assert len(rows) == 2
        for row in rows:
            assert row[total] == pytest.approx(row["truth"], rel=1e-6)
            assert [row[f"{per_task}/{task}"] for task in SCALES] == pytest.approx(
                [row[f"truth/{task}"] for task in SCALES], rel=1e-6
            )


@pytest.mark.parametrize("every", LOG_EVERY)
@pytest.mark.parametrize("validates", [False, True])
def test_early_stopping_and_checkpoints_find_it(tmp_path, every, validates):
    stopping = EarlyStopping(UNWEIGHTED)
    saving = ModelCheckpoint(tmp_path, monitor=UNWEIGHTED, filename="best")
    module, loaders = Truth(), [batches(20), batches(2)] if validates else [batches(20)]
    if validates:
        module.validation_step = lambda batch, batch_idx: None
    settings = {"max_epochs": 2, "log_every_n_steps": every, "enable_checkpointing": True, "logger": MemoryLogger()}
    callbacks = [stopping, saving, GradNormCallback(lr=0.1, summary=False)]
    quiet_trainer(tmp_path, callbacks=callbacks, **settings).fit(module, *loaders)
    epochs = [sum(module.sums[20 * k : 20 * k + 20]) / 20 for k in range(2)]
    assert float(stopping.best_score) == pytest.approx(min(epochs), rel=1e-6)
    assert float(saving.best_model_score) == pytest.approx(min(epochs), rel=1e-6)


@pytest.mark.parametrize("every", LOG_EVERY)
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_scheduler_on_a_plateau_finds_it(tmp_path, every, interval):
    module = Truth(plateau={"interval": interval})
    steps = []
    configure = module.configure_optimizers

    def watched():
        configured = configure()
        scheduler = configured["lr_scheduler"]["scheduler"]
        step = scheduler.step
        scheduler.step = lambda metrics: steps.append(float(metrics)) or step(metrics)
        return configured

    module.configure_optimizers = watched
    settings = {"max_epochs": 2, "log_every_n_steps": every, "logger": MemoryLogger()}
    quiet_trainer(tmp_path, callbacks=[GradNormCallback(lr=0.1, summary=False)], **settings).fit(module, batches(20))
    epochs = [sum(module.sums[20 * k : 20 * k + 20]) / 20 for k in range(2)]
    assert steps == pytest.approx(epochs if interval == "epoch" else module.sums, rel=1e-6)


@pytest.mark.parametrize("every", LOG_EVERY)
def test_a_checkpoint_of_single_steps_finds_the_steps_value(tmp_path, every):
    saving = ModelCheckpoint(tmp_path, monitor=UNWEIGHTED, every_n_train_steps=5, save_top_k=1)
    settings = {"log_every_n_steps": every, "enable_checkpointing": True, "logger": MemoryLogger()}
    module = Truth()
    callbacks = [GradNormCallback(lr=0.1, summary=False), saving]
    quiet_trainer(tmp_path, callbacks=callbacks, **settings).fit(module, batches(19))
    assert float(saving.best_model_score) == pytest.approx(min(module.sums[4::5]), rel=1e-6)


@pytest.mark.parametrize("settings", [{"val_check_interval": 10}, {"check_val_every_n_epoch": 2}], ids=str)
@pytest.mark.parametrize("every", LOG_EVERY)
def test_after_a_validation_it_is_the_mean_so_far(tmp_path, every, settings):
    metrics, module = Metrics(), Truth()
    module.validation_step = lambda batch, batch_idx: None
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[GradNormCallback(lr=0.1, summary=False), metrics],
        max_epochs=2,
        log_every_n_steps=every,
        num_sanity_val_steps=2,
        **settings,
    )
    trainer.fit(module, batches(20), batches(2))
    sums, sanity = module.sums, 1
    means = [sum(sums[:10]) / 10, sum(sums[:20]) / 20, sum(sums[20:30]) / 10, sum(sums[20:]) / 20]
    assert UNWEIGHTED not in metrics.after_validation[0]
    seen = [row[UNWEIGHTED] for row in metrics.after_validation[sanity:]]
    assert seen == pytest.approx(means if "val_check_interval" in settings else means[-1:], rel=1e-6)


def test_in_barebones_nothing_is_logged(tmp_path):
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    settings = off | {"num_sanity_val_steps": None, "log_every_n_steps": None, "barebones": True}
    trainer = quiet_trainer(tmp_path, callbacks=[GradNormCallback(summary=False)], **settings)
    trainer.fit(TrunkAndHeads(), batches(3))  # a log would be a warning, and so an error
    assert trainer.callback_metrics == {}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_epoch_has_the_mean_of_the_whole_epoch(tmp_path):
    def fit(max_steps, ckpt_path=None):
        torch.manual_seed(7)
        metrics = Metrics()
        saving = ModelCheckpoint(
            tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
        )
        callbacks = [GradNormCallback(lr=0.1, summary=False), saving, metrics]
        settings = {"max_epochs": -1, "max_steps": max_steps, "enable_checkpointing": True, "log_every_n_steps": 50}
        quiet_trainer(tmp_path, callbacks=callbacks, **settings).fit(TrunkAndHeads(), StatefulLoader(), ckpt_path=ckpt_path)
        return [seen[UNWEIGHTED] for seen in metrics.after_epoch]

    whole = fit(12)
    for stop in (4, 6, 9):
        resumed = fit(12, tmp_path / f"step={stop}.ckpt")
        assert resumed[-1] == whole[-1]
        assert (whole[0] in resumed) == (stop <= 6)


def test_a_fit_that_broke_off_leaves_nothing_to_the_next(tmp_path):
    callback, metrics = GradNormCallback(lr=0.1, summary=False), Metrics()
    module = Truth()
    step = module.training_step

    def breaks(batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("boom")
        return step(batch, batch_idx)

    module.training_step = breaks
    with pytest.raises(RuntimeError, match="boom"):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(module, batches(6))
    module.training_step = step
    quiet_trainer(tmp_path, callbacks=[callback, metrics]).fit(module, batches(6))
    assert metrics.after_epoch[0][UNWEIGHTED] == pytest.approx(metrics.after_epoch[0]["truth"], rel=1e-6)


class TakingTurns(TrunkAndHeads):
    """A task less in every second batch."""

    def losses(self, x):
        losses = super().losses(x)
        self.batches = getattr(self, "batches", 0) + 1
        if self.batches % 2 == 0:
            del losses["odd"]
        return losses


def test_a_tasks_mean_is_over_the_batches_that_have_it(tmp_path):
    memory, module = MemoryLogger(), TakingTurns(lr=0.0)
    quiet_trainer(tmp_path, callbacks=[GradNormCallback(summary=False)], logger=memory).fit(module, batches(6))
    ((_, row),) = memory.epochs
    losses = [TrunkAndHeads.losses(module, batch[0]) for batch in batches(6)]
    odd = [loss["odd"].item() for loss in losses]
    assert row["task_loss_epoch/odd"] == pytest.approx(sum(odd[::2]) / 3, rel=1e-5)
    small = [loss["small"].item() for loss in losses]
    assert row["task_loss_epoch/small"] == pytest.approx(sum(small) / 6, rel=1e-5)
    everything = sum(value.item() for loss in losses for value in loss.values()) - sum(odd[1::2])
    assert row[f"{UNWEIGHTED}_epoch"] == pytest.approx(everything / 6, rel=1e-5)


# -- evaluation ------------------------------------------------------------------------------------------------------


class Evaluated(Truth):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        losses = self.losses(batch[0])
        self.log("val_truth", sum(losses.values()), batch_size=len(batch[0]))
        for task, loss in losses.items():
            self.log(f"val_truth_{task}", loss, batch_size=len(batch[0]))
        self.log("val_as_logged", self.total_loss(losses), batch_size=len(batch[0]))

    test_step = validation_step


def assert_true(metrics, stage, suffix=""):
    for name in ("val_as_logged", f"{stage}_total_loss"):
        assert metrics[name + suffix] == pytest.approx(metrics["val_truth" + suffix], rel=1e-6), name
    for task in SCALES:
        assert metrics[f"{stage}_task_loss/{task}{suffix}"] == pytest.approx(metrics[f"val_truth_{task}{suffix}"], rel=1e-6)


@pytest.mark.parametrize("loaders", [1, 2])
def test_an_evaluation_logs_its_losses_without_weights(tmp_path, loaders):
    memory, metrics, module = MemoryLogger(), Metrics(), Evaluated()
    given = uneven(20) if loaders == 1 else [uneven(20), uneven(11)]
    suffixes = [""] if loaders == 1 else ["/dataloader_idx_0", "/dataloader_idx_1"]
    callback = GradNormCallback(lr=0.1, summary=False)
    trainer = quiet_trainer(
        tmp_path, callbacks=[callback, metrics], logger=memory, max_epochs=2, num_sanity_val_steps=1, log_every_n_steps=50
    )
    trainer.fit(module, batches(6), given)
    assert max(callback.weights.values()) > 1.2
    before, *after = metrics.after_validation
    assert not any("total_loss" in name or "task_loss" in name for name in before)
    for suffix in suffixes:
        for seen in after:
            assert_true(seen, "val", suffix)
        assert len([row for _, row in memory.logged if f"val_total_loss{suffix}" in row]) == 2, "none of the sanity check"
    for suffix in suffixes:
        for stage, evaluate in (("val", trainer.validate), ("test", trainer.test)):
            rows = evaluate(module, given, verbose=False)
            assert_true({name: value for row in rows for name, value in row.items()}, stage, suffix)


def test_an_evaluation_before_any_fit(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[GradNormCallback(summary=False)])
    assert_true(trainer.validate(Evaluated(), uneven(20), verbose=False)[0], "val")


def test_an_evaluation_that_does_not_call_total_loss_logs_nothing_of_ours(tmp_path):
    module = TrunkAndHeads()
    module.validation_step = lambda batch, batch_idx: module.log("mine", 1.0)
    trainer = quiet_trainer(tmp_path, callbacks=[GradNormCallback(summary=False)])
    assert trainer.validate(module, batches(2), verbose=False) == [{"mine": 1.0}]


def test_one_total_per_task_is_one_total(tmp_path):
    module = TrunkAndHeads()

    def validation_step(batch, batch_idx):
        losses = module.losses(batch[0])
        for task, loss in losses.items():
            module.total_loss({task: loss})
        module.log("val_truth", sum(losses.values()))

    module.validation_step = validation_step
    trainer = quiet_trainer(tmp_path, callbacks=[GradNormCallback(summary=False)])
    (row,) = trainer.validate(module, batches(3), verbose=False)
    assert row["val_total_loss"] == pytest.approx(row["val_truth"], rel=1e-6)


@pytest.mark.parametrize("where", ["validation_step", "on_validation_epoch_end", "on_validation_epoch_start"])
@pytest.mark.parametrize("loaders", [1, 2])
def test_what_the_module_logs_under_the_same_name_is_the_modules(tmp_path, where, loaders, caplog):
    memory, module = MemoryLogger(), Evaluated()

    def logs(*args):
        if where == "validation_step":
            module.total_loss(module.losses(args[0][0]))
        module.log("val_total_loss", 7.0)

    setattr(module, where, (lambda batch, batch_idx, dataloader_idx=0: logs(batch)) if where == "validation_step" else logs)
    callback = GradNormCallback(summary=False)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], logger=memory, max_epochs=3, num_sanity_val_steps=1)
    with caplog.at_level("INFO"):
        trainer.fit(module, batches(3), [batches(2)] * loaders)
    rows = [row for _, row in memory.logged if any("val_total_loss" in name for name in row)]
    assert len(rows) == 3
    several = loaders > 1
    suffix = "/dataloader_idx_1" if several and where == "validation_step" else ""
    assert [row[f"val_total_loss{suffix}"] for row in rows] == [7.0] * 3
    assert all(f"val_task_loss/odd{'/dataloader_idx_1' * several}" in row for row in rows)
    assert "The module logs val_total_loss" in caplog.text
