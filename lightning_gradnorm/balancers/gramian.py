"""Weights from the Gram matrix of the tasks' gradients, by any weighting that is a function of it: TorchJD's, or one's own."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_choice, check_range, check_that
from lightning_gradnorm.balancers.idle import mask_of, without_idle
from lightning_gradnorm.balancers.learnt import Learnt, random_numbers_of
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.measurement import Measurement

When = Literal["next step", "same step"]
"""When the weights of a step's Gram matrix act."""

AVERAGED = 0.9  # ema_decay by default, where weights act in the next step

LEAST = 1e-6
"""What a weight is at least, over the largest in size: of a task with the weight 0, nothing more could be read."""


def kept_readable(weights: Tensor, *, allow_negative: bool) -> Tensor:
    """The weights with none nearer to 0 than ``LEAST`` of the largest, and none below it, if negative ones are not allowed.

    Args:
        weights: shape ``[T]``, finite.
        allow_negative: whether a negative weight keeps its sign.
    """
    least = LEAST * weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
    if not allow_negative:
        return torch.maximum(weights, least)
    signs = torch.where(weights < 0, -1.0, 1.0).to(weights)
    return torch.where(weights.abs() < least, signs * least, weights)


class GramianWeighting(RuleBalancer):
    """w = weighting(G), with G_ij = ⟨∇_W L_i, ∇_W L_j⟩: gradient surgery on the shared layer without a second backward.

    UPGrad, MGDA, CAGrad, IMTL-G, Aligned-MTL, PCGrad and others are such functions; TorchJD has them, and its ``Weighting``
    objects are taken as they are::

        from torchjd.aggregation import UPGradWeighting

        LossBalancingCallback(GramianWeighting(UPGradWeighting()))

    What TorchJD does in the step itself, from the gradients on all shared parameters and with a backward per task, is done here
    from the gradients on the last shared layer, one step later: G of step t gives the weights of step t + 1, averaged over the
    steps before. So no direction is without conflict for certain; ``grad_cosine`` shows how much of it there is.

    With ``when="same step"`` they act in the step itself, in its one backward: where the tasks meet, at the output of a trunk,
    what goes on is Σ_i w_i g_i with weights of these very gradients g_i. That is TorchJD's ``mtl_backward``, exactly so where W
    is all that the tasks share. The total is the plain sum then, and each head has its own task's gradient; the weights are the
    shared parameters' alone. A graph in which tasks also meet elsewhere is refused. Each micro-batch has weights of its own;
    several ranks have the same ones, of their mean gradients. It takes a callback or a session, which call ``weigh`` in the
    backward; ``total`` and ``update`` by themselves are the plain sum's.

    The weights are the weighting's, on its scale: most of TorchJD's have the mean of the losses, 1/T each, where nothing
    conflicts. The first step applies weights of one, unless they act in the same step.

    The weighting runs on the CPU, in float64 and under random numbers of its own (PyTorch's and NumPy's), which are a function
    of the step: the same on every rank and after a resume. It sees the tasks that took part in the step, in the order in which
    they came first, or were declared; some weightings cannot do without any. What it has learnt is saved and restored.

    Source: TorchJD (Quinton, Rey 2024, arXiv 2406.16232), whose weightings each name their own.

    Args:
        weighting: G, ``[T, T]`` → weights, ``[T]``.
        when: ``"next step"`` or ``"same step"``: which step's loss the weights of a Gram matrix act on.
        ema_decay: β of the average of the weights, at least 0 and below 1: of the first updates their mean, from 1 / (1 − β) on
            exponential. 0: those of the last measured step. By default 0.9; in the same step 0, and nothing else.
        allow_negative: whether a negative weight is applied, which makes its task's loss rise. Else it is cut off at next to 0,
            with a warning.
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one is measured and updates the weights; in the same step 1.

    Raises:
        ValueError: for a setting outside its range; at a step, if the weighting gives something else than T numbers.
        TypeError: if the weighting cannot be called.
    """

    needs: tuple[str, ...] = ("gramian",)

    def __init__(
        self,
        weighting: Callable[..., Any],
        *,
        when: When = "next step",
        ema_decay: float | None = None,
        allow_negative: bool = False,
        tasks: Iterable[str] | None = None,
        update_every: int = 1,
    ) -> None:
        if not callable(weighting) or isinstance(weighting, type):
            hint = f": {weighting.__name__}()" if isinstance(weighting, type) else ""
            raise TypeError(
                "weighting is a function of the Gram matrix, or an object such as TorchJD's UPGradWeighting(), got "
                f"{weighting!r}. Pass an object{hint}."
            )
        self.weighting = weighting
        check_choice("when", when, get_args(When))
        self.when: When = when
        default = AVERAGED if when == "next step" else 0.0
        self.ema_decay: float = check_range("ema_decay", default if ema_decay is None else ema_decay, at_least=0, below=1)
        if when == "same step" and (self.ema_decay or update_every != 1):
            setting = f"ema_decay={ema_decay}" if self.ema_decay else f"update_every={update_every}"
            raise ValueError(
                f"when='same step' takes each step's weights from that step's own gradients, and {setting} from others'. Leave "
                "it out, or take when='next step'."
            )
        check_that("allow_negative", allow_negative, isinstance(allow_negative, bool), "true or false")
        self.allow_negative = allow_negative
        self._learnt = Learnt(weighting)
        self._parts = {"weighting": self._learnt}
        self._remembers = (("measured", 0.0),)
        self._warned = False
        self._acted: list[tuple[tuple[str, ...], Tensor]] = []  # tasks and weights of each backward of the step under way
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "weighting": self._learnt.description,
            "when": self.when,
            "ema_decay": self.ema_decay,
            "allow_negative": self.allow_negative,
        }

    @property
    def acts_in_backward(self) -> bool:
        return self.when == "same step" and not self.frozen

    @torch.no_grad()
    def weigh(self, measurement: Measurement) -> Tensor:
        taking_part = without_idle(measurement, mask_of(measurement, self.needs))
        found = self._found(taking_part)
        weights = self.weights_for(measurement.tasks).to(found)
        usable = bool(found.isfinite().all())
        if usable:
            weights[[measurement.tasks.index(task) for task in taking_part.tasks]] = found
        # Else the last ones act once more, and the update is skipped.
        self._acted.append((measurement.tasks, weights if usable else torch.full_like(weights, torch.nan)))
        return weights

    def update(self, measurement: Measurement | None) -> None:
        try:
            super().update(measurement)
        finally:
            self._acted.clear()

    def drop_step(self) -> None:
        self._acted.clear()

    def _may_read(self, measurement: Measurement) -> bool:
        return True  # the weighting runs on the host

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self._mean_acted(measurement.tasks) if self._acted else self._found(measurement)
        found = found.to(state["weights"])
        measured = state["measured"] + 1
        share = (1 / measured).clamp_min(1 - self.ema_decay)
        averaged = state["weights"] + share * (found - state["weights"])
        return {"weights": self._applicable(averaged), "measured": measured}

    def _mean_acted(self, tasks: Sequence[str]) -> Tensor:
        """Of the weights that the batches of the step applied, ``[T]``; 1 for a task that was alone in each of its own."""
        every = {task: [w[there.index(task)] for there, w in self._acted if task in there] for task in tasks}
        one = torch.ones((), dtype=torch.float64)
        return torch.stack([torch.stack(weights or [one]).mean() for weights in every.values()])

    def _applicable(self, weights: Tensor) -> Tensor:
        if self.when == "next step":
            return kept_readable(weights, allow_negative=self.allow_negative)
        return weights if self.allow_negative else weights.clamp_min(0)  # NaN stays

    def _found(self, measurement: Measurement) -> Tensor:
        """The weighting's weights of the measured gradients, ``[T]``, float64, on the CPU."""
        assert measurement.gramian is not None, "the contract has checked it"
        order = torch.tensor(self._in_order(measurement.tasks))
        weighed = self._ask(measurement.gramian.to("cpu", torch.float64)[order][:, order], measurement.tasks)
        found = torch.empty_like(weighed).index_copy(0, order, weighed)
        if not self.allow_negative and not self._warned and bool((found < -LEAST * found.abs().amax()).any()):
            self._warned = True
            negative = [task for task, weight in zip(measurement.tasks, found.tolist(), strict=True) if weight < 0]
            warnings.warn(
                f"{self.settings()['weighting']} gave {', '.join(map(repr, negative))} a negative weight, under which a loss "
                "rises. It is cut off at next to 0. To apply such weights, say GramianWeighting(…, allow_negative=True).",
                stacklevel=2,
            )
        return self._applicable(found)

    def _ask(self, gramian: Tensor, tasks: Sequence[str]) -> Tensor:
        if not bool(gramian.isfinite().all()):
            return gramian.new_full(gramian.shape[:1], torch.nan)  # the step is skipped; nothing is learnt of it
        before = self._learnt.state_dict()
        with random_numbers_of(self.steps, gramian.device), self._told_of_absent(tasks):
            found = self.weighting(gramian)
        if not isinstance(found, Tensor) or found.shape != gramian.shape[:1]:
            shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise ValueError(
                f"The weighting makes weights, shape ({len(gramian)},), out of the Gram matrix of {len(gramian)} tasks, and "
                f"gave {shape}. Of TorchJD, take the classes whose names end in Weighting and that take a Gramian."
            )
        if not bool(found.isfinite().all()):
            self._learnt.load_state_dict(before)  # the step is skipped
        return found.detach().to(torch.float64)
