"""The table at the end of fit, drawn by rich and as plain text."""

import importlib.util
import io
import math
import re

import pytest

from lightning_gradnorm.report.table import COLUMNS, cells, plain_table, print_table
from lightning_gradnorm.report.task_summary import TaskSummary

NAN = math.nan
DEPTH = TaskSummary("depth", 1.0, 0.75, 0.1, 0.5, 0.25, 0.5, 0.125, way="▄▃▂▁")
ROWS = [DEPTH, TaskSummary("größe/温度 4", 1.0, 1.25, 0.1, 1.5, NAN, NAN, 0.5, way="▄▅▆▇")]


@pytest.fixture
def width(monkeypatch):
    """Of the console that rich sees."""

    def set_width(columns: int) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))

    set_width(160)
    return set_width


@pytest.fixture
def without_rich(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "rich" else find(name, *rest))


def test_the_cells_of_a_row():
    assert cells(DEPTH) == ("depth", "1 → 0.5", "▄▃▂▁", "25.0 % → 50.0 %", "0.125")
    assert len(cells(DEPTH)) == len(COLUMNS)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (NAN, "–"),
        (0.0, "0"),
        (1.0, "1"),
        (0.123456, "0.1235"),
        (1234.5, "1234"),
        (1e-8, "1e-08"),
        (123456789.0, "1.235e+08"),
        (math.inf, "inf"),
    ],
)
def test_numbers_of_any_size_take_little_room(value, text):
    row = TaskSummary("a", value, value, 0.0, value, 0.5, 0.5, value)
    assert cells(row)[1] == f"{text} → {text}"
    assert cells(row)[4] == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(NAN, "–"), (0.0, "0.0 %"), (1e-9, "<0.1 %"), (0.0009, "<0.1 %"), (0.001, "0.1 %"), (0.5, "50.0 %"), (1.0, "100.0 %")],
)
def test_shares_are_percentages(value, text):
    row = TaskSummary("a", 1.0, 1.0, 0.0, 1.0, value, value, 1.0)
    assert cells(row)[3] == (f"{text} → {text}" if value == value else "–")


def test_what_is_known_of_no_task_has_no_column():
    unmeasured = [TaskSummary(task, 1.0, 1.0, 0.0, 2.0, NAN, NAN, 0.5) for task in "ab"]
    header = plain_table(unmeasured, "DWA, 7 steps").splitlines()[1]
    assert re.split(r"  +", header) == ["task", "weight", "loss ratio"]


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "rich"])
def test_a_console_of_ascii_has_the_same_table_in_its_letters(monkeypatch, plain, request):
    if plain:
        request.getfixturevalue("without_rich")
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    print_table([DEPTH], "GradNorm, 7 steps")
    last = written.getvalue().decode("ascii").splitlines()[-1]
    assert re.split(r"  +", last) == ["depth", "1 > 0.5", ":-._", "25.0 % > 50.0 %", "0.125"]


def test_rich_shows_each_task_in_its_colour(capsys, width, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    print_table([DEPTH], "GradNorm, 7 steps", {"depth": "#0072B2"})
    assert capsys.readouterr().out.count("\x1b[38;2;0;114;178m") == 2, "name and way"


def test_the_plain_table_is_aligned():
    title, header, rule, *lines = plain_table(ROWS, "GradNorm, 7 steps").splitlines()
    assert title == "GradNorm, 7 steps"
    assert header.split("  ")[0].strip() == "task"
    assert set(rule) == {"-"}
    assert len(lines) == 2
    assert len({len(line) for line in (header, rule, *lines)}) == 1
    assert [re.split(r"  +", line.strip()) for line in (header, *lines)] == [list(COLUMNS), *(list(cells(row)) for row in ROWS)]
    assert all(len(line) <= 110 for line in (header, *lines))
    ends = [m.end() for m in re.finditer(r"\S+(?: \S+)*", header)][1:]
    assert all(line[end - 1] != " " for line in lines for end in ends), "numbers stand flush right under their heading"


def printed(capsys, rows=ROWS, title="GradNorm, 7 steps") -> str:
    print_table(rows, title)
    return capsys.readouterr().out


def test_without_rich_the_plain_table_is_printed(capsys, without_rich):
    assert printed(capsys) == plain_table(ROWS, "GradNorm, 7 steps") + "\n"


def test_with_rich_every_cell_is_there(capsys, width):
    pytest.importorskip("rich")
    out = printed(capsys)
    assert out != plain_table(ROWS, "GradNorm, 7 steps") + "\n"
    assert "GradNorm, 7 steps" in out
    assert all(column in out for column in COLUMNS)
    for row in ROWS:
        line = next(line for line in out.splitlines() if row.task in line)
        assert [cell.strip() for cell in re.split("[│|┃]", line)[1:-1]] == list(cells(row))


@pytest.mark.parametrize("task", ["u[x]", "[red]", "loss [m]", "a[/b]", "[link=x]", "p:smile:q"])
def test_a_name_is_printed_as_it_is(capsys, width, task):
    """rich has a markup language of its own, in which brackets and colons mean something."""
    row = TaskSummary(task, 1.0, 1.0, 0.0, 1.0, 0.5, 0.5, 1.0)
    assert f" {task} " in printed(capsys, [row])


@pytest.mark.parametrize("task", ["depth", "segmentation", "a/very/long/name/of/a/task"])
def test_on_a_narrow_console_no_digit_is_lost(capsys, width, task):
    """Where nothing says how wide the output is, as in a job's log, rich takes 80 columns; a name may be cut, no number."""
    width(80)
    row = TaskSummary(task, 1.0, 1.235e-08, 0.0, 1.235e08, 0.25, 0.0009, 1.235e-08, way="▁▂▃▄▅▆▇███")
    line = next(line for line in printed(capsys, [row]).splitlines() if "25.0 %" in line)
    assert [cell.strip() for cell in re.split("[│|┃]", line)[2:-1]] == list(cells(row)[1:])


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "rich"])
def test_many_tasks_and_none(capsys, width, plain, request):
    if plain:
        request.getfixturevalue("without_rich")
    many = [TaskSummary(f"task {i}", 1.0, 1.0, 0.0, 10.0**-i, 0.1, 0.1, 1.0) for i in range(12)]
    out = printed(capsys, many)
    assert [f"task {i} " in out for i in range(12)] == [True] * 12
    assert "task" in printed(capsys, [])
