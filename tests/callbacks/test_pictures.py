"""The figure while training goes on: who is sent it, how often, and what it may cost."""

import contextlib
import itertools
import types
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gradnorm import GradNormCallback
from lightning_gradnorm.callbacks import pictures
from lightning_gradnorm.callbacks.pictures import Pictures
from tests.callbacks.test_run_files import mlflow_files, of_this_run, wandb
from tests.helpers import MemoryLogger, TrunkAndHeads, batches, quiet_trainer


class Taking(MemoryLogger):
    """Takes images, as W&B's logger does."""

    def __init__(self, error=None):
        super().__init__()
        self.images, self.error = [], error

    def log_image(self, key, images, step):
        self.images.append((key, step, images[0].shape, int(images[0].min()), int(images[0].max())))
        if self.error:
            raise self.error


@pytest.fixture
def at_once(monkeypatch):
    """Every picture is affordable."""
    monkeypatch.setattr(pictures, "_SHARE", 1e9)
    monkeypatch.setattr(pictures, "_GROWTH", 0.0)


def fit(folder, logger, steps=4, **settings):
    callback = GradNormCallback(**{"summary": False, **{k: settings.pop(k) for k in ("pictures", "summary") if k in settings}})
    quiet_trainer(folder, callbacks=[callback], logger=logger, **settings).fit(TrunkAndHeads(), batches(steps))
    return callback


# -- how often -------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def drawn_at(trainer, seconds, cost, checks=1.0):
    """When the pictures of a fit of so many seconds are drawn, each of which takes so long."""
    clock = Clock()
    shown, times = Pictures(True, clock), []

    def draw():
        times.append(clock.now - 100.0)
        clock.now += cost

    while clock.now < 100.0 + seconds:
        if shown.is_due(trainer):
            shown.draw_and_send(trainer, draw)
        clock.now += checks
    return times


@pytest.mark.parametrize("cost", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("seconds", [30, 600, 20_000, 400_000])
def test_pictures_take_less_than_half_a_percent_and_grow_rare(tmp_path, seconds, cost):
    trainer = quiet_trainer(tmp_path, logger=Taking())
    times = drawn_at(trainer, seconds, cost, checks=seconds / 3000)
    for number, time in enumerate(times, start=2):
        assert number <= 2 or (number - 1) * cost <= 0.005 * (time + cost) + 1e-9
    assert len(times) <= 40
    assert all(later >= 1.24 * earlier for earlier, later in itertools.pairwise(times))
    assert len(times) >= (5 if seconds >= 20_000 else 0)


def test_a_short_fit_has_none_before_its_end(tmp_path):
    assert drawn_at(quiet_trainer(tmp_path, logger=Taking()), 50, 0.3) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_draws(rank):
    clock = Clock()
    shown = Pictures(True, clock)
    trainer = types.SimpleNamespace(is_global_zero=rank == 0, loggers=[Taking()], fast_dev_run=False)
    clock.now += 1e6
    assert shown.is_due(trainer) == (rank == 0)


# -- who ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("at_once")
def test_a_logger_that_takes_images_is_sent_the_figure(tmp_path):
    logger = Taking()
    fit(tmp_path, logger, log_every_n_steps=2)
    assert [(key, step) for key, step, *_ in logger.images] == [("loss_balancing", step) for step in (2, 4, 4)], (
        "and each epoch's"
    )
    for _, _, shape, lowest, highest in logger.images:
        assert shape[2] == 4
        assert shape[1] > shape[0] > 500
        assert (lowest, highest) == (0, 255)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "settings",
    [{"pictures": False}, {"fast_dev_run": 3}, {"log_every_n_steps": 0}],
    ids=["not wanted", "a trial run", "nothing to show"],
)
def test_where_none_is_sent(tmp_path, settings):
    logger = Taking()
    fit(tmp_path, logger, **settings)
    assert logger.images == []


@pytest.mark.usefixtures("at_once")
def test_where_nobody_takes_images_none_is_drawn(tmp_path, monkeypatch):
    def fails(*args):
        raise AssertionError("drawn")

    monkeypatch.setattr("lightning_gradnorm.callbacks.reporting.picture_of", fails)
    fit(tmp_path, [MemoryLogger(), CSVLogger(tmp_path)])


@pytest.mark.usefixtures("at_once")
def test_without_matplotlib_nothing_is_sent_or_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lightning_gradnorm.callbacks.pictures.can_draw", lambda: False)
    logger = Taking()
    with caplog.at_level("INFO"):
        fit(tmp_path, logger)
    assert logger.images == []
    assert "matplotlib" not in caplog.text


@pytest.mark.usefixtures("at_once")
def test_a_logger_that_fails_to_take_it_is_asked_once(tmp_path):
    broken, other = Taking(ConnectionError("no route")), Taking()
    with pytest.warns(UserWarning, match=r"Taking did not take the figure of the loss weights: ConnectionError: no route"):
        callback = fit(tmp_path, [broken, other], steps=3)
    assert callback.balancer.steps == 3
    assert (len(broken.images), len(other.images)) == (1, 4)


class Away(MemoryLogger):
    """Its server is there when training begins, and then away."""

    @property
    def experiment(self):
        if self.logged:
            raise ConnectionError("no route")
        return object()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("where", ["is_due", "report"])
def test_what_fails_while_training_is_told_once_and_ends_no_fit(tmp_path, monkeypatch, where):
    def fails(*args):
        raise ConnectionError("no route")

    logger = Away() if where == "is_due" else Taking()
    if where == "report":
        monkeypatch.setattr("lightning_gradnorm.callbacks.reporting.Reporting.report", fails)
    with pytest.warns(UserWarning, match=r"figure of the fit so far could not be shown: ConnectionError: no route") as caught:
        callback = fit(tmp_path, logger, steps=8)
    assert callback.balancer.steps == 8
    assert sum("could not be shown" in str(warning.message) for warning in caught) == 1


def test_the_next_fit_has_pictures_again(tmp_path):
    shown, trainer = Pictures(True), quiet_trainer(tmp_path, logger=Taking())
    shown.stop()
    assert not shown.has_takers(trainer)
    shown.start()
    assert shown.has_takers(trainer)


@pytest.mark.filterwarnings("ignore:The report of the fit could not be written.* the folder of Away's run")
@pytest.mark.parametrize("when", ["fit so far", "fit"])
def test_the_files_are_written_where_the_figure_could_not_be_shown(tmp_path, monkeypatch, when):
    if when == "fit so far":
        monkeypatch.setattr(pictures, "_SHARE", 1e9)
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match=f"The figure of the {when} could not be shown"):
        fit(tmp_path, [Away(), logger], steps=4, summary=True)
    assert {path.name for path in Path(logger.log_dir).iterdir()} >= {"loss_weights.yaml", "loss_balancing.png"}


def test_the_last_figure_is_sent_with_the_report(tmp_path):
    logger = Taking()
    fit(tmp_path, logger, summary=True)
    assert [(key, step) for key, step, *_ in logger.images] == [("loss_balancing", 4)]


def test_tensorboard_shows_it_among_the_images(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, logger, summary=True)
    (image,) = EventAccumulator(logger.log_dir).Reload().Images("loss_balancing")
    assert image.step == 4
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.width > image.height > 500


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::pydantic.warnings.PydanticDeprecatedSince20"
)
@pytest.mark.parametrize("kind", [wandb, mlflow_files])
def test_wandb_and_mlflow_have_it_among_theirs(tmp_path, kind, monkeypatch):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("MLFLOW_ALLOW_FILE_STORE", "true")):
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as stack:
        logger = stack.enter_context(kind(tmp_path))
        fit(tmp_path, logger, summary=True)
        found = {path.name for path in of_this_run(logger).rglob("*.png")}
    assert "loss_balancing.png" in found
    assert any(name.startswith("loss_balancing") and name != "loss_balancing.png" for name in found), found
