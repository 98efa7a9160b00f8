"""The per-task loss dict: what is allowed in it, and its plain sum."""

import functools
import operator
from collections.abc import Container, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lightning_gradnorm.plain import plain_name, plain_number
from lightning_gradnorm.task_names import check_task_names

TaskLosses = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def check_losses(
    losses: TaskLosses, *, differentiable: bool, per_point: Container[str] = (), residuals_for: str = ""
) -> dict[str, Tensor]:
    """The loss dict, checked: plain names, plain scalar tensors, without the tasks that are absent.

    A task is absent where its loss is the number 0, or a zero that is detached though a backward will follow: a term that
    is switched off, or has no label in this batch. It is as if left out of the dict. (Only of a detached loss on a device
    is the number asked for, for which the host has to wait.) If all are, the dict is empty.

    Args:
        losses: task name → scalar loss; a mapping, or an iterable of pairs. One of shape (1,) is taken for a scalar.
        differentiable: whether a backward will follow, so that a detached loss is a mistake.
        per_point: the tasks whose loss is a vector, one entry per point.
        residuals_for: the method, if it is one that needs every loss per point, of any shape but a scalar's.

    Raises:
        TypeError: if ``losses`` or a loss is of the wrong kind.
        ValueError: if there is no loss, a loss is not a real scalar (or vector, as the case may be), is detached though a
            backward will follow, or a name cannot be used.
    """
    usable = isinstance(losses, Iterable) and not isinstance(losses, Tensor | str)
    pairs = list(losses.items() if isinstance(losses, Mapping) else losses) if usable else []
    if not usable or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError(
            f"total_loss() takes a dict of task name → loss, got {type(losses).__name__}. Write "
            "total_loss({'depth': depth_loss, 'normals': normals_loss})."
        )
    if not pairs:
        raise ValueError(
            "total_loss() needs at least one task's loss, got none. For a batch without any label, return None from "
            "training_step."
        )
    named = [(plain_name(task), _plain_tensor(loss)) for task, loss in pairs]
    check_task_names(task for task, _ in named)
    present = [(task, loss) for task, loss in named if not _is_absent(loss, differentiable)]
    whole = {task: _of_shape(task, loss, task in per_point, residuals_for) for task, loss in present}
    return {task: _checked(task, loss, differentiable) for task, loss in whole.items()}


def _plain_tensor(loss: Tensor) -> Tensor:
    """A subclass that only adds attributes, which its operations may lose, as a plain tensor; the graph is kept."""
    if type(loss) is Tensor or not isinstance(loss, Tensor):
        return loss
    if type(loss).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # it holds its numbers in its own way, as a DTensor does
        return loss
    with torch._C.DisableTorchFunctionSubclass():
        return loss.as_subclass(Tensor)


def _is_absent(loss: object, differentiable: bool) -> bool:
    if not isinstance(loss, Tensor):
        return plain_number(loss) == 0
    detached = differentiable and not loss.requires_grad
    return detached and loss.shape in ((), (1,)) and loss.dtype != torch.bool and bool(loss == 0)


def _of_shape(task: str, loss: Tensor, per_point: bool, residuals_for: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"The loss of task {task!r} is a {type(loss).__name__}; every loss is a scalar tensor.")
    if loss.shape == (1,) and not per_point and not residuals_for:
        return loss.reshape(())
    if per_point and (loss.ndim != 1 or not len(loss)):
        raise ValueError(
            f"The loss of task {task!r} has shape {tuple(loss.shape)}, and its points are weighed one by one: give one loss "
            "per point, shape (N,), without .mean(); or leave the task out of the callback's points={…}."
        )
    if residuals_for and not per_point and not (loss.ndim and loss.numel()):
        raise ValueError(
            f"The loss of task {task!r} has shape {tuple(loss.shape)}, and {residuals_for} looks at the residual of each "
            "point: give its square for each of them, shape (N,), as residual.square() without .mean(). Their mean is the loss."
        )
    if loss.ndim and not per_point and not residuals_for:
        raise ValueError(
            f"The loss of task {task!r} has shape {tuple(loss.shape)}; every loss is a scalar (shape ()). Reduce it, for "
            "example with .mean(); or have its points weighed one by one, with a balancing callback's "
            f"points={{{task!r}: SelfAdaptivePoints()}}."
        )
    return loss


def _checked(task: str, loss: Tensor, differentiable: bool) -> Tensor:
    if not loss.is_floating_point():
        kind = "complex" if loss.is_complex() else "not a floating-point number"
        raise ValueError(
            f"The loss of task {task!r} is {kind} ({loss.dtype}). Pass a real loss, for example loss.abs() or loss.float()."
        )
    if differentiable and not loss.requires_grad:
        raise ValueError(
            f"The loss of task {task!r} is detached from the network (requires_grad is False), so it can train nothing. "
            "Compute it without .detach(), .item() or no_grad; for a batch that has no label for it, leave the task out of "
            "the dict, or give 0.0."
        )
    return loss


class StackedLosses(Mapping[str, Tensor]):
    """Task → detached scalar, held as one vector until a single loss is asked for.

    Args:
        tasks: their names.
        vector: L_i, shape ``[T]``.
    """

    def __init__(self, tasks: Iterable[str], vector: Tensor) -> None:
        self._tasks: tuple[str, ...] = tuple(tasks)
        self.vector: Tensor = vector

    def __getitem__(self, task: str) -> Tensor:
        return self._scalars[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    @functools.cached_property
    def _scalars(self) -> dict[str, Tensor]:
        return dict(zip(self._tasks, self.vector.unbind(), strict=True))


def plain_sum(losses: Mapping[str, Tensor]) -> Tensor:
    """Σ_i L_i, scalar: what is trained without a balancer. Of no losses, a zero whose backward changes nothing."""
    if not losses:
        return torch.zeros((), requires_grad=torch.is_grad_enabled())
    total = functools.reduce(operator.add, losses.values())
    return total.clone() if len(losses) == 1 else total  # it may be added to in place, and the loss stays what it is


def weighted_sum(weights: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
    """Σ_i w_i L_i, scalar; the weights, shape ``[T]``, in the order of the losses."""
    return functools.reduce(torch.add, weighted_terms(weights, losses).values())


def weighted_terms(weights: Tensor, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Task → w_i L_i, scalar; the weights, shape ``[T]``, in the order of the losses."""
    weights = beside(next(iter(losses.values())), weights)
    return {task: weight * loss for (task, loss), weight in zip(losses.items(), weights.unbind(), strict=True)}


def beside(loss: Tensor, weights: Tensor) -> Tensor:
    """The weights on the loss's device, in its precision, or in float32 where that is less."""
    return weights.to(loss.device, torch.promote_types(loss.dtype, torch.float32))


def unweighted_total(losses: Tensor) -> Tensor:
    """Σ_i L_i of a ``[T]`` vector that holds NaN for tasks that are absent."""
    return torch.nansum(losses)
