"""The heat-map of ``docs/every-method.md``.

python -m benchmarks.experiments.every_method_figure
"""

import math
from pathlib import Path

import numpy as np
from _common import figure_style, plt
from matplotlib.colors import LogNorm

from benchmarks.experiments.every_method import FOLDER, EveryMethod, marked, short

TOP = 3.0  # ratios of so much and of one over so much have the ends of the colour scale


def draw(every: EveryMethod, path: Path) -> None:
    """Methods × problems: error over the plain sum's, blue is better; rings as in the table."""
    columns, methods = [*every.problems, "geometric mean"], every.order
    ratios, texts = np.full((len(methods), len(columns)), math.nan), {}
    for row, method in enumerate(methods):
        for column, problem in enumerate(every.problems):
            if (problem, method) in every.found:
                one = every.one(method, problem)
                ratios[row, column], texts[row, column] = one.ratio, marked(one)
        if method in every.whole:
            ratios[row, -1] = every.whole[method].ratio
            texts[row, len(columns) - 1] = short(ratios[row, -1])
    with figure_style():
        figure, axes = plt.subplots(figsize=(2.6 + 0.72 * len(columns), 1.6 + 0.27 * len(methods)))
        image = axes.imshow(ratios, cmap="RdBu_r", norm=LogNorm(1 / TOP, TOP, clip=True), aspect="auto")
        for (row, column), text in texts.items():
            dark = abs(math.log(ratios[row, column])) > 0.7 * math.log(TOP)
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8)
        axes.set_yticks(range(len(methods)), methods, fontsize=8)
        axes.axvline(len(every.problems) - 0.5, color="white", linewidth=3)
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, ticks=[1 / TOP, 0.5, 1, 2, TOP], format="{x:.2g}", shrink=0.6)
        bar.minorticks_off()
        axes.set_title("error over the plain sum's", fontsize=10)
        figure.savefig(path)
        plt.close(figure)


if __name__ == "__main__":
    draw(EveryMethod(), FOLDER / "every_method.png")
