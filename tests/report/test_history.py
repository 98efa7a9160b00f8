"""A log folder read back: what was logged is what comes out, and what cannot be read is said."""

import math
import struct

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_gradnorm import GradNormCallback
from lightning_gradnorm.report.history import History, read_history
from lightning_gradnorm.report.tags import PER_TASK
from lightning_gradnorm.task_names import task_tag
from tests.helpers import SCALES, MemoryLogger, TrunkAndHeads, batches, loading, quiet_trainer

ODD_NAMES = ["größe", "two words", "∂u/∂t", "🙂", "_a", "a.b-c", "深度", "$x^2$", "100 %"]


def write_events(folder, points, **settings):
    """One event file: (tag, step, value) each."""
    with SummaryWriter(folder, **settings) as writer:
        for tag, step, value in points:
            writer.add_scalar(tag, value, step)


def event_file(folder):
    (file,) = folder.glob("events.out.tfevents.*")
    return file


def weights_of(folder, task="a"):
    curve = read_history(folder).of("loss_weight")[task]
    return dict(zip(curve.steps, curve.values, strict=True))


@pytest.mark.parametrize("names", [list(SCALES), ODD_NAMES, [f"task {i}" for i in range(20)]], ids=["four", "odd", "twenty"])
def test_both_formats_give_what_was_logged(tmp_path, names):
    memory, loggers = MemoryLogger(), [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]
    callback = GradNormCallback(lr=0.1, summary=False)
    quiet_trainer(tmp_path, callbacks=[callback], logger=[*loggers, memory]).fit(NamedTasks(names), batches(7))
    for logger in loggers:
        history = read_history(logger.log_dir)
        assert history.notes == ()
        assert sorted(history.tasks) == sorted(map(task_tag, names))
        for kind in PER_TASK:
            curves = history.of(kind)
            assert len(curves) == len(names)
            for task, curve in curves.items():
                logged = [(step, row[f"{kind}/{task}"]) for step, row in memory.logged]
                assert curve.steps == [step for step, _ in logged]
                assert curve.values == pytest.approx([value for _, value in logged], rel=1e-6)


class NamedTasks(TrunkAndHeads):
    """Tasks of any name."""

    def __init__(self, names):
        super().__init__(scales={f"head{i}": 1.0 + i for i in range(len(names))})
        self.names = names

    def losses(self, x):
        return dict(zip(self.names, super().losses(x).values(), strict=True))


def test_a_resumed_run_has_each_step_once_as_it_was_logged_last(tmp_path):
    write_events(tmp_path, [("loss_weight/a", step, 1.0) for step in range(8)], filename_suffix=".0")
    write_events(tmp_path, [("loss_weight/a", step, 2.0) for step in range(5, 12)], filename_suffix=".1")
    for number, file in enumerate(sorted(tmp_path.iterdir(), key=lambda file: file.suffix)):
        file.rename(tmp_path / f"events.out.tfevents.{1_700_000_000 + number}.host")  # one second apart
    assert weights_of(tmp_path) == {step: 1.0 if step < 5 else 2.0 for step in range(12)}


def test_files_of_one_second_are_read_in_the_order_of_their_numbers(tmp_path):
    for number in (8, 9, 10):
        write_events(tmp_path, [("loss_weight/a", 0, float(number))])
        (new,) = (file for file in tmp_path.iterdir() if "host" not in file.name)
        new.rename(tmp_path / f"events.out.tfevents.1700000000.host.77.{number}")
    assert weights_of(tmp_path) == {0: 10.0}


def test_a_resumed_fit_has_each_step_once(tmp_path):
    module, folder = TrunkAndHeads(), tmp_path / "log"
    logger = {"save_dir": folder, "name": "", "version": ""}
    first = quiet_trainer(tmp_path, callbacks=[GradNormCallback(lr=0.1)], logger=TensorBoardLogger(**logger))
    first.fit(module, batches(6))
    first.save_checkpoint(tmp_path / "last.ckpt")
    callback, memory = GradNormCallback(lr=0.1), MemoryLogger()
    second = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2, logger=[TensorBoardLogger(**logger), memory])
    second.fit(module, batches(6), ckpt_path=tmp_path / "last.ckpt", **loading(weights_only=False))
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2
    weights = weights_of(folder, "small")
    assert list(weights) == list(range(12))
    logged = {step: row["loss_weight/small"] for step, row in memory.logged}
    assert {step: weights[step] for step in logged} == pytest.approx(logged, rel=1e-6)


def test_a_writer_that_purges_takes_back_what_it_logged(tmp_path):
    write_events(tmp_path, [(f"loss_weight/{task}", step, 1.0) for task in "ab" for step in range(8)], filename_suffix=".0")
    event_file(tmp_path).rename(tmp_path / "events.out.tfevents.0")
    write_events(tmp_path, [("loss_weight/a", 3, 2.0)], purge_step=3)
    assert weights_of(tmp_path) == {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0}
    assert weights_of(tmp_path, "b") == {0: 1.0, 1: 1.0, 2: 1.0}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_killed_run_is_read_up_to_there(tmp_path, cut):
    write_events(tmp_path, [("loss_weight/a", step, 1.0 + step) for step in range(6)])
    file = event_file(tmp_path)
    file.write_bytes(file.read_bytes()[:-cut])
    (note,) = read_history(tmp_path).notes
    assert file.name in note
    assert "read up to there" in note
    assert weights_of(tmp_path) == {step: 1.0 + step for step in range(5)}


def test_damage_in_the_middle_is_told(tmp_path):
    write_events(tmp_path, [("loss_weight/a", step, 1.0 + step) for step in range(6)])
    file = event_file(tmp_path)
    content = bytearray(file.read_bytes())
    position = 0
    for _ in range(4):  # the version, and three steps
        position += struct.unpack_from("<Q", content, position)[0] + 16
    content[position + 14] ^= 0xFF
    file.write_bytes(content)
    (note,) = read_history(tmp_path).notes
    assert f"{file.name} is damaged after 4 of 7 records" in note
    assert weights_of(tmp_path) == {0: 1.0, 1: 2.0, 2: 3.0}


def test_numbers_that_are_none_come_through(tmp_path):
    values = [math.nan, math.inf, -math.inf, -0.5, 0.0]
    write_events(tmp_path / "tb", [("task_loss/a", step, value) for step, value in enumerate(values)])
    write_events(tmp_path / "tb", [("loss_weight/a", 0, 1.0), ("loss_weight_of/a", 0, 1.0), ("val/loss", 0, 1.0)])
    lines = "".join(f"{value},{step}{',1' if step == 0 else ','}\n" for step, value in enumerate(values))
    (tmp_path / "metrics.csv").write_text(f"task_loss/a,step,loss_weight/a\n{lines}")
    for folder in (tmp_path / "tb", tmp_path):
        history = read_history(folder)
        assert history.of("task_loss")["a"].values == pytest.approx(values, nan_ok=True)
        assert history.tasks == ("a",)


class Shown:
    """What a module may log in validation besides numbers, each under a name that begins like a metric's."""

    image = staticmethod(lambda writer: writer.add_image("val/predictions", np.zeros((3, 4, 4), dtype=np.uint8), 0))
    histogram = staticmethod(lambda writer: writer.add_histogram("val/logits", np.arange(10.0), 0))
    text = staticmethod(lambda writer: writer.add_text("val/example", "hello", 0))
    pr_curve = staticmethod(lambda writer: writer.add_pr_curve("val/pr", np.array([0, 1, 1]), np.array([0.1, 0.5, 0.9]), 0))
    mesh = staticmethod(lambda writer: writer.add_mesh("val/mesh", torch.zeros(1, 3, 3), global_step=0))


@pytest.mark.parametrize("kind", [name for name in vars(Shown) if not name.startswith("_")])
def test_what_is_no_number_is_passed_over(tmp_path, kind):
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("loss_weight/a", 1.0, 0)
        writer.add_scalar("val/loss", 2.0, 0)
        writer.add_scalar("val/error", 3.0, 0, new_style=True)
        getattr(Shown, kind)(writer)
    history = read_history(tmp_path)
    assert history.tasks == ("a",)
    assert history.held_out == {"val/error": 3.0, "val/loss": 2.0}


def test_a_history_takes_points_in_any_order():
    history = History({"loss_weight/a/b": {7: 3.0, 1: 2.0}, "loss_weight/c": {}, "epoch": {0: 1.0}})
    assert history.tasks == ("a/b",)
    assert history.of("loss_weight") == {"a/b": ([1, 7], [2.0, 3.0])}


def test_a_history_in_the_order_of_training():
    history = History(
        {"loss_weight/a": {0: 1.0}, "task_loss/a": {0: 1.0}, "loss_weight/b": {0: 2.0}, "loss_weight/x": {0: 3.0}}, ("n",)
    )
    ordered = history.in_order_of(["c", "b", "a"])
    assert (history.tasks, ordered.tasks, ordered.notes) == (("a", "b", "x"), ("b", "a", "x"), ("n",))
    assert ordered.of("loss_weight")["b"] == ([0], [2.0])
    assert ordered.of("task_loss") == history.of("task_loss")


def test_a_folder_that_is_none(tmp_path):
    for folder in (tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(FileNotFoundError, match=r"There is no log folder .*Give the one that the table at the end of fit"):
            read_history(folder)


def test_a_folder_without_logs_names_those_below_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither TensorBoard event files nor Lightning's metrics.csv\. Give a folder"):
        read_history(tmp_path)
    (tmp_path / "version_7").mkdir()
    (tmp_path / "version_7" / "metrics.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"Below it, these have: .*version_7\. Give a folder"):
        read_history(tmp_path)


def test_logs_without_our_tags(tmp_path):
    write_events(tmp_path / "tb", [("val/loss", 0, 1.0)])
    (tmp_path / "metrics.csv").write_text("epoch,step,val/loss\n0,0,1.0\n")
    for folder in (tmp_path / "tb", tmp_path):
        with pytest.raises(
            ValueError, match=r"no loss_weight/… among them.*shorter than log_every_n_steps\. Add GradNormCallback\(\)"
        ):
            read_history(folder)


@pytest.mark.parametrize("content", [b"hello", b"not an event file, though it is long enough for one", bytes(40)])
def test_a_file_that_is_no_event_file(tmp_path, content):
    write_events(tmp_path, [("loss_weight/a", 0, 1.0)])
    stray = tmp_path / "events.out.tfevents.1.stray"
    stray.write_bytes(content)
    with pytest.raises(ValueError, match=r"stray is not a TensorBoard event file.*Move it out of the folder"):
        read_history(tmp_path)
    stray.write_bytes(b"")  # of a run that logged nothing yet
    assert weights_of(tmp_path) == {0: 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no column 'step'.*Give its folder"),
        (b"epoch,loss_weight/a\n0,1.0\n", "no column 'step'.*Give its folder"),
        (b"step,loss_weight/a\n0,1.0\n1,one\n2,1.0\n", "line 3: .*'one'.* Mend or delete that line"),
        (b"step,loss_weight/a\nx,1.0\n", "line 2: .*'x'.* Mend or delete that line"),
        (b"loss_weight/a,step,epoch\n1.0,0,0\n1.0,", "line 3: 2 values for 3 columns. Mend or delete that line"),
        (b"step,loss_weight/a\n0,1.0,9\n", "line 2: 3 values for 2 columns. Mend or delete that line"),
        ("step,loss_weight/größe\n0,1.0\n".encode("latin-1"), "is no CSV file .*Give a folder that a CSVLogger wrote"),
    ],
)
def test_a_table_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"metrics.csv.*{message}"):
        read_history(tmp_path)
