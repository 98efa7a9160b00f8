"""The toy problem of the GradNorm paper (Chen et al., ICML 2018, section 4): regressions that differ in scale alone.

Task i regresses f_i(x) = σ_i tanh((B + ε_i) x), from 250 to 100 numbers; B is common to the tasks, ε_i is their own. A
ReLU trunk of four layers, 100 wide, and an affine head per task learn them by squared error. T = 2 has σ = 1 and 100;
for T = 10 the paper does not print σ, and these are those of public re-implementations.

The measure is Σ_i L_i(t) / L_i(0) on held-out inputs. It is T at the start, and each task counts alike. Four methods start
from the same network and see the same batches:

- ``equal``: the plain sum of the losses;
- ``GradNorm``, α = 0.12 as in the paper;
- ``GradNorm static``: trained anew with the time averages of that GradNorm run's weights, at the cost of a plain sum;
- ``fixed 1/σ²``: each loss divided by its scale, which here is known.

The last knows what the measure asks for: GradNorm evens out gradients, for which 1/σ is enough, and the measure asks for 1/σ².
Where scales are known, divide by them.

    python examples/toy.py               # five seeds, T = 2 and T = 10; about five minutes
    python examples/toy.py --help
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from _common import (
    METHOD_COLOURS,
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
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm import FixedWeights, GradNormCallback, LossBalancingCallback, MultiTaskMixin

SIGMAS = {2: (1, 100), 10: (48, 3, 54, 16, 9, 30, 52, 26, 47, 81)}
METHODS = ("equal", "GradNorm", "GradNorm static", "fixed 1/σ²")  # the static one needs the run before it
LAST = 8  # evaluations, of 30, whose mean is the measure at the end: single ones jump about under equal weights
Batch = tuple[Tensor, Tensor]


class ToyData:
    """One seed's functions, and freshly drawn inputs: no input is seen twice.

    Args:
        tasks: T.
        seed: of the functions and the inputs.
        steps: batches that an iteration gives.
    """

    def __init__(self, tasks: int, seed: int, steps: int) -> None:
        self.seed, self.steps = seed, steps
        draws = torch.Generator().manual_seed(seed)
        common = 10 * torch.randn(100, 250, generator=draws)
        own = 3.5 * torch.randn(tasks, 100, 250, generator=draws)
        self._matrices = (common + own).flatten(0, 1).T.contiguous()
        self.held_out = self._draw(1000, draws)

    def _draw(self, size: int, draws: torch.Generator) -> Batch:
        """Inputs ``[size, 250]`` of length one, and tanh((B + ε_i) x), ``[T, size, 100]``; σ is for the network to apply."""
        x = F.normalize(2 * torch.rand(size, 250, generator=draws) - 1)
        return x, (x @ self._matrices).tanh_().unflatten(1, (-1, 100)).transpose(0, 1)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        draws = torch.Generator().manual_seed(self.seed + 1_000_000)
        for _ in range(self.steps):
            yield self._draw(100, draws)


class Toy(MultiTaskMixin, L.LightningModule):
    """The paper's network. GradNorm finds its last trunk layer to be the shared one, so ``shared_layer`` is left out.

    Args:
        sigmas: σ_i; the tasks are named after them.
    """

    def __init__(self, sigmas: Sequence[float], lr: float) -> None:
        super().__init__()
        self.sigmas, self.lr = sigmas, lr
        widths = [250, 100, 100, 100, 100]
        layers = [(nn.Linear(i, o), nn.ReLU()) for i, o in itertools.pairwise(widths)]
        self.trunk = nn.Sequential(*(module for layer in layers for module in layer))
        self.heads = nn.ModuleList(nn.Linear(100, 100) for _ in sigmas)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Task → mean squared error, unweighted."""
        x, targets = batch
        features = self.trunk(x)
        parts = zip(self.sigmas, self.heads, targets, strict=True)
        return {f"σ={sigma}": F.mse_loss(head(features), sigma * target) for sigma, head, target in parts}

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self.losses(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr, fused=True)  # one call for 28 small parameters


class Evaluation(L.Callback):
    """Keeps the measure and the weights, before the first step and after every so-manieth.

    Args:
        held_out: inputs and targets.
        every: steps from one evaluation to the next.
        balancing: the callback whose weights are kept; ``None`` for a plain sum.

    Attributes:
        measures: Σ_i L_i(t) / L_i(0).
        weights: task → weight.
    """

    def __init__(self, held_out: Batch, every: int, balancing: LossBalancingCallback | None) -> None:
        self.held_out, self.every, self.balancing = held_out, every, balancing
        self.measures: list[float] = []
        self.weights: list[dict[str, float]] = []

    @torch.no_grad()
    def _evaluate(self, module: Toy) -> None:
        losses = {task: loss.item() for task, loss in module.losses(self.held_out).items()}
        if not self.measures:
            self._start = losses
        self.measures.append(sum(losses[task] / self._start[task] for task in losses))
        self.weights.append((self.balancing.weights if self.balancing else None) or dict.fromkeys(losses, 1.0))

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._evaluate(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: object) -> None:
        if trainer.global_step % self.every == 0:
            self._evaluate(pl_module)


def inverse_squares(sigmas: Sequence[float]) -> dict[str, float]:
    """Task → weight ∝ 1/σ², T in all."""
    whole = sum(sigma**-2 for sigma in sigmas)
    return {f"σ={sigma}": len(sigmas) * sigma**-2 / whole for sigma in sigmas}


def balancing_of(method: str, sigmas: Sequence[float], average: dict[str, float]) -> LossBalancingCallback | None:
    """The method's callback; ``average`` is of the weights of the GradNorm run on the same seed."""
    if method == "GradNorm":
        return GradNormCallback(alpha=0.12, summary=False)
    if method == "GradNorm static":
        return LossBalancingCallback(FixedWeights(average), summary=False)
    if method == "fixed 1/σ²":
        return LossBalancingCallback(FixedWeights(inverse_squares(sigmas)), summary=False)
    return None


def train_once(
    method: str, tasks: int, seed: int, args: argparse.Namespace, progress: Progress, average: dict[str, float]
) -> dict[str, Any]:
    """One fit; its measures and weights as plain values."""
    sigmas, data = SIGMAS[tasks], ToyData(tasks, seed, args.steps)
    torch.manual_seed(seed)
    module = Toy(sigmas, args.lr)
    balancing = balancing_of(method, sigmas, average)
    evaluation = Evaluation(data.held_out, args.every, balancing)
    trainer = quiet_trainer([progress, *([balancing] if balancing else []), evaluation], max_epochs=1)
    progress.name(f"T = {tasks}, seed {seed}, {method}")
    began = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - began
    at_end = statistics.fmean(evaluation.measures[-LAST:])
    average = balancing.mean_weights if balancing else {}
    return {
        "at_end": at_end,
        "measures": evaluation.measures,
        "weights": evaluation.weights,
        "mean_weights": average,
        "seconds": seconds,
    }


def print_results(tasks: int, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Per method: the measure at the end, its difference to equal weights seed by seed, and the time of a fit."""
    values = {method: [run["at_end"] for run in runs[method]] for method in METHODS}
    rows = []
    for method, ours in values.items():
        differences = [v - e for v, e in zip(ours, values["equal"], strict=True)]
        ratios = [run["seconds"] / plain["seconds"] for run, plain in zip(runs[method], runs["equal"], strict=True)]
        spread = f"{min(differences):+.3f} to {max(differences):+.3f}" if method != "equal" else ""
        rows.append((method, mean_std(ours, 3), spread, f"{statistics.median(ratios):.2f}"))
    title = f"T = {tasks}: Σ L(t)/L(0) at the end (start: {tasks}); seeds: {len(runs['equal'])}"
    print_table(title, ["", "mean ± std", "minus equal", "time"], rows)
    finals = [run["weights"][-1] for run in runs["GradNorm"]]
    means = {task: statistics.fmean(by_task(finals, task)) for task in finals[0]}
    ranked = sorted(means, key=means.__getitem__, reverse=True)
    print("GradNorm's weights at the end:", ", ".join(f"{means[task]:.3g} ({task})" for task in ranked), end="\n\n")


def draw(results: dict[int, dict[str, list[dict[str, Any]]]], every: int, path: Path) -> None:
    """A row per T: the measure, and GradNorm's weights, over the steps."""
    with figure_style():
        figure, grid = plt.subplots(len(results), 2, figsize=(10, 3.6 * len(results)), squeeze=False)
        for (left, right), (tasks, runs) in zip(grid, results.items(), strict=True):
            steps = [every * i for i in range(len(runs["equal"][0]["measures"]))]
            for method in METHODS:
                measures = [run["measures"] for run in runs[method]]
                draw_runs(left, steps, measures, color=METHOD_COLOURS[method], label=method)
            left.set(title=f"T = {tasks}: Σ L(t)/L(0) ↓", xlabel="step")
            left.legend(loc="lower left")
            sigmas = sorted(SIGMAS[tasks])
            for rank, sigma in enumerate(sigmas):
                weights = [by_task(run["weights"], f"σ={sigma}") for run in runs["GradNorm"]]
                draw_runs(right, steps, weights, color=plt.cm.viridis(0.9 * rank / (tasks - 1)), label=f"σ = {sigma}")
            right.set(title="GradNorm's loss weights", xlabel="step", yscale="log")
            right.yaxis.set_major_formatter("{x:g}")
            right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "Held-out inputs", path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandLine(__doc__, "toy", seeds=5, steps=1500, quick=40, out="figure and values")
    parser.add_argument("--tasks", type=int, nargs="+", choices=SIGMAS, default=[2, 10], help="T; default: 2 10")
    # The paper names no rate. Public code takes 1e-4; at that, so few steps learn too little to tell the methods apart.
    parser.add_argument("--lr", type=float, default=2e-3, help="of the network's Adam; default %(default)s")
    args = parser.read(arguments)
    args.every = max(args.steps // 30, 1)
    progress = Progress(args.steps * args.seeds * len(args.tasks) * len(METHODS))
    results: dict[int, dict[str, list[dict[str, Any]]]] = {}
    with quiet_lightning():
        for tasks in args.tasks:
            results[tasks] = {method: [] for method in METHODS}
            for seed in range(args.seeds):
                average: dict[str, float] = {}
                for method in METHODS:
                    run = train_once(method, tasks, seed, args, progress, average)
                    results[tasks][method].append(run)
                    average = run["mean_weights"]
    for tasks, runs in results.items():
        print_results(tasks, runs)
    draw(results, args.every, args.out / "toy.png")
    settings = {"seeds": args.seeds, "steps": args.steps, "lr": args.lr, "every": args.every, "mean_of_last": LAST}
    values = {"settings": settings, "runs": {f"T={tasks}": runs for tasks, runs in results.items()}}
    (args.out / "toy.json").write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"Figure: {args.out / 'toy.png'}\nValues: {args.out / 'toy.json'}")


if __name__ == "__main__":
    main()
