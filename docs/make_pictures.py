"""Draws the pictures of docs/gradnorm-in-pictures.md: what GradNorm compares, and what it moves in the first page's program.

python docs/make_pictures.py    # half a minute on one core; writes docs/images/gradnorm.png and gradnorm-training.png
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrow, FancyBboxPatch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent
LOOKS = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150, "axes.titlelocation": "left"}
COLOURS = {"price": "#0072B2", "sold": "#E69F00"}  # Okabe and Ito
HEADS = {"depth": "#0072B2", "class": "#E69F00", "normals": "#009E73"}


def box(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """A part of a network, its middle at (x, y)."""
    patch = FancyBboxPatch((x - 0.62, y - 0.25), 1.24, 0.5, boxstyle="round,pad=0.05", facecolor=colour, edgecolor="none")
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", color="white", weight="bold")


def draw_network(axes: Axes, title: str, widths: dict[str, float]) -> None:
    """A trunk with a shared layer W and three heads; each task's gradient as an arrow down to W, as wide as it is large."""
    box(axes, 2, 0.4, "trunk", "0.55")
    box(axes, 2, 1.3, "W", "0.25")
    for x, (task, width) in zip((0.2, 2, 3.8), widths.items(), strict=True):
        box(axes, x, 3.3, task, HEADS[task])
        start, end = (x + 0.12 * (2 - x), 3.2), (2 + 0.28 * (x - 2), 1.68)
        down = FancyArrow(
            *start, end[0] - start[0], end[1] - start[1], width=width, length_includes_head=True,
            head_width=width + 0.14, head_length=0.22, facecolor=HEADS[task], edgecolor="none", zorder=0,
        )  # fmt: skip
        axes.add_patch(down)
    axes.set_title(title, loc="center")
    axes.set(xlim=(-0.7, 4.7), ylim=(0, 3.8), aspect="equal")
    axes.axis("off")


def draw_idea(path: Path) -> None:
    """What GradNorm compares."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
    draw_network(left, "Equal weights: one drowns the others", {"depth": 0.48, "class": 0.02, "normals": 0.09})
    draw_network(right, "GradNorm: all arrive with one norm", dict.fromkeys(HEADS, 0.24))
    figure.savefig(path)
    plt.close(figure)


class Watch(L.Callback):
    """Notes of every step each task's weight and norms, and now and then how many of the houses held out are told right."""

    def __init__(self, balancing: Any, x: torch.Tensor, sold: torch.Tensor) -> None:
        self.balancing, self.x, self.sold = balancing, x, sold
        self.weights: dict[str, list[float]] = {task: [] for task in COLOURS}
        self.norms: dict[str, list[float]] = {task: [] for task in COLOURS}
        self.right: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: object) -> None:
        for task in COLOURS:
            self.weights[task].append(float(self.balancing.logged[f"loss_weight/{task}"]))
            self.norms[task].append(float(self.balancing.logged[f"grad_norm/{task}"]))
        if trainer.global_step % 8 == 0:
            with torch.no_grad():
                answer = module(self.x)[1].argmax(1)
            self.right.append((answer == self.sold).float().mean().item())


def trained(settings: dict[str, Any]) -> Watch:
    """The program's module, trained with the callback's settings."""
    names: dict[str, Any] = {}
    exec(compile(program(), "program.jinja", "exec"), names)
    torch.manual_seed(0)
    module, callback = names["House"](), names["GradNormCallback"](summary=False, update_every=1, **settings)
    watch = Watch(callback, names["x"][2048:], names["sold"][2048:])
    with tempfile.TemporaryDirectory() as folder:
        logger = L.pytorch.loggers.CSVLogger(folder)
        trainer = L.Trainer(max_epochs=5, callbacks=[callback, watch], logger=logger, log_every_n_steps=1, accelerator="cpu")
        trainer.fit(module, torch.utils.data.DataLoader(names["data"], batch_size=32))
    return watch


def draw_shares(axes: Axes, title: str, norms: dict[str, list[float]]) -> None:
    """The tasks' shares of the sum of the norms, one upon the other; running means over twenty steps."""
    rows = torch.tensor(list(norms.values()))
    shares = torch.nn.functional.avg_pool1d((rows / rows.sum(0))[None], 20, 1, 10, count_include_pad=False)[0]
    axes.stackplot(range(shares.shape[1]), *shares.tolist(), colors=list(COLOURS.values()), alpha=0.85)
    axes.set(title=title, xlabel="step", ylim=(0, 1), xlim=(0, shares.shape[1]))
    axes.yaxis.set_major_formatter("{x:.0%}")


def draw_training(path: Path) -> None:
    """What GradNorm moves."""
    plain, balanced = trained({"mode": "monitor"}), trained({})
    figure, ((first, second), (third, fourth)) = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    draw_shares(first, "Shares of the gradient, equal weights", plain.norms)
    draw_shares(second, "Shares of the gradient, GradNorm", balanced.norms)
    for axes, height, task in ((first, 0.45, "price"), (second, 0.2, "price"), (second, 0.75, "sold")):
        axes.text(160, height, task, color="white", weight="bold", ha="center")
    for task, weights in balanced.weights.items():
        third.plot(weights, color=COLOURS[task], linewidth=2)
        third.annotate(
            task, (len(weights), weights[-1]), xytext=(4, 0), textcoords="offset points", color=COLOURS[task], va="center"
        )
    third.set(title="GradNorm's weights", xlabel="step", yscale="log", xlim=(0, 370))
    third.yaxis.set_major_formatter("{x:g}")
    for name, watch, colour in (("GradNorm", balanced, "0.1"), ("equal weights", plain, "0.6")):
        fourth.plot([8 * (i + 1) for i in range(len(watch.right))], watch.right, color=colour, linewidth=2)
        fourth.annotate(name, (300, max(watch.right[-8:])), xytext=(0, 8), textcoords="offset points", color=colour, ha="right")
    fourth.set(title="sold or not: told right, held out", xlabel="step", xlim=(0, 330), ylim=(0.4, 1))
    fourth.yaxis.set_major_formatter("{x:.0%}")
    figure.savefig(path)
    plt.close(figure)


def program() -> str:
    """The first page's, up to where it trains."""
    text = (DOCS / "parts" / "program.jinja").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)\nfor name", text, flags=re.DOTALL)
    assert found is not None
    return found[1]


if __name__ == "__main__":
    with plt.rc_context(LOOKS):
        draw_idea(DOCS / "images" / "gradnorm.png")
        draw_training(DOCS / "images" / "gradnorm-training.png")
