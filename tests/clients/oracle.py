"""What every client is held to: each task's gradient on W by its own ``autograd.grad``, and the trace of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tests.helpers import QUIET


class Oracle(L.Callback):
    """Differentiates each task's loss before the backward does; given to the Trainer before the balancing callback.

    Args:
        balancing: whose layer it is.

    Attributes:
        expected: of every step that came after the layer was found, task → the norm of the task's gradient on it.
    """

    def __init__(self, balancing: Any) -> None:
        self.balancing, self._seen = balancing, {}
        self.expected: list[dict[str, float]] = []

    def see(self, losses: Mapping[str, Tensor]) -> None:
        """Take the unweighted losses of a step, where the client has them; from several places, if it has them in several."""
        if torch.is_grad_enabled():
            self._seen |= losses

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        layer, losses = self.balancing.shared, dict(self._seen)
        self._seen.clear()
        assert losses, "the test has to hand the oracle the losses of every step"
        if layer is None:
            return
        norms = {}
        for task, task_loss in losses.items():
            found = torch.autograd.grad(task_loss, layer.parameters, retain_graph=True, allow_unused=True)
            norms[task] = sum(float(g.double().square().sum()) for g in found if g is not None) ** 0.5
        self.expected.append(norms)


@dataclass
class Trace(L.Callback):
    """What a run was; given to the Trainer after the balancing callback.

    Attributes:
        balancing: the callback, or ``None`` for the plain run.
        weights: task → the weight that the next step applies, after every step.
        norms: task → the norm of its unweighted loss that the callback measured, of every step.
        parameters: all of the module's, flat, at the end.
    """

    balancing: Any = None
    weights: list[dict[str, float]] = field(default_factory=list)
    norms: list[dict[str, float]] = field(default_factory=list)
    parameters: Tensor = field(default_factory=lambda: torch.empty(0))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.balancing is not None:
            logged, tag = self.balancing.logged, "loss_weight/"
            applied = {name.removeprefix(tag): float(w) for name, w in logged.items() if name.startswith(tag)}
            self.weights.append(self.balancing.weights)
            self.norms.append({task: float(logged[f"grad_norm/{task}"]) / w for task, w in applied.items()})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.parameters = torch.cat([p.detach().flatten().double() for p in pl_module.parameters()])

    def error(self, oracle: Oracle) -> float:
        """The greatest relative difference from the oracle's norms, over steps and tasks."""
        assert oracle.expected, "the layer was not found, or one step only was made"
        measured = self.norms[-len(oracle.expected) :]
        pairs = [(m[task], e[task]) for m, e in zip(measured, oracle.expected, strict=True) for task in e]
        return max(abs(m - e) / e for m, e in pairs)


def fit(
    module: L.LightningModule,
    batches: Any,
    balancing: Any = None,
    oracle: Oracle | None = None,
    *,
    trainer: Any = L.Trainer,
    **settings: Any,
) -> Trace:
    """Train on the CPU with nothing written, balanced or plain.

    Args:
        module: whose.
        batches: what ``Trainer.fit`` takes.
        balancing: the callback.
        oracle: sees every backward first.
        trainer: the class, of either of Lightning's packages.
        settings: of the Trainer; ``max_epochs`` is 1.
    """
    trace = Trace(balancing)
    callbacks = [callback for callback in (oracle, balancing, trace) if callback is not None]
    trainer(**(QUIET | settings), callbacks=callbacks).fit(module, batches)
    return trace


def assert_moving(trace: Trace) -> None:
    """All weights are finite and positive, and every task's changed."""
    first, last = trace.weights[0], trace.weights[-1]
    assert all(0 < w < float("inf") for weights in trace.weights for w in weights.values()), trace.weights
    assert {task for task in last if last[task] == first[task]} == set(), "these weights stood still"


def assert_same(one: Trace, other: Trace) -> None:
    """Two runs are one, bit for bit: weights of every step, and parameters at the end."""
    assert one.weights == other.weights
    assert torch.equal(one.parameters, other.parameters)
