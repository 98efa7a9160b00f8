"""What a balanced training step costs beside the plain sum: time, FLOPs, peak memory.

    python benchmarks/overhead.py                                       # the table, about ten minutes on one core
    python benchmarks/overhead.py --workloads mlp pinn --profile        # where the time goes
    python benchmarks/overhead.py --quick

See benchmarks/README.md for what is measured and how.
"""

import argparse
import gc
import json
import math
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.breakdown import PARTS, breakdown
from benchmarks.methods import BALANCED, GradNormMethod, Method, PlainSum
from benchmarks.workloads import WORKLOADS

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_SAMPLE_SECONDS = 0.05  # steps are timed in blocks of about this length
_WARM_UP_SECONDS = 1.0


@dataclass
class Row:
    """One method on one workload, beside the plain sum.

    Attributes:
        ratios: one per pair of neighbours: a block of steps over the block of plain steps next to it.
        plain_ms, method_ms: median time of a step, in milliseconds.
        flops: of a step, over those of the plain step.
        plain_bytes, method_bytes: greatest sum of allocations above what was there before the step.
        w_bytes: T gradients of W.
    """

    workload: str
    method: str
    plain_ms: float
    method_ms: float
    ratios: list[float] = field(repr=False)
    flops: float
    plain_bytes: int
    method_bytes: int
    w_bytes: int

    @property
    def extra_in_w(self) -> float:
        """Peak memory above the plain step's, in units of T gradients of W."""
        return (self.method_bytes - self.plain_bytes) / self.w_bytes

    @property
    def beyond_w(self) -> float:
        """Peak memory over the plain step's, after T gradients of W are taken off."""
        return max(self.method_bytes - self.w_bytes, self.plain_bytes) / self.plain_bytes


class Timer:
    """Times two methods side by side.

    Args:
        clock: returns seconds.
        pairs: how many pairs of neighbouring blocks of steps are timed.
        multiple: the number of steps in a block is a multiple of this, after the first step and whole multiples of it: with
            ``update_every``, as many of the steps are measured in every block.
    """

    def __init__(self, clock: Callable[[], float], pairs: int, multiple: int = 1) -> None:
        self.clock, self.pairs, self.multiple = clock, pairs, multiple

    def seconds(self, step: Callable[[], None], steps: int) -> float:
        """Time of one step, from a block of them."""
        start = self.clock()
        for _ in range(steps):
            step()
        return (self.clock() - start) / steps

    def interleaved(self, plain: Method, method: Method) -> tuple[list[float], list[float]]:
        """Seconds per step of both, block beside block; the order within a pair alternates."""
        steps, started = 0, time.perf_counter()
        while steps < 2 or (steps - 1) % self.multiple or time.perf_counter() - started < _WARM_UP_SECONDS:
            plain.step()
            method.step()
            steps += 1
        block = math.ceil(_SAMPLE_SECONDS / self.seconds(plain.step, 2) / self.multiple) * self.multiple
        gc.collect()
        seconds: dict[Method, list[float]] = {plain: [], method: []}
        for pair in range(self.pairs):
            for each in (plain, method) if pair % 2 == 0 else (method, plain):
                seconds[each].append(self.seconds(each.step, block))
        return seconds[plain], seconds[method]


def flops(step: Callable[[], None]) -> int:
    """FLOPs of one step: matrix products and convolutions, also those that a hook issues inside the backward.

    Attention's own kernel is not counted on the CPU; it is the same work in every method.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_bytes(step: Callable[[], None]) -> int:
    """Greatest sum of allocations, above what was there before, in one step on the CPU.

    Every allocation and release of a tensor's memory is replayed in order. Scratch space that a library takes for itself
    (oneDNN's, MKL's) is not seen.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


def measure(name: str, method: Method, plain: Method, timer: Timer) -> Row:
    """All numbers of one row."""
    workload, cycle = method.workload, range(timer.multiple)  # with update_every, a cycle has one step that measures
    plain_seconds, method_seconds = timer.interleaved(plain, method)
    return Row(
        workload=name,
        method=method.name,
        plain_ms=1e3 * median(plain_seconds),
        method_ms=1e3 * median(method_seconds),
        ratios=[b / a for a, b in zip(plain_seconds, method_seconds, strict=True)],
        flops=sum(flops(method.step) for _ in cycle) / len(cycle) / flops(plain.step),
        plain_bytes=peak_bytes(plain.step),
        method_bytes=max(peak_bytes(method.step) for _ in cycle),
        w_bytes=len(workload.losses) * sum(p.numel() * p.element_size() for p in workload.shared),
    )


# -- what is printed -----------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first column to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    left = [column < 2 and not lines[-1][column][:1].isdigit() for column in range(len(header))]
    padded = [[c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(x, widths, left, strict=True)] for x in lines]
    rule = ["-" * w if to_left else "-" * (w - 1) + ":" for w, to_left in zip(widths, left, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def overhead_table(rows: Sequence[Row]) -> str:
    header = ["workload", "method", "time", "quartiles", "plain ms", "ms", "FLOPs", "memory", "extra / T·W", "memory − T·W"]
    cells = []
    for row in rows:
        low, _, high = quantiles(row.ratios, n=4) if len(row.ratios) > 1 else row.ratios * 3
        cells.append(
            [
                row.workload,
                row.method,
                f"{median(row.ratios):.3f}",
                f"{low:.3f}–{high:.3f}",
                f"{row.plain_ms:.2f}",
                f"{row.method_ms:.2f}",
                f"{row.flops:.3f}",
                f"{row.method_bytes / row.plain_bytes:.3f}",
                f"{row.extra_in_w:.2f}",
                f"{row.beyond_w:.3f}",
            ]
        )
    return markdown(header, cells)


def breakdown_table(parts: dict[str, dict[str, float]]) -> str:
    rows = [[name, *(f"{1e6 * values[part]:.0f}" for part in PARTS)] for name, values in parts.items()]
    return markdown(["µs per step", *PARTS], rows)


def machine(threads: int, clock: str) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on = f"{threads} thread{'s' if threads > 1 else ''}, {clock} time"
    return f"{cores} cores {platform.machine().replace('_', '-')}, torch {torch.__version__}, {on}"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of a balanced training step beside the plain sum.")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=BALANCED, default=list(BALANCED), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=40, help="pairs of timed blocks for each method")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu, with one thread, where the machine is shared")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="the network's; sgd costs least, so hides least")
    parser.add_argument("--update-every", type=int, default=1, help="of GradNorm with either engine")
    parser.add_argument("--quick", action="store_true", help="five pairs: to see that it runs")
    parser.add_argument("--profile", action="store_true", help="print where the joint engine's extra time goes instead")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers, every ratio too, to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    options = arguments(argv)
    pairs = 5 if options.quick else options.repeats
    torch.set_num_threads(options.threads)
    setting = machine(options.threads, options.clock)
    print(f"{setting}. Command: `{shlex.join(['python', 'benchmarks/overhead.py', *argv])}`\n")
    rows: list[Row] = []
    parts: dict[str, dict[str, float]] = {}
    for name in options.workloads:
        torch.manual_seed(0)
        workload = WORKLOADS[name]()
        optimizer = OPTIMIZERS[options.optimizer](workload.network.parameters(), lr=1e-5)
        if options.profile:
            parts[name] = breakdown(workload, optimizer, CLOCKS[options.clock], pairs)
            continue
        plain = PlainSum(workload, optimizer)
        for make in map(BALANCED.__getitem__, options.methods):
            every = options.update_every if issubclass(make, GradNormMethod) else 1
            method = make(workload, optimizer, update_every=every) if every > 1 else make(workload, optimizer)
            rows.append(measure(name, method, plain, Timer(CLOCKS[options.clock], pairs, every)))
            print(f"{name}, {method.name}: {median(rows[-1].ratios):.3f}", file=sys.stderr, flush=True)
    print(breakdown_table(parts) if options.profile else overhead_table(rows))
    if options.json:
        result: dict[str, Any] = {"setting": setting, "rows": [asdict(row) for row in rows], "parts": parts}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
