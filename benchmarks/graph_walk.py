"""What reading the graph costs before each backward, for graphs of 100 to 20,000 nodes.

A trunk of so many layers and two heads, tensors of one number, so that nothing but the graph counts. W is the last layer, or
all parameters. Medians over repeats, of the walk and hooks alone, in the same process as the plain step.

    python benchmarks/graph_walk.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_gradnorm import JointBackward, tap_losses


def seconds(step: Callable[[], float], repeats: int) -> float:
    step()
    return statistics.median(step() for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="default %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| nodes | W | plain step ms | walk and hooks ms | of the step | µs per node |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for layers in (20, 200, 1000, 4000):
        trunk = nn.Sequential(*(module for _ in range(layers) for module in (nn.Linear(1, 1), nn.Tanh())))
        heads = nn.Linear(1, 1), nn.Linear(1, 1)
        x = torch.ones(1, 1)
        nodes = 5 * layers + 10  # product, its transpose, tanh, and a node for each of the two parameters

        def losses(trunk: nn.Module = trunk, heads: tuple[nn.Linear, nn.Linear] = heads, x: torch.Tensor = x) -> dict:
            z = trunk(x)
            return {name: head(z).square().mean() for name, head in zip("ab", heads, strict=True)}

        def plain(losses: Callable[[], dict] = losses) -> float:
            start = time.perf_counter()
            sum(losses().values()).backward()
            return time.perf_counter() - start

        for name, w in (("last layer", [trunk[-2].weight]), ("all", list(trunk.parameters()))):

            def walk(w: list = w, losses: Callable[[], dict] = losses) -> float:
                tapped = tap_losses(losses())
                total = sum(tapped.values())
                start = time.perf_counter()
                reader = JointBackward(total, tapped, w)
                took = time.perf_counter() - start
                reader.discard()
                return took

            step, extra = seconds(plain, args.repeats), seconds(walk, args.repeats)
            share, per_node = f"{extra / step:.1%}", f"{1e6 * extra / nodes:.2f}"
            print(f"| {nodes:,} | {name} | {1e3 * step:.2f} | {1e3 * extra:.2f} | {share} | {per_node} |")


if __name__ == "__main__":
    main()
