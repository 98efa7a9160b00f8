"""What weights cost in a distributed run: two processes under DDP, gloo, on this machine.

    python benchmarks/ranks.py                       # a transformer and a ResNet-18
    python benchmarks/ranks.py --workloads mlp --pairs 5

Time of a step of UPGrad over the plain sum's, blocks of steps beside blocks of plain ones, both in the same two processes: a
step late, where the tasks' gradients are exchanged after the backward, and in the same step, where the trunk's backward waits
for them.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from statistics import quantiles

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchjd.aggregation import UPGradWeighting

from benchmarks.overhead import markdown
from benchmarks.workloads import WORKLOADS, Batch, Losses, Workload
from lightning_gradnorm import BalancingSession, GramianWeighting
from lightning_gradnorm.balancers.gramian import When

WAYS: tuple[When, ...] = ("next step", "same step")
BLOCK = 3  # steps


class Whole(nn.Module):
    """Network and losses, for DDP to see one forward."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.network, self.make_losses = workload.network, workload.make_losses

    def forward(self, batch: Batch) -> Losses:
        return self.make_losses(self.network, batch)


def stepper(name: str, when: When | None) -> Callable[[], None]:
    """One training step of a new network: balanced, or the plain sum's."""
    torch.manual_seed(0)
    workload = WORKLOADS[name]()
    parallel = DistributedDataParallel(Whole(workload))
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-6)
    names = {id(parameter): name for name, parameter in workload.network.named_parameters()}
    shared = [names[id(w)] for w in workload.shared]
    session = None
    if when is not None:
        balancer = GramianWeighting(UPGradWeighting(), when=when)
        session = BalancingSession(balancer, workload.network, shared_layer=shared)

    def step() -> None:
        losses = parallel(workload.batch)
        total: Tensor = sum(losses.values()) if session is None else session.total(losses)
        if session is not None:
            session.before_backward(total)
        total.backward()
        if session is not None:
            session.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        if session is not None:
            session.step()

    return step


def block_of(step: Callable[[], None]) -> float:
    torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(BLOCK):
        step()
    torch.distributed.barrier()
    return time.perf_counter() - start


def work(rank: int, port: int, options: argparse.Namespace) -> None:
    """One of the two processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rows = []
    for name in options.workloads:
        plain, ways = stepper(name, None), {when: stepper(name, when) for when in WAYS}
        for step in (plain, *ways.values()):
            block_of(step)
        ratios: dict[str, list[float]] = {when: [] for when in WAYS}
        for _ in range(options.pairs):
            for when, step in ways.items():
                before, balanced, after = block_of(plain), block_of(step), block_of(plain)
                ratios[when].append(2 * balanced / (before + after))
        for when in WAYS:
            low, middle, high = quantiles(ratios[when], n=4)
            rows.append([name, when, f"{middle:.2f}", f"{low:.2f}–{high:.2f}"])
    if rank == 0:
        print(markdown(["workload", "weights act in the", "time", "quartiles"], rows))
    torch.distributed.destroy_process_group()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["conv", "transformer"], metavar="NAME")
    parser.add_argument("--pairs", type=int, default=12)
    options = parser.parse_args(argv)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, options), nprocs=2)


if __name__ == "__main__":
    main(sys.argv[1:])
