"""What GradNorm adds to a training step inside the Trainer, beside the same fit without the callback.

The networks of the experiments, on random data of the same shapes: fits with and without the callback alternate in one
process, and each round gives a ratio of median step times.

    python benchmarks/fit_time.py
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _common import quiet_lightning, quiet_trainer

from benchmarks.experiments.fits import Shuffled
from benchmarks.experiments.no_harm import Batches, TwoDigits
from benchmarks.experiments.physics import METHODS, Helmholtz, batches
from benchmarks.experiments.turbofans import SENSORS, WINDOW, Turbofan
from lightning_gradnorm import GradNorm, LossBalancingCallback
from lightning_gradnorm.comparison import StepTimes


class Case(NamedTuple):
    """A network, its batches, and how GradNorm is set."""

    module: Callable[[], L.LightningModule]
    batches: Callable[[int], Iterable[Any]]
    settings: dict[str, Any]


def turbofan_batches(steps: int) -> Iterable[Any]:
    windows, lives = torch.randn(128 * steps, len(SENSORS), WINDOW), torch.randint(126, (128 * steps,)).float()
    return Shuffled((windows, lives), 128, 0)


TURBOFANS = Case(lambda: Turbofan(1000), turbofan_batches, {"update_every": 1})
DIGITS = Case(TwoDigits, lambda steps: Batches(0), {"update_every": 1})
HELMHOLTZ = Case(
    lambda: Helmholtz(METHODS["equal"]),
    lambda steps: batches(Helmholtz, 0, steps, fixed=False),
    {"residuals": ["pde"], "update_every": 1},
)
CASES = {
    "C-MAPSS": TURBOFANS,
    "C-MAPSS, every 10th step": TURBOFANS._replace(settings={"update_every": 10}),
    "C-MAPSS, neither measured nor logged": TURBOFANS._replace(settings={"update_every": 100_000}),
    "pairs of digits": DIGITS,
    "Helmholtz": HELMHOLTZ,
    "Helmholtz, every 10th step": HELMHOLTZ._replace(settings=HELMHOLTZ.settings | {"update_every": 10}),
}


def step_seconds(case: Case, steps: int, *callbacks: L.Callback) -> float:
    """Median time of a step."""
    torch.manual_seed(0)
    times = StepTimes()
    quiet_trainer([*callbacks, times], max_steps=steps, max_epochs=-1).fit(case.module(), case.batches(steps))
    return times.median()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="per fit; default %(default)s")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| fit | time | quartiles | plain ms | ms |\n| --- | ---: | ---: | ---: | ---: |")
    with quiet_lightning():
        for name in args.cases:
            case, rounds = CASES[name], []
            for k in range(args.rounds):
                pair = {}
                for balanced in (False, True) if k % 2 else (True, False):
                    callbacks = [LossBalancingCallback(GradNorm(**case.settings), summary=False)] if balanced else []
                    pair[balanced] = step_seconds(case, args.steps, *callbacks)
                rounds.append(pair)
            low, middle, high = statistics.quantiles([pair[True] / pair[False] for pair in rounds], n=4)
            plain, ours = (1000 * statistics.median(pair[balanced] for pair in rounds) for balanced in (False, True))
            print(f"| {name} | {middle:.3f} | {low:.3f}–{high:.3f} | {plain:.2f} | {ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
