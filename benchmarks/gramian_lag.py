"""What it costs a weighting of the Gram matrix to act one step late, from the last shared layer, beside TorchJD's own step.

    python benchmarks/gramian_lag.py                                  # two problems of the suite, two weightings, three seeds
    python benchmarks/gramian_lag.py --problems digits --weightings UPGrad --seeds 1 --steps 100

Four trainings of each: the plain sum; ``GramianWeighting``, whose weights are of the steps before; the same weighting in the
step itself, of the gradients on W (``when="same step"``); and of those on all that the tasks share, as TorchJD has it. In the
step the heads keep their own gradients.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, stdev

import torch
from torch import Tensor
from torchjd.aggregation import IMTLGWeighting, MGDAWeighting, PCGradWeighting, UPGradWeighting

from benchmarks.overhead import markdown
from benchmarks.suite.members import fresh
from benchmarks.suite.problem import Problem
from benchmarks.suite.registry import PROBLEMS
from lightning_gradnorm import EqualWeights, GramianWeighting, LossBalancer, Measurement
from lightning_gradnorm.balancers.gramian import kept_readable

Weighting = Callable[[Tensor], Tensor]
WEIGHTINGS: dict[str, Callable[[], Weighting]] = {
    "UPGrad": UPGradWeighting,
    "MGDA": MGDAWeighting,
    "PCGrad": PCGradWeighting,
    "IMTL-G": IMTLGWeighting,
}

RISING = 1e-3  # minus the cosine of a direction and a task's gradient from which on the task counts as made to rise


@dataclass
class Training:
    """What came of one.

    Attributes:
        error: the problem's, on what was held out.
        conflicts: share of the tasks, over all steps, whose loss the direction on the shared parameters makes rise.
        lag: mean over the steps of ‖w − w*‖ / ‖w*‖, w applied and w* of the same step's gradients on W.
        cosine: mean cosine of the two directions on W.
    """

    error: float
    conflicts: float
    lag: float
    cosine: float


def flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def train(problem: Problem, balancer: LossBalancer | None, weighting: Weighting, steps: int, *, of_w: bool) -> Training:
    """One training; without a balancer, by the weighting in the step itself, of the gradients on W or on all."""
    parameters = dict(problem.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=problem.lr, betas=problem.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: problem.lr_factor(step / steps))
    stream, risen, lags, cosines = problem.stream(), 0, [], []
    for _ in range(steps):
        losses = {task: loss.mean() for task, loss in problem.losses(*next(stream)).items()}
        rows = [
            torch.autograd.grad(loss, [*parameters.values()], retain_graph=True, allow_unused=True) for loss in losses.values()
        ]
        by_name = [dict(zip(parameters, row, strict=True)) for row in rows]
        shared = [name for name in parameters if all(row[name] is not None for row in by_name)]
        jacobian = torch.stack([flat([row[n] for n in shared], [parameters[n] for n in shared]) for row in by_name]).double()
        on_w = torch.stack([flat([row[n] for n in problem.shared], [parameters[n] for n in problem.shared]) for row in by_name])
        gramian = on_w.double() @ on_w.double().T
        if balancer is None:
            applied = weighting(gramian if of_w else jacobian @ jacobian.T)
        else:
            applied = balancer.weights_for(losses)
            # The plain sum has no other weights than its own.
            wanted = applied if isinstance(balancer, EqualWeights) else kept_readable(weighting(gramian), allow_negative=False)
            lags.append(float((applied - wanted).norm() / wanted.norm()))
            sizes = (applied @ gramian @ applied).sqrt() * (wanted @ gramian @ wanted).sqrt()
            cosines.append(float(applied @ gramian @ wanted / sizes))
            measured = torch.stack([loss.detach() for loss in losses.values()]).double()
            balancer.update(Measurement(tuple(losses), measured, gramian.diagonal().sqrt(), gramian=gramian))
        direction = applied @ jacobian
        risen += int((jacobian @ direction < -RISING * jacobian.norm(dim=1) * direction.norm()).sum())
        own = torch.ones_like(applied) if balancer is None else applied  # TorchJD leaves the heads their own gradients
        for name, parameter in parameters.items():
            weights = applied if name in shared else own
            parts = [w.float() * row[name] for w, row in zip(weights, by_name, strict=True) if row[name] is not None]
            parameter.grad = torch.stack(parts).sum(0)
        optimizer.step()
        schedule.step()
    still = mean(lags) if lags else 0.0
    return Training(problem.eval().error(), risen / steps / len(problem.tasks), still, mean(cosines) if cosines else 1.0)


def balancer_of(weighting: Callable[[], Weighting], decay: float) -> LossBalancer:
    return GramianWeighting(weighting(), ema_decay=decay)


def cell(values: Sequence[float]) -> str:
    return f"{mean(values):.3g} ± {stdev(values):.2g}" if len(values) > 1 else f"{values[0]:.3g}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["digits", "eight regressions"], metavar="NAME")
    parser.add_argument("--weightings", nargs="+", choices=WEIGHTINGS, default=["UPGrad", "MGDA"], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each training; by default the problem's")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for name in options.problems:
        make = PROBLEMS[name]
        steps = options.steps or make.steps
        ways: list[tuple[str, Callable[[], LossBalancer | None], Callable[[], Weighting], bool]] = [
            ("plain sum", EqualWeights, UPGradWeighting, True)
        ]
        for word in options.weightings:
            weighting = WEIGHTINGS[word]
            for decay in (0.9, 0.0):
                ways.append((f"{word}, β = {decay:g}", partial(balancer_of, weighting, decay), weighting, True))
            ways.append((f"{word} in the step, of W", lambda: None, weighting, True))
            ways.append((f"{word} in the step, of all", lambda: None, weighting, False))
        for way, balancer, weighting, of_w in ways:
            found = [train(fresh(make, seed), balancer(), weighting(), steps, of_w=of_w) for seed in range(options.seeds)]
            columns = [[getattr(one, column) for one in found] for column in ("error", "conflicts", "lag", "cosine")]
            rows.append([name, way, *map(cell, columns)])
            print(*rows[-1], file=sys.stderr, flush=True)
    print(markdown(["problem", "weights", "error", "tasks made to rise", "‖w − w*‖ / ‖w*‖", "cosine"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
