"""The experiments: their problems are what they say, every one runs, resumes, and tells what came of it."""

import importlib
import json
import lzma
import math
import os
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from benchmarks.experiments import cmapss, physics, scenes, tox21, turbofans
from benchmarks.experiments.command import Case, main
from benchmarks.experiments.pages import NAMES, experiment
from benchmarks.experiments.records import Record, Records
from tests.test_examples import is_drawn

DATA = os.environ.get("LIGHTNING_GRADNORM_DATA")  # folder with the real files
real_data = pytest.mark.skipif(DATA is None, reason="LIGHTNING_GRADNORM_DATA does not name a folder with cmapss/ and tox21/")

# Each engine's regime is its first setting; sensor s reads s + cycle, so that what a window holds can be told.
CYCLES = {"train": (40, 33), "test": (35, 12, 50)}


def rows_of(engine: int, cycles: int, regime: float) -> np.ndarray:
    columns = [[engine, cycle, regime + 0.001, 0.2, 100, *(s + cycle for s in range(1, 22))] for cycle in range(1, cycles + 1)]
    return np.array(columns, dtype=float)


@pytest.fixture
def data(tmp_path):
    """Files as NASA's and Tox21's, small."""
    (tmp_path / "data" / "cmapss").mkdir(parents=True)
    (tmp_path / "data" / "tox21").mkdir()
    for subset, regimes in (("FD001", (0.0,)), ("FD002", (10.0, 42.0))):
        for part, cycles in CYCLES.items():
            engines = [rows_of(i + 1, n, regimes[i % len(regimes)]) for i, n in enumerate(cycles)]
            with lzma.open(tmp_path / "data" / "cmapss" / f"{part}_{subset}.txt.xz", "wt") as file:
                np.savetxt(file, np.concatenate(engines))
        with lzma.open(tmp_path / "data" / "cmapss" / f"RUL_{subset}.txt.xz", "wt") as file:
            np.savetxt(file, [10, 60, 200])
    draws = np.random.default_rng(0)
    tasks = [*(f"NR-{i}" for i in range(7)), *(f"SR-{i}" for i in range(5))]
    labels = draws.integers(-1, 2, (60, 12)).astype(np.int8)
    bits = draws.integers(0, 256, (60, 128), dtype=np.uint8)
    np.savez(tmp_path / "data" / "tox21" / "tox21_ecfp4_1024.npz", x_packed=bits, y=labels, tasks=np.array(tasks))
    return tmp_path / "data"


# -- the problems --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", physics.PROBLEMS)
def test_the_exact_solution_has_no_residual_and_no_border_loss(name, float64):
    problem = physics.PROBLEMS[name]
    module = problem(physics.METHODS["equal"])
    module.forward = problem.solution
    draws = torch.Generator().manual_seed(0)
    inside = physics.uniform(problem.low, problem.high, 50, draws)
    assert module.residual(inside).abs().max() < 1e-11
    losses = module.border_losses(*problem.border(8, draws))
    assert losses.keys() == ({"boundary"} if name == "Helmholtz" else {"boundary", "initial"})
    assert max(loss.max().item() for loss in losses.values()) < 1e-25


@pytest.mark.parametrize(("name", "task", "parts"), [("Helmholtz", "boundary", 4), ("Klein–Gordon", "boundary", 2)])
def test_the_parts_of_the_border_are_added_as_in_the_source(name, task, parts):
    problem = physics.PROBLEMS[name]
    module = problem(physics.METHODS["equal"])
    *_, border = problem.border(16, torch.Generator().manual_seed(0))
    errors = (module(border) - problem.solution(border)).square()
    if name == "Helmholtz":
        sides = [border[:, i] == side for i in (0, 1) for side in (-1.0, 1.0)]
    else:
        sides = [border[:, 1] == end for end in (0.0, 1.0)]
    assert len(sides) == parts and all(side.sum() == 16 for side in sides)
    expected = sum(errors[side].mean() for side in sides)
    losses = module.border_losses(*problem.border(16, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(losses[task].mean(), expected)


def test_coordinates_are_scaled_to_a_standard_deviation_of_one():
    problem = physics.KleinGordon(physics.METHODS["equal"])
    seen = []
    problem.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    problem(physics.uniform(problem.low, problem.high, 20_000, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(2), atol=0.03, rtol=0)
    torch.testing.assert_close(seen[0].std(0), torch.ones(2), atol=0.03, rtol=0)


def test_the_learning_rate_falls_by_a_tenth_smoothly_every_thousand_steps():
    settings = physics.Helmholtz(physics.METHODS["equal"]).configure_optimizers()
    adam, slower = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    adam.step()
    for _ in range(500):
        slower.step()
    assert slower.get_last_lr()[0] == pytest.approx(1e-3 * 0.9**0.5)


@pytest.mark.parametrize("unit", [1, 125])
def test_the_lifes_head_starts_at_the_cycles_that_it_is_told(unit):
    torch.manual_seed(0)
    module = turbofans.Turbofan(10, unit)
    windows = torch.randn(64, 14, 30)
    before = unit * (module(windows)[0] - module.life.bias).detach()
    torch.manual_seed(0)
    started = turbofans.Turbofan(10, unit, start=80.0)
    torch.testing.assert_close(unit * started(windows)[0].detach(), 80 + before, rtol=0, atol=1e-3)


def test_windows_hold_thirty_cycles_and_the_life_that_is_left(data):
    engines = turbofans.Engines.read(data / "cmapss", "FD001")
    windows, lives = engines.train
    assert windows.shape == (11 + 4, 14, 30)
    assert lives.tolist() == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 3, 2, 1, 0]
    steps = windows.diff(dim=2)
    torch.testing.assert_close(steps, steps[0, 0, 0].expand_as(steps), atol=1e-5, rtol=1e-4)  # one cycle, one unit
    last, left = engines.test
    assert last.shape == (3, 14, 30)
    assert left.tolist() == [10, 60, 125]  # the last one is capped
    assert (last[1].diff(dim=1) == 0).sum(1).tolist() == [18] * 14  # 12 cycles: the first stands for 18 more
    torch.testing.assert_close(last[2][:, -1] - last[2][:, 0], 29 * steps[0, :, 0], atol=1e-4, rtol=1e-4)


def test_each_flight_regime_is_scaled_by_itself(data):
    rows = np.concatenate([rows_of(1, 40, 10.0), rows_of(2, 40, 42.0)])
    rows[40:, 5:] += 1000
    scaled = turbofans.Regimes(rows)(rows)
    for part in (scaled[:40], scaled[40:]):
        np.testing.assert_allclose(part.mean(0), 0, atol=1e-9)
        np.testing.assert_allclose(part.std(0), 1, atol=1e-9)


def test_states_of_health_and_nasas_score():
    assert turbofans.health(torch.tensor([125.0, 81, 80, 31, 30, 0])).tolist() == [0, 0, 1, 1, 2, 2]
    predicted, true = torch.tensor([50.0, 37.0, 60.0]), torch.tensor([50.0, 50.0, 50.0])
    assert turbofans.nasa_score(predicted, true) == pytest.approx((math.e - 1) + (math.e - 1))


def test_an_assay_without_a_label_in_the_batch_is_left_out(data):
    molecules = tox21.read(data / "tox21")
    module = tox21.Assays(molecules.tasks)
    for bits, labels in tox21.Batches(molecules, 0, apart=True):
        losses = module.task_losses((bits, labels), 0)
        assert losses.keys() == {t for t, column in zip(molecules.tasks, labels.T, strict=True) if (column >= 0).any()}
        assert len({task[:2] for task in losses}) == 1
    assert len(molecules.train[1]) == 48 and len(molecules.test[1]) == 12


@real_data
def test_the_real_engines_are_all_there():
    for subset, train, test, short in (("FD001", 100, 100, 0), ("FD002", 260, 259, 6)):
        rows = [np.loadtxt(Path(DATA) / "cmapss" / f"{part}_{subset}.txt.xz") for part in ("train", "test")]
        assert [len(np.unique(part[:, 0])) for part in rows] == [train, test]
        assert sum(len(engine) < turbofans.WINDOW for engine in turbofans.by_engine(rows[1])) == short
        engines = turbofans.Engines.read(Path(DATA) / "cmapss", subset)
        assert len(engines.test[1]) == test and len(engines.train[1]) == len(rows[0]) - train * (turbofans.WINDOW - 1)


# -- records -------------------------------------------------------------------------------------------------------------


def record(method: str, seed: int, error: float = 1.0, steps: int = 10) -> Record:
    return Record("p", method, seed, steps, {"error": error}, 0.1)


def test_records_come_back_as_they_were_written(tmp_path):
    records = Records(tmp_path / "records.jsonl")
    assert records.all() == [] and records.of("p", ["a"]) == {}
    whole = Record("p", "σ", 0, 10, {"error": 0.123456789}, 0.1, {"a": 1.0}, {"a": 2.0}, {"step": [1.23456789]}, {"x": ["y"]})
    records.add(whole)
    (back,) = records.all()
    assert back.measures == whole.measures and back.weights == whole.weights and back.extras == whole.extras
    assert back.curves == {"step": [1.2346]}


def test_a_line_that_was_cut_short_is_made_again_and_spoils_no_other(tmp_path):
    records = Records(tmp_path / "records.jsonl")
    records.add(record("a", 0))
    records.add(record("b", 0))
    whole = records.path.read_text()
    records.path.write_text(whole[:-20])
    assert [r.method for r in records.all()] == ["a"]
    assert records.find("p", "b", 0, 10) is None
    records.add(record("b", 0, 2.0))
    assert [(r.method, r.measures["error"]) for r in records.all()] == [("a", 1.0), ("b", 2.0)]


def test_methods_are_compared_on_the_seeds_that_all_have_and_the_longest_fits(tmp_path):
    records = Records(tmp_path / "records.jsonl")
    for seed in (0, 1, 2):
        records.add(record("a", seed, 10.0 + seed))
        records.add(record("a", seed, steps=5))
    for seed in (2, 0):
        records.add(record("b", seed, 20.0 + seed))
    records.add(record("no longer a method", 0))
    comparison = records.comparison("p", {"error": "lower"}, ["b", "a"])
    assert comparison.baseline == "b" and comparison.seeds == (0, 2)
    assert comparison.values("a", "error") == [10, 12] and comparison.values("b", "error") == [20, 22]
    assert records.find("p", "a", 1, 10).measures["error"] == 11
    assert records.find("p", "a", 1, 5).measures["error"] == 1


# -- every experiment ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs_resumes_and_writes_its_results(name, data, tmp_path, capsys, monkeypatch):
    this, out = experiment(name), tmp_path / "out"
    arguments = ["--quick", "--data", str(data), "--out", str(out)]
    records = main(this, arguments).all()
    expected = {(name, method) for name, problem in this.problems.items() for method in problem.made}
    assert {(r.problem, r.method) for r in records} == expected and len(records) == len(expected)
    assert all(math.isfinite(value) for r in records for value in r.measures.values())
    assert all(r.measures.keys() >= this.problems[r.problem].better.keys() for r in records)
    assert is_drawn(out / f"{name}.png")
    table = (out / "table.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    for name_of_problem, problem in this.problems.items():
        steps = this.steps_on(name_of_problem, this.quick_steps)
        assert f"## {name_of_problem}, {steps:,} steps" in table and name_of_problem in printed
        assert all(f"| {method} |" in table for method in problem.made)
    assert "step time" not in table, "the fits of a long run are not timed side by side"
    assert str(tmp_path) not in (out / "records.jsonl").read_text()  # where files lay is nobody's business
    made = records[0].made
    assert made["command"] == f"python -m benchmarks.experiments.{name} --quick --data DATA --out OUT"
    assert torch.__version__ in made["versions"] and len(made["date"]) == 10

    module = importlib.import_module(f"benchmarks.experiments.{name}")
    unmade = type(this)(**(vars(module.EXPERIMENT) | {"fit": lambda case: pytest.fail(f"{case.method} was made again")}))
    assert len(main(unmade, arguments).all()) == len(records)


def test_a_command_line_that_cannot_be_used_says_the_way_out(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(experiment("cmapss"), ["--quick", "--out", str(tmp_path)])
    assert "--data is the folder that holds cmapss/" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(experiment("toy"), ["--methods", "magic"])
    assert "invalid choice: 'magic'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="'GradNorm static' starts from the weights of 'GradNorm': add it to --methods"):
        main(experiment("toy"), ["--quick", "--problems", "T = 2", "--methods", "GradNorm static", "--out", str(tmp_path)])
    assert not (tmp_path / "records.jsonl").exists()


def test_what_is_no_longer_made_stays_in_the_tables(tmp_path, capsys):
    kept = Record("T = 2", "GradNorm 0.1", 0, 6, {"Σ L(t)/L(0)": 1.25}, 0.1, curves={"step": [0.0], "Σ L(t)/L(0)": [2.0]})
    made = dict.fromkeys(("command", "versions", "machine", "date"), "x")
    Records(tmp_path / "records.jsonl").add(replace(kept, made=made))
    this, arguments = experiment("toy"), ["--quick", "--problems", "T = 2", "--out", str(tmp_path), "--methods"]
    assert [r.method for r in main(this, [*arguments, "equal"]).all()] == ["GradNorm 0.1", "equal"]
    assert "| GradNorm 0.1 | 1.25 |" in (tmp_path / "table.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(this, [*arguments, "GradNorm 0.1"])
    assert "invalid choice: 'GradNorm 0.1'" in capsys.readouterr().err


def test_seeds_are_a_number_of_them_or_named(tmp_path):
    arguments = ["--quick", "--problems", "T = 2", "--methods", "equal", "--out", str(tmp_path)]
    assert [r.seed for r in main(experiment("toy"), [*arguments, "--seeds", "2"]).all()] == [0, 1]
    assert [r.seed for r in main(experiment("toy"), [*arguments, "--seeds", "1", "5"]).all()] == [0, 1, 5]


def test_the_static_run_takes_the_mean_weights_of_its_own_seeds_gradnorm_run(tmp_path):
    arguments = ["--quick", "--problems", "T = 2", "--methods", "GradNorm", "GradNorm static", "--out", str(tmp_path)]
    records = main(experiment("toy"), [*arguments, "--seeds", "2"])
    for seed in (0, 1):
        first, static = (records.find("T = 2", method, seed, 6) for method in ("GradNorm", "GradNorm static"))
        assert static.weights == pytest.approx(first.mean_weights)
        assert static.weights != pytest.approx(dict.fromkeys(static.weights, 1.0))


def test_lines_are_json(tmp_path):
    records = Records(tmp_path / "records.jsonl")
    records.add(record("a", 0, math.nan))
    assert math.isnan(json.loads(records.path.read_text())["measures"]["error"])
    assert math.isnan(records.all()[0].measures["error"])


def test_from_the_mean_starts_the_lifes_head_at_the_training_windows_mean(data, monkeypatch):
    started = []

    class Noted(turbofans.Turbofan):
        def __init__(self, steps, unit=1.0, factors=None, start=None):
            super().__init__(steps, unit, factors, start)
            started.append((unit, start))

    monkeypatch.setattr(cmapss, "Turbofan", Noted)
    for method in ("equal", "equal, from the mean", "hand-scaled, from the mean"):
        cmapss.fit(Case("FD001", method, 0, 1, 1, L.Callback(), data, None))
    mean = turbofans.Engines.read(data / "cmapss", "FD001").train[1].mean().item()
    assert started == [(1, None), (1, mean), (125, mean)]


def test_answers_are_kept_as_text_to_half_a_unit():
    _, rooms = scenes.load(1, 3)
    for task, truth in (("segmentation", rooms.classes), ("depth", rooms.depth), ("normals", rooms.normals)):
        again = scenes.unpacked(task, scenes.packed(task, truth), rooms)
        assert again.shape == truth.shape
        assert (again - truth).abs().max() <= scenes.KEPT[task][1] / 2 + 1e-5
    assert torch.equal(scenes.unpacked("segmentation", scenes.packed("segmentation", rooms.classes), rooms), rooms.classes)
