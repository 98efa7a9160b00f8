"""Where the extra time of a balanced step goes: the same step, timed piece by piece."""

from collections.abc import Callable
from statistics import median

import torch

from benchmarks.workloads import Workload
from lightning_gradnorm import GradNorm, JointBackward, tap_losses

PARTS = ("plain step", "taps and total", "walk and hooks", "products", "norms", "update", "all extra")
_LEAST_SECONDS = 5.0


class _Laps:
    """Seconds from lap to lap."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.laps: dict[str, float] = {}
        self._clock, self._last = clock, clock()

    def lap(self, name: str) -> None:
        now = self._clock()
        self.laps[name] = now - self._last
        self._last = now


def _plain(workload: Workload, optimizer: torch.optim.Optimizer, laps: _Laps) -> None:
    losses = workload.losses
    laps.lap("forward")
    total = sum(losses.values())
    laps.lap("total")
    total.backward()
    laps.lap("backward")
    optimizer.step()
    optimizer.zero_grad()
    laps.lap("optimizer")


def _joint(workload: Workload, optimizer: torch.optim.Optimizer, gradnorm: GradNorm, laps: _Laps) -> None:
    losses = workload.losses
    laps.lap("forward")
    losses = tap_losses(losses)
    total = gradnorm.total(losses)
    laps.lap("total")
    reader = JointBackward(total, losses, workload.shared)
    laps.lap("walk")
    total.backward()
    laps.lap("backward")
    measurement = reader.measurement()
    laps.lap("norms")
    gradnorm.update(measurement)
    laps.lap("update")
    del reader, measurement
    optimizer.step()
    optimizer.zero_grad()
    laps.lap("optimizer")


def breakdown(
    workload: Workload, optimizer: torch.optim.Optimizer, clock: Callable[[], float], blocks: int
) -> dict[str, float]:
    """Median seconds of each of ``PARTS``; differences are taken between neighbouring steps.

    "products" is the backward less the plain one's: the hooks, and the vector-Jacobian products that they start.
    """
    gradnorm = GradNorm(update_every=1)
    seen: dict[str, list[float]] = {part: [] for part in PARTS}
    started = clock()
    while len(seen["update"]) < blocks or clock() - started < _LEAST_SECONDS:
        _plain(workload, optimizer, plain := _Laps(clock))
        _joint(workload, optimizer, gradnorm, joint := _Laps(clock))
        a, b = plain.laps, joint.laps
        seen["plain step"].append(sum(a.values()))
        seen["taps and total"].append(b["total"] - a["total"])
        seen["walk and hooks"].append(b["walk"])
        seen["products"].append(b["backward"] - a["backward"])
        seen["norms"].append(b["norms"])
        seen["update"].append(b["update"])
        seen["all extra"].append(sum(b.values()) - sum(a.values()))
    return {part: median(values) for part, values in seen.items()}
