"""What a total leaves behind for the backward and the step that follow."""

import functools
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.gradients import tap_losses
from lightning_gradnorm.losses import StackedLosses, beside, weighted_terms
from lightning_gradnorm.plain import plain_keys
from lightning_gradnorm.pointwise import NotedPoints, PointWeighting
from lightning_gradnorm.session.kpis import read_kpis


class NotedLosses(NamedTuple):
    """What one total left behind for the backward that follows.

    Attributes:
        losses: task name → the loss, with its graph; tapped where gradients are to be read.
        tapped: whether they are tapped.
        weights: those that the total applied, shape ``[T]``.
        roots: copies of the losses, with their graph, that the total is made of: one each, or all in one ``[T]`` vector.
        values: task name → the loss as it was, detached scalar, whatever happens to it in place.
        kpis: task name → scalar, where the method needs them.
        points: task name → its points, where they are weighed one by one.
        residuals: task name → the squared residuals of its points, with their graph, where they are to be read.
        is_total: whether it has all losses of a step, and not one term.
    """

    losses: dict[str, Tensor]
    tapped: bool
    weights: Tensor
    roots: Sequence[Tensor]
    values: Mapping[str, Tensor]
    kpis: dict[str, Tensor]
    points: dict[str, NotedPoints]
    residuals: dict[str, Tensor]
    is_total: bool = True

    @classmethod
    def joined(cls, noted: Sequence["NotedLosses"]) -> "NotedLosses":
        """Several totals that one backward runs through, as one.

        Raises:
            RuntimeError: if a task is in two of them.
        """
        tasks = [task for one in noted for task in one.losses]
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        if twice:
            raise RuntimeError(
                f"One backward runs through two totals of task {', '.join(map(repr, twice))}. Call total_loss() once with the "
                "losses of all tasks, or run a backward of its own for each total."
            )
        return cls(
            {task: loss for one in noted for task, loss in one.losses.items()},
            noted[0].tapped,
            torch.cat([one.weights for one in noted]),
            [root for one in noted for root in one.roots],
            {task: value for one in noted for task, value in one.values.items()},
            {task: kpi for one in noted for task, kpi in one.kpis.items()},
            {task: points for one in noted for task, points in one.points.items()},
            {task: residuals for one in noted for task, residuals in one.residuals.items()},
        )

    def is_met_by(self, nodes: Container[Node | None]) -> bool:
        """Whether one of its roots is among these nodes of a graph, or has none of its own."""
        return any(root.is_leaf or root.grad_fn in nodes for root in self.roots)

    def terms(self) -> dict[str, Tensor]:
        """Task → w_i L_i, scalar."""
        return weighted_terms(self.weights, dict(zip(self.losses, self.roots, strict=True)))

    def total(self) -> Tensor:
        """Σ_i w_i L_i, scalar."""
        if len(self.roots) < len(self.losses):
            (losses,) = self.roots
            weights = beside(losses, self.weights)
            return torch.dot(weights, losses.to(weights.dtype))
        return functools.reduce(torch.add, self.terms().values())


def note(
    balancer: LossBalancer,
    points: Mapping[str, PointWeighting],
    losses: Mapping[str, Tensor],
    network: nn.Module,
    kpis: Mapping[str, Any],
    given_points: Mapping[str, Tensor],
    *,
    tapped: bool,
    is_total: bool,
    as_one: bool,
) -> NotedLosses:
    """Checked losses, weighed with the present weights.

    Args:
        balancer: the method.
        points: task → how its points are weighed.
        losses: task name → scalar loss; of a task of ``points``, and where the method needs residuals, one loss per point.
        network: what they were computed with.
        kpis: task name → key performance indicator.
        given_points: task name → what identifies its points.
        tapped: whether the tasks' gradients are to be read.
        is_total: whether they are all losses of a step.
        as_one: whether nothing but their total is wanted.
    """
    indicators = read_kpis(losses, plain_keys(kpis)) if "kpis" in balancer.needs else {}
    weighed: dict[str, NotedPoints] = {}
    if points:
        given_points = plain_keys(given_points)
        weighed = {task: NotedPoints(losses[task].detach(), given_points.get(task)) for task in losses if task in points}
    terms = {
        task: loss
        if not loss.ndim
        else points[task].term(loss, given_points.get(task), network)
        if task in weighed
        else loss.mean()
        for task, loss in losses.items()
    }
    terms = tap_losses(terms) if tapped else terms
    scalars = list(terms.values())
    weights = balancer.applied_at(terms)
    values: Mapping[str, Tensor]
    if as_one and not tapped and _are_alike(scalars):  # few operations, however many tasks there are
        roots = [torch.stack(scalars)]
        values = StackedLosses(terms, roots[0].detach())
    else:
        roots = scalars if tapped else [scalar.clone() for scalar in scalars]
        values = {task: root.detach() for task, root in zip(terms, roots, strict=True)}
    residuals = {task: loss.clone() for task, loss in losses.items()} if tapped and balancer.needs_residuals else {}
    return NotedLosses(terms, tapped, weights, roots, values, indicators, weighed, residuals, is_total)


def _are_alike(scalars: Sequence[Tensor]) -> bool:
    """Whether they are plain tensors of one kind, more than one, that can be one vector; autocast stacks no other half's."""
    kinds = {(type(scalar), scalar.dtype, scalar.device) for scalar in scalars}
    is_one_kind = len(scalars) > 1 and len(kinds) == 1
    return is_one_kind and type(scalars[0]) is Tensor and scalars[0].dtype in (torch.float32, torch.float64)


def multiplied_twice(task: str) -> str:
    """What is said of a second loss of one task in one step."""
    return (
        f"The weight of task {task!r} multiplied two losses in one step, and a task has one. Give each term a weight of its "
        f"own, such as weight('{task} 2'); or, where all losses are at hand, hand them over at once: "
        "total_loss({'task': loss, …})."
    )


def returned_twice(tasks: Iterable[str]) -> str:
    """What is said of a submodule that returns its losses a second time in one step."""
    return (
        f"The submodule that losses_of names returned losses of the tasks {list(tasks)} twice in one step, and a task has one. "
        "Where all losses are at hand, add up those of a task and hand them over at once: total_loss({'task': loss, …})."
    )


def called_twice(first: Iterable[str], now: Iterable[str]) -> str:
    """What is said of a second total in one step, with the tasks of both."""
    return (
        f"total_loss() was called twice in one step: first for the tasks {list(first)}, now for {list(now)}. Call it once with "
        "the losses of all tasks; add terms that are not to be balanced to what it returns."
    )


def not_handed_over(noted: Sequence[NotedLosses], name: str) -> str:
    """What is said of a batch whose losses did not come, or came and had no backward that was announced.

    Args:
        noted: the losses that were weighed in it, and wait for their backward.
        name: of what the user sees.
    """
    tasks = [task for one in noted for task in one.losses]
    if not tasks:
        return (
            f"A batch handed no losses over, so {name} has nothing to weigh. Where all of them are at hand, write "
            "total_loss({'task': loss, …}) in the place of their sum, in the thread of the batch: replicas of DataParallel run "
            "in threads of their own."
        )
    return (
        f"The losses of a batch, of the tasks {tasks}, were weighed, but no before_backward() of what they add up to "
        "followed, so the weights stay as they are. Call session.before_backward(loss) before the backward of that loss, and "
        "session.after_backward() after it."
    )
