"""Where a run's files go: real loggers, remote folders, several runs side by side, and folders that cannot be written."""

import contextlib
import warnings
from pathlib import Path

import fsspec
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_gradnorm import FixedWeights, GradNormCallback, LossBalancingCallback
from lightning_gradnorm.report.run import report_of
from lightning_gradnorm.weights_file import read_file
from tests.helpers import MemoryLogger, TrunkAndHeads, batches, quiet_trainer

WRITTEN = {"loss_weights.yaml", "loss_balancing.png"}
PNG = b"\x89PNG\r\n\x1a\n"


@contextlib.contextmanager
def csv(folder):
    yield CSVLogger(folder)


@contextlib.contextmanager
def tensorboard(folder):
    yield TensorBoardLogger(folder)


@contextlib.contextmanager
def wandb(folder):
    import wandb

    logger = WandbLogger(save_dir=folder, offline=True)
    yield logger
    logger.experiment.finish()
    wandb.teardown()


@contextlib.contextmanager
def mlflow_files(folder):
    yield MLFlowLogger(save_dir=str(folder / "mlruns"))


@contextlib.contextmanager
def mlflow_database(folder):
    yield MLFlowLogger(tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=str(folder / "artifacts"))


class OfOneFolder(Logger):
    """As W&B's of old, Comet's and others: a folder for all runs, and an id for each."""

    def __init__(self, folder, version, name="project"):
        super().__init__()
        self._folder, self._version, self._name = folder, version, name

    save_dir, version, name = (
        property(lambda self, what=what: getattr(self, what)) for what in ("_folder", "_version", "_name")
    )

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass


@contextlib.contextmanager
def of_one_folder(folder):
    yield OfOneFolder(folder, f"id{len(list(folder.rglob('*')))}")


LOGGERS = {logger.__name__: logger for logger in (csv, tensorboard, wandb, mlflow_files, mlflow_database, of_one_folder)}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow would have everybody use a database


def fit(folder, logger, callback=None, **settings):
    callback = callback or GradNormCallback(lr=0.1)
    quiet_trainer(folder, callbacks=[callback], logger=logger, **settings).fit(TrunkAndHeads(), batches(4))
    return callback


def of_this_run(logger):
    """Where a person who knows the logger would look for the run's files."""
    match logger:
        case TensorBoardLogger() | CSVLogger():
            return Path(logger.log_dir)
        case WandbLogger():
            return Path(logger.experiment.dir)
        case MLFlowLogger():
            (run,) = (run for run in logger.experiment.search_runs([logger.experiment_id]) if run.info.run_id == logger.run_id)
            return Path(run.info.artifact_uri.removeprefix("file://"))
    return Path(logger.save_dir) / "project" / logger.version


@pytest.mark.feature(
    "TensorBoardLogger, CSVLogger, WandbLogger, MLFlowLogger, others with a `save_dir`",
    "supported",
    "`loss_weights.yaml` and the figure are in the folder of the logger's run",
)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::pydantic.warnings.PydanticDeprecatedSince20"
)
@pytest.mark.parametrize("kind", LOGGERS)
def test_each_run_has_its_files_in_its_own_folder(tmp_path, kind):
    folders = []
    for _ in range(2):
        with LOGGERS[kind](tmp_path) as logger:
            callback = fit(tmp_path, logger)
            folders.append(of_this_run(logger))
            assert tmp_path in folders[-1].parents
            assert {path.name for path in folders[-1].iterdir()} >= WRITTEN
            assert (folders[-1] / "loss_balancing.png").read_bytes().startswith(PNG)
            report, history = report_of(folders[-1])
            assert {row.task: row.mean for row in report.rows} == callback.mean_weights
            assert FixedWeights.from_file(folders[-1] / "loss_weights.yaml").given == callback.mean_weights
            assert bool(history.tasks) == (kind in ("csv", "tensorboard"))
            assert kind in ("csv", "tensorboard") or "No curves, so no figure" in history.notes[0]
    assert folders[0] != folders[1]
    assert len(list(tmp_path.rglob("loss_weights.yaml"))) == len(list(tmp_path.rglob("loss_balancing.png"))) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_second_fit_in_one_mlflow_run_goes_on_with_other_settings(tmp_path, caplog):
    with mlflow_files(tmp_path) as logger:
        module = TrunkAndHeads()
        module.save_hyperparameters({"width": 3})
        first = GradNormCallback(lr=0.1)
        for callback in (first, None):
            callback = callback or LossBalancingCallback(FixedWeights(first.mean_weights))
            with caplog.at_level("INFO"):
                quiet_trainer(tmp_path, callbacks=[callback], logger=logger).fit(module, batches(4))
        parameters = logger.experiment.get_run(logger.run_id).data.params
    assert parameters["loss_balancing/method"] == "GradNorm"
    assert parameters["width"] == "3"
    (told,) = (record.getMessage() for record in caplog.records if "did not take the loss balancing's" in record.getMessage())
    assert "MLFlowLogger" in told
    assert "loss_weights.yaml has them" in told
    folder = of_this_run(logger)
    assert read_file(folder / "loss_weights.yaml")["method"] == "FixedWeights"
    assert read_file(folder / "loss_weights-v1.yaml")["method"] == "GradNorm", "what was learnt first is kept"


def test_a_logger_that_refuses_hyperparameters_of_any_kind_does_not_end_the_fit(tmp_path, caplog):
    class Refusing(MemoryLogger):
        def log_hyperparams(self, params):
            if any(name.startswith("loss_balancing/") for name in params):
                raise KeyError("no")

    with caplog.at_level("INFO"):
        callback = fit(tmp_path, Refusing())
    assert callback.balancer.steps == 4
    assert "Refusing did not take the loss balancing's method and settings as hyperparameters: KeyError: 'no'" in caplog.text


def test_several_loggers_have_the_files_each(tmp_path):
    loggers = [OfOneFolder(tmp_path / "a", "1"), CSVLogger(tmp_path / "b"), MemoryLogger(), OfOneFolder(tmp_path / "a", "1")]
    fit(tmp_path, loggers)
    for folder in (tmp_path / "a/project/1", tmp_path / "b/lightning_logs/version_0"):
        assert {path.name for path in folder.iterdir()} >= WRITTEN
    assert len(list(tmp_path.rglob("loss_weights*"))) == 2


# -- one folder, several fits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, 0, "same"])
def test_a_run_does_not_write_over_another(tmp_path, version, caplog):
    given = [FixedWeights(dict.fromkeys(("small", "middle", "large", "odd"), weight)) for weight in (1.0, 2.0, 3.0)]
    for balancer in given:
        with caplog.at_level("INFO"):
            fit(tmp_path, OfOneFolder(tmp_path, version), LossBalancingCallback(balancer))
    folder = tmp_path / "project" / {None: "", 0: "version_0", "same": "same"}[version]
    means = {path.name: FixedWeights.from_file(path).given["odd"] for path in folder.glob("*.yaml")}
    assert means == {"loss_weights-v1.yaml": 1.0, "loss_weights-v2.yaml": 2.0, "loss_weights.yaml": 3.0}
    assert len(list(folder.glob("*.png"))) == 3


def test_a_run_that_goes_on_replaces_its_own_files(tmp_path):
    logger, callback = CSVLogger(tmp_path, version="log"), GradNormCallback(lr=0.1)
    module = TrunkAndHeads()
    for _ in range(2):
        trainer = quiet_trainer(tmp_path, callbacks=[callback], logger=logger)
        trainer.fit(module, batches(4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    folder = tmp_path / "lightning_logs" / "log"
    assert read_file(folder / "loss_weights.yaml")["steps"] == 8
    resumed = quiet_trainer(
        tmp_path, callbacks=[GradNormCallback(lr=0.1)], logger=OfOneFolder(folder, None, None), max_epochs=2
    )
    resumed.fit(TrunkAndHeads(), batches(4), ckpt_path=tmp_path / "last.ckpt")
    assert read_file(folder / "loss_weights.yaml")["steps"] == 12
    assert not list(folder.glob("*-v1*"))


class Validated(TrunkAndHeads):
    def validation_step(self, batch, batch_idx):
        self.log("accuracy", 0.5)


def test_a_run_that_is_resumed_at_its_end_has_the_held_out_metrics_still(tmp_path):
    folder = tmp_path / "lightning_logs" / "log"
    for path in (None, tmp_path / "last.ckpt"):
        callback, logger = GradNormCallback(lr=0.1), CSVLogger(tmp_path, version="log")
        trainer = quiet_trainer(tmp_path, callbacks=[callback], logger=logger)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory")
            trainer.fit(Validated(), batches(4), batches(1), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        assert read_file(folder / "loss_weights.yaml")["held_out"] == {"accuracy": 0.5}
    trainer = quiet_trainer(tmp_path, callbacks=[callback], logger=logger)
    trainer.fit(TrunkAndHeads(), batches(4))
    assert callback.report.held_out == {}, "another fit, without a validation"


# -- behind a URL ----------------------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    """A folder in memory, as remote as S3 for all that we do."""
    yield fsspec.filesystem("memory")
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def test_a_remote_folder_is_written_and_read(tmp_path, memory):
    callback = fit(tmp_path, CSVLogger("memory://runs"))
    folder = "memory://runs/lightning_logs/version_0"
    assert {Path(path).name for path in memory.ls("/runs/lightning_logs/version_0", detail=False)} >= WRITTEN | {"metrics.csv"}
    assert memory.cat_file("/runs/lightning_logs/version_0/loss_balancing.png").startswith(PNG)
    report, history = report_of(folder)
    assert {row.task: row.mean for row in report.rows} == callback.mean_weights
    assert history.of("loss_weight")["small"].steps == [0, 1, 2, 3]
    assert FixedWeights.from_file(f"{folder}/loss_weights.yaml").given == callback.mean_weights
    assert not list(tmp_path.rglob("loss_weights*"))
    with pytest.raises(FileNotFoundError, match=r"neither .* Below it, these have: memory://runs/lightning_logs/version_0\."):
        report_of("memory://runs")
    with pytest.raises(FileNotFoundError, match="There is no log folder memory://nothing"):
        report_of("memory://nothing")
    fit(tmp_path, OfOneFolder("memory://runs", "version_0", "lightning_logs"))
    assert memory.exists("/runs/lightning_logs/version_0/loss_weights-v1.yaml")


def test_remote_event_files_are_read(tmp_path, memory):
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, logger)
    for file in Path(logger.log_dir).glob("events*"):
        memory.pipe_file(f"/log/{file.name}", file.read_bytes())
    report, history = report_of("memory://log")
    assert report.logged_only
    assert history.of("loss_weight")["small"].steps == [0, 1, 2, 3]


# -- where nothing can be written ------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_told_and_the_fit_ends_well(tmp_path, capsys):
    (tmp_path / "project").write_text("a file")
    with pytest.warns(UserWarning, match="could not be written") as caught:
        callback = fit(tmp_path, OfOneFolder(tmp_path, "1"))
    (said,) = (str(warning.message) for warning in caught if "could not be written" in str(warning.message))
    assert "The report of the fit could not be written: " in said
    assert f"It was to go into {tmp_path}/project/1. Make that a folder that can be written" in said
    assert "callback.report.write('another folder')" in said
    assert "GradNorm after 4 steps" in capsys.readouterr().out
    assert read_file(callback.report.write(tmp_path / "elsewhere"))["steps"] == 4


def test_other_loggers_still_get_theirs(tmp_path):
    (tmp_path / "project").write_text("a file")
    with pytest.warns(UserWarning, match="could not be written"):
        fit(tmp_path, [OfOneFolder(tmp_path, "1"), CSVLogger(tmp_path)])
    assert {path.name for path in (tmp_path / "lightning_logs" / "version_0").iterdir()} >= WRITTEN


@pytest.mark.parametrize(
    "error", [PermissionError("read-only"), RuntimeError("403 Forbidden"), UnicodeEncodeError("cp", "–", 0, 1, "no")]
)
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("run_folder", "The report of the fit could not be written: .* the folder of CSVLogger's run"),
        ("picture_of", "The figure of the fit could not be drawn: .* written without"),
        ("RunReport.print", "The table of the fit could not be printed: .* callback.report has its rows"),
        ("Reporting.report", "The report of the fit could not be written: .* callback.report has what there is"),
    ],
)
def test_nothing_that_goes_wrong_at_the_end_ends_the_fit(tmp_path, monkeypatch, where, said, error):
    def fails(*args):
        raise error

    monkeypatch.setattr(f"lightning_gradnorm.callbacks.reporting.{where}", fails)
    with pytest.warns(UserWarning, match=said):
        assert fit(tmp_path, CSVLogger(tmp_path)).balancer.steps == 4
    assert len(list(tmp_path.rglob("loss_weights.yaml"))) == (where in ("picture_of", "RunReport.print"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"logger": False}, "loss_weights.yaml and the figure are not written: the Trainer has no logger"),
        ({"logger": MemoryLogger()}, "loss_weights.yaml and the figure are not written: no folder is known of MemoryLogger"),
        ({"fast_dev_run": 2}, "no report of this fit's loss weights: fast_dev_run leaves nothing behind"),
        ({"limit_train_batches": 0}, "no report of this fit's loss weights: no optimiser step was measured"),
    ],
    ids=["no logger", "no folder", "fast_dev_run", "no step"],
)
def test_where_nothing_is_written_a_line_says_why(tmp_path, settings, said, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, **{"logger": CSVLogger(tmp_path)} | settings)
    assert said in caplog.text
    assert not list(tmp_path.rglob("loss_weights*"))


@pytest.mark.parametrize("every", [0, 50])
def test_a_run_that_logs_no_step_has_its_weights_written_and_says_why_no_figure(tmp_path, every, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, CSVLogger(tmp_path), log_every_n_steps=every)
    assert "No figure is drawn" in caplog.text
    assert len(list(tmp_path.rglob("loss_weights.yaml"))) == 1


# -- what the table counts -------------------------------------------------------------------------------------------


def test_the_tables_steps_are_the_runs(tmp_path, capsys):
    callback = GradNormCallback(update_every=10)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], logger=CSVLogger(tmp_path), accumulate_grad_batches=2, max_epochs=4)
    trainer.fit(TrunkAndHeads(), batches(80))
    report = callback.report
    assert (report.steps, report.measured) == (160, 17), "the first, and each tenth"
    assert report.heading == "GradNorm after 160 steps, 17 of them measured"
    assert "After the first 1 measured steps" in report.verdict
    assert report.heading in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
    content = read_file(next(tmp_path.rglob("loss_weights.yaml")))
    assert (content["steps"], content["measured_steps"]) == (160, 17)
    again, _ = report_of(next(tmp_path.rglob("loss_weights.yaml")).parent)
    assert again.heading == report.heading
    assert again.verdict == report.verdict
