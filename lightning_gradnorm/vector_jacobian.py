"""One node of the autograd graph run by hand: its vector-Jacobian product, and nothing else.

The engine runs more than a node's formula: the hooks that users have laid on tensors, modules and nodes, ``retain_grad``, and
what it adds to ``.grad``. Reading a gradient must not do any of that a second time. A node called by hand runs its formula
alone.

What a node has saved may come through hooks (``torch.utils.checkpoint``, saving on the CPU), which may run the forward pass of
modules once more; what that changes is put back.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_gradnorm.partial_products import PARTS, Gradients


def inputs_of(node: Node) -> int:
    """How many gradients the node takes: as many as its operation had outputs."""
    return len(_metadata(node))


def rows_of(node: Node) -> int:
    """Length of the first dimension of the node's (first) output; 1 for a scalar."""
    shape = _metadata(node)[0].shape
    return int(shape[0]) if shape else 1


def shape_of(node: Node) -> tuple[int, ...]:
    """Of the node's (first) output."""
    return tuple(_metadata(node)[0].shape)


def dtype_of(node: Node) -> torch.dtype:
    """Of the node's (first) output."""
    return cast(torch.dtype, _metadata(node)[0].dtype)


def _metadata(node: Node) -> Sequence[Any]:
    return cast(Sequence[Any], cast(Any, node)._input_metadata)


class VectorJacobianProduct:
    """What a node sends down for what arrives at it; no hook runs. Made once for as many cotangents as come.

    Args:
        node: not a leaf, and not used up.
        wanted: which of the ``node.next_functions`` are asked for; see ``partial_products`` for where the others cost nothing.
    """

    def __init__(self, node: Node, wanted: Sequence[bool]) -> None:
        self._node, self._wanted, self._inputs = node, wanted, range(inputs_of(node))
        self._part = None if all(wanted) else PARTS.get(type(node).__name__)
        self._ways = [
            (child, number, _metadata(child)[number]) if asked and child is not None else None
            for (child, number), asked in zip(node.next_functions, wanted, strict=True)
        ]

    def __call__(self, held: Mapping[int, Tensor]) -> Iterator[tuple[Node, int, Tensor]]:
        """(child, its input, cotangent) for what was brought: input of the node → cotangent, at least one."""
        if not any(self._ways):
            return
        for gradient, way in zip(self._found([held.get(i) for i in self._inputs]), self._ways, strict=True):
            if gradient is not None and way is not None:
                child, number, metadata = way
                yield child, number, _as_taken(gradient, metadata)

    def _found(self, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        if self._part is not None:
            return self._part(self._node, cast(Tensor, cotangents[0]), self._wanted)
        if isinstance(self._node, BackwardCFunction):
            return _of_python_function(self._node, cotangents)
        result = cast(Callable[..., Any], self._node)(*cotangents)
        return result if isinstance(result, tuple) else (result,)


def added(held: Tensor, gradient: Tensor) -> Tensor:
    """The sum of two gradients of one tensor, of which either may be sparse."""
    return gradient + held if held.is_sparse and not gradient.is_sparse else held + gradient


def _as_taken(gradient: Tensor, metadata: Any) -> Tensor:
    """As the engine hands it over: summed over what was broadcast, in the dtype of what it is the gradient of."""
    if metadata.is_nested_tensor:
        return gradient
    if list(gradient.shape) != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    if gradient.dtype != metadata.dtype:
        gradient = (gradient if metadata.dtype.is_complex or not gradient.is_complex() else gradient.real).to(metadata.dtype)
    return gradient


def _of_python_function(node: Any, cotangents: Sequence[Tensor | None]) -> Gradients:
    """The ``backward`` that somebody wrote: it may return an entry for arguments that are no tensors too."""
    given = [
        torch.zeros(metadata.shape, dtype=metadata.dtype, device=metadata.device) if cotangent is None else cotangent
        for cotangent, metadata in zip(cotangents, _metadata(node), strict=True)
    ]
    result = (None, *given) if type(node).__name__ in _PASS_ON else _run_for_once(node, given)
    found = iter([gradient for gradient, needed in zip(result, node.needs_input_grad, strict=False) if needed])
    return [None if child is None else next(found, None) for child, _ in node.next_functions]


def _run_for_once(node: Any, cotangents: Sequence[Tensor]) -> tuple[Any, ...]:
    """A ``backward`` that expects to run once may free what its context holds, or scale it in place: that is put back."""
    held = dict(vars(node))
    saved = () if _hook_of(node._raw_saved_tensors) is not None else node.saved_tensors
    kept = [(tensor, tensor.detach().clone()) for tensor in (*saved, *held.values()) if _may_be_written_to(tensor)]
    with contextlib.ExitStack() as versions:
        for tensor, _ in kept:
            versions.enter_context(torch.autograd.grad_mode._unsafe_preserve_version_counter(tensor))
        result = node.apply(*cotangents)
    places = {_place_of(tensor) for tensor, _ in kept}
    gradients = result if isinstance(result, tuple) else (result,)
    found = tuple(g.clone() if _may_be_written_to(g) and _place_of(g) in places else g for g in gradients)
    for tensor, value in kept:
        tensor.data.copy_(value)
    vars(node).clear()
    vars(node).update(held)
    return found


def _may_be_written_to(held: Any) -> bool:
    plain = type(held) in (Tensor, nn.Parameter) and held.layout is torch.strided and not held.is_inference()
    return plain and torch._debug_has_internal_overlap(held) != 1


def _place_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_SHARDED = "RegisterPostBackwardFunctionBackward"  # FSDP2's: gives a module's parameters back to their ranks
# They pass on what arrives, and do for the ordinary backward what only that may do.
_PASS_ON = {"_DDPSinkBackward", _SHARDED}


def has_shards(nodes: Iterable[Node]) -> bool:
    """Whether parameters on the way are whole only while autograd's engine, and the hooks that it runs, is at them."""
    return any(type(node).__name__ == _SHARDED for node in nodes)


# -- what was saved through hooks ----------------------------------------------------------------------------------


_HIDES = "CopySlices"


@functools.lru_cache(maxsize=1024)
def _saved_by(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved"))


def frames_of(nodes: Iterable[Node]) -> dict[Node, int]:
    """Those of the nodes that have saved tensors through hooks → whose hooks, a checkpoint's or another's.

    A write into a part of a tensor hides what it has saved, and is one for itself.
    """
    frames = {}
    for node in nodes:
        if type(node).__name__ == _HIDES:
            frames[node] = id(node)
        for name in _saved_by(type(node)):
            hook = _hook_of(getattr(node, name))
            if hook is not None:
                frames[node] = id(hook)
                break
    return frames


def _hook_of(saved: Any) -> object | None:
    if isinstance(saved, tuple):
        return next(filter(None, map(_hook_of, saved)), None)
    return getattr(saved, "unpack_hook", _hook_of)  # before torch could be asked: there may be one, somebody's


def in_graph_task(function: Callable[..., None], *args: Any) -> None:
    """Call the function within a run of autograd's engine that does nothing else.

    A checkpoint hands out each tensor that it has recomputed once in a run.
    """
    start = torch.zeros((), requires_grad=True)
    with torch.enable_grad():
        run = start.view_as(start)
    assert run.grad_fn is not None, "it has just been made"
    run.grad_fn.register_hook(lambda *_: torch.no_grad()(function)(*args))
    torch.autograd.backward(run)


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """What modules have counted in their buffers meanwhile is put back, and random numbers go on as before.

    A checkpointed region runs the forward pass of its modules once more, and they count once more (BatchNorm, spectral norm).
    """
    devices = [torch.cuda.current_device()] if cast(Any, torch.cuda).is_initialized() else []
    before: dict[tuple[int, str], tuple[nn.Module, Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: Any) -> None:
        for name, buffer in module.named_buffers(recurse=False):
            before.setdefault((id(module), name), (module, buffer, buffer.detach().clone()))

    handle = register_module_forward_pre_hook(keep)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        handle.remove()
        for (_, name), (module, buffer, value) in before.items():
            buffer.data.copy_(value)  # past the version counter: the graph may have saved it
            module._buffers[name] = buffer
