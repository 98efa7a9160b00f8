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
            "scale": "reference",
            "reference": "a",
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
    program = [sys.executable, "-m", "tests.callbacks.cli_program", namespace, tmp_path / "found.json"]
    done = subprocess.run([*program, json.dumps(list(lines.values()))], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = dict(zip(lines, json.loads((tmp_path / "found.json").read_text()), strict=True))
    for name, found in results.items():
        callback = BY_HAND[name]()
        quiet_trainer(tmp_path, callbacks=[callback]).fit(two_tasks(lightning.pytorch)())
        settings = {key: str(value) for key, value in callback.balancer.settings().items()}
        assert found == {"weights": callback.weights, "steps": 3, "settings": settings}, name
    assert len({result["weights"]["b"] for result in results.values()}) == 3
