"""Several runs against each other: found, told apart, in one table and one figure."""

import math

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_gradnorm import EqualWeights, GradNorm, LossBalancingCallback
from lightning_gradnorm.report.history import History
from lightning_gradnorm.report.recorded import RecordedRun, folders_of_runs, groups_of, read_runs
from lightning_gradnorm.report.runs import RunsReport
from lightning_gradnorm.report.sheet import Sheet
from tests.helpers import TrunkAndHeads, batches, quiet_trainer


class Validated(TrunkAndHeads):
    def __init__(self, seed=0):
        super().__init__()
        self.save_hyperparameters()

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", 0.5 + 0.1 * self.hparams.seed)
        self.log("val_error", 2.0)


def fit(folder, name, balancer, seed=0, logger=TensorBoardLogger):
    callbacks = [LossBalancingCallback(balancer)] if balancer else []
    logger = logger(folder, name=name, version=f"seed_{seed}")
    trainer = quiet_trainer(folder, callbacks=callbacks, logger=logger, log_every_n_steps=2)
    trainer.fit(Validated(seed), batches(8), batches(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six runs: two seeds, two settings, two loggers, with and without a callback; and one whose files are damaged."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_gradnorm.callbacks.reporting.can_draw", lambda: False)
        fit(folder, "a", GradNorm(lr=0.1))
        fit(folder, "a", GradNorm(lr=0.1), seed=1)
        fit(folder, "b", GradNorm(0.5, lr=0.1))
        fit(folder, "c", EqualWeights(), logger=CSVLogger)
        fit(folder, "plain", None)
        fit(folder, "plain", None, seed=10)
    (folder / "broken").mkdir()
    (folder / "broken" / "metrics.csv").write_text("no table\n1,2")
    return folder


def test_runs_are_found_in_their_natural_order_and_what_cannot_be_read_is_told(folder):
    names = folders_of_runs(folder)
    assert names == ["a/seed_0", "a/seed_1", "b/seed_0", "broken", "c/seed_0", "plain/seed_0", "plain/seed_10"]
    assert folders_of_runs(folder / "a" / "seed_0") == ["."]
    assert folders_of_runs(folder / "nothing") == []
    runs, notes = read_runs(folder, names)
    assert [run.name for run in runs] == [name for name in names if name != "broken"]
    assert len(notes) == 1
    assert notes[0].startswith("Left out: broken. ")
    assert "has no column 'step'" in notes[0]


def test_runs_that_differ_in_their_seed_alone_stand_together(folder):
    runs, _ = read_runs(folder, folders_of_runs(folder))
    groups = groups_of(runs)
    assert {label: [run.name for run in of] for label, of in groups.items()} == {
        "GradNorm, alpha=0.0": ["a/seed_0", "a/seed_1"],
        "GradNorm, alpha=0.5": ["b/seed_0"],
        "EqualWeights": ["c/seed_0"],
        "plain": ["plain/seed_0", "plain/seed_10"],
    }


def test_the_table_has_held_out_metrics_and_weights(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    runs, _ = read_runs(folder, folders_of_runs(folder))
    report = RunsReport(runs, folder)
    assert report.columns() == ("run", "runs", "accuracy", "val_error", "w small", "w middle", "w large", "w odd")
    rows = {row[0]: row[1:] for row in report.rows()}
    assert rows["GradNorm, alpha=0.0"][:3] == ("2", "0.550 ± 0.071", "2.00 ± 0.00")
    assert rows["EqualWeights"] == ("1", "0.5", "2", "1", "1", "1", "1")
    assert rows["plain"][0] == "2"
    assert rows["plain"][2:] == ("2.00 ± 0.00", "–", "–", "–", "–"), "what a name tells to be held out is, also without us"
    ends = [run.history.of("loss_weight")["small"].values[-1] for run in runs if run.name.startswith("a/")]
    assert rows["GradNorm, alpha=0.0"][3] == f"{math.sqrt(ends[0] * ends[1]):.3g}"
    report.print()
    printed = capsys.readouterr().out
    assert "6 runs in " in printed
    assert "mean ± standard deviation" in printed
    assert all(label in printed for label in rows)


def test_the_figure_has_a_column_for_each_and_the_same_scales(folder, tmp_path, monkeypatch):
    figures = []
    render = Sheet.rendered
    monkeypatch.setattr(Sheet, "rendered", lambda sheet: figures.append(sheet.figure) or render(sheet))
    runs, _ = read_runs(folder, folders_of_runs(folder))
    path = RunsReport(runs, folder).draw(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["loss weights"] * 3 + ["losses, unweighted"] * 3 + ["accuracy", "val_error"]
    captions = [text.get_text() for text in figure.texts]
    assert [label for label in captions if label in groups_of(runs)] == [
        "GradNorm, alpha=0.0",
        "GradNorm, alpha=0.5",
        "EqualWeights",
    ]
    for row in (figure.axes[:3], figure.axes[3:6]):
        assert len({axes.get_ylim() for axes in row}) == 1
        assert len({axes.get_xlim() for axes in row}) == 1
        looks = [{text.get_text(): text.get_color() for text in axes.texts} for axes in row]
        assert looks[0] == looks[1] == looks[2]
    rows = [label.get_text() for label in figure.axes[-2].get_yticklabels()]
    assert rows == ["plain", "EqualWeights", "GradNorm, alpha=0.5", "GradNorm, alpha=0.0"], "the first on top"


def recorded(method="GradNorm", name="", tasks=(), held_out=(), **settings):
    history = History({f"loss_weight/{task}": {0: 1.0, 1: weight} for task, weight in dict(tasks).items()})
    return RecordedRun(name, method, settings, history, dict(held_out))


def test_of_many_tasks_the_smallest_and_the_largest_weight_are_told():
    report = RunsReport([recorded(tasks={f"t{i}": 2.0**i for i in range(9)}), recorded("DWA")], "x")
    assert report.columns() == ("run", "runs", "smallest w", "largest w")
    assert report.rows() == [("GradNorm", "1", "1 (t0)", "256 (t8)"), ("DWA", "1", "–", "–")]


def test_runs_with_neither_curves_nor_metrics_can_still_be_drawn(tmp_path):
    report = RunsReport([recorded(), recorded("DWA")], "x")
    assert report.draw(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_without_curves_no_room_is_left_for_them(tmp_path, monkeypatch):
    heights = []
    render = Sheet.rendered
    monkeypatch.setattr(Sheet, "rendered", lambda sheet: heights.append(sheet.height) or render(sheet))
    metrics = {"accuracy": 0.5}
    RunsReport([recorded(held_out=metrics)], tmp_path).draw(tmp_path)
    RunsReport([recorded(held_out=metrics, tasks={"a": 2.0})], tmp_path).draw(tmp_path)
    assert heights[0] < 3.0 < heights[1], "inches"


def test_what_tells_runs_apart_is_what_they_differ_in():
    settings = [
        {"alpha": 0.0, "lr": 1},
        {"alpha": 1.0, "lr": 1},
        {"alpha": 1.0, "lr": 2, "data_seed": 4},
        {"alpha": 1.0, "lr": 2},
    ]
    runs = [recorded(**one) for one in settings]
    assert list(groups_of(runs)) == ["GradNorm, alpha=0.0, lr=1", "GradNorm, alpha=1.0, lr=1", "GradNorm, alpha=1.0, lr=2"]
    assert len(groups_of(runs)["GradNorm, alpha=1.0, lr=2"]) == 2


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("lightning_logs/version_3", "plain sum"),
        ("version_3", "plain sum"),
        (".", "plain sum"),
        ("equal/seed_1", "equal"),
        ("equal-12", "equal"),
        ("wide/net", "wide/net"),
    ],
)
def test_a_run_without_a_method_is_called_by_its_folder(tmp_path, name, label):
    (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / name / "metrics.csv").write_text("step,val_loss\n0,1.5\n4,0.5\n")
    (run,), _ = read_runs(tmp_path, [name])
    assert run.method == label
    assert run.held_out == {"val_loss": 0.5}


def test_hyperparameters_that_are_objects_are_left_alone(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val_loss\n0,1.5\n")
    (tmp_path / "hparams.yaml").write_text(yaml.dump({"a": {1, 2}}) + "b: !!python/object:some.Thing {}\n")
    (run,), notes = read_runs(tmp_path, ["."])
    assert (run.settings, notes) == ({}, [])
