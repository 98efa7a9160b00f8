"""What a summary leaves in a folder: the tables as text, all ratios as CSV, a heat-map."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from _common import figure_style, plt
from matplotlib.colors import LogNorm

from benchmarks.suite.members import MARKS
from benchmarks.suite.summary import Overall, Ratio, Summary

TOP = 4.0  # ratios of so much and of one over so much have the ends of the colour scale


def write(summary: Summary, folder: Path) -> Iterator[Path]:
    """Table, CSV files and figure; gives their paths."""
    table = folder / "table.md"
    table.write_text(summary.text(), encoding="utf-8")
    yield table
    for name, kind, rows in (("ratios", Ratio, summary.ratios.values()), ("overall", Overall, summary.overall())):
        path = folder / f"{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(kind._fields)
            writer.writerows([f"{v:.5g}" if isinstance(v, float) else v for v in row] for row in rows)
        yield path
    if summary.ratios:
        draw(summary, folder / "ratios.png")
        yield folder / "ratios.png"


def draw(summary: Summary, path: Path) -> None:
    """Problems × methods at each share of the training; blue is better than the best reference, red worse."""
    problems = [p for p in summary.problems if any(problem == p for _, problem, _ in summary.ratios)]
    methods = summary.methods
    with figure_style():
        width, height = 3 + 0.62 * len(methods) * len(MARKS), 1.8 + 0.3 * len(problems)
        figure, panels = plt.subplots(1, len(MARKS), figsize=(width, height), sharey=True)
        for axes, mark in zip(panels, MARKS, strict=True):
            found = [[summary.ratios.get((mark, p, m)) for m in methods] for p in problems]
            ratios = np.array([[math.nan if ratio is None else ratio.ratio for ratio in row] for row in found])
            image = axes.imshow(ratios, cmap="RdBu_r", norm=LogNorm(1 / TOP, TOP, clip=True), aspect="auto")
            for (row, column), value in np.ndenumerate(ratios):
                if math.isfinite(value):
                    dark = abs(math.log(value)) > 0.7 * math.log(TOP)
                    colour = "white" if dark else "black"
                    axes.text(
                        column,
                        row,
                        f"{value:.2f}" if value < 9.95 else f"{value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color=colour,
                    )
            axes.set_xticks(range(len(methods)), methods, rotation=60, ha="right", fontsize=8)
            axes.set_yticks(range(len(problems)), problems, fontsize=8)
            axes.set_title(f"at {mark:g} of the training", fontsize=9)
            axes.grid(visible=False)
        bar = figure.colorbar(image, ax=panels, ticks=[1 / TOP, 0.5, 1, 2, TOP], format="{x:g}", shrink=0.6)
        bar.minorticks_off()
        about = f"error over the best of {', '.join(summary.references)}"
        figure.suptitle(about, x=0.01, ha="left", fontsize=10)
        figure.savefig(path)
        plt.close(figure)
