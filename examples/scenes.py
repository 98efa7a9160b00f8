"""The paper's experiment on scenes rendered here: one U-Net for the kind, the depth and the normal of every pixel.

A thousand rooms to train on and 250 to test with are cast by ``scenes_renderer.py``, in three seconds. Losses are the paper's,
in the units of the data: cross-entropy in nats, squared error of the depth in square metres, 1 − cosine of the normals.
Four methods start from the same network and see the same batches:

- ``equal``: the plain sum of the losses;
- ``uncertainty``: weights learnt as variances (Kendall et al. 2018);
- ``GradNorm``: the package's default;
- ``GradNorm static``: trained anew with the time averages of the weights of that GradNorm run, out of its file.

What it shows on three seeds is in ``docs/scenes.md``.

    python examples/scenes.py            # three seeds; some six minutes
    python examples/scenes.py --help
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import torch
from _common import Progress, mean_std, print_table, quiet_lightning, quiet_trainer
from lightning.pytorch.loggers import CSVLogger
from scenes_figure import Outcome, draw
from scenes_problem import MEASURES, Batches, SceneNet, load
from scenes_renderer import Views

from lightning_gradnorm import EqualWeights, FixedWeights, GradNorm, LossBalancer, LossBalancingCallback, UncertaintyWeighting

BALANCERS: dict[str, Callable[[], LossBalancer]] = {
    "equal": EqualWeights,
    "uncertainty": lambda: UncertaintyWeighting({"segmentation": "classification"}),
    "GradNorm": GradNorm,
}
METHODS = (*BALANCERS, "GradNorm static")  # the static one needs the run before it
ANSWERS = ("equal", "GradNorm")  # whose answers the figure shows
SHOWN = 4  # rooms in the figure: the first of those held out


class WeightsTaken(L.Callback):
    """Keeps the weights after every so-manieth step.

    Args:
        balancing: the callback whose weights are kept.
        every: steps from one time to the next.

    Attributes:
        weights: step → task → weight after it.
    """

    def __init__(self, balancing: LossBalancingCallback, every: int) -> None:
        self.balancing, self.every = balancing, every
        self.weights: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step % self.every == 0:
            self.weights[trainer.global_step] = self.balancing.weights


def balancer_of(method: str, earlier: Path) -> LossBalancer:
    """The method; ``earlier`` is the folder of the GradNorm run on the same seed."""
    if method == "GradNorm static":
        return FixedWeights.from_file(earlier / "loss_weights.yaml")
    return BALANCERS[method]()


def train_once(method: str, seed: int, args: argparse.Namespace, views: tuple[Views, Views], progress: Progress) -> Outcome:
    """One fit. All that depends on the seed is drawn the same for every method."""
    train, held_out = views
    torch.manual_seed(seed)
    module = SceneNet(train.depth.mean().item(), args.steps)
    balancer = balancer_of(method, args.out / "GradNorm" / f"seed_{seed}")
    balancing = LossBalancingCallback(balancer, summary=method == "GradNorm")  # prints a table, and writes the file
    taken = WeightsTaken(balancing, max(args.steps // 50, 1))
    progress.name(f"seed {seed}, {method}")
    logger = CSVLogger(args.out, name=method, version=f"seed_{seed}")
    trainer = quiet_trainer([progress, balancing, taken], max_steps=args.steps, max_epochs=-1, logger=logger)
    trainer.fit(module, Batches(train, seed))
    answers = module.answers(held_out)
    shown = {task: answer[:SHOWN] for task, answer in answers.items()} if seed == 0 and method in ANSWERS else {}
    return Outcome(module.measures(held_out, answers), taken.weights, shown)


def print_results(outcomes: dict[str, list[Outcome]]) -> None:
    """Per method, mean and spread of the three errors over the seeds."""
    names = MEASURES.values()
    rows = [(method, *(mean_std([fit.measures[n] for fit in fits], d) for n, d in names)) for method, fits in outcomes.items()]
    title = f"Held-out rooms; seeds: {len(outcomes['equal'])}, mean ± standard deviation"
    print_table(title, ("", *(f"{name} ↓" for name, _ in names)), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many; default %(default)s")
    parser.add_argument("--steps", type=int, default=800, help="per fit; default %(default)s")
    parser.add_argument("--rooms", type=int, default=1000, help="to train on; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"), help="folder for logs and figure; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="one seed, four steps: to see that it runs")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # layers as small as these are slower on several
    if args.quick:
        args.seeds, args.steps, args.rooms = 1, 4, 64
    views = load(args.rooms, max(args.rooms // 4, SHOWN))
    progress = Progress(args.steps * args.seeds * len(METHODS))
    outcomes: dict[str, list[Outcome]] = {method: [] for method in METHODS}
    with quiet_lightning():
        for seed in range(args.seeds):
            for method in METHODS:
                outcomes[method].append(train_once(method, seed, args, views, progress))
    print_results(outcomes)
    draw(outcomes, views[1][:SHOWN], args.out / "scenes.png")
    print(f"Figure: {args.out / 'scenes.png'}\nRuns:   {args.out}")


if __name__ == "__main__":
    main()
