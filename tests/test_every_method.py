"""The comparison of all methods: its list is the package's, and its sums are right."""

import json
import math

import pytest
import torch
import yaml

from benchmarks import method_costs, workloads
from benchmarks.experiments import every_method as page
from benchmarks.experiments.every_method_figure import draw
from benchmarks.experiments.records import Record, Records
from benchmarks.suite import command
from benchmarks.suite.every_method import ANYWHERE, ASKING_NOTHING, SPECS, balancer
from benchmarks.suite.methods import obstacle
from benchmarks.suite.registry import PROBLEMS
from benchmarks.suite.standings import overall, standings
from lightning_gradnorm import comparison
from tests.test_examples import is_drawn


@pytest.mark.parametrize("name", comparison.METHODS)
def test_each_method_is_what_compare_makes_of_the_name(name):
    pytest.importorskip("torchjd")
    made = comparison.METHODS[name]()
    assert SPECS[name]["class"] == type(made).__name__
    if name in ASKING_NOTHING:
        assert balancer(name, ("a", "b")).settings() == made.settings()
    assert (name in ANYWHERE) == (name in comparison.everything())


def test_a_scalariser_is_made_for_the_tasks_that_there_are():
    pytest.importorskip("torchjd")
    assert len(balancer("IMTL-L", ("a", "b", "c"), lr=0.5).scalarizer.log_scale) == 3


def test_what_cannot_be_tried_is_left_out_and_told_why(tmp_path, capsys):
    why = {name: obstacle(SPECS[name], PROBLEMS["digits"]) for name in SPECS}
    of_another_kind = {"NTK", "GradNorm, residuals", "annealing (max/mean)"}
    assert {name for name in why if why[name]} == {"DTP", "UPGrad (same step)", *of_another_kind}
    chosen = {name: SPECS[name] for name in ("equal", "DTP", "NTK", "1/trivial loss")}
    (tmp_path / "chosen.yaml").write_text(yaml.safe_dump(chosen))
    absent = 'absent={"class": "GramianWeighting", "weighting": {"class": "no_such_package.Weighting"}}'
    given = ["--methods", "given", "--methods-file", str(tmp_path / "chosen.yaml"), "--method", absent, "--against", "equal"]
    words = ["--problems", "digits", "Helmholtz", "--seeds", "1", "--budget", "0.002", "--out", str(tmp_path)]
    command.main(["run", *words, *given])
    printed = capsys.readouterr().out
    assert "DTP: needs a key performance indicator of every task: not tried on Helmholtz, digits" in printed
    assert "NTK: needs residuals of single points: not tried on digits" in printed
    assert "1/trivial loss: asks for the best constant prediction, and there is nothing to predict: not tried on" in printed
    assert "digits, absent: left out, No module named 'no_such_package'" in printed
    made = {(r.problem, r.method) for r in Records(tmp_path / "records.jsonl").all()}
    both = {(problem, "equal") for problem in ("digits", "Helmholtz")}
    assert made == both | {("Helmholtz", "NTK"), ("digits", "1/trivial loss")}


def test_standings_are_paired_by_seed_and_say_what_the_seeds_cannot_tell_apart():
    nan = math.nan
    errors = {
        ("p", "plain"): {0: 1.0, 1: 4.0, 2: 7.0},
        ("p", "best"): {0: 0.5, 1: 2.0},
        ("p", "near"): {0: 0.5, 1: 4.0},  # over the best's 1 and 2: log of it 0.35 ± 0.49
        ("p", "behind"): {0: 1.0, 1: 5.0},  # 2 and 2.5: 0.80 ± 0.16
        ("p", "lost"): {0: nan, 1: 1.0},
        ("q", "plain"): {0: 1.0},
        ("q", "best"): {0: 3.0},
        ("q", "lost"): {0: 0.5},
    }
    found = standings(errors, "plain")
    on_p = {method: one for (problem, method), one in found.items() if problem == "p"}
    assert {method: one.rank for method, one in on_p.items()} == {"best": 1, "near": 2, "plain": 3, "behind": 4, "lost": 5}
    assert {method for method, one in on_p.items() if one.level} == {"best", "near", "lost"}
    assert on_p["best"].ratio == pytest.approx(0.5) and on_p["near"].ratio == pytest.approx(math.sqrt(0.5))
    assert on_p["lost"].errors == {0: 70.0, 1: 1.0}  # ten times the worst of the problem
    whole = overall(found, ["p", "q"])
    assert list(whole) == ["plain", "best", "lost"]
    best = whole["best"]
    assert (best.ratio, best.rank) == (pytest.approx(math.sqrt(1.5)), 2.0)
    assert (best.worst, best.worst_on, best.level) == (pytest.approx(3.0), "q", 1)


def test_errors_are_of_whole_trainings_and_a_geometric_mean_where_there_are_several(tmp_path):
    whole = Records(tmp_path / "records.jsonl")
    whole.add(Record("digits", "equal", 0, 1500, {"error": 0.5}, 0.1))
    whole.add(Record("digits", "equal", 1, 30, {"error": 0.25}, 0.1))
    whole.add(Record("wave", "equal", 0, 4000, {"error": 0.125}, 0.1))
    (tmp_path / "rooms").mkdir()
    rooms = Records(tmp_path / "rooms" / "records.jsonl")
    rooms.add(Record(page.SCENES, "equal", 0, 800, {"a": 2.0, "b": 8.0}, 0.1))
    assert page.read(tmp_path, tmp_path / "rooms") == {("digits", "equal"): {0: 0.5}, (page.SCENES, "equal"): {0: 4.0}}


def test_the_table_marks_the_best_and_what_is_level_with_it(tmp_path):
    records = Records(tmp_path / "records.jsonl")
    for problem in page.SUITE:
        steps = PROBLEMS[problem].steps
        for method, errors in (("equal", (1.0, 2.0)), ("GradNorm", (0.5, 1.0)), ("random", (0.4, 1.5)), ("DWA", (8.0, 64.0))):
            for seed, error in enumerate(errors):
                records.add(Record(problem, method, seed, steps, {"error": error}, 0.1))
    records.add(Record("digits", "MGDA", 0, 1500, {"error": 2.0}, 0.1))
    records.add(Record("digits", "1/trivial loss", 0, 1500, {"error": 0.25}, 0.1))
    rows = [
        {"workload": workload, "method": method, "low": time, "time": time, "high": time, "measured": measured}
        for workload in ("conv", "pinn")
        for method, time, measured in (("equal", 1.1, 0.0), ("GradNorm", 1.5, 0.25))
    ]
    (tmp_path / "costs.json").write_text(json.dumps({"setting": "here", "command": "so", "rows": rows}))
    every = page.EveryMethod(tmp_path, tmp_path)
    _, _, *lines = every.table().splitlines()
    assert lines[0] == "| GradNorm | 0.50 | 1.0 | " + "**0.50** | " * 6 + "0.50 | 0.50 | 0.50 | 1.20 | 1.20 |"
    assert lines[1] == "| random | 0.55 | 2.0 | " + "0.55 ° | " * 6 + "0.55 | 0.55 | 0.55 | – | – |"
    assert lines[3] == "| DWA | 16 | 4.0 | " + "16 | " * 6 + "16 | 16 | 16 | – | – |"
    assert lines[4] == "| MGDA | – | – | 2.00 |" + " – |" * 10
    assert lines[5].startswith("| methods level with the best |  |  | 2 of 5 | 2 of 4 |")
    assert every.particular().splitlines()[2:] == [
        "| 1/trivial loss | 0.25 | – | – | – | – | – |",
        "| the best above | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 |",
    ]
    assert "| GradNorm | 0.750 ± 0.354 |" in every.errors()
    draw(every, tmp_path / "figure.png")
    assert is_drawn(tmp_path / "figure.png")


def test_a_methods_call_is_what_one_writes():
    names = {
        "equal": "EqualWeights()",
        "GradNorm paper": "GradNorm(update='paper')",
        "STCH": "ScalarizerBalancer(STCH(mu=0.1))",
        "UPGrad (same step)": "GramianWeighting(UPGradWeighting(), when='same step')",
    }
    assert {name: page.called(SPECS[name]) for name in names} == names


def test_a_session_of_weights_one_steps_as_the_plain_sum():
    ends = []
    for make in (method_costs.PlainSum, lambda *words: method_costs.Balanced(*words, balancer("equal", ()))):
        torch.manual_seed(0)
        workload = workloads.pinn(points=4, width=4)
        method = make(workload, torch.optim.SGD(workload.network.parameters(), lr=0.1))
        method.step()
        method.step()
        ends.append(torch.cat([p.detach().flatten() for p in workload.network.parameters()]))
    torch.testing.assert_close(*ends)


def test_steps_that_read_gradients_are_counted():
    shares = {"equal": 0.0, "annealing (norms)": 0.1, "DB-MTL": 1.0, "GradNorm": 0.16}
    found = {name: method_costs.share_measured(balancer(name, ("a", "b"))) for name in shares}
    assert found == pytest.approx(shares, abs=0.01)
