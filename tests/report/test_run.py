"""The report of a run: the same from its log folder as at the end of fit, and what an interrupted fit leaves behind."""

import contextlib
import dataclasses
import math
import types
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_gradnorm import FixedWeights, GradNorm, GradNormCallback, LossBalancingCallback, UncertaintyWeighting
from lightning_gradnorm.callbacks.reporting import Reporting
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.report.history import History
from lightning_gradnorm.report.run import draw, report_of
from lightning_gradnorm.weights_file import read_file
from tests.helpers import SCALES, TrunkAndHeads, batches, quiet_trainer

LOGGERS = {"tensorboard": TensorBoardLogger, "csv": CSVLogger}
WRITTEN = {"loss_weights.yaml", "loss_balancing.png"}
PNG = b"\x89PNG\r\n\x1a\n"


def fit(folder, callback, *others, steps=12, logger=CSVLogger, **settings):
    """The log folder of a short fit, with all that is logged in it."""
    logger = logger and logger(folder, name="", version="log")
    trainer = quiet_trainer(folder, callbacks=[*others, callback], logger=logger, **settings)
    trainer.fit(TrunkAndHeads(), batches(steps))
    return Path(logger.log_dir) if logger else Path(folder)


def written(folder):
    return {path.name for path in Path(folder).rglob("*") if path.name in WRITTEN}


def fields(rows):
    return [repr(dataclasses.astuple(row)) for row in rows]  # NaN equals NaN


@pytest.mark.parametrize("logger", LOGGERS)
@pytest.mark.parametrize(
    "callback",
    [
        lambda: GradNormCallback(lr=0.1),
        lambda: GradNormCallback(mode="monitor"),
        lambda: LossBalancingCallback(UncertaintyWeighting()),  # measures no gradients
        lambda: LossBalancingCallback(FixedWeights(dict.fromkeys(SCALES, 2.0))),
    ],
    ids=["GradNorm", "monitor", "uncertainty", "fixed"],
)
def test_the_folder_gives_the_table_of_the_end_of_fit(tmp_path, logger, callback, capsys):
    callback = callback()
    folder = fit(tmp_path, callback, logger=LOGGERS[logger], max_epochs=2)
    printed = capsys.readouterr().out
    report, history = report_of(folder)
    assert fields(report.rows) == fields(callback.report.rows)
    assert len(report.rows) == 4
    assert report.heading == callback.report.heading
    assert "after 24 steps" in report.heading
    assert report.verdict == callback.report.verdict
    assert report.verdict in printed
    assert report.settings == callback.report.settings
    report.print()
    assert capsys.readouterr().out in printed
    assert (folder / "loss_balancing.png").read_bytes().startswith(PNG)
    again = draw(history, tmp_path, "again")
    assert again == tmp_path / "loss_balancing.png"
    assert again.read_bytes().startswith(PNG)


@pytest.mark.parametrize("logger", LOGGERS)
def test_without_the_file_it_is_over_the_logged_steps(tmp_path, logger):
    callback = GradNormCallback(lr=0.1)
    folder = fit(tmp_path, callback, logger=LOGGERS[logger], steps=10)
    (folder / "loss_weights.yaml").unlink()
    report, _ = report_of(folder)
    assert report.heading == "The run after the 10 logged steps"
    assert report.verdict.startswith("After the first 1 logged steps the weight of ")
    ours = {row.task: row for row in report.rows}
    theirs = {row.task: row for row in callback.report.rows}
    assert ours.keys() == theirs.keys()
    for task, row in theirs.items():
        for name in ("start", "mean", "std", "mean_after_warmup", "std_after_warmup", "share_before"):
            assert getattr(ours[task], name) == pytest.approx(getattr(row, name), rel=1e-5, abs=1e-7), name


def from_curves(monkeypatch, **curves):
    """The report of a run with these values on steps 0, 10, 20, …"""
    points = {
        f"{kind}/{task}": {10 * i: value for i, value in enumerate(values)}
        for kind, by_task in curves.items()
        for task, values in by_task.items()
    }
    monkeypatch.setattr("lightning_gradnorm.report.run.read_history", lambda folder: History(points))
    report, _ = report_of("nowhere")
    return report, {row.task: row for row in report.rows}


def test_numbers_that_can_be_done_in_the_head(monkeypatch):
    weights = {"a": [2.0] + [4.0] * 10, "b": [0.5] + [1.0, 3.0] * 5}
    norms = {"a": [6.0] + [1.0] * 10, "b": [0.5] + [3.0] * 10}
    losses = {"a": [math.nan, 8.0] + [2.0] * 9, "b": [10.0] * 11}
    report, rows = from_curves(monkeypatch, loss_weight=weights, grad_norm=norms, task_loss=losses)
    assert (report.steps, report.warmup, report.logged_only) == (11, 1, True)
    a, b = rows["a"], rows["b"]
    assert (a.start, a.final, a.mean_after_warmup, a.std_after_warmup) == (2.0, 4.0, 4.0, 0.0)
    assert (b.start, b.final, b.mean_after_warmup, b.std_after_warmup) == (0.5, 3.0, 2.0, 1.0)
    assert (a.mean, b.mean) == (42 / 11, 20.5 / 11)
    assert (a.share_before, b.share_before) == (0.75, 0.25), "3 and 1, unweighted, as at the end of fit"
    assert (a.share_after, b.share_after) == (0.25, 0.75)
    assert (a.loss_ratio, b.loss_ratio) == (0.25, 1.0)
    assert report.verdict == (
        "After the first 1 logged steps the weight of 'b' moved by 50% of its mean: leave the balancing on. Whether fixed "
        "weights do as well, a run with FixedWeights.from_file('loss_weights.yaml') says."
    )
    assert (a.way[0], a.way[-1], b.way[0]) == ("▆", "█", "▁"), "2 and 4 on a scale from 0.5 to 4"


def test_steady_weights_are_told_what_to_do_with_them_and_weights_that_never_moved_nothing(monkeypatch):
    report, _ = from_curves(monkeypatch, loss_weight={"a": [1.0] + [4.0, 4.1] * 10})
    assert report.verdict.startswith(
        "After the first 2 logged steps every weight stayed within 1% of its mean: fixed weights would do"
    )
    assert report.verdict.endswith("To train with them: LossBalancingCallback(FixedWeights.from_file('loss_weights.yaml')).")
    still, _ = from_curves(monkeypatch, loss_weight={"a": [1.0] * 20})
    assert still.verdict == ""


def test_the_table_of_very_many_tasks_has_the_smallest_and_the_largest_weights(monkeypatch, capsys):
    weights = {f"task {i}": [1.0, math.nan if i == 7 else 1.0 + i] for i in range(100)}
    report, rows = from_curves(monkeypatch, loss_weight=weights)
    assert len(rows) == 100
    report.print()
    for text in (str(report), capsys.readouterr().out):
        assert [i for i in range(100) if f"task {i} " in text] == [*range(31), *range(71, 100)]
        assert "Left out: 40 tasks whose weights end between these; loss_weights.yaml has all." in text


def test_a_run_that_diverged_or_measured_no_norms_has_a_report(monkeypatch):
    weights = {"a": [1.0, math.inf], "b": [1.0, math.nan], "c": [0.0, 0.0], "d": [1.0, 1.0]}
    report, rows = from_curves(monkeypatch, loss_weight=weights, grad_norm={"c": [0.0, 0.0], "d": [math.nan] * 2})
    assert [rows["a"].final, rows["a"].mean, rows["a"].std] == pytest.approx([math.inf, math.nan, math.nan], nan_ok=True)
    assert math.isnan(rows["b"].mean)
    assert all(math.isnan(row.share_after) and math.isnan(row.loss_ratio) for row in rows.values())
    assert report.verdict == "", "no weight moved that is known"
    assert all(f"\n{task} " in str(report) for task in "abcd")


class Raising(L.Callback):
    """Ends the fit in the middle."""

    def __init__(self, error, batch=5, before=None):
        self.error, self.batch, self.before = error, batch, before

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            if self.before is not None:
                self.before(Path(trainer.log_dir))
            raise self.error


@pytest.fixture
def interrupts(monkeypatch):
    """Lightning goes on to ignore Ctrl+C after the first; the tests do not."""
    monkeypatch.setattr("signal.signal", lambda number, handler: None)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("logger", LOGGERS)
@pytest.mark.parametrize(("error", "seen"), [(RuntimeError("boom"), RuntimeError), (KeyboardInterrupt(), SystemExit)])
def test_an_interrupted_fit_leaves_its_report(tmp_path, logger, error, seen, capsys):
    callback = GradNormCallback(lr=0.1)
    with pytest.raises(seen) as raised:
        fit(tmp_path, callback, Raising(error), logger=LOGGERS[logger])
    assert seen is SystemExit or raised.value is error
    folder = tmp_path / "log"
    assert written(folder) == WRITTEN
    assert read_file(folder / "loss_weights.yaml")["steps"] == 5
    report, history = report_of(folder)
    assert fields(report.rows) == fields(callback.report.rows)
    assert history.of("loss_weight")["small"].steps == [0, 1, 2, 3, 4]
    assert "GradNorm after 5 steps" in capsys.readouterr().out


def test_before_the_first_step_there_is_nothing_to_leave(tmp_path, capsys):
    error = ValueError("boom")
    with pytest.raises(ValueError, match="boom") as raised:
        fit(tmp_path, GradNormCallback(), Raising(error, batch=0))
    assert raised.value is error
    assert not written(tmp_path)
    assert "steps" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_does_not_hide_the_error(tmp_path):
    def block(folder):
        (folder / "loss_weights.yaml").mkdir(parents=True)

    with (
        pytest.warns(
            UserWarning, match=r"report of the interrupted fit could not be written: .*loss_weights.yaml.* go into .*log"
        ),
        pytest.raises(RuntimeError, match="boom"),
    ):
        fit(tmp_path, GradNormCallback(), Raising(RuntimeError("boom"), before=block))


NOTHING = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), None)
BAREBONES = {"barebones": True, "num_sanity_val_steps": None, "log_every_n_steps": None, "logger": None, **NOTHING}


@pytest.mark.parametrize("error", [None, RuntimeError("boom")], ids=["whole", "interrupted"])
@pytest.mark.parametrize(
    ("settings", "summary", "prints"),
    [
        ({"fast_dev_run": 7}, True, False),
        ({"logger": False}, True, True),
        (BAREBONES, True, True),
        ({}, False, False),
    ],
    ids=["fast_dev_run", "no logger", "barebones", "no summary"],
)
def test_what_writes_nothing(tmp_path, settings, summary, prints, error, capsys):
    others = [Raising(error)] if error else []
    callback = GradNormCallback(lr=0.1, summary=summary)
    with pytest.raises(RuntimeError, match="boom") if error else contextlib.nullcontext():
        fit(tmp_path, callback, *others, steps=7, **settings)
    assert not written(tmp_path)
    assert callback.balancer.steps == (5 if error else 7)
    printed = capsys.readouterr().out
    assert (f"GradNorm after {callback.balancer.steps} steps" in printed) == prints
    assert ("middle" in printed) == prints


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_writes(tmp_path, rank, capsys):
    balancer, reporting = GradNorm(lr=0.1), Reporting(enabled=True)
    vector = balancer.weights_for(["a", "b"])
    reporting.add(vector, Measurement(("a", "b"), vector.double(), vector.double()), 0)
    logger = types.SimpleNamespace(save=lambda: None, log_dir=str(tmp_path), save_dir=None)
    trainer = types.SimpleNamespace(fast_dev_run=False, is_global_zero=rank == 0, loggers=[logger], world_size=2)
    for interrupted in (False, True):
        reporting.write(trainer, balancer, interrupted=interrupted)
        assert written(tmp_path) == ({"loss_weights.yaml"} if rank == 0 else set())
        assert bool(capsys.readouterr().out) == (rank == 0)
