"""``diagnose``: what the tasks' gradients say before any commitment."""

import copy
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_gradnorm.callbacks import GradNormCallback
from lightning_gradnorm.callbacks.lightning_api import LightningModule, Trainer, trainer_class_of
from lightning_gradnorm.regularisers import sounds_like_a_regulariser
from lightning_gradnorm.report.table import plain_rows
from lightning_gradnorm.report.tags import per_pair_names
from lightning_gradnorm.session import NormOf
from lightning_gradnorm.task_names import task_tag

_EVEN = 3.0  # ratio of gradient norms up to which equal weights do
_UNEVEN = 10.0  # from which on one task owns the shared layer
_CONFLICT = -0.1  # mean cosine below which two tasks pull against each other
_UNDONE = 0.5  # part of a task's gain that the others undo at even sizes, from which on a conflict counts


@dataclass(frozen=True)
class Diagnosis:
    """What so many training batches showed, with equal weights.

    Attributes:
        norms: task → geometric mean of ‖∇_W L_i‖ over the batches; 0 for a task that had none.
        shares: task → mean share of Σ_j ‖∇_W L_j‖.
        cosines: pair of tasks → mean cosine between their gradients.
        conflicts: pair of tasks → part of the batches in which the cosine was below 0.
        loss_ratios: task → L_i at the end over L_i at the start.
        batches: how many there were.
        layer: the shared layer, in words.
        penalties: those tasks that are made of the network's parameters alone, and so are none.
    """

    norms: Mapping[str, float]
    shares: Mapping[str, float]
    cosines: Mapping[tuple[str, str], float]
    conflicts: Mapping[tuple[str, str], float]
    loss_ratios: Mapping[str, float]
    batches: int
    layer: str
    penalties: Sequence[str] = ()

    @property
    def _tasks(self) -> dict[str, float]:
        return {task: norm for task, norm in self.norms.items() if task not in self.penalties}

    @property
    def spread(self) -> float:
        """Largest gradient norm over the smallest that is not 0, of what is a task; 1 for one task."""
        norms = [norm for norm in self._tasks.values() if norm > 0]
        return max(norms) / min(norms) if norms else 1.0

    @property
    def _cosines_of_tasks(self) -> dict[tuple[str, str], float]:
        return {pair: cosine for pair, cosine in self.cosines.items() if self._tasks.keys() >= {*pair}}

    @property
    def conflicting(self) -> list[tuple[str, str]]:
        """Pairs of tasks that pull against each other on most batches, the worst first."""
        pairs = [pair for pair, cosine in self._cosines_of_tasks.items() if cosine < _CONFLICT and self.conflicts[pair] > 0.5]
        return sorted(pairs, key=lambda pair: self.cosines[pair])

    @property
    def undone(self) -> dict[str, float]:
        """Task → which part of what a step of its own gains it the others undo, were all gradients of one size.

        To first order, in a step along the sum: −Σ of the task's mean cosines. Above 1 its loss rises; below 0 the others help.
        """
        cosines = self._cosines_of_tasks
        return {task: -sum(cosine for pair, cosine in cosines.items() if task in pair) for task in self._tasks}

    @property
    def weighting(self) -> str:
        """``"not needed"``, ``"may help"`` or ``"can help"``."""
        return "not needed" if self.spread < _EVEN else "may help" if self.spread < _UNEVEN else "can help"

    @property
    def _of_regularisers(self) -> list[str]:
        """What is no task, surely or by its name."""
        maybe = [task for task in self._tasks if sounds_like_a_regulariser(task)]
        said = []
        if self.penalties:
            said.append(
                f"{', '.join(map(repr, self.penalties))}: made of the network's parameters alone, whatever the data, and so "
                "a weight penalty and no task. Add it to what total_loss() returns."
            )
        if maybe:
            said.append(
                f"Is {' or '.join(map(repr, maybe))} a regulariser? One that pulls towards a prior, or to what is small or "
                "smooth, is met best by learning nothing, and with a gradient as large as the tasks' it comes to that: add it "
                "to what total_loss() returns, with its own factor. A term that has data to fit, as in distillation, is a task."
            )
        return said

    @property
    def advice(self) -> list[str]:
        """What follows, in sentences."""
        norms, said = self._tasks, self._of_regularisers
        if len(norms) < 2:
            return [*said, "There is one task only, so there is nothing to balance."]
        silent = [task for task, norm in norms.items() if norm == 0]
        if silent:
            said.append(
                f"Task {', '.join(map(repr, silent))} has no gradient on the shared layer at all: look into that first."
            )
        largest, smallest = (
            max(norms, key=lambda t: norms[t]),
            min((task for task, norm in norms.items() if norm > 0), key=lambda t: norms[t], default=""),
        )
        if self.weighting == "not needed":
            said.append(
                f"You do not need loss weighting here: the tasks' gradients are of like size (within {self.spread:.1f}×), so "
                "equal weights do."
            )
        else:
            said.append(
                f"The gradient of {largest!r} is {self.spread:{',.0f' if self.spread > 100 else '.3g'}}× that of {smallest!r}. "
                + (
                    "It decides what the shared layer learns: weighting can help. Try GradNormCallback()."
                    if self.weighting == "can help"
                    else "Weighting may help a little, and a factor set by hand as much. Try GradNormCallback(), and compare()."
                )
            )
        return [*said, *self._of_conflicts]

    @property
    def _of_conflicts(self) -> list[str]:
        """Whether they are worth gradient surgery."""
        said = []
        if self.conflicting:
            a, b = self.conflicting[0]
            said.append(
                f"{a!r} and {b!r} pull against each other (mean cosine {self.cosines[a, b]:+.2f}, below 0 on "
                f"{self.conflicts[a, b]:.0%} of the batches)."
            )
        task, part = max(self.undone.items(), key=lambda found: found[1])
        undo = f"With gradients of one size the others would undo {max(part, 0):.0%} of what a step gains {task!r}"
        if min(self.undone.values()) >= _UNDONE:
            said.append(
                f"{undo}, and half or more of every other task's gain. No weights, and so no gradient surgery, can give to one "
                "without taking from another here: give each task more layers of its own. See docs/gradient-surgery.md."
            )
        elif part >= _UNDONE:
            said.append(
                f"{undo}, and less than half of another's. Gradient surgery can even that out: try GramianWeighting beside "
                "GradNormCallback(), and compare(). See docs/gradient-surgery.md."
            )
        elif said:
            said.append(
                f"{undo}, and no more of any other task's: too little for gradient surgery (GramianWeighting), which is worth "
                "a try from a half on."
            )
        elif self.cosines:
            said.append("No two tasks pull against each other on most batches, so gradient surgery has little to do.")
        return [" ".join(said)] if said else []

    def __str__(self) -> str:
        tasks = plain_rows(
            ("task", "gradient norm", "share", "loss ratio"),
            [
                (task, f"{norm:.3g}", f"{self.shares[task]:.1%}", f"{self.loss_ratios[task]:.3g}")
                for task, norm in self.norms.items()
            ],
            f"{self.batches} batches with equal weights, on {self.layer}",
        )
        pairs = [(f"{a} – {b}", f"{cosine:+.2f}", f"{self.conflicts[a, b]:.0%}") for (a, b), cosine in self.cosines.items()]
        cosines = plain_rows(("pair", "mean cosine", "below 0"), pairs, "") if pairs else ""
        return "\n".join(filter(None, (tasks, cosines, "", *self.advice)))


@dataclass
class _Noted:
    """Per batch: tag → value; and which tasks are none."""

    rows: list[dict[str, float]] = field(default_factory=list)
    penalties: list[str] = field(default_factory=list)

    def of(self, tag: str) -> list[float]:
        return [row[tag] for row in self.rows if math.isfinite(row.get(tag, math.nan))]


class Diagnosing(GradNormCallback):
    """Notes what every step would have logged."""

    def __init__(self, norm_of: NormOf) -> None:
        super().__init__(mode="monitor", summary=False, log_cosines=True, norm_of=norm_of)
        self.noted: _Noted = _Noted()

    def _tell(self, about: str, message: str) -> None:
        if not about.startswith(("idle", "penalty")):  # the diagnosis says that itself
            super()._tell(about, message)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before = self.balancer.steps
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.noted.penalties = self.session.words.penalties
        if self.balancer.steps > before:
            self.noted.rows.append({tag: float(value) for tag, value in self.logged.items()})


def diagnose(
    module: Any, data: Any, batches: int = 20, *, norm_of: NormOf = "parameters", **trainer_settings: Any
) -> Diagnosis:
    """Train a copy of the module for a few steps with equal weights, and say what its tasks' gradients look like.

    The module itself, and torch's random numbers, stay as they are::

        print(diagnose(Digits(), DigitsData()))

    Args:
        module: a LightningModule with ``MultiTaskMixin``.
        data: a LightningDataModule, or a training loader.
        batches: how many optimiser steps.
        norm_of: as in ``GradNormCallback``.
        trainer_settings: further settings of the Trainer, ``accelerator`` for example.

    Raises:
        ValueError: for fewer than one batch; TypeError for a module without the mixin.
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ValueError(f"batches is a whole number, 1 or more; got {batches!r}.")
    observer = Diagnosing(norm_of)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    steps = {"max_steps": batches, "max_epochs": -1, "log_every_n_steps": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    with torch.random.fork_rng():
        trainer = trainer_class_of(module)(**off, **steps, callbacks=[observer], **trainer_settings)
        of_module = {"datamodule": data} if hasattr(data, "train_dataloader") else {"train_dataloaders": data}
        trainer.fit(copy.deepcopy(module), **of_module)
    return _of(observer)


def _of(observer: Diagnosing) -> Diagnosis:
    noted, tasks = observer.noted, observer.balancer.tasks
    tags = {task: f"grad_norm/{task_tag(task)}" for task in tasks}
    norms = {task: noted.of(tag) for task, tag in tags.items()}
    losses = {task: noted.of(f"task_loss/{task_tag(task)}") for task in tasks}
    last = max(len(noted.rows) // 5, 1)
    of_batches = [{task: row[tag] for task, tag in tags.items() if tag in row} for row in noted.rows]
    in_parts = [{task: norm / sum(row.values()) for task, norm in row.items()} for row in of_batches if sum(row.values()) > 0]
    shares = {task: _mean([row[task] for row in in_parts if task in row]) for task in tasks}
    pairs = dict(zip(itertools.combinations(tasks, 2), per_pair_names("grad_cosine", tasks), strict=True))
    cosines = {pair: values for pair, tag in pairs.items() if (values := noted.of(tag))}
    return Diagnosis(
        norms={task: _geometric_mean(values) for task, values in norms.items()},
        shares=shares,
        cosines={pair: _mean(values) for pair, values in cosines.items()},
        conflicts={pair: _mean([float(cosine < 0) for cosine in values]) for pair, values in cosines.items()},
        loss_ratios={
            task: _mean(values[-last:]) / _mean(values[:last]) if values else math.nan for task, values in losses.items()
        },
        batches=len(noted.rows),
        layer=str(observer.shared),
        penalties=tuple(noted.penalties),
    )


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _geometric_mean(values: list[float]) -> float:
    positive = [value for value in values if value > 0]
    return math.exp(statistics.fmean(map(math.log, positive))) if positive else 0.0
