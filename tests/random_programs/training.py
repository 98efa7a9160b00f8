"""Random trainings: a module of random pieces through a Trainer with random flags, and the same by hand in plain torch."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradnorm import GradNorm, GradNormCallback, Measurement, MultiTaskMixin
from tests.helpers import Recorder, quiet_trainer
from tests.random_programs.description import Piece, _Printed
from tests.random_programs.network import LOSSES
from tests.random_programs.operations import make

_WIDTH, _ROWS = 8, 4
_SCALE = 256.0  # of the GradScaler
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.003, eps=1e-4),
}
_OF_WEIGHTS = {"own": None, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
# Relative; and how near to its target a norm may be before the sign of their difference is a matter of rounding.
TOLERANCES = {"64-true": (1e-7, 1e-10), "32-true": (2e-3, 1e-3), "bf16-mixed": (0.1, 0.05), "scaler": (0.1, 0.05)}


@dataclass(frozen=True, repr=False)
class Training(_Printed):
    """A module and the flags of its Trainer.

    Attributes:
        below, above: pieces of the trunk before and after W, a Linear.
        heads: pieces of each task.
        sizes: factor of each task's loss.
        losses: kind of each task's loss.
        absent: of the batches in turn, which tasks are left out, as bits.
        precision: ``"64-true"``, ``"32-true"``, ``"bf16-mixed"``, or ``"scaler"`` for float16 with a GradScaler.
        batches, epochs, accumulate, limit: flags of the Trainer and sizes; batches beyond ``limit`` are not run.
        clip: kind and value, if gradients are clipped.
        manual: whether the module steps its optimiser itself.
        settings: of GradNorm.
        weights_optimizer: of GradNorm; "own" for what its update takes by itself.
        optimizer: the network's.
        engine: of the callback.
        resumed_after: epochs after which the run is stopped and goes on from a checkpoint; 0 for a run in one.
        validates: whether there is validation, and a sanity check.
        given: whether the module says what W is.
    """

    below: tuple[Piece, ...] = ()
    above: tuple[Piece, ...] = ()
    heads: tuple[tuple[Piece, ...], ...] = ((Piece(),), (Piece(),))
    sizes: tuple[float, ...] = (1.0, 10.0, 0.1, 3.0)
    losses: tuple[str, ...] = ("square",) * 4
    absent: tuple[int, ...] = (0,)
    precision: str = "64-true"
    batches: int = 4
    epochs: int = 1
    accumulate: int = 1
    limit: int = 9
    clip: tuple[str, float] | None = None
    manual: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    weights_optimizer: str = "own"
    optimizer: str = "sgd"
    engine: str = "auto"
    resumed_after: int = 0
    validates: bool = False
    given: bool = True
    seed: int = 0

    @property
    def tasks(self) -> list[str]:
        return [f"task{i}" for i in range(len(self.heads))]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "64-true" else torch.float32

    @property
    def run_batches(self) -> int:
        """Of an epoch."""
        return min(self.batches, self.limit)

    def data(self) -> Tensor:
        """``[batches, rows, width]``."""
        return torch.randn(self.batches, _ROWS, _WIDTH, generator=torch.Generator().manual_seed(self.seed))

    def balancer_settings(self) -> dict[str, Any]:
        return dict(self.settings) | {"optimizer": _OF_WEIGHTS[self.weights_optimizer]}


class Net(nn.Module):
    """Trunk and heads; its losses depend on the batch and its number alone."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.training_of = training
        torch.manual_seed(training.seed)
        self.below = nn.Sequential(*[make(piece, _WIDTH) for piece in training.below])
        self.shared = nn.Linear(_WIDTH, _WIDTH)
        self.above = nn.Sequential(*[make(piece, _WIDTH) for piece in training.above])
        self.heads = nn.ModuleList([nn.Sequential(*[make(p, _WIDTH) for p in head]) for head in training.heads])

    def losses(self, x: Tensor, number: int) -> dict[str, Tensor]:
        """Of the tasks that the batch has."""
        told = self.training_of
        torch.manual_seed(1000 + number)  # dropout is the same in every run of this batch
        z = self.above(self.shared(self.below(x.clone())))  # what works in place leaves the batch as it is
        left_out = told.absent[number % len(told.absent)]
        found = {}
        for i, (task, head) in enumerate(zip(told.tasks, self.heads, strict=True)):
            if i and left_out >> i & 1:
                continue
            found[task] = LOSSES[told.losses[i]](head(z).to(x.dtype), (i + 1) * x) * told.sizes[i]
        return found


class Module(MultiTaskMixin, L.LightningModule):
    def __init__(self, training: Training) -> None:
        super().__init__()
        # In its precision from the start: a checkpoint of "64-true" is loaded by Lightning before the module is made float64.
        self.net, self.told = Net(training).to(training.dtype), training
        self.automatic_optimization = not training.manual

    def shared_layer(self):
        return self.net.shared if self.told.given else None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        total = self.total_loss(self.net.losses(batch, batch_idx))
        if self.automatic_optimization:
            return total
        self.manual_backward(total / self.told.accumulate)
        if ends_step(self.told, batch_idx):
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.total_loss(self.net.losses(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return _OPTIMIZERS[self.told.optimizer](self.parameters())


def ends_step(training: Training, batch_idx: int) -> bool:
    """Whether the optimiser steps after this batch: the last ones of an epoch are a window of their own."""
    return (batch_idx + 1) % training.accumulate == 0 or batch_idx + 1 == training.run_batches


def through_the_trainer(training: Training, folder: Path) -> tuple[list[dict[str, float]], list[Tensor], list[str]]:
    """After every batch: the weights that are to come, and the parameters. And the names of W."""
    weights: list[dict[str, float]] = []
    parameters: list[Tensor] = []
    stops = [training.resumed_after] if 0 < training.resumed_after < training.epochs else []
    checkpoint, names = None, []
    for epochs in (*stops, training.epochs):
        callback = GradNormCallback(summary=False, engine=training.engine, **training.balancer_settings())
        seen = Recorder(callback)
        settings: dict[str, Any] = {"precision": training.precision}
        if training.precision == "scaler":
            settings = {"plugins": [MixedPrecision("16-mixed", "cpu", _scaler())]}
        if not training.manual:
            settings["accumulate_grad_batches"] = training.accumulate
            if training.clip is not None:
                settings |= {"gradient_clip_algorithm": training.clip[0], "gradient_clip_val": training.clip[1]}
        trainer = quiet_trainer(
            folder,
            max_epochs=epochs,
            callbacks=[callback, seen],
            limit_train_batches=training.limit,
            inference_mode=False,  # a piece may be a derivative
            num_sanity_val_steps=2 if training.validates else 0,
            **settings,
        )
        module = Module(training)
        trainer.fit(module, _loader(training), _loader(training) if training.validates else None, ckpt_path=checkpoint)
        checkpoint = folder / "last.ckpt"
        trainer.save_checkpoint(checkpoint)
        weights += seen.weights
        parameters += seen.parameters
        names = [name.removeprefix("net.") for name in callback.shared.names] if callback.shared is not None else names
    return weights, parameters, names


def _loader(training: Training) -> DataLoader:
    return DataLoader(training.data(), batch_size=None, shuffle=False, generator=torch.Generator())


def _scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=_SCALE, growth_interval=10**6)


def _autocast(training: Training) -> AbstractContextManager:
    kind = {"bf16-mixed": torch.bfloat16, "scaler": torch.float16}.get(training.precision)
    return nullcontext() if kind is None else torch.autocast("cpu", kind)


def by_hand(training: Training, names: list[str]) -> Iterator[tuple[dict[str, float], Tensor]]:
    """The same in plain torch, after every batch; it ends where the weights' next step hangs on rounding.

    Of the package only the balancer is used, as in a bare loop: the norms are those of the mean gradients over the
    micro-batches that have the task, by one ``autograd.grad`` per task on an equal network.
    """
    net = Net(training).to(training.dtype)
    balancer = GradNorm(**training.balancer_settings())
    optimizer, scaler = _OPTIMIZERS[training.optimizer](net.parameters()), _scaler()
    data = training.data().to(training.dtype)
    for _ in range(training.epochs):
        sums: dict[str, list[Tensor]] = {}
        for number in range(training.run_batches):
            for task, (loss, gradient) in _gradients(training, net, data[number], number, names).items():
                held = sums.setdefault(task, [torch.zeros(()), torch.zeros(()), torch.zeros(())])
                sums[task] = [held[0] + loss, held[1] + gradient, held[2] + 1]
            with _autocast(training):
                total = balancer.total(net.losses(data[number], number))
            total = total / training.accumulate
            (scaler.scale(total) if training.precision == "scaler" else total).backward()
            ends = ends_step(training, number)
            if ends:
                _step(training, net, optimizer, scaler)
                measured = Measurement(
                    tuple(sums),
                    torch.stack([loss.double() / count for loss, _, count in sums.values()]),
                    torch.stack([(gradient.double() / count).norm() for _, gradient, count in sums.values()]),
                )
                if training.precision == "scaler" and not measured.gradient_norms.isfinite().all():
                    return  # what overflows float16 here need not do so in the joint backward
                balancer.update(measured if balancer.due else None)
                sums = {}
            yield balancer.weights, torch.cat([p.detach().flatten().clone() for p in net.parameters()])
            if ends and _hangs_on_rounding(training, balancer):
                return
        balancer.end_epoch()


def _gradients(training: Training, net: Net, x: Tensor, number: int, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Task → its loss and ∇_W of it in one row; ``net`` itself is not run."""
    found = {}
    for task in training.tasks:
        other = Net(training).to(training.dtype)
        other.load_state_dict(copy.deepcopy(net.state_dict()))
        with _autocast(training):
            losses = other.losses(x, number)
        if task in losses:
            w = [dict(other.named_parameters())[name] for name in names]
            scale = _SCALE / training.accumulate if training.precision == "scaler" else 1.0  # or float16 underflows
            gradients = torch.autograd.grad(losses[task] * scale, w)
            found[task] = losses[task].detach(), torch.cat([g.flatten() for g in gradients]) / scale
    return found


def _step(training: Training, net: Net, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    if training.precision == "scaler":
        scaler.unscale_(optimizer)
    if training.clip is not None and not training.manual:
        kind, value = training.clip
        clip = nn.utils.clip_grad_norm_ if kind == "norm" else nn.utils.clip_grad_value_
        clip(net.parameters(), value)
    if training.precision == "scaler":
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad()


def _hangs_on_rounding(training: Training, balancer: GradNorm) -> bool:
    norms, targets = (balancer.diagnostics.get(name) for name in ("grad_norm", "target_norm"))
    if norms is None or targets is None or len(norms) == 1 or balancer.update_rule != "paper":
        return False
    return bool(((norms - targets).abs() <= TOLERANCES[training.precision][1] * norms.abs()).any())
