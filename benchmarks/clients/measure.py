"""What a client's recipe quotes: held-out errors with balancing and without, on several seeds, and what a step costs.

A client's file says how a module and its batches are made and how its errors are read; ``main`` here does the rest::

    python -m benchmarks.clients.torchvision            # fits, results/clients/torchvision.json and its table
    python -m benchmarks.clients.torchvision --quick    # shows that it runs, writes nothing
"""

import argparse
import datetime
import json
import logging
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_gradnorm import GradNormCallback, LossBalancingCallback

RESULTS = Path(__file__).parents[1] / "results" / "clients"
PLAIN = "plain"
MakeCallback = Callable[[], LossBalancingCallback | None]


@dataclass(frozen=True)
class Client:
    """A program that balances the losses of somebody else's library.

    Attributes:
        name: of its results.
        packages: whose versions are written down.
        make: the callback, or ``None`` for the plain run → module and training batches, made anew from torch's seed.
        errors: a trained module → name → error on held-out data, better where it is lower; the tasks' weights play no part.
        steps: of a fit.
        methods: name → what makes the callback; the first is what steps' times are compared with.
        trainer: the class, of either of Lightning's packages.
        settings: of the Trainer.
        longer: steps of further fits, which show whether an early lead lasts; 0 for none.
    """

    name: str
    packages: tuple[str, ...]
    make: Callable[[LossBalancingCallback | None], tuple[Any, Iterable[Any]]]
    errors: Callable[[Any], Mapping[str, float]]
    steps: int
    methods: Mapping[str, MakeCallback] = field(
        default_factory=lambda: {PLAIN: lambda: None, "GradNorm": lambda: GradNormCallback(summary=False)}
    )
    trainer: Any = L.Trainer
    settings: Mapping[str, Any] = field(default_factory=dict)
    longer: int = 0


class CpuTimes(L.Callback):
    """CPU time from the end of one batch to the end of the next: others may use the machine too."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_epoch_start(self, *_: Any) -> None:
        self._last = None

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.process_time()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def train(client: Client, method: str, seed: int, steps: int) -> tuple[Any, LossBalancingCallback | None, float]:
    """One fit: the module, the callback, the median CPU time of a step."""
    torch.manual_seed(seed)
    callback, times = client.methods[method](), CpuTimes()
    module, batches = client.make(callback)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = client.trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        num_sanity_val_steps=0,
        log_every_n_steps=0,
        callbacks=[c for c in (callback, times) if c],
        **(off | dict(client.settings)),
    )
    trainer.fit(module, batches)
    return module, callback, statistics.median(times.seconds)


def fits(client: Client, seeds: Iterable[int], steps: int) -> list[dict[str, Any]]:
    """Every method on every seed."""
    made = []
    for seed in seeds:
        for method in client.methods:
            module, callback, _ = train(client, method, seed, steps)
            errors = dict(client.errors(module))
            weights = callback.weights if callback else {}
            made.append({"method": method, "seed": seed, "steps": steps, "errors": errors, "weights": weights})
            print(method, seed, {name: f"{error:.4g}" for name, error in errors.items()}, flush=True)
    return made


def step_ratios(client: Client, rounds: int, steps: int) -> dict[str, list[float]]:
    """Method → quartiles of its step's time over the plain one's: fits in turn, each round in another order."""
    methods, ratios = list(client.methods), {}
    for k in range(rounds):
        order = methods if k % 2 else methods[::-1]
        seconds = {method: train(client, method, 0, steps)[2] for method in order}
        for method in methods[1:]:
            ratios.setdefault(method, []).append(seconds[method] / seconds[methods[0]])
    return {method: statistics.quantiles(values, n=4, method="inclusive") for method, values in ratios.items()}


def mean_and_spread(values: list[float]) -> str:
    """Mean ± standard deviation, to three figures of the mean."""
    mean = statistics.fmean(values)
    decimals = max(0, 2 - math.floor(math.log10(abs(mean) or 1)))
    return f"{mean:.{decimals}f} ± {statistics.stdev(values):.{decimals}f}"


def table(record: Mapping[str, Any]) -> str:
    """What was measured, in Markdown: mean ± standard deviation over the seeds, then what a step costs."""
    names = list(record["fits"][0]["errors"])
    lines = [f"| | {' | '.join(names)} | time of a step |", "| --- |" + " ---: |" * (len(names) + 1)]
    kinds = dict.fromkeys((fit["method"], fit.get("steps", record["steps"])) for fit in record["fits"])
    several, first = len({steps for _, steps in kinds}) > 1, next(iter(kinds))[0]
    for method, steps in kinds:
        rows = [fit for fit in record["fits"] if (fit["method"], fit.get("steps", steps)) == (method, steps)]
        cells = [mean_and_spread([fit["errors"][name] for fit in rows]) for name in names]
        quartiles = record["step"].get(method)
        cost = "{1:.2f} ({0:.2f}–{2:.2f})".format(*quartiles) if quartiles else "1" if method == first else "–"
        lines.append(f"| {method}{f', {steps} steps' if several else ''} | {' | '.join(cells)} | {cost} |")
    return "\n".join(lines)


def main(client: Client) -> None:
    """The command line of a client's file."""
    parser = argparse.ArgumentParser(description=f"What balancing does for {client.name}.")
    parser.add_argument("--seeds", type=int, default=3, help="how many, two at least; default %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="of timed fits; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="shows that it runs, writes nothing")
    parser.add_argument("--table", action="store_true", help="the table of the results that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    path = RESULTS / f"{client.name}.json"
    if not args.table:
        seeds, rounds, steps, longer = (2, 2, 8, 0) if args.quick else (args.seeds, args.rounds, client.steps, client.longer)
        record = {
            "client": client.name,
            "steps": steps,
            "versions": {name: version(name) for name in ("torch", *client.packages)} | {"python": platform.python_version()},
            "date": datetime.date.today().isoformat(),
            "fits": [fit for length in (steps, longer) if length for fit in fits(client, range(seeds), length)],
            "step": step_ratios(client, rounds, min(steps, 20)),
        }
        if args.quick:
            print(table(record))
            return
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(path.read_text(encoding="utf-8"))))
