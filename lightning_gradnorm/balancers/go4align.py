"""GO4Align, group optimisation for alignment (Shen, Wang, Xiao, Van Noord, Worring, NeurIPS 2024, arXiv 2404.06486)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_range, check_whole
from lightning_gradnorm.balancers.own_losses import OwnLosses
from lightning_gradnorm.measurement import Measurement

_LEAST_LOSS = 1e-30


def smoothed(log_smoothness: Tensor, losses: Tensor, beta: float) -> Tensor:
    """Log Q(t), Q(t) = σ[Q(t − 1) ⊙ exp(−β L(t))], Eq. (6), shape ``[T]``; σ keeps Σ Q as it was.

    Args:
        log_smoothness: log Q(t − 1), shape ``[T]``.
        losses: L(t), shape ``[T]``.
        beta: β, in one over the losses' units.
    """
    moved = log_smoothness - beta * losses
    return moved + (log_smoothness.logsumexp(0) - moved.logsumexp(0))


def group_indicators(losses: Tensor, log_smoothness: Tensor) -> Tensor:
    """γ_i = Q_i (Σ_j L_j / T) / L_i, Eq. (5) and (7): the mean loss over the task's own, smoothed; shape ``[T]``."""
    return log_smoothness.exp() * losses.mean() / losses.clamp_min(_LEAST_LOSS)


def group_means(values: Tensor, groups: int) -> Tensor:
    """ω⊺G, Eq. (3): for each value the mean of its group, in the grouping with the least squared distances to the means.

    On a line every group of that k-means is an interval, so dynamic programming over the sorted values finds the best of all
    groupings: it depends on no draw, and not on the order of the values.

    Args:
        values: at least 0, shape ``[T]``.
        groups: K, how many groups there are at most, at least 1.
    """
    ordered, order = values.sort()
    places = torch.arange(len(values), device=values.device)
    labels = torch.zeros_like(places).index_copy(0, order, _intervals(ordered, min(groups, len(values)), places))
    together = (labels[:, None] == labels).to(values)
    return together @ values / together.sum(1)


def _intervals(ordered: Tensor, groups: int, places: Tensor) -> Tensor:
    """The group of each sorted value, 0 to ``groups`` − 1, shape ``[T]``."""
    within = _squares_within(ordered / ordered[-1].clamp_min(torch.finfo(ordered.dtype).tiny), places)
    least, starts = within[0], []  # up to each value, with one group so far
    for _ in range(groups - 1):
        with_one_more = least.roll(1).index_fill(0, places[:1], torch.inf)[:, None] + within
        starts.append(with_one_more.argmin(0))  # of equals the first, on any device
        least = with_one_more.amin(0)
    labels, last = torch.zeros_like(places), places[-1:]
    for start in reversed(starts):
        first = start[last]
        labels, last = labels + (places >= first), first - 1
    return labels


def _squares_within(ordered: Tensor, places: Tensor) -> Tensor:
    """Entry i, j: the squared distances of the i-th to the j-th value to their mean, added up; infinite below the diagonal."""
    first, second = (torch.nn.functional.pad(power.cumsum(0), (1, 0)) for power in (ordered, ordered.square()))
    count = places - places[:, None] + 1
    sums, squares = first[1:] - first[:-1, None], second[1:] - second[:-1, None]
    return torch.where(count > 0, (squares - sums.square() / count.clamp_min(1)).clamp_min(0), torch.inf)


class GO4Align(OwnLosses):
    """Tasks that learn alike share a weight: w_i is the mean of γ over the group of task i, γ_i = Q_i (mean loss) / L_i.

    1 / L_i evens out the losses' sizes, Q_i ∝ exp(−β × the sum of task i's losses so far) favours the tasks whose losses have
    been small, and k-means on γ makes ``groups`` groups. With as many groups as tasks, as of two tasks by default, w = γ.

    The weights depend on the losses of the step itself, are constants for its gradient, and are what is reported; they are not
    bound to a sum. Under DDP and accumulation each batch has its own; Q is of the whole step. A task that comes late starts at
    the mean Q.

    The groups are those of γ itself, so losses of one order of magnitude are meant. A group whose losses are far apart gets a
    weight that suits the smallest of them and is too large for the others: take as many groups as there are sizes.

    Q forgets nothing: beside a task whose loss is lower by d, a task loses a factor of exp(β d N) over N steps. So β has to
    suit the losses' units and the length of the training; the default is that of the authors' program.

    Deviations: γ is T times Eq. (5) to (7), as in the authors' program, so that tasks of one size start at weights of one. The
    k-means is exact, where they start Lloyd's algorithm from random centres: the same on every rank and after a resume.

    Source: Shen, Wang, Xiao, Van Noord, Worring, NeurIPS 2024, arXiv 2404.06486.

    Args:
        groups: K, at least 1; the authors take 2 of 3 tasks, 5 of 11.
        beta: β, at least 0, in one over the losses' units; 0: no memory.
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one enters Q.

    Raises:
        ValueError: for a setting outside its range; for a negative loss.
    """

    _remembers = (("log_smoothness", 0.0),)

    def __init__(
        self, groups: int = 2, beta: float = 1e-4, *, tasks: Iterable[str] | None = None, update_every: int = 1
    ) -> None:
        self.groups: int = check_whole("groups", groups, "a whole number of groups, 1 or more", at_least=1)
        self.beta: float = check_range("beta", beta, at_least=0)
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"groups": self.groups, "beta": self.beta}

    def _weights_of(self, losses: Tensor, tasks: Sequence[str]) -> Tensor:
        return self._of(losses, smoothed(self._remembered("log_smoothness", tasks, losses), losses, self.beta))

    def _of(self, losses: Tensor, log_smoothness: Tensor) -> Tensor:
        return group_means(group_indicators(losses, log_smoothness), self.groups)

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        log_smoothness = smoothed(state["log_smoothness"], measurement.losses, self.beta)
        return {"weights": self._of(measurement.losses, log_smoothness), "log_smoothness": log_smoothness}
