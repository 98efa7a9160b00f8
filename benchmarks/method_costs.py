"""The time of a measured training step over the plain sum's, for every method of ``suite/every_method.yaml``.

    python benchmarks/method_costs.py --clock cpu --json benchmarks/results/every_method/costs.json    # five minutes

In an ordinary loop with a ``BalancingSession``, on two workloads of ``overhead.py``, the convolutions' with half as many images
of a quarter of the pixels, so that extra operations count for more than in most programs; a method and the plain sum take turns
in blocks of steps, in one process. Every step is measured, ``update_every=1``; the share of steps on which a method reads
gradients by itself stands beside it.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from benchmarks.methods import Method, PlainSum
from benchmarks.overhead import CLOCKS, Timer, machine, markdown
from benchmarks.suite.every_method import ANYWHERE, balancer
from benchmarks.workloads import Losses, Workload, conv, pinn
from lightning_gradnorm import BalancingSession, LossBalancer

WORKLOADS = {"conv": partial(conv, batch=8, size=32), "pinn": pinn}
STEPS = 2000  # of the training whose measured steps are counted


class Balanced(Method):
    """A method in a session's loop.

    Args:
        workload: what is trained.
        optimizer: the network's own.
        balancer: the method.
    """

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer, balancer: LossBalancer) -> None:
        super().__init__(workload, optimizer)
        self.session = BalancingSession(balancer, workload.network, shared_layer=workload.shared)

    def step(self) -> None:
        super().step()
        self.session.step()

    def backward(self, losses: Losses) -> None:
        total = self.session.total(losses)
        self.session.before_backward(total)
        total.backward()
        self.session.after_backward()


def share_measured(method: LossBalancer) -> float:
    """Of the first ``STEPS`` steps, those on which gradients are read."""
    read = 0
    for _ in range(STEPS):
        read += method.due and method.needs_gradients
        method.steps += 1
    return read / STEPS


def row_of(name: str, workload: str, timer: Timer) -> dict[str, Any]:
    """One method on one workload."""
    torch.manual_seed(0)
    made = WORKLOADS[workload]()
    optimizer = torch.optim.SGD(made.network.parameters(), lr=1e-6)
    tasks = tuple(made.losses)
    balanced = Balanced(made, optimizer, balancer(name, tasks, update_every=1))
    plain_seconds, seconds = timer.interleaved(PlainSum(made, optimizer), balanced)
    low, middle, high = quantiles([b / a for a, b in zip(plain_seconds, seconds, strict=True)], n=4)
    measured = share_measured(balancer(name, tasks))
    return {"workload": workload, "method": name, "low": low, "time": middle, "high": high, "measured": measured}


def main(argv: Sequence[str]) -> None:
    """Time all that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=ANYWHERE, default=ANYWHERE, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=12, help="pairs of timed blocks for each method")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu where the machine is shared")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    setting = machine(1, options.clock)
    command = shlex.join(["python", "benchmarks/method_costs.py", *argv])
    rows = []
    for workload in options.workloads:
        for name in options.methods:
            try:
                row = row_of(name, workload, Timer(CLOCKS[options.clock], options.repeats))
            except ImportError as missing:
                print(f"{name}: left out, {missing}", file=sys.stderr)
                continue
            rows.append(row)
            print(f"{workload}, {name}: {row['time']:.3f}", file=sys.stderr, flush=True)
    cells = [
        [row["workload"], row["method"], f"{row['time']:.3f}", f"{row['low']:.3f}–{row['high']:.3f}", f"{row['measured']:.1%}"]
        for row in rows
    ]
    print(f"{setting}. Command: `{command}`\n")
    print(markdown(["workload", "method", "time", "quartiles", "steps measured"], cells))
    if options.json:
        options.json.write_text(json.dumps({"setting": setting, "command": command, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
