"""The callbacks by ``LightningCLI``, from flags and from YAML, in both namespaces."""

import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import pytest
import torch
import yaml

from lightning_gradnorm import GradNorm, GradNormCallback, LossBalancingCallback
from tests.callbacks.cli_program import two_tasks
from tests.helpers import quiet_trainer

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--trainer.callbacks+=lightning_gradnorm.GradNormCallback",
    "--trainer.callbacks.alpha=1.0",
    "--trainer.callbacks.lr=0.1",
    "--trainer.callbacks.initial_losses=2",
    "--trainer.callbacks.optimizer=torch.optim.SGD",
]
CONFIGS = {
    "named": {
        "class_path": "lightning_gradnorm.GradNormCallback",
        "init_args": {
            "alpha": 0.5,
            "lr": 0.1,
            "update": "paper",
            "initial_losses": {"a": 0.5, "b": 2.0},
            "tasks": ["a", "b"],
            "priorities": {"a": 2.0},
            "optimizer": {"class_path": "torch.optim.RMSprop", "init_args": {"alpha": 0.9}},
        },
    },
    "general": {
        "class_path": "lightning_gradnorm.LossBalancingCallback",
        "init_args": {
            "engine": "per_task",
            "balancer": {"class_path": "lightning_gradnorm.GradNorm", "init_args": {"alpha": 1.0, "lr": 0.1}},
        },
    },
}


def rms_prop(parameters, lr):
    return torch.optim.RMSprop(parameters, lr=lr, alpha=0.9)


# the same callbacks, in Python
BY_HAND = {
    "flags": lambda: GradNormCallback(alpha=1.0, lr=0.1, initial_losses=2, optimizer=torch.optim.SGD),
    "named": lambda: GradNormCallback(**CONFIGS["named"]["init_args"] | {"optimizer": rms_prop}),
    "general": lambda: LossBalancingCallback(GradNorm(alpha=1.0, lr=0.1), engine="per_task"),
    "the flags' saved config.yaml": lambda: BY_HAND["flags"](),
}


def run(namespace, module, folder, command_lines):
    program = [sys.executable, "-m", "tests.callbacks.cli_program", namespace, module, folder / "found.json"]
    return subprocess.run([*program, json.dumps(command_lines)], cwd=ROOT, capture_output=True, text=True, timeout=300)


def found_by(namespace, module, folder, command_lines):
    done = run(namespace, module, folder, command_lines)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.feature(
    "`LightningCLI`, of `lightning.pytorch` and of `pytorch_lightning`",
    "supported",
    "flags, YAML and the saved `config.yaml` give the same run as Python",
)
@pytest.mark.slow
@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_the_command_line_gives_the_same_run_as_python(tmp_path, namespace):
    pytest.importorskip("jsonargparse")
    pytest.importorskip(namespace)
    off = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    common = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", *(f"--trainer.{name}=false" for name in off)]
    lines = {"flags": FLAGS}
    for name, config in CONFIGS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [config], "logger": False}}))
        lines[name] = [f"--config={tmp_path / f'{name}.yaml'}"]
    saved = tmp_path / "flags" / "lightning_logs" / "version_0" / "config.yaml"
    lines["the flags' saved config.yaml"] = [f"--config={saved}", "--trainer.logger=false"]
    for name, line in lines.items():
        lines[name] = ["fit", *line, *common, f"--trainer.default_root_dir={tmp_path / name}"]
    results = dict(zip(lines, found_by(namespace, "two_tasks", tmp_path, list(lines.values())), strict=True))
    for name, found in results.items():
        callback = BY_HAND[name]()
        quiet_trainer(tmp_path, callbacks=[callback]).fit(two_tasks(lightning.pytorch)())
        settings = {key: str(value) for key, value in callback.balancer.settings().items()}
        layer = list(callback.shared.names)
        assert found == {"weights": callback.weights, "steps": 3, "settings": settings, "layer": layer}, name
    assert len({result["weights"]["b"] for result in results.values()}) == 3


def of_a_foreign_module(folder, layer):
    """A command line whose YAML names the shared layer; its run saves its own ``config.yaml`` under ``folder``."""
    callback = {"class_path": "lightning_gradnorm.GradNormCallback", "init_args": {"lr": 0.1, "shared_layer": layer}}
    off = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = {"callbacks": [callback], "max_epochs": 1, "accelerator": "cpu", "default_root_dir": str(folder), **off}
    folder.mkdir()
    (folder / "given.yaml").write_text(yaml.safe_dump({"trainer": trainer, "model": {"width": 5}}))
    return ["fit", f"--config={folder / 'given.yaml'}"]


@pytest.mark.feature(
    "a foreign module by `LightningCLI`",
    "supported",
    "`shared_layer: model.trunk.2` in YAML; the saved `config.yaml` runs again",
)
@pytest.mark.slow
def test_a_foreign_module_and_its_shared_layer_come_from_yaml(tmp_path):
    pytest.importorskip("jsonargparse")
    one, saved = tmp_path / "one", tmp_path / "one" / "lightning_logs" / "version_0" / "config.yaml"
    several = of_a_foreign_module(tmp_path / "several", ["model.trunk.2.weight", "model.trunk.2.bias"])
    lines = [of_a_foreign_module(one, "model.trunk.2"), ["fit", f"--config={saved}"], several]
    by_one, again, by_several = found_by("lightning.pytorch", "foreign", tmp_path, lines)
    assert by_one["layer"] == ["model.trunk.2.weight", "model.trunk.2.bias"]
    assert by_one["steps"] == 3 and abs(by_one["weights"]["b"] - 1) > 0.05
    assert by_one == again == by_several
    saved_callback = yaml.safe_load(saved.read_text())["trainer"]["callbacks"][0]
    assert saved_callback["init_args"]["shared_layer"] == "model.trunk.2"


@pytest.mark.slow
def test_a_wrong_name_in_yaml_is_told_with_what_is_there(tmp_path):
    pytest.importorskip("jsonargparse")
    done = run("lightning.pytorch", "foreign", tmp_path, [of_a_foreign_module(tmp_path / "run", "trunk.2")])
    assert done.returncode != 0
    assert (
        "GradNormCallback(shared_layer=…) named 'trunk.2', which is no module or parameter of Foreign. "
        "Did you mean 'model.trunk.2'? In it there are: model, criterion."
    ) in done.stderr
