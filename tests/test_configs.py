"""Every configuration in ``configs/`` runs as its first line says, and every method has one."""

import math
from pathlib import Path

import pytest
import yaml

import lightning_gradnorm
from lightning_gradnorm import balancers
from lightning_gradnorm.balancers.schedule import is_measured, widening
from lightning_gradnorm.cli import main
from lightning_gradnorm.report.run import report_of

pytest.importorskip("jsonargparse", reason="the command line is an extra")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
ABSTRACT = {"LossBalancer", "RuleBalancer"}


def callback_of(path):
    (callback,) = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"]["callbacks"]
    return callback


def method_of(path):
    """The balancer's class that the configuration names."""
    callback = callback_of(path)
    if callback["class_path"].endswith("GradNormCallback"):
        return "GradNorm"
    package, _, name = callback["init_args"]["balancer"]["class_path"].rpartition(".")
    assert package == "lightning_gradnorm"
    return name


def test_every_method_has_a_configuration():
    assert len(CONFIGS) >= 16
    exported = set(balancers.__all__) - ABSTRACT
    of_residuals = {name for name in exported if "ntk_traces" in getattr(balancers, name).needs}
    assert set(map(method_of, CONFIGS)) == exported - of_residuals, "the digits have a cross entropy: no square of anything"
    assert all(hasattr(lightning_gradnorm, name) for name in exported)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_says_how_to_run_it(path):
    assert path.read_text(encoding="utf-8").startswith(f"# lightning-gradnorm fit --config configs/{path.name}\n")


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_runs(tmp_path, monkeypatch, capsys, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(path.parents[1])  # where the command is run
    for name, value in (("PL_GLOBAL_SEED", "0"), ("PL_SEED_WORKERS", "0"), ("JSONARGPARSE_DEPRECATION_WARNINGS", "off")):
        monkeypatch.setenv(name, value)
    short = [f"--trainer.{name}=5" for name in ("limit_train_batches", "log_every_n_steps")]
    off = [f"--trainer.enable_{name}=false" for name in ("model_summary", "checkpointing")]
    main(["fit", "--config", str(path), "--trainer.max_epochs=3", *short, *off])
    report, history = report_of(tmp_path / "lightning_logs" / "version_0")
    assert report.steps == 15
    every = report.settings.get("update_every", 1)
    assert report.measured == sum(is_measured(step, widening(step) if every == "auto" else every) for step in range(15))
    assert method_of(path) in report.method
    assert {row.task for row in report.rows} == {"digit", "pixels", "ink"}
    assert all(math.isfinite(row.final) and row.final > 0 for row in report.rows)
    assert report.method in capsys.readouterr().out
    asked = callback_of(path).get("init_args", {})
    asked = asked.get("balancer", asked).get("init_args", asked)
    for name, value in asked.items():
        if name in ("mode", "balancer"):
            continue
        if isinstance(value, dict) and "class_path" in value:
            assert str(report.settings[name]).startswith(value["class_path"].rpartition(".")[2]), name
        else:
            assert report.settings[name] == value, name
    still = report.method.endswith("(monitor)") or method_of(path) in ("EqualWeights", "FixedWeights")
    assert all((row.std < 1e-6) == still for row in report.rows)
    assert set(history.tasks) <= {"digit", "pixels", "ink"}
