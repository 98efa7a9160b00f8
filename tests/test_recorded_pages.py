"""The pages say what the experiments' records say."""

import pytest

from benchmarks.experiments import pages
from benchmarks.experiments.records import Record, Records
from tests.test_experiments import record


def test_the_pages_say_what_the_records_say(capsys):
    assert pages.main(["--check"]) == 0, f"run python -m benchmarks.experiments.pages: {capsys.readouterr().out}"


def test_a_page_that_says_something_else_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    (tmp_path / "no_harm").mkdir()
    records = Records(tmp_path / "no_harm" / "records.jsonl")
    for seed, accuracy in ((0, 0.5), (1, 0.7)):
        for method, more in (("equal", 0.0), ("GradNorm", 0.1)):
            values = {"left accuracy": accuracy + more, "right accuracy": 1.0}
            made = dict.fromkeys(("command", "versions", "machine", "date"), "x")
            records.add(Record("pairs of digits", method, seed, 10, values, 0.1, made=made))
    (tmp_path / "page.md.jinja").write_text('{{ no_harm.differences("pairs of digits", ["left accuracy"]) }}\n')
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "one.jinja").write_text('{{ no_harm.across(["pairs of digits"], ["GradNorm"], "left accuracy") }}\n')
    before, after = "# Read me\n<!-- made from docs/parts/one.jinja -->", "<!-- until here -->, and so on.\n"
    (tmp_path / "README.md").write_text(f"{before}old{after}")
    monkeypatch.setattr(pages, "README", tmp_path / "README.md")
    monkeypatch.setattr(pages, "write_report", lambda *args: None)
    assert pages.main([]) == 0
    table = "| left accuracy | pairs of digits, 2 seeds |\n| --- | --- |\n| GradNorm | 0.700 ± 0.141 |\n"
    assert (tmp_path / "README.md").read_text() == before + table + after
    text = (tmp_path / "page.md").read_text()
    assert text == "| minus equal | left accuracy |\n| --- | --- |\n| GradNorm | +0.100 ± 0.000 |\n"
    assert pages.main(["--check"]) == 0
    (tmp_path / "page.md").write_text(text.replace("100", "200"))
    assert pages.main(["--check"]) == 1
    assert "page.md is not what the records say" in capsys.readouterr().out
    assert pages.main([]) == 0
    (tmp_path / "README.md").write_text(f"{before}old{after}")
    assert pages.main(["--check"]) == 1
    assert capsys.readouterr().out.endswith("README.md is not what the records say\n")


def test_a_figure_among_the_pages_is_moved_there_and_linked(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "NAMES", ("scenes",))
    for name, path in (("DOCS", tmp_path / "docs"), ("RESULTS", tmp_path / "results"), ("README", tmp_path / "README.md")):
        monkeypatch.setattr(pages, name, path)
    beside = tmp_path / "results" / "scenes"
    for folder in (beside, tmp_path / "docs" / "images"):
        folder.mkdir(parents=True)
    (tmp_path / "README.md").touch()
    (tmp_path / "docs" / "page.md.jinja").write_text("![The figure]({{ scenes.figure }})\n")
    Records(beside / "records.jsonl").add(record("equal", 0))
    monkeypatch.setattr(pages, "write_report", lambda experiment, records, out: (out / "scenes.png").write_text("drawn"))
    assert pages.main([]) == 0
    assert (tmp_path / "docs" / "page.md").read_text() == "![The figure](images/scenes.png)\n"
    assert (tmp_path / "docs" / "images" / "scenes.png").read_text() == "drawn"
    assert not (beside / "scenes.png").exists()


def test_changes_are_of_the_seeds_that_both_problems_have(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    (tmp_path / "rescue").mkdir()
    records = Records(tmp_path / "rescue" / "records.jsonl")
    for problem, rows in (("digits as they are", {"equal": [0.8, 0.6]}), ("left × 1e4", {"equal": [0.4], "GradNorm": [0.9]})):
        for method, accuracies in rows.items():
            for seed, accuracy in enumerate(accuracies):
                records.add(Record(problem, method, seed, 10, {"left accuracy": accuracy}, 0.1))
    table = pages.Results("rescue").changes("digits as they are", ["left × 1e4"], ["left accuracy"])
    assert table.splitlines()[2:] == ["| left × 1e4 | equal | -50.0 % |"]


def test_some_methods_alone_are_compared_on_every_seed_that_they_have(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    (tmp_path / "klein_gordon").mkdir()
    records = Records(tmp_path / "klein_gordon" / "records.jsonl")
    for method, errors in (("equal", [0.3]), ("annealing", [0.2, 0.1, 0.4]), ("GradNorm", [0.1, 0.2, 0.3])):
        for seed, error in enumerate(errors):
            records.add(Record("Klein–Gordon", method, seed, 10, {"relative L2 error": error}, 0.1))
    everything = pages.Results("klein_gordon")
    pair = everything.only("annealing", "GradNorm")
    assert (everything.seeds("Klein–Gordon"), pair.seeds("Klein–Gordon")) == (1, 3)
    assert pair.better_on("Klein–Gordon", "GradNorm", "relative L2 error", "annealing") == 2
    rows = pair.seed_by_seed("Klein–Gordon", "relative L2 error").splitlines()
    assert rows[2:] == ["| annealing | 0.2 | 0.1 | 0.4 | 0.233 ± 0.153 |", "| GradNorm | 0.1 | 0.2 | 0.3 | 0.200 ± 0.100 |"]
    later = everything.only("annealing", "GradNorm", from_seed=1)
    assert later.seeds("Klein–Gordon") == 2
    assert later.better_on("Klein–Gordon", "GradNorm", "relative L2 error", "annealing") == 1
    assert pair.median("Klein–Gordon", "GradNorm", "relative L2 error") == 0.2
    assert pair.mean_difference("Klein–Gordon", "GradNorm", "relative L2 error", "annealing") == "-0.033 ± 0.115"
    with pytest.raises(ValueError, match=r"klein_gordon has no method 'Gradnorm'; it has GradNorm, .*annealing"):
        everything.only("annealing", "Gradnorm")
