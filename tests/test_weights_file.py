"""``loss_weights.yaml`` reads back as what was written."""

import math

import numpy
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradnorm import GradNorm
from lightning_gradnorm.weights_file import write_weights

STEPS = 12


def row(task: str, final=0.5, mean=0.75, std=0.1, ratio=0.25) -> tuple[str, dict[str, float]]:
    return task, {"final": final, "mean": mean, "std": std, "loss_ratio": ratio}


def write(folder, rows, **settings):
    return write_weights(folder, dict(rows), method="GradNorm", settings=settings, steps=STEPS, warmup=1)


def read(path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_it_reads_back(tmp_path):
    path = write(tmp_path, [row("normals", 1.5, 1.25, 0.2, 0.125), row("depth")], alpha=1.5, reference=None, update="log")
    assert path == tmp_path / "loss_weights.yaml"
    assert read(path) == {
        "method": "GradNorm",
        "settings": {"alpha": 1.5, "reference": None, "update": "log"},
        "steps": STEPS,
        "warmup_steps": 1,
        "tasks": {
            "depth": {"final": 0.5, "mean": 0.75, "std": 0.1, "loss_ratio": 0.25},
            "normals": {"final": 1.5, "mean": 1.25, "std": 0.2, "loss_ratio": 0.125},
        },
    }
    assert list(read(path)["tasks"]) == ["normals", "depth"], "in the order of training"


def test_a_person_is_told_what_it_is_for(tmp_path):
    first = write(tmp_path, [row("a")]).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert "mean" in first
    assert "FixedWeights.from_file" in first


@pytest.mark.parametrize(
    "task", ["größe 4", "温度", "∂u/∂t", "🙂", "yes", "null", "1", "1.5", "a: b", "#a", "- a", "'", "{a}", "*a", "!a"]
)
def test_any_name_survives(tmp_path, task):
    assert list(read(write(tmp_path, [row(task)]))["tasks"]) == [task]
    if not task.isascii() and task != "🙂":
        assert task in write(tmp_path, [row(task)]).read_text(encoding="utf-8"), "readable, not escaped"


@given(st.lists(st.floats(1e-300, 1e300), min_size=4, max_size=4))
def test_numbers_survive_to_the_last_digit(tmp_path_factory, numbers):
    got = read(write(tmp_path_factory.getbasetemp() / "numbers", [row("a", *numbers)]))["tasks"]["a"]
    assert got == dict(zip(("final", "mean", "std", "loss_ratio"), numbers, strict=True))


def test_what_was_not_measured_is_null(tmp_path):
    assert read(write(tmp_path, [row("a", ratio=math.nan)]))["tasks"]["a"]["loss_ratio"] is None


def test_the_folder_is_made_and_an_older_file_replaced(tmp_path):
    folder = tmp_path / "not" / "yet" / "there"
    write(folder, [row("before")])
    assert list(read(write(folder, [row("after")]))["tasks"]) == ["after"]
    assert [file.name for file in folder.iterdir()] == ["loss_weights.yaml"]


SETTINGS = {
    "defaults": {},
    "all": {
        "alpha": 0.12, "lr": 0.01, "update": "average", "optimizer": torch.optim.SGD, "initial_losses": {"größe": 2.3},
        "residuals": ["größe"], "update_every": 3, "min_weight": 0.01, "max_weight": 5,
        "priorities": {"größe": 2, "b": 0.5}, "tasks": ["größe", "b"],
    },
    "mean of five": {"initial_losses": 5},
    "numpy's numbers": {
        "alpha": numpy.float64(0.5), "max_weight": numpy.float32(3.0), "initial_losses": {"größe": numpy.log(10.0)},
        "priorities": {"größe": numpy.float64(2.0)},
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_settings_of_gradnorm_read_back(tmp_path, settings):
    balancer = GradNorm(**settings)
    got = read(write(tmp_path, [row("größe")], **balancer.settings()))["settings"]
    assert got == balancer.settings()
    for name in settings.keys() - {"optimizer", "tasks"}:
        assert got[name] == settings[name], name
    assert got["optimizer"] == (settings["optimizer"].__name__ if "optimizer" in settings else None)
    if "tasks" not in settings:
        again = GradNorm(**got)
        assert again.settings() == got, "the file's settings are the constructor's arguments"
