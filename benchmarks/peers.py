"""The cost of a balanced step beside the plain sum, for us and for the packages that people use today.

    pip install -r benchmarks/peers.txt
    python benchmarks/peers.py                 # all peers, about fifteen minutes on one core
    python benchmarks/peers.py --grow          # how the cost grows with tasks, width, batch and depth, ours and theirs

Every peer does its own update, as its documentation has it, on the workloads of ``overhead.py``; each is timed in blocks that
alternate with blocks of the plain step, in one process, after a warm-up.
"""

import argparse
import functools
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks import workloads
from benchmarks.methods import PlainSum
from benchmarks.overhead import CLOCKS, Timer, flops, machine, markdown, peak_bytes
from benchmarks.peer_methods import FEATURES, PEERS
from benchmarks.workloads import WORKLOADS, Workload


def rows_of(name: str, make: Callable[[], Workload], peers: Sequence[str], timer: Timer) -> list[dict[str, object]]:
    """One row per peer that can do this workload."""
    rows = []
    for peer in peers:
        if peer == "features" and name.split(",")[0] not in FEATURES:
            continue  # no one layer's output stands for all of W
        torch.manual_seed(0)
        workload = make()
        optimizer = torch.optim.SGD(workload.network.parameters(), lr=1e-6)
        plain = PlainSum(workload, optimizer)
        try:
            method = PEERS[peer](workload, optimizer)
            method.step()
        except (ImportError, ValueError, RuntimeError) as error:
            print(f"{name}, {peer}: left out, {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        plain_seconds, seconds = timer.interleaved(plain, method)
        ratios = [b / a for a, b in zip(plain_seconds, seconds, strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        rows.append(
            {
                "workload": name,
                "method": method.name,
                "time": middle,
                "low": low,
                "high": high,
                "plain_ms": 1e3 * median(plain_seconds),
                "ms": 1e3 * median(seconds),
                "flops": flops(method.step) / flops(plain.step),
                "memory": peak_bytes(method.step) / peak_bytes(plain.step),
            }
        )
        print(f"{name}, {method.name}: {middle:.3f}", file=sys.stderr, flush=True)
    return rows


def table(rows: Sequence[dict[str, object]]) -> str:
    header = ["workload", "method", "time", "quartiles", "plain ms", "ms", "FLOPs", "memory"]
    cells = [
        [
            str(row["workload"]),
            str(row["method"]),
            f"{row['time']:.2f}",
            f"{row['low']:.2f}–{row['high']:.2f}",
            f"{row['plain_ms']:.1f}",
            f"{row['ms']:.1f}",
            f"{row['flops']:.2f}",
            f"{row['memory']:.2f}",
        ]
        for row in rows
    ]
    return markdown(header, cells)


def draw(rows: Sequence[dict[str, object]], path: Path) -> None:
    """A panel per workload, a bar per method: time of a step over the plain sum's, quartiles as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    names = list(dict.fromkeys(str(row["workload"]) for row in rows))
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))[::-1]
    figure = Figure(figsize=(1.8 + 2.1 * len(names), 0.9 + 0.32 * len(methods)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for row in (row for row in rows if row["workload"] == name):
            height, colour = (
                methods.index(str(row["method"])),
                "#0072B2" if str(row["method"]).startswith("GradNorm") else "#E69F00",
            )
            axes.barh(height, row["time"] - 1, left=1, color=colour, height=0.7)
            axes.plot([row["low"], row["high"]], [height, height], color="black", linewidth=1)
            axes.text(row["high"], height, f" {row['time']:.2f}", va="center", fontsize=8)
        axes.set(title=name, xscale="log", xlim=(0.9, 30))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1, color="black", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_yticks(range(len(methods)), methods)
    figure.supxlabel("time of a training step over that of the plain sum", fontsize=9)
    figure.savefig(path)


# Of the MLP: what is changed, and to what.
GROWTH: dict[str, dict[str, Callable[[], Workload]]] = {
    "tasks": {f"mlp, {count} tasks": functools.partial(workloads.mlp, tasks=count) for count in (2, 5, 10, 20, 40)},
    "width": {f"mlp, width {width}": functools.partial(workloads.mlp, width=width) for width in (128, 256, 1024)},
    "batch": {f"mlp, batch {batch}": functools.partial(workloads.mlp, batch=batch) for batch in (32, 64, 1024)},
    "depth": {f"mlp, {layers} layers": functools.partial(workloads.mlp, layers=layers) for layers in (2, 4, 8, 16)},
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=20, help="pairs of timed blocks for each; default %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument(
        "--grow",
        nargs="*",
        choices=GROWTH,
        metavar="WITH",
        help=f"growth of the MLP's cost instead: {', '.join(GROWTH)}; or all",
    )
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw the times")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    made = {name: WORKLOADS[name] for name in options.workloads}
    if options.grow is not None:
        made = {name: make for kind in options.grow or GROWTH for name, make in GROWTH[kind].items()}
    print(f"{machine(options.threads, options.clock)}. Command: `{shlex.join(['python', 'benchmarks/peers.py', *argv])}`\n")
    rows: list[dict[str, object]] = []
    for name, make in made.items():
        rows += rows_of(name, make, options.peers, Timer(CLOCKS[options.clock], options.repeats))
    print(table(rows))
    if options.figure:
        draw(rows, options.figure)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
