"""Losses that a submodule returns, weighed on their way out; for libraries whose step and whose sum cannot be reached."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gradnorm.autograd_graph import nodes_met
from lightning_gradnorm.plain import plain_text

Terms = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def weigh_losses_of(name: str, network: nn.Module, terms: Terms) -> RemovableHandle:
    """Lay a forward hook that weighs the losses in the mapping that a submodule returns.

    Its entries that are scalars with a gradient are the losses; all else goes through as it is, as does whatever else the
    submodule returns, and what it returns without a gradient.

    Args:
        name: the submodule's dotted name, as in ``named_modules()``.
        network: whose submodule it is.
        terms: gives the weighed losses.

    Returns:
        What takes the hook off.

    Raises:
        ValueError: if there is no such submodule.
    """
    # A part that was compiled stands behind a wrapper, under whose name people do not know it.
    modules = {found.replace("_orig_mod.", ""): module for found, module in network.named_modules(remove_duplicate=False)}
    if name not in modules or not name:
        children = [child for child, _ in network.named_children()]
        raise ValueError(
            f"losses_of={name!r} names no submodule of {type(network).__name__}. Name the one whose forward returns a dict of "
            f"losses in training, as in named_modules(); at the top there are: {', '.join(children) or 'none'}."
        )

    handle: RemovableHandle = modules[name].register_forward_hook(_Weigh(name, terms))
    return handle


class _Weigh:
    """The hook. In a copy of the submodule, and in what is pickled of it, it lets all through."""

    def __init__(self, name: str, terms: Terms) -> None:
        self._name, self._terms = name, terms
        self._known: set[tuple[str, ...]] = set()  # what was seen to be losses, and no sum of them
        disable: Any = torch.compiler.disable
        self._outside_compiled_code: Callable[[Any], Any] = disable(self._weighed)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._outside_compiled_code(output)

    def _weighed(self, output: Any) -> Any:
        found = {key: loss for key, loss in output.items() if _is_loss(loss)} if isinstance(output, Mapping) else {}
        if not found:
            return None
        keys = {plain_text(key) or str(key): key for key in found}
        losses = {task: found[key] for task, key in keys.items()}
        if tuple(losses) not in self._known:
            _refuse_sums(losses, self._name)
            self._known.add(tuple(losses))
        weighed = copy.copy(output)
        for task, loss in self._terms(losses).items():
            weighed[keys[task]] = loss
        return weighed

    def __reduce__(self) -> tuple[type["_LetThrough"], tuple[()]]:
        return _LetThrough, ()


class _LetThrough:
    """The hook in a copy, which no session weighs."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pass


def _is_loss(value: object) -> bool:
    return isinstance(value, Tensor) and value.shape in ((), (1,)) and value.requires_grad and torch.is_grad_enabled()


def _refuse_sums(losses: Mapping[str, Tensor], name: str) -> None:
    """A total beside its terms would count each of them twice.

    Raises:
        RuntimeError: naming it.
    """
    nodes = {loss.grad_fn: task for task, loss in losses.items()}
    for task, loss in losses.items():
        others = {node: other for node, other in nodes.items() if other != task}
        if loss.grad_fn is not None and (parts := nodes_met(loss, others)):
            raise RuntimeError(
                f"losses_of={name!r}: the loss {task!r} is made of {', '.join(repr(others[node]) for node in parts)}, so it is "
                "their sum rather than a task's. Where the losses are at hand apart, hand these over: "
                "total_loss({'task': loss, …})."
            )
