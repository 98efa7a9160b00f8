"""How far it goes: a thousand tasks, 1e8 weights in W, graphs of 100,000 nodes, 50,000 steps.

Each part replaces its rows in ``results/scale/scale.json``, from which ``docs/scale.md`` is made
(``python -m benchmarks.experiments.pages``). Times are the process's own, on one thread, so that a machine which others use too
changes them little; memory is the profiler's, as in ``overhead.py``.

    python -m benchmarks.scale                      # all, about ten minutes
    python -m benchmarks.scale --parts graph steps
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.many_tasks import Heads, Row, seconds, tasks
from benchmarks.methods import FeatureNorms, JointEngine, Method, PlainSum, ProductPerTask
from benchmarks.overhead import peak_bytes
from benchmarks.workloads import Workload
from lightning_gradnorm import BalancingSession, GradNorm, JointBackward, tap_losses
from lightning_gradnorm.task_gradients import TaskGradients
from lightning_gradnorm.window import MeasurementWindow

RESULTS = Path(__file__).parent / "results" / "scale" / "scale.json"
# -- W -------------------------------------------------------------------------------------------------------------------


def wide(width: int, tasks: int = 3, batch: int = 8) -> Workload:
    """A trunk whose last weight, W, has ``width`` squared entries."""
    trunk, heads = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width, bias=False)), nn.Linear(width, tasks)

    def losses(network: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {f"task {k}": error for k, error in enumerate(network(batch["x"]).square().mean(0).unbind())}

    return Workload(nn.Sequential(trunk, nn.Tanh(), heads), losses, [trunk[2].weight], {"x": torch.randn(batch, 8)})


def reduced_bytes(entries: int, tasks: int = 3) -> int:
    """Peak of what a rank packs for the collective, above the tasks' gradients themselves."""
    window = MeasurementWindow()
    names = tuple(f"task {k}" for k in range(tasks))
    window.add_losses({name: torch.ones(()) for name in names}, torch.ones(tasks))
    window.add_gradients(TaskGradients(names, [[torch.ones(entries)] for _ in names], torch.ones(tasks), [torch.ones(entries)]))
    return peak_bytes(lambda: window.reduce(lambda vector: vector, names, entries, torch.device("cpu")))


def weights() -> list[Row]:
    """Up to 1e8 entries; memory in units of one gradient of W."""
    rows = []
    for width in (1000, 3162, 10_000):
        row: Row = {"entries": width * width}
        for name, method in {"gram": JointEngine, "products": ProductPerTask, "features": FeatureNorms}.items():
            torch.manual_seed(0)
            workload = wide(width)
            optimizer = torch.optim.SGD(workload.network.parameters(), lr=1e-6)
            plain, made = (kind(workload, optimizer) for kind in (PlainSum, method))
            row[name] = (peak(made) - peak(plain)) / (4 * width * width)
        rows.append(row)
        print(row, flush=True)
    return rows


def peak(method: Method) -> int:
    """Peak bytes of a step that is not the first."""
    method.step()
    method.optimizer.zero_grad()
    gc.collect()
    return peak_bytes(method.step)


# -- graph ---------------------------------------------------------------------------------------------------------------


def graph() -> list[Row]:
    """Up to 100,000 nodes: a trunk of so many layers of one number, so that nothing but the graph counts."""
    rows = []
    for layers in (200, 2000, 20_000):
        trunk = nn.Sequential(*(module for _ in range(layers) for module in (nn.Linear(1, 1), nn.Tanh())))
        heads, x = (nn.Linear(1, 1), nn.Linear(1, 1)), torch.ones(1, 1)

        def losses(trunk: nn.Module = trunk, heads: tuple[nn.Module, ...] = heads, x: Tensor = x) -> dict[str, Tensor]:
            z = trunk(x)
            return {name: head(z).square().mean() for name, head in zip("ab", heads, strict=True)}

        def walk(w: list[Tensor], losses: Callable[[], dict[str, Tensor]] = losses) -> float:
            tapped = tap_losses(losses())
            total = sum(tapped.values())
            start = time.process_time()
            reader = JointBackward(total, tapped, w)
            took = time.process_time() - start
            nodes = reader.graph.seen  # the last to go: PyTorch 2.13 frees a graph of so many, once looked at, by recursion
            reader.discard()
            del tapped, total, reader
            nodes.clear()
            return took

        ways = {"last": [trunk[-2].weight], "all": list(trunk.parameters())}
        walks = {f"{name}_seconds": statistics.median(walk(w) for _ in range(5)) for name, w in ways.items()}
        plain = seconds(lambda losses=losses: sum(losses().values()).backward(), 5)
        rows.append({"nodes": 5 * layers + 10, "plain_seconds": plain, **walks})
        print(rows[-1], flush=True)
    return rows


# -- steps ---------------------------------------------------------------------------------------------------------------


def steps() -> list[Row]:
    """50,000, five thousand at a time: time, memory and Python's objects."""
    torch.manual_seed(0)
    network, x = Heads(3), torch.randn(16, 16)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    session, rows = BalancingSession(GradNorm(update_every=4), network), []
    for number in range(10):
        times = []
        for _ in range(5000):
            start = time.process_time()
            with session.batch():
                total = session.total(network.losses(x))
                session.before_backward(total)
                total.backward()
                session.after_backward()
            optimizer.step()
            optimizer.zero_grad()
            session.step()
            times.append(time.process_time() - start)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
        resident = pages * resource.getpagesize()
        objects = len(gc.get_objects())
        rows.append({"steps": 5000 * (number + 1), "seconds": statistics.median(times), "bytes": resident, "objects": objects})
        print(rows[-1], flush=True)
    return rows


PARTS = {"tasks": tasks, "weights": weights, "graph": graph, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in args.parts:
        found[part] = PARTS[part]()
        if part == "weights":
            found["packed"] = reduced_bytes(10**7) / (4 * 10**7)
        found["machine"] = f"{os.cpu_count()} cores {platform.machine()}, torch {torch.__version__}, 1 thread"
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
