"""What the examples share: a command line, a quiet Trainer, a progress bar, a table, a figure's looks."""

import argparse
import logging
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import matplotlib
import torch

matplotlib.use("Agg")  # draws to files; no window is needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

# Colours of Okabe and Ito, which people with any kind of colour vision tell apart.
BLACK, ORANGE, GREEN, BLUE, PURPLE = "#000000", "#E69F00", "#009E73", "#0072B2", "#CC79A7"
SKY, VERMILION = "#56B4E9", "#D55E00"
METHOD_COLOURS = {"equal": ORANGE, "GradNorm": BLUE, "GradNorm static": PURPLE, "fixed 1/σ²": GREEN, "uncertainty": GREEN}


class CommandLine(argparse.ArgumentParser):
    """The options of an example that trains several seeds; it may add its own before ``read``.

    Args:
        about: its docstring.
        name: of its folder under ``runs/``.
        seeds: how many, if none are asked for.
        quick: how long a fit is with ``--quick``.
        out: what goes to the folder.
        each: how long one epoch is.
        length: ``steps`` or ``epochs``, of a fit.
    """

    def __init__(
        self, about: str | None, name: str, *, seeds: int, quick: int, out: str = "the figure", each: str = "", **length: int
    ) -> None:
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        ((unit, default),) = length.items()
        self.quick = {"seeds": 1, unit: quick}
        self.add_argument("--seeds", type=int, default=seeds, help="how many; default %(default)s")
        self.add_argument(f"--{unit}", type=int, default=default, help=f"per fit{each}; default %(default)s")
        self.add_argument("--out", type=Path, default=Path("runs") / name, help=f"folder for {out}; default %(default)s")
        self.add_argument("--quick", action="store_true", help=f"one seed, {quick} {unit}: to see that it runs")

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """What was asked for; the folder is made."""
        args = self.parse_args(arguments)
        torch.set_num_threads(1)  # layers as small as these are slower on several
        if args.quick:
            vars(args).update(self.quick)
        args.out.mkdir(parents=True, exist_ok=True)
        return args


def loop_parser(about: str | None, each: str, **length: int) -> argparse.ArgumentParser:
    """The options of an example of another loop, which trains one seed, with equal weights and with GradNorm's."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    ((unit, default),) = length.items()
    parser.add_argument("--seed", type=int, default=0, help="of network and batches; default %(default)s")
    parser.add_argument(f"--{unit}", type=int, default=default, help=f"{each}; default %(default)s")
    parser.add_argument("--alpha", type=float, default=0.0, help="GradNorm's asymmetry; default %(default)s")
    return parser


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's notices on devices and models, its advice on worker processes and its own use of a deprecated call."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers")
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def quiet_trainer(callbacks: Sequence[L.Callback], **settings: object) -> L.Trainer:
    """A Trainer on the CPU that draws, saves and, unless ``logger`` is given, logs nothing of its own."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    steps = {"log_every_n_steps": 0, "num_sanity_val_steps": 0}
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **(off | steps | settings))


class Progress(L.Callback):
    """One bar over several fits, drawn on terminals only; it goes away when the last fit ends.

    Args:
        total: optimiser steps of all fits together.
    """

    def __init__(self, total: int) -> None:
        self.bar = tqdm(total=total, disable=None, leave=False, unit="step", mininterval=0.3)

    def name(self, text: str) -> None:
        """What the bar says of the fit that comes next."""
        self.bar.set_description(text)

    def on_train_batch_end(self, *args: object) -> None:
        self.bar.update()
        if self.bar.total == self.bar.n:
            self.bar.close()


def mean_std(values: Sequence[float], digits: int, sign: str = "") -> str:
    """``mean ± standard deviation`` over the seeds; the mean alone of one seed."""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """To the console; the first column to the left, the others to the right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_held_out(equal: Mapping[str, float], balanced: Mapping[str, float], weights: Mapping[str, float]) -> None:
    """Task → loss on held-out data with equal weights and with GradNorm's, and its last weight, as a table."""
    rows = [(task, *(f"{value:.3g}" for value in (equal[task], balanced[task], weights[task]))) for task in equal]
    print_table("Held-out losses", ["", "equal weights", "GradNorm", "GradNorm's weight"], rows)


@contextmanager
def figure_style() -> Iterator[None]:
    """Plain axes and a light grid, for the figures made inside."""
    changes = {
        "figure.dpi": 150,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "0.9",
        "axes.titlelocation": "left",
        "lines.linewidth": 1.8,
        "legend.frameon": False,
    }
    with plt.rc_context(changes):
        yield


def draw_runs(axes: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], **line: object) -> None:
    """The mean of several seeds' curves as a line, their range as a band."""
    columns = list(zip(*runs, strict=True))
    (drawn,) = axes.plot(x, [statistics.fmean(column) for column in columns], **line)
    axes.fill_between(x, list(map(min, columns)), list(map(max, columns)), color=drawn.get_color(), alpha=0.18, linewidth=0)


def save(figure: Figure, about: str, path: Path) -> None:
    """Write the figure as a PNG, with a line on what its curves are."""
    figure.suptitle(f"{about}: line = mean of the seeds, band = their range", x=0.01, ha="left", fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def by_task(records: Sequence[Mapping[str, float]], task: str) -> list[float]:
    """One task's values out of a list of dicts."""
    return [record[task] for record in records]
