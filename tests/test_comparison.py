"""``compare``: the same start for every method, and statistics that can be done by hand."""

import math
import statistics
import sys

import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from lightning_gradnorm import EqualWeights, FixedWeights, GradNorm, compare
from lightning_gradnorm.comparison import METHODS, OF_TORCHJD, everything
from lightning_gradnorm.report.comparison import Comparison, Run
from tests.helpers import TrunkAndHeads, batches, quiet_trainer

BETTER = {"accuracy": "higher", "error": "lower"}


def runs(**by_method):
    """Method → (accuracy, error, seconds) per seed."""
    return [
        Run(method, seed, {"accuracy": accuracy, "error": error}, seconds, {"a": 1.0})
        for method, rows in by_method.items()
        for seed, (accuracy, error, seconds) in enumerate(rows)
    ]


KNOWN = Comparison(
    BETTER,
    runs(
        plain=[(0.5, 4.0, 1.0), (0.6, 6.0, 1.0)],
        other=[(0.7, 3.0, 1.1), (0.9, 2.0, 1.3)],
        third=[(0.7, 5.0, 2.0), (0.1, math.nan, 2.0)],
    ),
    "plain",
)


def test_numbers_that_can_be_done_in_the_head():
    # Places: accuracy, seed 0: other and third share the first two; seed 1: other, plain, third. Error: other, plain, third.
    assert KNOWN.mean_rank("other") == (1.5 + 1 + 1 + 1) / 4
    assert KNOWN.mean_rank("plain") == (3 + 2 + 2 + 2) / 4
    assert KNOWN.mean_rank("third") == (1.5 + 3 + 3 + 3) / 4
    assert KNOWN.methods == ("other", "plain", "third")
    assert KNOWN.differences("other", "error") == [-1.0, -4.0]
    assert KNOWN.time_ratio("other") == pytest.approx(1.2)
    assert KNOWN.time_ratio("plain") == 1.0
    assert KNOWN.seeds == (0, 1)


def test_the_table_says_all_of_it():
    text = str(KNOWN)
    values, differences = ({line.split("  ")[0]: line.split() for line in part.splitlines()} for part in text.split("\n\n"))
    mean, spread = statistics.fmean([0.7, 0.9]), statistics.stdev([0.7, 0.9])
    assert f"{mean:.3f} ± {spread:.3f}" in " ".join(values["other"])
    assert differences["other"][-3:] == ["-2.50", "±", "2.12"]
    assert "accuracy ↑" in text
    assert "error ↓" in text
    assert "Over 2 seeds" in text
    assert "nan" in " ".join(values["third"]), "a run that diverged is not hidden"
    markdown = KNOWN.markdown()
    assert markdown.count("\n| other |") == 2
    assert all(line.count("|") == 6 for line in markdown.splitlines()[2:7])


def test_times_that_were_not_taken_side_by_side_are_left_out(tmp_path):
    timeless = Comparison(
        BETTER, runs(plain=[(0.5, 4.0, None), (0.6, 6.0, 1.0)], other=[(0.7, 3.0, 1.0), (0.9, 2.0, 1.0)]), "plain"
    )
    assert timeless.columns() == KNOWN.columns()[:-1]
    assert [len(row) for row in timeless.rows()] == [4, 4]
    assert "step time" not in timeless.markdown()
    timeless.write(tmp_path / "runs.json")
    assert Comparison.read(tmp_path / "runs.json") == timeless
    with pytest.raises(ValueError, match="time of a step is known on 1 of 2 seeds only, of 'other' and 'plain'"):
        timeless.time_ratio("other")


def test_a_seed_that_was_run_twice_counts_twice():
    twice = [
        Run(method, 0, {"accuracy": 0.5, "error": 1.0}, seconds, {}) for method, seconds in (("plain", 2.0), ("other", 3.0))
    ]
    again = Comparison(BETTER, [*twice, *twice], "plain")
    assert again.time_ratio("other") == 1.5
    assert "1.50" in str(again)


def test_one_seed_has_no_spread_and_one_method_no_differences():
    single = Comparison(BETTER, runs(plain=[(0.5, 4.0, 1.0)]), "plain")
    assert "±" not in "".join(single.rows()[0])
    assert "Paired" not in str(single)


@pytest.mark.parametrize("rich", [True, False])
def test_it_prints_with_rich_or_without(monkeypatch, capsys, rich):
    monkeypatch.setenv("COLUMNS", "120")
    if not rich:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    KNOWN.print()
    printed = capsys.readouterr().out
    assert ("┃" in printed) == rich
    for word in ("other", "third", "mean rank", "minus plain"):
        assert word in printed


def test_it_reads_back_and_draws(tmp_path):
    KNOWN.write(tmp_path / "runs.json")
    again = Comparison.read(tmp_path / "runs.json")
    assert str(again) == str(KNOWN)
    again.draw(tmp_path / "figure.png")
    content = (tmp_path / "figure.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


@pytest.mark.parametrize("name", ["a", "a method with all of its settings, and " * 2])
def test_a_long_name_does_not_take_the_room_of_the_panels(monkeypatch, tmp_path, name):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    Comparison(BETTER, runs(plain=[(0.5, 4.0, 1.0)], **{name: [(0.7, 3.0, 1.0)]}), "plain").draw(tmp_path / "figure.png")
    (figure,) = figures
    figure.draw_without_rendering()
    widths = [axes.get_window_extent().width / figure.dpi for axes in figure.axes]
    assert len(widths) == 2
    assert all(2.3 < width < 3.4 for width in widths), f"inches: {widths}"


class Validated(TrunkAndHeads):
    """Remembers where it started and what it saw first."""

    starts: list[torch.Tensor]

    def __init__(self):
        super().__init__(torch.optim.Adam)
        self.first = None

    def training_step(self, batch, batch_idx):
        if self.first is None:
            self.first = torch.cat([*(p.detach().flatten() for p in self.parameters()), batch[0].flatten()])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("sum", sum(self.losses(batch[0]).values()))


def make_in(modules):
    def make():
        modules.append(Validated())
        data = batches(6).dataset
        return modules[-1], DataLoader(data, 8, shuffle=True), DataLoader(data, 48)

    return make


def test_every_method_starts_from_the_same_network_and_batch(tmp_path):
    modules, seen = [], []
    comparison = compare(
        make_in(modules),
        {"sum": "lower"},
        ["equal", "GradNorm", "DTP"],
        seeds=2,
        trainer=lambda **settings: quiet_trainer(tmp_path, max_epochs=2, **settings),
        on_run=seen.append,
    )
    assert [(run.method, run.seed) for run in seen] == [(m, s) for s in range(2) for m in ("equal", "GradNorm", "DTP")]
    firsts = [module.first for module in modules]
    assert torch.equal(firsts[0], firsts[1])
    assert torch.equal(firsts[0], firsts[2])
    assert not torch.equal(firsts[0], firsts[3])
    assert comparison.baseline == "equal"
    assert list(comparison.runs) == seen
    assert all(run.step_seconds > 0 for run in seen)
    for run, module in zip(seen, modules, strict=True):
        with torch.no_grad():
            expected = sum(module.losses(batches(6).dataset.tensors[0]).values()).item()
        assert run.measures["sum"] == pytest.approx(expected, rel=1e-5)
    assert seen[0].weights == dict.fromkeys(("small", "middle", "large", "odd"), 1.0)
    assert seen[1].weights != seen[0].weights


def test_the_same_method_twice_comes_to_the_same(tmp_path):
    methods = {
        "one": EqualWeights,
        "fixed at one": lambda: FixedWeights(dict.fromkeys(("small", "middle", "large", "odd"), 1.0)),
    }
    comparison = compare(
        make_in([]), {"sum": "lower"}, methods, seeds=[3], trainer=lambda **settings: quiet_trainer(tmp_path, **settings)
    )
    assert comparison.differences("fixed at one", "sum") == [0.0]
    assert comparison.mean_rank("one") == comparison.mean_rank("fixed at one") == 1.5


@pytest.mark.parametrize(
    ("measures", "methods", "seeds", "words"),
    [
        ({"sum": "lower"}, ["equal", "gradnorm"], 1, "Unknown method 'gradnorm'. Known ones are 'equal', 'GradNorm'"),
        ({"sum": "lower"}, [], 1, "needs a method at least"),
        ({"sum": "lower"}, {"x": GradNorm}, [], "needs a measure and a seed"),
        ({}, ["equal"], 1, "needs a measure and a seed"),
        ({"accuracy": "higher"}, "equal", 1, "The fit logged no 'accuracy'; it logged .*'sum'.*self.log"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, measures, methods, seeds, words):
    with pytest.raises(ValueError, match=words):
        compare(make_in([]), measures, methods, seeds=seeds, trainer=lambda **s: quiet_trainer(tmp_path, **s))


def test_what_cannot_be_made_is_told_before_the_first_fit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    fits = []
    with pytest.raises(ImportError, match="This method is TorchJD's"):
        compare(make_in(fits), {"sum": "lower"}, ["equal", "UPGrad"], trainer=lambda **s: quiet_trainer(tmp_path, **s))
    assert fits == []


def test_all_are_those_that_need_nothing_else(monkeypatch):
    names = everything()
    assert {"equal", "GradNorm", "UPGrad", "STCH"} < set(names) and "DTP" not in names
    monkeypatch.setitem(sys.modules, "torchjd.scalarization", None)
    monkeypatch.delattr("torchjd.scalarization")
    assert everything() == [name for name in names if name not in OF_TORCHJD]
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ImportError, match=r"This method is TorchJD's. pip install 'lightning-gradnorm\[torchjd\]'"):
        METHODS["MGDA"]()


def test_the_known_methods_are_methods():
    assert len(METHODS) > 10
    names = {name: make().settings() for name, make in METHODS.items()}
    assert names["GradNorm paper"]["update"] == "paper"
