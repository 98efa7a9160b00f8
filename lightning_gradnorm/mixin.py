"""What a LightningModule mixes in: the tasks' losses, their total, the layer that the tasks share."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradnorm.losses import TaskLosses, check_losses, plain_sum
from lightning_gradnorm.shared_layer import SharedLayerSpec

_METHODS = "total_loss", "task_losses"
_GUARDED = *_METHODS, "shared_layer"
_NAMES = *_GUARDED, "training_step"


class _GivenLayer:
    """``shared_layer``: a method where nothing stands under that name, and else what does: a submodule or a parameter."""

    def __init__(self, method: Callable[[Any], SharedLayerSpec | None]) -> None:
        self._method, self.__doc__ = method, method.__doc__

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self._method
        for held in (vars(module).get("_modules"), vars(module).get("_parameters")):
            if held and held.get("shared_layer") is not None:
                return held["shared_layer"]
        return self._method.__get__(module, owner)


class MultiTaskMixin:
    """Gives a module with several losses one total, which a balancing callback can weigh.

    Put it before ``LightningModule`` in the bases, and write the module in either of two ways: return
    ``self.total_loss({...})`` from ``training_step``, or define ``task_losses`` and leave ``training_step`` out. A
    ``training_step`` that another base brings stays what it is.

    Without a balancing callback the total is the plain sum of the losses, so an ablation is deleting one line.
    """

    _loss_balancing: Any = None  # put here by the callback while its Trainer is at work

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            _check_attribute(name, value)
        _hide_nothing(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _GUARDED:  # a Trainer sets dozens of others in every step
            _check_attribute(name, value)
        if name == "shared_layer" and isinstance(value, nn.Parameter):
            vars(self)["_parameters"][name] = value  # register_parameter takes the method for something that is there already
        else:
            super().__setattr__(name, value)

    @_GivenLayer
    def shared_layer(self) -> SharedLayerSpec | None:
        """The layer that all tasks share, on whose parameters their gradients are compared (the paper's W).

        Override it to choose: return a module, a parameter, the dotted name of either, or an iterable of these; or let one of
        these stand under this name. Each task needs to reach some of those parameters, not all: networks of several subdomains
        can be given together. ``None`` has the layer found: the last weights on which every task has a gradient in the first
        training batches.
        """
        return None

    def task_losses(self, batch: Any, batch_idx: int) -> TaskLosses:
        """Task name → scalar loss of one batch; what the default ``training_step`` calls.

        Args:
            batch: what the loader gave.
            batch_idx: its number in the epoch.

        Raises:
            NotImplementedError: where it is not overridden.
        """
        raise NotImplementedError(
            f"{type(self).__name__} defines neither training_step nor task_losses. Define task_losses(batch, batch_idx) to "
            "return a dict of task name → loss, or training_step to return self.total_loss(that dict)."
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Total loss of the batch, scalar.

        Args:
            batch: what the loader gave.
            batch_idx: its number in the epoch.
        """
        return self.total_loss(self.task_losses(batch, batch_idx))

    def total_loss(
        self, losses: TaskLosses, *, kpis: Mapping[str, Any] | None = None, points: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The loss to train on, scalar: Σ_i w_i L_i with the callback's present weights; without a callback, Σ_i L_i.

        Call it once per training step, with all tasks that the batch has labels for; further terms can be added to what
        it returns. Outside training it is Σ_i L_i, with the callback or without, so that validation compares across epochs
        and runs.

        Args:
            losses: task name → scalar loss. Names appear in the loggers' tags. A task named in the callback's ``points`` has
                one loss per point instead, shape ``[N]``; with ``NTKWeighting`` every task has.
            kpis: task name → key performance indicator between 0 and 1, for methods that prioritise by it: a number, a scalar
                tensor, a torchmetrics ``Metric`` or a callable without arguments; not looked at by other methods.
            points: task name → what identifies the points of its per-point losses: their indices ``[N]`` among fixed
                points (``SelfAdaptivePoints``; not needed where every batch has all of them), or their coordinates
                ``[N, …]`` (``GradientNormPoints``).

        Raises:
            TypeError, ValueError: for a loss dict that cannot be used; the message names the task and the way out.
        """
        link = self._loss_balancing
        differentiable = torch.is_grad_enabled() and bool(getattr(self, "training", True))
        if link is None:
            return plain_sum(check_losses(losses, differentiable=differentiable))
        total: Tensor = link.total(losses, kpis or {}, points or {}, differentiable=differentiable)
        return total


def _hide_nothing(cls: type) -> None:
    """Let through what a base after the mixin brings under the mixin's names, where no class before the mixin has its own.

    Raises:
        TypeError: for a ``total_loss``, of which there can be one.
    """
    order = list(cls.__mro__)
    ours = order.index(MultiTaskMixin)
    brought: dict[str, Any] = {}
    for base in reversed(order[ours + 1 :]):
        if base.__name__ != "LightningModule":
            brought |= {name: value for name, value in vars(base).items() if name in _NAMES}
            if "total_loss" in vars(base):
                brought["total_loss"] = base
    own = {name for base in order[:ours] for name in _NAMES if vars(base).get(name) not in (None, brought.get(name))}
    if "total_loss" in brought and "total_loss" not in own:
        vendor = brought["total_loss"].__name__
        raise TypeError(
            f"{vendor} has a total_loss of its own, which MultiTaskMixin would hide from it. Put MultiTaskMixin on a class "
            f"that has none, or rename the one of {vendor}."
        )
    for name in brought.keys() - own - {"total_loss"}:
        is_step = name == "training_step" and "task_losses" in own
        setattr(cls, name, MultiTaskMixin.training_step if is_step else brought[name])


def _check_attribute(name: str, value: Any) -> None:
    """Refuse what would stand in the way of a method of the mixin."""
    method = callable(value) and not isinstance(value, nn.Module)
    if method or isinstance(value, property | staticmethod | classmethod | _GivenLayer):
        return
    if name in _METHODS:
        raise TypeError(
            f"{name} is a method of MultiTaskMixin, and a {type(value).__name__} would take its place here. Give it another "
            "name."
        )
    layer = isinstance(value, nn.Module | nn.Parameter | str | list | tuple) or value is None
    if name == "shared_layer" and not layer:
        raise TypeError(
            "shared_layer is the name by which MultiTaskMixin asks for the layer that the tasks share: a module, a parameter, "
            f"the dotted name of either, or a list of these. Give the {type(value).__name__} another name."
        )


def check_attributes(module: Any) -> None:
    """Refuse a module in which the mixin's names stand for something else; for those whose bases let that through.

    Raises:
        TypeError: naming the attribute.
    """
    held: dict[str, Any] = vars(module) | module._modules | module._parameters | module._buffers
    for name in _GUARDED:
        if name in held:
            _check_attribute(name, held[name])


def shared_layer_of(module: Any) -> SharedLayerSpec | None:
    """What the module names as its shared layer, by the method or by what stands under its name."""
    if not isinstance(module, MultiTaskMixin):
        return None  # whatever it has under that name, nobody meant this
    found: Any = module.shared_layer
    given: SharedLayerSpec | None = found() if callable(found) and not isinstance(found, nn.Module) else found
    return given
