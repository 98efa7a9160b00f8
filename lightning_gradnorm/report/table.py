"""The table at the end of fit, and how any table is printed.

``weight``: at the first step, and for a next one; ``over the run``: its way there, on one logarithmic scale for all tasks.
``share of the gradient``: the task's of the gradient norms on the shared layer, unweighted at the first step, and weighted over
the last epoch. ``loss ratio``: of the first loss, what is left then.
"""

import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence

from lightning_gradnorm.report.sparkline import in_plain_letters
from lightning_gradnorm.report.task_summary import TaskSummary

COLUMNS = ("task", "weight", "over the run", "share of the gradient", "loss ratio")
LEGEND = (
    "Weight: first step → next step. Share: unweighted at the first step → weighted in the last epoch. Loss ratio: L(t) / L(0)."
)

_LEAST_NAME = 8  # characters that a name may be folded to


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def _percent(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "<0.1 %" if 0 < value < 0.001 else f"{100 * value:.1f} %"


def cells(row: TaskSummary) -> tuple[str, ...]:
    """One task's row, as text."""
    shares = f"{_percent(row.share_before)} → {_percent(row.share_after)}"
    return (
        row.task,
        f"{_number(row.start)} → {_number(row.final)}",
        row.way,
        "–" if math.isnan(row.share_before) and math.isnan(row.share_after) else shares,
        _number(row.loss_ratio),
    )


def _table(rows: Sequence[TaskSummary]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, without what is known of no task."""
    lines = [cells(row) for row in rows]
    known = [i for i in range(len(COLUMNS)) if i == 0 or any(line[i] not in ("", "–") for line in lines)]
    return [COLUMNS[i] for i in known], [[line[i] for i in known] for line in lines]


def plain_table(rows: Sequence[TaskSummary], title: str) -> str:
    """The table as lines of text, columns aligned."""
    return plain_rows(*_table(rows), title)


def print_table(rows: Sequence[TaskSummary], title: str, colours: Mapping[str, str] | None = None) -> None:
    """To the console, with rich where it is installed; names and ways in the tasks' colours."""
    print_rows(*_table(rows), title, colours)


def print_line(text: str) -> None:
    """To the console, in ASCII where it has no more."""
    print(text if _can_print(text) else in_plain_letters(text))


def _can_print(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def plain_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    """Any table as lines of text: the first column to the left, the others to the right."""
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    texts = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([title, texts[0], "-" * len(texts[0]), *texts[1:]])


def markdown_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Any table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ("---",) * len(columns), *rows])


def print_rows(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, colours: Mapping[str, str] | None = None
) -> None:
    """Any table to the console, with rich where it is installed.

    Args:
        columns: their headings.
        rows: as many cells each.
        title: a line above.
        colours: first cell of a row → colour of its first and third, ``#RRGGBB``.
    """
    text = plain_rows(columns, rows, title)
    if importlib.util.find_spec("rich") is None or not _can_print(text):
        print_line(text)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    table.add_column(columns[0], overflow="fold")  # on a narrow console a name goes on in the next line; a number never does
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        colour = (colours or {}).get(row[0], "")
        # as it is: a task's name may look like rich's markup
        table.add_row(*(Text(cell, style=colour if i in (0, 2) else "") for i, cell in enumerate(row)))
    console = Console()
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    if min(widths[0], _LEAST_NAME) + sum(widths[1:]) + 3 * len(widths) + 1 > console.width:  # rich would leave out digits
        print(text)
    else:
        console.print(table)
