"""Weights that are given: by hand, or by the file of an earlier run."""

import math

import pytest
import torch

from lightning_gradnorm import FixedWeights, Measurement
from lightning_gradnorm.weights_file import write_weights


def test_fixed_weights_refuse_a_task_that_has_none():
    balancer = FixedWeights({"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match=r"Unknown task 'c': FixedWeights was given tasks=\['a', 'b'\]"):
        balancer.total({"a": torch.tensor(1.0), "c": torch.tensor(1.0)})


@pytest.mark.parametrize("weights", [{}, None, [1.0], {"a": 0.0}, {"a": -1.0}, {"a": math.nan}, {"a": "1"}, {"a": True}])
def test_fixed_weights_refuse_what_is_no_weight(weights):
    with pytest.raises(ValueError, match=r"weights is a dict of task name|The weight of task 'a' is a finite number above 0"):
        FixedWeights(weights)


ROWS = {"a": {"final": 3.0, "mean": 2.0, "std": 0.5, "mean_after_warmup": 2.5}, "b": {"final": 1.0, "mean": 0.5, "std": 0.0}}


@pytest.mark.parametrize(("statistic", "expected"), [("mean", [2.0, 0.5]), ("final", [3.0, 1.0])])
def test_fixed_weights_come_from_the_file_of_an_earlier_run(tmp_path, statistic, expected):
    path = write_weights(tmp_path, ROWS, method="GradNorm", settings={}, steps=9, warmup=0)
    balancer = FixedWeights.from_file(path, statistic)
    assert balancer.weights_for(("a", "b")).tolist() == expected


def test_a_checkpoint_of_other_fixed_weights_does_not_bring_them_back():
    old, new = FixedWeights({"a": 1.0, "b": 3.0}), FixedWeights({"a": 2.0, "b": 0.1})
    old.update(Measurement(("a", "b"), torch.ones(2)))
    new.load_state_dict(old.state_dict())
    assert new.weights == {"a": 2.0, "b": 0.1}, "to the last digit"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("tasks: [", "cannot be read as YAML"),
        ("just words", "no 'tasks'"),
        ("method: GradNorm", "no 'tasks'"),
        ("tasks: {}", "no 'tasks'"),
        ("tasks: {a: 3}", "no statistics for 'a'"),
        ("tasks: {a: {mean: 1.0}, b: {mean: null}}", "no 'mean' weight for 'b'"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, content, words):
    path = tmp_path / "loss_weights.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"(?s)loss_weights.yaml is not a .*{words}.*run the fit again"):
        FixedWeights.from_file(path)
    with pytest.raises(ValueError, match="statistic is one of 'mean', 'mean_after_warmup', 'final'; got 'median'"):
        FixedWeights.from_file(path, "median")
    with pytest.raises(FileNotFoundError):
        FixedWeights.from_file(tmp_path / "none.yaml")
