"""TensorBoard's HParams page: method, settings and the held-out metrics of every run, so that its table sorts."""

import pickle
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lightning_gradnorm import EqualWeights, GradNorm, GradNormCallback, LossBalancingCallback, UncertaintyWeighting
from lightning_gradnorm.report.run import report_of
from tests.helpers import TrunkAndHeads, batches, quiet_trainer


class Validated(TrunkAndHeads):
    """Logs a metric in validation, and one in training."""

    def training_step(self, batch, batch_idx):
        self.log("speed", 3.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", 0.5 + 0.1 * self.current_epoch)


def page_of(logger):
    """Columns of hyperparameters, of metrics, and the run's own values."""
    content = EventAccumulator(logger.log_dir).Reload().PluginTagToContent("hparams")
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    values = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG]).hparams
    plain = {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}
    return [column.name for column in experiment.hparam_infos], [m.name.tag for m in experiment.metric_infos], plain


def fit(folder, balancer, *, module=Validated, error=None, **settings):
    logger = TensorBoardLogger(folder, default_hp_metric=settings.pop("default_hp_metric", True))
    callback = LossBalancingCallback(balancer, summary=settings.pop("summary", False))
    trainer = quiet_trainer(folder, callbacks=[callback], logger=logger, num_sanity_val_steps=1, **settings)
    validation = batches(1) if module is Validated else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory")
        trainer.fit(module(), batches(3), validation)
    return logger


@pytest.mark.parametrize(
    ("balancer", "settings"),
    [
        (lambda: GradNorm(), "default"),
        (lambda: GradNorm(0.5, min_weight=0.1), "alpha=0.5, min_weight=0.1"),
        (lambda: UncertaintyWeighting(lr=0.1), "lr=0.1"),
        (lambda: EqualWeights(), "default"),
    ],
)
def test_the_page_has_method_settings_and_held_out_metrics(tmp_path, balancer, settings):
    columns, metrics, values = page_of(fit(tmp_path, balancer(), max_epochs=2))
    assert metrics == ["accuracy"]
    assert values["loss_balancing/method"] == type(balancer()).__name__
    assert values["loss_balancing/settings"] == settings
    assert {"loss_balancing/method", "loss_balancing/settings"} <= set(columns), "whichever run the page takes its columns from"
    assert len(columns) == 2 + (0 if settings == "default" else settings.count("="))


class OfATable(EqualWeights):
    """Reads a file, which is not there by default."""

    def __init__(self, table="weights.csv"):
        super().__init__()
        self.table = Path(table).read_text()

    def settings(self):
        return {"table": self.table}


class WithPrior(EqualWeights):
    """Whose settings cannot be compared as a whole."""

    def settings(self):
        return {"prior": torch.ones(2)}


class Fails(EqualWeights):
    def settings(self):
        raise LookupError("no settings")


def test_balancers_of_the_users_own_of_any_kind_are_logged(tmp_path):
    (tmp_path / "w.csv").write_text("a,1")
    _, _, values = page_of(fit(tmp_path, OfATable(tmp_path / "w.csv")))
    assert values["loss_balancing/settings"] == "table=a,1"
    _, _, values = page_of(fit(tmp_path, WithPrior()))
    assert values["loss_balancing/settings"] == "prior=tensor([1., 1.])"


def test_a_balancer_that_cannot_tell_its_settings_is_trained_all_the_same(tmp_path):
    with pytest.warns(UserWarning, match="could not be logged among the hyperparameters: LookupError: no settings"):
        fit(tmp_path, Fails(), module=TrunkAndHeads)


def test_the_metrics_value_is_that_of_the_last_validation(tmp_path):
    logger = fit(tmp_path, GradNorm(), max_epochs=3)
    scalars = EventAccumulator(logger.log_dir).Reload().Scalars("accuracy")
    assert scalars[-1].value == pytest.approx(0.7)
    assert len({event.step for event in scalars}) == 3, "what the page is told stands where the metric is logged"


def test_the_report_has_the_held_out_metrics_too(tmp_path):
    logger = fit(tmp_path, GradNorm(), max_epochs=2, summary=True)
    report, _ = report_of(logger.log_dir)
    assert report.held_out == {"accuracy": pytest.approx(0.6)}


def test_without_a_validation_the_page_is_there_from_the_start(tmp_path):
    columns, metrics, _ = page_of(fit(tmp_path, GradNorm(), module=TrunkAndHeads))
    assert metrics == ["hp_metric"]
    assert "loss_balancing/method" in columns


def test_a_fit_that_ends_before_its_first_validation_is_on_the_page(tmp_path):
    class Breaks(Validated):
        def on_train_epoch_start(self):
            raise OSError("boom")

    logger = TensorBoardLogger(tmp_path)
    callback = LossBalancingCallback(GradNorm(), summary=False)
    with pytest.raises(OSError, match="boom"):
        quiet_trainer(tmp_path, callbacks=[callback], logger=logger).fit(Breaks(), batches(3), batches(1))
    assert page_of(logger)[1] == ["hp_metric"]


def test_a_logger_that_is_to_have_no_such_page_has_none(tmp_path):
    logger = fit(tmp_path, GradNorm(), default_hp_metric=False)
    assert EventAccumulator(logger.log_dir).Reload().Tags().get("hparams", []) == []
    with pytest.raises(KeyError):
        EventAccumulator(logger.log_dir).Reload().PluginTagToContent("hparams")


# -- beside the module's own -------------------------------------------------------------------------------------------


class WithHyperparameters(TrunkAndHeads):
    def __init__(self, width=3):
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("module", [TrunkAndHeads, WithHyperparameters])
def test_method_and_settings_stand_among_the_runs_hyperparameters(tmp_path, module):
    logger = TensorBoardLogger(tmp_path)
    callback = GradNormCallback(alpha=0.7, priorities={"odd": 2.0}, summary=False)
    keeping = ModelCheckpoint(tmp_path, filename="last")
    model = module()
    trainer = quiet_trainer(tmp_path, callbacks=[callback, keeping], logger=logger, enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory")
        trainer.fit(model, batches(3))
    written = yaml.safe_load((tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text())
    assert written["loss_balancing/method"] == "GradNorm"
    assert written["loss_balancing/alpha"] == 0.7
    assert written["loss_balancing/priorities/odd"] == 2.0
    assert written["loss_balancing/settings"] == "alpha=0.7, priorities={'odd': 2.0}"
    assert written["loss_balancing/update"] == "average", "what is as usual stands in this file"
    own = {"width": 3} if module is WithHyperparameters else {}
    assert own.items() <= written.items()
    plugins = EventAccumulator(logger.log_dir).Reload().PluginTagToContent("hparams")
    page = b"".join(plugins.values())
    assert b"loss_balancing/alpha" in page
    assert b"loss_balancing/update" not in page, "and not on the page"
    # The module's own hyperparameters, and its checkpoints, are as they were.
    assert dict(model.hparams) == own
    assert dict(model.hparams_initial) == own
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint.get("hyper_parameters", {}) == own


def test_the_data_modules_hyperparameters_stand_there_too(tmp_path):
    class Data(L.LightningDataModule):
        def __init__(self, rows=24):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return batches(3)

    logger, model = TensorBoardLogger(tmp_path), WithHyperparameters()
    quiet_trainer(tmp_path, callbacks=[GradNormCallback(summary=False)], logger=logger).fit(model, datamodule=Data())
    page = b"".join(EventAccumulator(logger.log_dir).Reload().PluginTagToContent("hparams").values())
    assert all(name in page for name in (b"loss_balancing/method", b"width", b"rows"))


def test_an_error_before_training_leaves_the_modules_hyperparameters_alone(tmp_path):
    class Breaks(L.Callback):
        def on_sanity_check_start(self, *args):
            raise OSError("no disk")

    model = WithHyperparameters()
    model.validation_step = lambda batch, batch_idx: None
    callbacks = [Breaks(), GradNormCallback(summary=False)]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, num_sanity_val_steps=1)
    with pytest.raises(OSError, match="no disk"):
        trainer.fit(model, batches(3), batches(3))
    assert dict(model.hparams_initial) == {"width": 3}


def test_a_copy_made_before_the_first_validation_has_no_part_of_the_fit(tmp_path):
    class Copies(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.kept = pickle.loads(pickle.dumps(balancing))

    class Unpicklable(Validated):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"activation": lambda x: x}, logger=True)

    balancing, copies = LossBalancingCallback(GradNorm(), summary=False), Copies()
    logger = TensorBoardLogger(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(tmp_path, callbacks=[balancing, copies], logger=logger)
        trainer.fit(Unpicklable(), batches(3), batches(1))
    assert copies.kept.report.held_out == {}
    assert balancing.report.held_out == {"accuracy": 0.5}
