"""Energies, forces and stresses of a small interatomic potential: errors by how its losses are weighed, and how often.

    python benchmarks/potential.py                          # three seeds, 1,000 steps: ten minutes on one core
    python benchmarks/potential.py --seeds 1 --steps 50     # to see that it runs

The truth is a sum of Morse potentials between four species; 640 clusters of eight atoms to learn from, 160 others to judge by.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks.overhead import markdown
from benchmarks.workloads import Batch, energy_and_slopes, potential, potential_losses
from lightning_gradnorm import EqualWeights, FixedWeights, GradNorm, JointBackward, LossBalancer, tap_losses

TASKS = ("energy", "forces", "stress")
VOLUME = 100.0  # of a cluster: what a stress is divided by, which makes its numbers small
METHODS: dict[str, Callable[[Mapping[str, float]], LossBalancer]] = {
    "plain sum": lambda _: EqualWeights(),
    "1 / variance of the labels": FixedWeights,
    "GradNorm": lambda _: GradNorm(),
    "GradNorm, every step": lambda _: GradNorm(update_every=1),
    "GradNorm, every 10th": lambda _: GradNorm(update_every=10),
    "GradNorm, every 100th": lambda _: GradNorm(update_every=100),
}


class Morse(torch.nn.Module):
    """The truth: each pair's well has a depth and a place of its own."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        depth, place = (0.5 + torch.rand(2, 4, 4, generator=draws)).unbind()
        self.depth, self.place = (depth + depth.T) / 4, 1.5 + (place + place.T) / 4

    def forward(self, vectors: Tensor, batch: Batch) -> Tensor:
        first, second = batch["pairs"]
        kinds = batch["species"][first], batch["species"][second]
        near = (-1.5 * (vectors.norm(dim=1) - self.place[kinds])).exp()
        pairs = self.depth[kinds] * (near.square() - 2 * near) / 2
        return torch.zeros(len(batch["energy"])).index_add(0, batch["cluster"][first], pairs)


def labelled(count: int) -> list[Batch]:
    """That many batches of 16 clusters, with the truth's energies, forces and stresses."""
    batches = []
    for _ in range(count):
        batch = dict(potential(stress=True, atoms=8, width=32).batch)
        truth = energy_and_slopes(Morse(), batch)
        batches.append(batch | {task: value.detach() for task, value in truth.items()})
    return batches


def losses_of(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    losses = potential_losses(network, batch)
    return losses | {"stress": losses["stress"] / VOLUME**2}


def fit(make: Callable[[Mapping[str, float]], LossBalancer], seed: int, steps: int) -> dict[str, float]:
    """Root mean square errors on the clusters held out, each over the deviation of its labels; the last weights."""
    torch.manual_seed(seed)
    network = potential(stress=True, width=32, blocks=2).network
    learnt, held = labelled(40), labelled(10)
    deviation = {task: torch.cat([batch[task] for batch in learnt]).std() for task in TASKS}
    middle = torch.cat([batch["energy"] for batch in learnt]).mean()
    learnt, held = ([{**batch, "energy": batch["energy"] - middle} for batch in some] for some in (learnt, held))
    units = {"energy": 1.0, "forces": 1.0, "stress": VOLUME}
    balancer = make({task: (units[task] / float(deviation[task])) ** 2 for task in TASKS})
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        losses = tap_losses(losses_of(network, learnt[step % len(learnt)]))
        total = balancer.total(losses)
        reads = balancer.due and balancer.needs_gradients
        reader = JointBackward(total, losses, [network.readout[0].weight]) if reads else None
        total.backward()
        balancer.update(None if reader is None else reader.measurement())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    squares = [potential_losses(network, batch) for batch in held]
    return {task: mean(float(each[task].detach()) for each in squares) ** 0.5 / float(deviation[task]) for task in TASKS}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for method in options.methods:
        found = [fit(METHODS[method], seed, options.steps) for seed in range(options.seeds)]
        columns = [[errors[task] for errors in found] for task in TASKS]
        rows.append([method, *(f"{mean(values):.3f} [{min(values):.3f}–{max(values):.3f}]" for values in columns)])
        print(*rows[-1], file=sys.stderr, flush=True)
    print(markdown(["weights", *TASKS], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
