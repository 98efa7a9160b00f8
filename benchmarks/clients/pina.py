"""PINA's own problems with its own weightings and with ours: relative L2 errors, and the time of a step on the first.

    python -m benchmarks.clients.pina            # fits, results/clients/pina.json and its table
    python -m benchmarks.clients.pina --quick    # shows that it runs, writes nothing

``measure.main`` does not serve: PINA's Trainer is made for a solver, and its weightings are no callbacks.
"""

import argparse
import datetime
import json
import logging
import platform
import time
import warnings
from importlib.metadata import version
from statistics import median, quantiles

import lightning as L
import torch
from pina.model import FeedForward
from pina.optim import TorchOptimizer
from pina.problem.zoo import DiffusionReactionProblem, Poisson2DSquareProblem
from pina.solver import PhysicsInformedSingleModelSolver
from pina.trainer import Trainer
from pina.weighting import NeuralTangentKernelWeighting, ScalarWeighting, SelfAdaptiveWeighting

from benchmarks.clients.measure import PLAIN, RESULTS, table
from lightning_gradnorm import GradNormCallback

PROBLEMS = {"Poisson": Poisson2DSquareProblem, "diffusion and reaction": DiffusionReactionProblem}
POINTS = {"D": 256, "boundary": 128, "t0": 64}
STEPS, LR = 1000, 5e-3
METHODS = {
    PLAIN: lambda names: (None, []),
    "NeuralTangentKernelWeighting": lambda names: (NeuralTangentKernelWeighting(), []),
    "SelfAdaptiveWeighting": lambda names: (SelfAdaptiveWeighting(), []),
    "GradNorm": lambda names: _weighed(GradNormCallback(summary=False), names),
    "GradNorm, residuals": lambda names: _weighed(GradNormCallback(residuals=["D"], summary=False), names),
}
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def _weighed(callback, names):
    return ScalarWeighting({name: callback.weight(name) for name in names}), [callback]


class Clock(L.Callback):
    """CPU seconds of each epoch, which is one step on all points."""

    def __init__(self):
        self.seconds, self._start = [], 0.0

    def on_train_epoch_start(self, *_):
        self._start = time.process_time()

    def on_train_epoch_end(self, *_):
        self.seconds.append(time.process_time() - self._start)


def train(problem_name, method, seed, steps, watch=()):
    """A run; the relative L2 error of its solution, and its last weights."""
    L.seed_everything(seed, verbose=False)
    problem = PROBLEMS[problem_name]()
    for domain in problem.domains:
        problem.discretise_domain(n=POINTS[domain], mode="random", domains=[domain])
    network = FeedForward(len(problem.input_variables), 1, layers=[40, 40], func=torch.nn.Tanh)
    weighting, callbacks = METHODS[method](list(problem.conditions))
    optimizer = TorchOptimizer(torch.optim.Adam, lr=LR)
    solver = PhysicsInformedSingleModelSolver(problem, network, optimizer=optimizer, weighting=weighting)
    trainer = Trainer(solver, max_epochs=steps, callbacks=[*watch, *callbacks], enable_model_summary=False, **QUIET)
    trainer.train()
    points = problem.domains["D"].sample(10_000, "random")
    with torch.no_grad():
        truth = problem.solution(points)
        error = float((solver(points) - truth).norm() / truth.norm())
    weights = callbacks[0].weights if callbacks else {k: float(w) for k, w in solver.weighting.last_saved_weights().items()}
    return error, weights


def fits(problems, seeds, steps):
    """Every method on every seed and problem."""
    made = []
    for seed in seeds:
        for method in METHODS:
            found = {problem: train(problem, method, seed, steps) for problem in problems}
            errors = {problem: error for problem, (error, _) in found.items()}
            made.append(
                {"method": method, "seed": seed, "errors": errors, "weights": {problem: w for problem, (_, w) in found.items()}}
            )
            print(method, seed, errors, flush=True)
    return made


def step_ratios(rounds, steps):
    """Method → quartiles of its step's time over the plain one's: fits in turn, each round in another order."""
    ratios = {method: [] for method in METHODS if method != PLAIN}
    for k in range(rounds):
        seconds = {}
        for method in list(METHODS)[:: 1 if k % 2 else -1]:
            clock = Clock()
            train(next(iter(PROBLEMS)), method, 0, steps, [clock])
            seconds[method] = median(clock.seconds[5:])
        for method, values in ratios.items():
            values.append(seconds[method] / seconds[PLAIN])
    return {method: quantiles(values, n=4, method="inclusive") for method, values in ratios.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=["Poisson"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7, help="of timed fits")
    parser.add_argument("--quick", action="store_true", help="shows that it runs, writes nothing")
    parser.add_argument("--table", action="store_true", help="the table of the results that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    path = RESULTS / "pina.json"
    if not args.table:
        seeds, rounds, steps = (2, 2, 20) if args.quick else (args.seeds, args.rounds, STEPS)
        record = {
            "client": "pina",
            "steps": steps,
            "versions": {name: version(name) for name in ("torch", "pina-mathlab", "lightning")}
            | {"python": platform.python_version()},
            "date": datetime.date.today().isoformat(),
            "fits": fits(args.problems, range(seeds), steps),
            "step": step_ratios(rounds, min(steps, 40)),
        }
        if args.quick:
            print(table(record))
            return
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
