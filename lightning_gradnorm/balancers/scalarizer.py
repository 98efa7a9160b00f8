"""Training on a scalar function of all losses: TorchJD's scalarisers, or one's own."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradnorm.balancers.checks import check_factory, check_range
from lightning_gradnorm.balancers.learnt import Learnt, random_numbers_of
from lightning_gradnorm.balancers.optimizer import OptimizerFactory
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.measurement import Measurement, stack_scalars


class _ParametersOptimizer:
    """The optimiser of what a scalariser learns.

    Args:
        factory: called as ``factory(parameters, lr=lr)``.
        parameters: at least one.
        lr: learning rate.
    """

    def __init__(self, factory: OptimizerFactory, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self._factory, self._parameters, self._lr = factory, list(parameters), lr
        self.reset()

    @property
    def name(self) -> str:
        return type(self._optimizer).__name__

    def reset(self) -> None:
        """Forget all."""
        self._optimizer = self._factory(self._parameters, lr=self._lr)

    def step(self, gradients: Iterable[Tensor | None]) -> None:
        """One step against these, one for each parameter; ``.grad`` is left empty."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self._optimizer.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``."""
        self._optimizer.load_state_dict(copy.deepcopy(dict(state)))


class ScalarizerBalancer(RuleBalancer):
    """Trains on s(L_1, …, L_T): the weight that is applied, reported and logged is ∂s/∂L_i at the step's own losses.

    TorchJD's scalarisers are taken as they are::

        from torchjd.scalarization import STCH

        LossBalancingCallback(ScalarizerBalancer(STCH(mu=0.1)))

    What the scalariser learns, as IMTL-L its scales, is trained on s by an optimiser of its own, once per optimiser step. It
    sees the tasks in the order in which they came first, or were declared. Random numbers that it draws are a function of the
    step: the same on every rank and after a resume. The total is Σ w_i L_i, whose gradient is that of s.

    FAMO is refused: its ``update`` wants the losses of the same batch once more, after the network's step.

    Source: TorchJD (Quinton, Rey 2024, arXiv 2406.16232), whose scalarisers each name their own.

    Args:
        scalarizer: L, ``[T]`` → scalar, differentiable.
        lr: learning rate of what the scalariser learns.
        optimizer: factory of its optimiser, called as ``optimizer(parameters, lr=lr)``.
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: of how many optimiser steps one is a step of what it learns.

    Raises:
        TypeError: if the scalariser cannot be called.
        ValueError: for one that wants a second look at the losses, or a setting outside its range; at a step, if it gives
            something else than a scalar that depends on the losses.
    """

    def __init__(
        self,
        scalarizer: Callable[..., Any],
        lr: float = 0.025,
        *,
        optimizer: OptimizerFactory = torch.optim.Adam,
        tasks: Iterable[str] | None = None,
        update_every: int = 1,
    ) -> None:
        if not callable(scalarizer) or isinstance(scalarizer, type):
            raise TypeError(
                f"scalarizer is a function of the losses, or an object such as TorchJD's STCH(0.1), got {scalarizer!r}."
            )
        if hasattr(scalarizer, "update"):
            raise ValueError(
                f"{type(scalarizer).__name__} wants the losses of the same batch once more after the network's step "
                "(update()), and in Lightning a batch is seen once. Take another scalariser."
            )
        self.scalarizer: Any = scalarizer
        self.lr: float = check_range("lr", lr, at_least=0)
        check_factory("optimizer", optimizer)
        step = getattr(scalarizer, "step", None)  # of TorchJD's dynamic weight average
        self._steps_by_epoch = callable(step) and not inspect.signature(step).parameters
        self._learnt, self._device = Learnt(scalarizer), torch.device("cpu")
        self._parameters = list(scalarizer.parameters()) if isinstance(scalarizer, nn.Module) else []
        self._optimizer = _ParametersOptimizer(optimizer, self._parameters, self.lr) if self._parameters else None
        self._parts = {"scalarizer": self._learnt} | ({} if self._optimizer is None else {"optimizer": self._optimizer})
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        settings = super().settings() | {"scalarizer": self._learnt.description}
        return settings if self._optimizer is None else settings | {"lr": self.lr, "optimizer": self._optimizer.name}

    def weights_at(self, losses: Mapping[str, Tensor]) -> Tensor:
        self._check_names(tuple(losses))
        with self._learnt.untouched():
            return self._slopes(stack_scalars(loss.detach() for loss in losses.values()), tuple(losses))[0]

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not bool(measurement.losses.isfinite().all()):
            return {"weights": torch.full_like(measurement.losses, torch.nan)}  # the step is skipped; nothing is learnt of it
        before = self._learnt.state_dict()
        weights, gradients = self._slopes(measurement.losses, measurement.tasks)
        if not bool(weights.isfinite().all()):
            self._learnt.load_state_dict(before)  # the step is skipped
        elif self._optimizer is not None and not self.frozen:
            self._optimizer.step(gradients)
            with self._learnt.untouched():
                weights, _ = self._slopes(measurement.losses, measurement.tasks)
        return {"weights": weights}

    def end_epoch(self) -> None:
        if self._steps_by_epoch:
            self.scalarizer.step()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._move_to(torch.device("cpu"))
        super().load_state_dict(state)

    def _move_to(self, device: torch.device) -> None:
        if isinstance(self.scalarizer, nn.Module):
            self.scalarizer.to(device)
        self._learnt.move(device)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(self._optimizer.state_dict())  # its memory goes to where the parameters are
        self._device = device

    def _slopes(self, losses: Tensor, tasks: Sequence[str]) -> tuple[Tensor, Sequence[Tensor | None]]:
        """∂s/∂L, ``[T]``, detached; and ∂s over what the scalariser learns."""
        if losses.device != self._device:
            self._move_to(losses.device)
        order = torch.tensor(self._in_order(tasks), device=losses.device)
        exact = torch.autocast(losses.device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), exact, random_numbers_of(self.steps, losses.device):
            leaf = losses[order].to(torch.get_default_dtype()).requires_grad_()
            with self._told_of_absent(tasks):
                total = self.scalarizer(leaf)
            if not isinstance(total, Tensor) or total.shape != () or not total.requires_grad:
                raise ValueError(
                    f"The scalariser makes one number out of {len(tasks)} losses, a tensor of shape () that depends on them, "
                    f"and gave {total!r}."
                )
            slopes, *gradients = torch.autograd.grad(total, [leaf, *self._parameters], allow_unused=True)
        found = torch.zeros_like(losses) if slopes is None else slopes.to(losses)
        return torch.empty_like(losses).index_copy(0, order, found), gradients
