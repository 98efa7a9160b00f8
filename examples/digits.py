"""Three tasks on one trunk, over scikit-learn's handwritten digits: equal weights against GradNorm.

Each 8×8 image asks for three things, in the units that the data come in:

- ``digit``, its class: cross-entropy, about 2 at the start;
- ``pixels``, the image itself (0 to 16 per pixel) through a narrow code: mean squared error, about 20;
- ``ink``, the sum of its pixels: squared error, above 1000.

Added up as they are, the ink decides what the trunk learns. GradNorm is one line of the Trainer. Both methods start from
the same weights and see the same batches.

    python examples/digits.py            # three seeds, a minute or so
    python examples/digits.py --help
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
from _common import (
    BLACK,
    GREEN,
    METHOD_COLOURS,
    PURPLE,
    CommandLine,
    Progress,
    by_task,
    draw_runs,
    figure_style,
    mean_std,
    plt,
    print_table,
    quiet_lightning,
    quiet_trainer,
    save,
)
from digits_problem import Digits, load
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.ticker import LogLocator, NullLocator
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradnorm import EqualWeights, GradNormCallback, LossBalancingCallback

# task → what is measured on the test images, decimals to print, which way is better
MEASURES = {"digit": ("accuracy %", 1, "↑"), "pixels": ("RMSE", 2, "↓"), "ink": ("RMSE", 2, "↓")}
TASK_COLOURS = {"digit": BLACK, "pixels": GREEN, "ink": PURPLE}
METHODS = ("equal", "GradNorm")


@dataclass
class History(L.Callback):
    """Keeps what the figure shows.

    Attributes:
        balancing: the callback whose weights are kept.
        weights: task → weight, after each step.
        measures: task → measure on the test images, after each epoch.
    """

    balancing: LossBalancingCallback
    weights: list[dict[str, float]] = field(default_factory=list)
    measures: list[dict[str, float]] = field(default_factory=list)

    def on_train_batch_end(self, *args: object) -> None:
        self.weights.append(self.balancing.weights)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        factors = {"digit": 100.0, "pixels": 1.0, "ink": 1.0}  # the accuracy in %
        self.measures.append({task: factors[task] * float(trainer.callback_metrics[f"held_out/{task}"]) for task in MEASURES})


def guesses(train: TensorDataset, test: TensorDataset) -> dict[str, float]:
    """The three measures of whoever looks at no test image: the commonest class, the mean image, the mean ink."""
    (images, labels), (test_images, test_labels) = train.tensors, test.tensors
    return {
        "digit": 100 * (test_labels == labels.mode().values).float().mean().item(),
        "pixels": (test_images - images.mean(0)).square().mean().sqrt().item(),
        "ink": (test_images.sum(1) - images.sum(1).mean()).square().mean().sqrt().item(),
    }


def train_once(method: str, seed: int, args: argparse.Namespace, progress: Progress, *, summary: bool) -> History:
    """One fit. All that depends on the seed is drawn the same for both methods."""
    train, test = load()
    torch.manual_seed(seed)
    model = Digits()
    order = torch.Generator().manual_seed(seed)
    equal = LossBalancingCallback(EqualWeights(), summary=False)  # the plain sum; so that its losses are logged by task, too
    balancing = GradNormCallback(alpha=args.alpha, summary=summary) if method == "GradNorm" else equal
    history = History(balancing)
    logger = TensorBoardLogger(args.out, name=method, version=f"seed_{seed}")
    for old in Path(logger.log_dir).glob("events.out.tfevents.*"):
        old.unlink()  # or TensorBoard would join an earlier run's curves to this one's
    callbacks = [progress, balancing, history]
    trainer = quiet_trainer(callbacks, max_epochs=args.epochs, logger=logger, log_every_n_steps=22)
    progress.name(f"seed {seed}, {method}")
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True, generator=order), DataLoader(test, batch_size=450))
    return history


def print_results(runs: dict[str, list[History]], guess: dict[str, float]) -> None:
    """Per task: both methods' mean and spread over the seeds, and of their differences seed by seed."""
    rows = []
    for task, (measure, digits, better) in MEASURES.items():
        equal, balanced = ([run.measures[-1][task] for run in runs[method]] for method in METHODS)
        differences = [b - e for b, e in zip(balanced, equal, strict=True)]
        values = mean_std(equal, digits), mean_std(balanced, digits), mean_std(differences, digits, "+")
        rows.append((f"{task}, {measure} {better}", f"{guess[task]:.{digits}f}", *values))
    columns = ("", "a guess", *METHODS, "difference")
    print_table(f"On the test images; seeds: {len(runs['equal'])}, mean ± standard deviation", columns, rows)


def draw(runs: dict[str, list[History]], path: Path) -> None:
    """GradNorm's weights over the steps, and each task's measure over the epochs."""
    with figure_style():
        figure, ((top_left, *top), bottom) = plt.subplots(2, 2, figsize=(9, 6.4))
        for task, colour in TASK_COLOURS.items():
            weights = [by_task(run.weights, task) for run in runs["GradNorm"]]
            draw_runs(top_left, range(1, len(weights[0]) + 1), weights, color=colour, label=task)
        top_left.set(title="GradNorm's loss weights", xlabel="step", yscale="log")
        top_left.yaxis.set_major_formatter("{x:g}")
        top_left.legend(loc="best")
        for axes, (task, (measure, _, better)) in zip([*top, *bottom], MEASURES.items(), strict=True):
            for method in METHODS:
                measures = [by_task(run.measures, task) for run in runs[method]]
                draw_runs(axes, range(1, len(measures[0]) + 1), measures, color=METHOD_COLOURS[method], label=method)
            axes.set(title=f"{task}: {measure} {better}", xlabel="epoch")
        top[0].legend(loc="lower right")
        bottom[-1].set_yscale("log")
        bottom[-1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bottom[-1].yaxis.set_major_formatter("{x:g}")
        bottom[-1].yaxis.set_minor_locator(NullLocator())
        save(figure, "Held-out digits", path)


def tensorboard_command(folder: Path) -> str:
    """The command that shows ``folder``, with the program of the Python that runs this."""
    beside = Path(sys.executable).with_name("tensorboard")
    program = os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
    return f"{program if beside.exists() else 'tensorboard'} --logdir {folder}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandLine(__doc__, "digits", seeds=3, epochs=80, each=", of 22 steps each", quick=3, out="logs and figure")
    parser.add_argument("--alpha", type=float, default=0.0, help="GradNorm's asymmetry; default %(default)s")
    args = parser.read(arguments)
    train, test = load()
    steps = -(-len(train) // 64) * args.epochs
    progress = Progress(steps * args.seeds * len(METHODS))
    runs: dict[str, list[History]] = {method: [] for method in METHODS}
    with quiet_lightning():
        for seed in range(args.seeds):
            for method in METHODS:
                runs[method].append(train_once(method, seed, args, progress, summary=seed == args.seeds - 1))
    print_results(runs, guesses(train, test))
    figure = args.out / "digits.png"
    draw(runs, figure)
    print(f"Figure:      {figure}\nTensorBoard: {tensorboard_command(args.out)}")


if __name__ == "__main__":
    main()
