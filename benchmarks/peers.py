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
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn
from torchjd.aggregation import IMTLG, Aggregator, UPGrad, UPGradWeighting

from benchmarks import workloads
from benchmarks.methods import FeatureNorms, JointEngine, Method, PlainSum, ProductPerTask
from benchmarks.overhead import CLOCKS, Timer, flops, machine, markdown, peak_bytes
from benchmarks.workloads import WORKLOADS, Losses, Workload
from lightning_gradnorm import GramianWeighting, JointBackward, Measurement, tap_losses
from lightning_gradnorm.recombination import RecombiningBackward
from lightning_gradnorm.task_gradients import TaskGradients

FEATURES = {"conv": "trunk", "transformer": "encoder", "mlp": "trunk"}  # where each network's tasks part


class GradNormPytorch(Method):
    """gradnorm-pytorch 0.2.3: a second-order graph; W is one parameter."""

    name = "gradnorm-pytorch"

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(workload, optimizer)
        from gradnorm_pytorch import GradNormLossWeighter

        (w,) = workload.shared
        self.weighter = GradNormLossWeighter(
            num_losses=len(workload.losses), restoring_force_alpha=1.5, learning_rate=1e-4, grad_norm_parameters=w
        )

    def backward(self, losses: Losses) -> None:
        self.weighter.backward(list(losses.values()))


class LibMTL(Method):
    """LibMTL 1.1.5's GradNorm: one backward per task; norms over all parameters that the tasks share."""

    name = "LibMTL"

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(workload, optimizer)
        # LibMTL imports torchvision for models that are not used here.
        for name in ("torchvision", "torchvision.models", "torchvision.models.utils", "torchvision.transforms"):
            sys.modules.setdefault(name, MagicMock())
        from LibMTL.weighting.GradNorm import GradNorm

        shared = shared_parameters(workload)
        count = len(workload.losses)
        self.weighting = GradNorm()
        members = {
            "task_num": count,
            "device": torch.device("cpu"),
            "rep_grad": False,
            "epoch": 1,
            "train_loss_buffer": torch.stack([loss.detach() for loss in workload.losses.values()]).unsqueeze(1).numpy(),
            "get_share_params": lambda: iter(shared),
            "zero_grad_share_params": lambda: [
                setattr(p.grad, "data", torch.zeros_like(p)) for p in shared if p.grad is not None
            ],
        }
        for name, value in members.items():
            object.__setattr__(self.weighting, name, value)
        self.weighting.init_param()

    def backward(self, losses: Losses) -> None:
        self.weighting.backward(torch.stack(list(losses.values())), alpha=1.5)


class UPGradHere(Method):
    """UPGrad from the Gram matrix on W that the one joint backward brings, one step late."""

    name = "UPGrad, one backward"

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(workload, optimizer)
        self.balancer = GramianWeighting(UPGradWeighting())

    def backward(self, losses: Losses) -> None:
        losses = tap_losses(losses)
        total = self.balancer.total(losses)
        reader = JointBackward(total, losses, self.workload.shared, keep=False, pairs=True)
        total.backward()
        self.balancer.update(reader.measurement(gramian=True))


class UPGradSameStep(Method):
    """UPGrad in the step itself: the tasks' gradients weighed where they meet, by the Gram matrix on W."""

    name = "UPGrad, same step, W"

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(workload, optimizer)
        self.balancer = GramianWeighting(UPGradWeighting(), when="same step")
        self.shared = self.compared()

    def compared(self) -> Sequence[Tensor]:
        return self.workload.shared

    def backward(self, losses: Losses) -> None:
        losses = tap_losses(losses)
        measured: list[Measurement] = []

        def weigh(gradients: TaskGradients) -> list[float]:
            values = torch.stack([loss.detach() for loss in losses.values()]).double()
            measured.append(Measurement(gradients.tasks, values, gramian=gradients.gramian()))
            return self.balancer.weigh(measured[0]).tolist()

        total = self.balancer.total(losses)
        RecombiningBackward(total, losses, self.shared, weigh=weigh)
        total.backward()
        self.balancer.update(measured[0])


class UPGradSameStepAll(UPGradSameStep):
    """The same with W all that the tasks share, which is what TorchJD's is."""

    name = "UPGrad, same step, all"

    def compared(self) -> Sequence[Tensor]:
        return shared_parameters(self.workload)


class TorchJD(Method):
    """TorchJD 0.18: the Jacobian of all shared parameters, aggregated by IMTL-G, which evens out the tasks' projections."""

    name = "TorchJD, IMTL-G"
    aggregates: Callable[[], Aggregator] = IMTLG

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(workload, optimizer)
        self.aggregator = self.aggregates()
        self.shared = shared_parameters(workload)
        self.features: Tensor | None = None
        for name, module in workload.network.named_children():
            if name in FEATURES.values():
                module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.features = output

    def backward(self, losses: Losses) -> None:
        from torchjd.autojac import backward, jac_to_grad, mtl_backward

        if self.features is None:
            backward(list(losses.values()), inputs=self.shared)
        else:
            mtl_backward(list(losses.values()), features=self.features)
            self.features = None
        jac_to_grad(self.shared, self.aggregator)


class TorchJDUPGrad(TorchJD):
    """TorchJD 0.18 with UPGrad, which turns no task's loss upwards."""

    name = "TorchJD, UPGrad"
    aggregates = UPGrad


class Pina(Method):
    """PINA 0.3.2's self-adaptive weighting: norms over all parameters, one autograd.grad per term, at every step."""

    name = "PINA, self-adaptive"

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(workload, optimizer)
        from pina.weighting import SelfAdaptiveWeighting

        self.weighting = SelfAdaptiveWeighting()
        object.__setattr__(self.weighting, "_solver", SimpleNamespace(model=workload.network))

    def backward(self, losses: Losses) -> None:
        weights = self.weighting.update_weights(losses)
        sum(weights[task].detach() * loss for task, loss in losses.items()).backward()


PEERS: dict[str, type[Method]] = {
    "ours": JointEngine,
    "features": FeatureNorms,
    "product": ProductPerTask,
    "gradnorm-pytorch": GradNormPytorch,
    "libmtl": LibMTL,
    "upgrad": UPGradHere,
    "upgrad-same": UPGradSameStep,
    "upgrad-same-all": UPGradSameStepAll,
    "torchjd": TorchJD,
    "torchjd-upgrad": TorchJDUPGrad,
    "pina": Pina,
}


def shared_parameters(workload: Workload) -> list[nn.Parameter]:
    """Those that every task's loss reaches."""
    parameters = [p for p in workload.network.parameters() if p.requires_grad]
    reached = [
        {
            id(p)
            for p, g in zip(
                parameters, torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), strict=True
            )
            if g is not None
        }
        for loss in workload.losses.values()
    ]
    common = set.intersection(*reached)
    return [p for p in parameters if id(p) in common]


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
