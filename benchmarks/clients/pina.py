"""PINA's own problems with its own weightings and with ours: the error of the solution, and the time of a step.

    python -m benchmarks.clients.pina                    # the errors, about ten minutes on one core
    python -m benchmarks.clients.pina --time             # the time of a step over the plain sum's

Writes ``results/pina.json`` or ``results/pina_time.json`` beside itself.
"""

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from statistics import median, quantiles

import lightning as L
import torch
from pina.model import FeedForward
from pina.optim import TorchOptimizer
from pina.problem.zoo import HelmholtzProblem, Poisson2DSquareProblem
from pina.solver import PhysicsInformedSingleModelSolver
from pina.trainer import Trainer
from pina.weighting import NeuralTangentKernelWeighting, ScalarWeighting, SelfAdaptiveWeighting

from lightning_gradnorm import GradNormCallback

RESULTS = Path(__file__).parent / "results"
PROBLEMS = {"poisson": Poisson2DSquareProblem, "helmholtz": HelmholtzProblem}
POINTS = {"D": 256, "boundary": 128}
STEPS, LR = 1000, 5e-3
SLOW = {"reference": "D", "alpha": 0.0, "update": "closed_form", "ema_decay": 0.98, "update_every": 2}
METHODS = {
    "plain sum": lambda names: (None, []),
    "NTK": lambda names: (NeuralTangentKernelWeighting(), []),
    "self-adaptive": lambda names: (SelfAdaptiveWeighting(), []),
    "GradNorm": lambda names: _weighed(GradNormCallback(summary=False), names),
    "GradNorm, five settings": lambda names: _weighed(GradNormCallback(**SLOW, summary=False), names),
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


def errors(seeds):
    """One record per run, written after each."""
    records = []
    for seed in seeds:
        for problem in PROBLEMS:
            for method in METHODS:
                error, weights = train(problem, method, seed, STEPS)
                record = {
                    "problem": problem,
                    "method": method,
                    "seed": seed,
                    "steps": STEPS,
                    "error": error,
                    "weights": weights,
                }
                print(record, flush=True)
                records.append(record)
                write("pina.json", records)


def seconds_of_a_step(problem, method, steps):
    """The median of a short run, its first steps left out."""
    clock = Clock()
    train(problem, method, 0, steps, [clock])
    return median(clock.seconds[10:])


def times(rounds=9, steps=40):
    """Methods take turns in one process; each block of steps over the plain block of the same round."""
    records = []
    for problem in PROBLEMS:
        blocks = [{method: seconds_of_a_step(problem, method, steps) for method in METHODS} for _ in range(rounds + 1)]
        for method in METHODS:
            ratios = [block[method] / block["plain sum"] for block in blocks[1:]]
            low, middle, high = quantiles(ratios, n=4)
            records.append({"problem": problem, "method": method, "median": middle, "quartiles": [low, high]})
            print(records[-1], flush=True)
    write("pina_time.json", records)


def write(name, records):
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times() if arguments.time else errors(arguments.seeds)


if __name__ == "__main__":
    main()
