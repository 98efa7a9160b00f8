"""The examples run as a reader runs them, only shorter."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_gradnorm import GradNorm, GradNormCallback
from tests.helpers import quiet_trainer

pytestmark = pytest.mark.slow


def is_drawn(path: Path) -> bool:
    """Whether the file is a PNG with more in it than an empty page."""
    content = path.read_bytes()
    return content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 20_000


@pytest.mark.parametrize("example", ["digits"], indirect=True)
def test_digits_trains_both_methods_and_shows_what_came_of_it(example, tmp_path, capsys):
    example.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for word in ("equal", "GradNorm", "difference", "digit, accuracy", "pixels, RMSE", "ink, RMSE"):
        assert word in printed
    assert is_drawn(tmp_path / "digits.png")
    assert f"--logdir {tmp_path}" in printed
    for method in ("equal", "GradNorm"):
        assert list((tmp_path / method / "seed_0").glob("events.out.tfevents.*"))
    assert (tmp_path / "GradNorm" / "seed_0" / "loss_weights.yaml").exists()


@pytest.mark.parametrize("example", ["digits"], indirect=True)
def test_digits_leaves_one_run_in_a_folder_that_is_used_twice(example, tmp_path):
    for _ in range(2):
        example.main(["--quick", "--epochs", "1", "--out", str(tmp_path)])
    assert len(list((tmp_path / "GradNorm" / "seed_0").glob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize(("example", "module"), [("digits", "Digits"), ("toy", "Toy")], indirect=["example"])
def test_all_methods_start_from_one_network_and_one_batch(example, module, tmp_path, monkeypatch):
    starts = []
    plain = getattr(example, module).training_step

    def noting(self, batch, batch_idx):
        if self.global_step == 0:
            starts.append([*(p.detach().clone() for p in self.parameters()), *(part.clone() for part in batch)])
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(getattr(example, module), "training_step", noting)
    example.main(["--quick", "--out", str(tmp_path), *(["--tasks", "2"] if module == "Toy" else [])])
    assert len(starts) == len(example.METHODS)
    for other in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0], other, strict=True))


@pytest.mark.parametrize("example", ["toy"], indirect=True)
def test_toy_starts_at_the_number_of_tasks_and_raises_the_smallest_scale(example, tmp_path, capsys):
    example.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert is_drawn(tmp_path / "toy.png")
    values = json.loads((tmp_path / "toy.json").read_text(encoding="utf-8"))
    for tasks, smallest in ((2, "σ=1"), (10, "σ=3")):
        assert f"T = {tasks}" in printed
        runs = values["runs"][f"T={tasks}"]
        assert list(runs) == ["equal", "GradNorm", "GradNorm static", "fixed 1/σ²"]
        for method, (run,) in runs.items():
            assert method in printed
            assert run["measures"][0] == pytest.approx(tasks)
            assert all(math.isfinite(measure) for measure in run["measures"])
            assert method == "GradNorm" or "static" in method or sum(run["weights"][-1].values()) == pytest.approx(tasks)
        weights = runs["GradNorm"][0]["weights"][-1]
        assert max(weights, key=weights.__getitem__) == smallest
        assert set(runs["equal"][0]["weights"][-1].values()) == {1.0}


@pytest.mark.parametrize("example", ["fabric"], indirect=True)
def test_the_fabric_loop_ends_with_the_trainers_weights(example, tmp_path, monkeypatch, capsys):
    batches, made, plain = [], [], example.task_losses

    def noting(network, images, labels):
        if torch.is_grad_enabled():
            batches.append((images, labels))
        return plain(network, images, labels)

    monkeypatch.setattr(example, "task_losses", noting)
    monkeypatch.setattr(example, "GradNorm", lambda **settings: made.append(GradNorm(**settings)) or made[-1])
    example.main(["--epochs", "1", "--alpha", "0.25"])
    equal, balanced = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    assert all(torch.equal(a, b) for one, other in zip(equal, balanced, strict=True) for a, b in zip(one, other, strict=True))

    torch.manual_seed(0)
    module, callback = example.Digits(), GradNormCallback(alpha=0.25, summary=False)
    held_out = DataLoader(example.TEST, batch_size=len(example.TEST))
    quiet_trainer(tmp_path, callbacks=[callback]).fit(module, DataLoader(balanced, batch_size=None), held_out)
    assert made[0].weights == pytest.approx(callback.weights, rel=1e-6)
    printed = capsys.readouterr().out
    for task, weight in callback.weights.items():
        assert task in printed and f"{weight:.3g}" in printed


@pytest.mark.parametrize("example", ["points"], indirect=True)
def test_points_draws_the_masks_and_ranks_the_four_ways(example, tmp_path, capsys):
    example.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for method in example.METHODS:
        assert method.split(",")[0] in printed
    assert is_drawn(tmp_path / "points.png")


@pytest.mark.parametrize("example", ["points"], indirect=True)
def test_masks_lower_the_error_where_it_stayed(example):
    """The race of 4000 steps, shorter: near the slope against outside, uniform weights against polynomial masks."""
    torch.set_num_threads(1)
    with example.quiet_lightning():
        ratios = {
            method: example.train_once(method, 0, 1500, example.Progress(1500))["ratio"]
            for method in ("uniform", "self-adaptive, polynomial")
        }
    assert ratios["uniform"] > 1.5 * ratios["self-adaptive, polynomial"]


@pytest.mark.parametrize("example", ["compare"], indirect=True)
def test_compare_ranks_every_method(example, tmp_path, capsys):
    example.main(["--quick", "--epochs", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for method in example.METHODS:
        assert method.split()[0] in printed
    assert is_drawn(tmp_path / "compare.png")
    runs = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["runs"]
    assert {run["method"] for run in runs} == set(example.METHODS)
    assert all(math.isfinite(value) for run in runs for value in run["measures"].values())
    assert (tmp_path / "compare.md").read_text(encoding="utf-8").count("| GradNorm |") == 2
