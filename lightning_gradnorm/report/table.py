"""The table at the end of fit.

``w``: the weight at the first step, on average and for a next step. ``before``, ``after``: the task's share of the gradient
norms on the shared layer, unweighted at the first step and weighted over the last epoch. ``loss ratio``: of the first loss,
what is left.
"""

import importlib.util
import math
from collections.abc import Sequence

from lightning_gradnorm.report.task_summary import TaskSummary

COLUMNS = ("task", "w start", "w mean", "w end", "before", "after", "loss ratio")

_LEAST_NAME = 8  # characters that a name may be folded to


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def _percent(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "<0.1 %" if 0 < value < 0.001 else f"{100 * value:.1f} %"


def cells(row: TaskSummary) -> tuple[str, ...]:
    """One task's row, as text."""
    return (
        row.task,
        *(_number(value) for value in (row.start, row.mean, row.final)),
        *(_percent(value) for value in (row.share_before, row.share_after)),
        _number(row.loss_ratio),
    )


def plain_table(rows: Sequence[TaskSummary], title: str) -> str:
    """The table as lines of text, columns aligned."""
    return plain_rows(COLUMNS, [cells(row) for row in rows], title)


def print_table(rows: Sequence[TaskSummary], title: str) -> None:
    """To the console, with rich where it is installed."""
    print_rows(COLUMNS, [cells(row) for row in rows], title)


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


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """Any table to the console, with rich where it is installed."""
    if importlib.util.find_spec("rich") is None:
        print(plain_rows(columns, rows, title))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    table.add_column(columns[0], overflow="fold")  # on a narrow console a name goes on in the next line; a number never does
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: a task's name may look like rich's markup
    console = Console()
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    if min(widths[0], _LEAST_NAME) + sum(widths[1:]) + 3 * len(widths) + 1 > console.width:  # rich would leave out digits
        print(plain_rows(columns, rows, title))
    else:
        console.print(table)
