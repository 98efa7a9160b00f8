"""The weights' own optimiser: kept apart from the network's, and taken back where an update is refused."""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradnorm.balancers.arrays import Vector, as_tensor, on_host
from lightning_gradnorm.balancers.plain_step import plain_step
from lightning_gradnorm.measurement import reading_is_free, widest_float

OptimizerFactory = Callable[..., Optimizer]


class VectorOptimizer:
    """A torch optimiser of one ``[T]`` vector that can grow, and whose steps can be refused entry by entry.

    Args:
        factory: called as ``factory([vector], lr=lr)``: an optimiser class, or a ``functools.partial`` of one.
        lr: learning rate.
    """

    def __init__(self, factory: OptimizerFactory, lr: float) -> None:
        self._factory, self._lr = factory, lr
        self.reset()

    def reset(self) -> None:
        """An optimiser of no entries yet, without memory."""
        self._build(torch.zeros(0, dtype=torch.float64))

    @property
    def name(self) -> str:
        """The optimiser's class."""
        return type(self._optimizer).__name__

    def _build(self, values: Tensor) -> None:
        self._vector = values.clone().requires_grad_()
        self._optimizer = self._factory([self._vector], lr=self._lr)
        for group in self._optimizer.param_groups:
            if "capturable" in group and values.is_cuda:
                group["capturable"] = True  # its step counter then lives on the device, and reading it makes no one wait

    def step(self, values: Vector, gradient: Vector, accept: Vector | None = None, positions: Vector | None = None) -> Vector:
        """One step from ``values`` against ``gradient``.

        Args:
            values: where the step starts, shape ``[T]``.
            gradient: of the entries at ``positions``, shape ``[P]``; ignored where refused.
            accept: boolean, shape ``[P]``; ``None`` for all. A refused entry keeps its value and the optimiser's memory of it;
                where all are refused, nothing changes at all.
            positions: of the entries to step; the others are refused. ``None`` for all, in order.

        Returns:
            The new values at ``positions``, shape ``[P]``.
        """
        if not isinstance(values, Tensor):
            if accept is None and positions is None and values.shape == self._vector.shape and self._vector.is_cpu:
                stepped = plain_step(self._optimizer, self._vector, values, gradient)
                if stepped is not None:
                    return stepped
            given = (None if vector is None else as_tensor(vector) for vector in (accept, positions))
            return on_host(self.step(as_tensor(values), as_tensor(gradient), *given))
        if positions is None:
            return self._step(values, gradient, accept)
        accept = torch.ones_like(gradient, dtype=torch.bool) if accept is None else accept
        gradient = torch.zeros_like(values).index_copy(0, positions, gradient)
        accept = torch.zeros_like(values, dtype=torch.bool).index_copy(0, positions, accept)
        return self._step(values, gradient, accept)[positions]

    def _step(self, values: Tensor, gradient: Tensor, accept: Tensor | None) -> Tensor:
        if values.shape != self._vector.shape or values.device != self._vector.device:
            self._resize(values)
        if accept is None:
            return self._stepped(values, gradient)
        if reading_is_free(accept) and not accept.any():
            return values
        memory = self._optimizer.state[self._vector]
        before = {key: value.clone() for key, value in memory.items() if isinstance(value, Tensor)}
        stepped = self._stepped(values, torch.where(accept, gradient, 0.0))
        any_accepted = accept.any()
        for key, value in memory.items():
            if isinstance(value, Tensor):  # what a first step has just made was zero before
                keep = accept if value.shape == accept.shape else any_accepted.to(value.device)
                value.copy_(torch.where(keep, value, before.get(key, torch.zeros_like(value))))
        return torch.where(accept, stepped, values)

    def _stepped(self, values: Tensor, gradient: Tensor) -> Tensor:
        with torch.no_grad():
            self._vector.copy_(values)
        self._vector.grad = gradient
        self._optimizer.step()
        self._vector.grad = None
        return self._vector.detach().clone()

    def _resize(self, values: Tensor) -> None:
        """Follow the values to another length or device; new entries have no memory."""
        old, new = self._vector.shape, values.numel() - self._vector.numel()
        memory = self._optimizer.state_dict()["state"]
        self._build(values)
        state = {
            index: {key: self._grown(value, old, new, values) for key, value in entries.items()}
            for index, entries in memory.items()
        }
        self._load(state)

    @staticmethod
    def _grown(value: Any, old: torch.Size, new: int, like: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.shape != old:
            return value
        return torch.cat([value.to(like.device, like.dtype), like.new_zeros(new)])

    def _load(self, state: Mapping[int, Any]) -> None:
        self._optimizer.load_state_dict({"state": state, "param_groups": self._optimizer.state_dict()["param_groups"]})

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's memory; its settings stay those of the constructor."""
        memory = {key: entries for key, entries in copy.deepcopy(self._optimizer.state_dict()["state"]).items() if entries}
        return {"vector": self._vector.detach().clone(), "state": memory, "optimizer": self.name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a memory from ``state_dict``; one of another kind is left, with a warning, and starts anew."""
        vector = state["vector"]
        self._build(vector.to(widest_float(vector.device)))
        remembered = {name for entries in state["state"].values() for name, value in entries.items() if value is not None}
        was = state.get("optimizer")  # not in the states of 0.1
        wanted = self._names_of_memory() if remembered else set()
        fits = was == self.name and remembered >= wanted if was else remembered == wanted
        if not fits:
            was = was or f"one that remembers {', '.join(sorted(remembered))}"
            warnings.warn(
                f"The weights' optimiser in the checkpoint is {was}, and now it is {self.name}, which remembers other things: "
                "its memory starts anew, and the weights go on from where they were.",
                stacklevel=2,
            )
        elif remembered:
            self._load(copy.deepcopy(state["state"]))

    def _names_of_memory(self) -> set[str]:
        """What this optimiser remembers once it has made a step."""
        probe = self._vector.detach().clone().requires_grad_()
        optimizer = self._factory([probe], lr=self._lr)
        probe.grad = torch.zeros_like(probe)
        optimizer.step()
        return {name for name, value in optimizer.state[probe].items() if value is not None}
