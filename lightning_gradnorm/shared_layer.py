"""What W is: the shared parameters on which the tasks' gradients are compared.

Given by the user (a module, a parameter, several of them, a dotted name), or found in the autograd graph of the first
training batch. The paper takes "generally the last shared layer", to save on compute.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from lightning_gradnorm.autograd_graph import first_uses

SharedLayerSpec = nn.Module | nn.Parameter | str | Iterable[nn.Module | nn.Parameter | str]

_PART = re.compile(r"(?<=\.)original\d*$")
_T = TypeVar("_T")
_OVERRIDE = "Override shared_layer() in your LightningModule to return the layer that all tasks share"


@dataclass(frozen=True)
class SharedLayer:
    """The shared parameters W.

    Attributes:
        names: their dotted names in the network; of the modules, where it stands for their outputs.
        parameters: the parameters, each once, all trainable; none where it stands for modules' outputs.
        reason: why these: for people to read.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    reason: str

    def __str__(self) -> str:
        if not self.parameters:
            return f"{', '.join(self.names)}, {self.reason}"
        entries = sum(parameter.numel() for parameter in self.parameters)
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in zip(self.names[:4], self.parameters, strict=False))
        more = f" and {len(self.names) - 4} more" if len(self.names) > 4 else ""
        return f"{shapes}{more}: {entries:,} entries, {self.reason}"


def _named(pairs: Iterable[tuple[str, _T]]) -> Iterable[tuple[str, _T]]:
    """The names as the user wrote the network: without what ``torch.compile`` puts between."""
    return ((name.replace("_orig_mod.", "").removesuffix("._orig_mod"), value) for name, value in pairs)


def resolve_shared_layer(spec: SharedLayerSpec, network: nn.Module) -> SharedLayer:
    """W as the user gave it.

    Args:
        spec: a module (all its trainable parameters), a parameter, the dotted name of either, or an iterable of these.
        network: the module that they belong to, for their names.

    Raises:
        TypeError: if ``spec`` is of another kind.
        ValueError: if a name is unknown, a parameter is not the network's, there is none, all are frozen, or one is sharded.
    """
    given = _given(spec, network)
    trainable = [parameter for parameter in given if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            f"The shared layer is frozen: none of its parameters ({', '.join(list(given.values())[:4])}) requires grad, so no "
            "task "
            f"has a gradient there. {_OVERRIDE} and is trained, or unfreeze it."
        )
    _refuse_sharded({parameter: given[parameter] for parameter in trainable})
    return SharedLayer(tuple(given[p] for p in trainable), tuple(trainable), "given by shared_layer()")


def _refuse_sharded(names: Mapping[nn.Parameter, str]) -> None:
    # By name: DTensor has moved between modules of torch, and importing it takes long.
    sharded = [name for parameter, name in names.items() if type(parameter).__name__ == "DTensor"]
    if sharded:
        more = f" and {len(sharded) - 4} more" if len(sharded) > 4 else ""
        raise ValueError(
            "Each task's gradient on the shared layer is read from whole parameters, and when the backward began each rank "
            f"held only its shard of {', '.join(sharded[:4])}{more}. Take norm_of='features' with a shared_layer() that names "
            "the module; or, with FSDP2, keep the shared layer whole from the forward to the backward: "
            "fully_shard(layer, reshard_after_forward=False)."
        )


def feature_modules(spec: SharedLayerSpec | None, network: nn.Module) -> list[nn.Module]:
    """The modules whose outputs are the shared features: those that ``spec`` names, or that own the parameters it names.

    Raises:
        TypeError: if ``spec`` is of a kind that ``shared_layer()`` cannot return.
        ValueError: if it is ``None`` (the features must be known before the forward pass), or names nothing of ``network``.
    """
    if spec is None:
        raise ValueError(
            "norm_of='features' reads the gradient at the shared layer's output, and shared_layer() names no layer. "
            f"{_OVERRIDE}."
        )
    if not isinstance(spec, nn.Module) or spec not in network.modules():  # a module without parameters has features too
        _given(spec, network)
    return list(dict.fromkeys(_modules(spec, network)))


def shared_features(spec: SharedLayerSpec | None, network: nn.Module) -> SharedLayer:
    """The layer as ``feature_modules`` takes it, for people to read: names of modules, and no parameters."""
    names = {module: name for name, module in _named(network.named_modules())}
    return SharedLayer(tuple(names[module] for module in feature_modules(spec, network)), (), "given by shared_layer()")


def owner_of(parameters: Iterable[Tensor], network: nn.Module) -> nn.Module | None:
    """The one module that all these parameters are the own ones of; ``None`` where they are several modules', or shared."""
    wanted = {id(parameter) for parameter in parameters}
    owners = [m for m in network.modules() if not wanted.isdisjoint(id(p) for p in m.parameters(recurse=False))]
    return owners[0] if len(owners) == 1 and wanted <= {id(p) for p in owners[0].parameters(recurse=False)} else None


def is_compiled(network: nn.Module) -> bool:
    """Whether ``torch.compile`` has been at the network or a part of it."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in network.modules())


def _modules(spec: SharedLayerSpec, network: nn.Module) -> Iterable[nn.Module]:
    modules = dict(_named(network.named_modules(remove_duplicate=False)))
    if isinstance(spec, nn.Module):
        yield spec
    elif isinstance(spec, str) and spec in modules:
        yield modules[spec]
    elif isinstance(spec, nn.Parameter | str):
        wanted = {id(parameter) for parameter in _parameters(spec, network)}
        yield from (m for m in network.modules() if any(id(p) in wanted for p in m.parameters(recurse=False)))
    else:
        for part in spec:
            yield from _modules(part, network)


def _given(spec: SharedLayerSpec, network: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters that ``spec`` stands for → their names; each once, as a tied parameter counts once in the norm."""
    given = list(dict.fromkeys(_parameters(spec, network)))
    if not given:
        raise ValueError(f"shared_layer() gave no parameters ({_describe(spec)}). {_OVERRIDE}: one with weights.")
    names = {parameter: name for name, parameter in _named(network.named_parameters())}
    if any(parameter not in names for parameter in given):
        raise ValueError(
            f"shared_layer() gave a parameter that is not one of {type(network).__name__}'s own ({_describe(spec)}). "
            f"{_OVERRIDE}, not a copy of it."
        )
    return {parameter: names[parameter] for parameter in given}


def _parameters(spec: SharedLayerSpec, network: nn.Module) -> Iterable[nn.Parameter]:
    if isinstance(spec, nn.Parameter):
        yield spec
    elif isinstance(spec, nn.Module):
        yield from spec.parameters()
    elif isinstance(spec, str):
        modules = dict(_named(network.named_modules(remove_duplicate=False)))
        parameters = dict(_named(network.named_parameters(remove_duplicate=False)))
        if spec not in modules and spec not in parameters:
            raise ValueError(
                f"shared_layer() named {spec!r}, which is no module or parameter of {type(network).__name__}. "
                f"Its parameters are: {', '.join(parameters) or 'none'}."
            )
        yield from [parameters[spec]] if spec in parameters else modules[spec].parameters()
    elif isinstance(spec, Iterable) and not isinstance(spec, Tensor):
        for part in spec:
            yield from _parameters(part, network)
    else:
        raise TypeError(
            f"shared_layer() gave {_describe(spec)}. It returns a module, a parameter, the dotted name of either, an iterable "
            "of these, or None to have the layer found."
        )


def _describe(spec: object) -> str:
    return (
        f"a tensor of shape {tuple(spec.shape)} that is no parameter" if isinstance(spec, Tensor) else f"{type(spec).__name__}"
    )


def detect_shared_layer(losses: Mapping[str, Tensor], network: nn.Module) -> SharedLayer:
    """W as the graph shows it: the last weight (two or more dimensions) that every task's loss reaches.

    "Last" is by the order in which the forward pass first used the weights. Where no task has a weight of its own (a
    network that is shared whole, as physics-informed ones are), the very last weight is the output layer, and the one
    before it is taken: the last hidden weight.

    Args:
        losses: task name → scalar loss of one training batch, with its graph.
        network: the module that the parameters belong to.

    Raises:
        ValueError: if the tasks have no trainable weight in common, saying what each task reaches; if the weight is sharded.
    """
    names = {parameter: name for name, parameter in _named(network.named_parameters()) if parameter.ndim >= 2}
    reached = {task: {p: order for p, order in first_uses(loss.grad_fn).items() if p in names} for task, loss in losses.items()}
    by_task = list(reached.values())
    shared = set(by_task[0]).intersection(*by_task[1:])
    if not shared:
        _refuse_sharded(names)
        raise ValueError(_nothing_shared(reached, names))
    # The parts of a parametrised weight (of weight_norm, say) are one weight.
    weights: dict[str, list[nn.Parameter]] = {}
    for parameter in sorted(shared, key=lambda parameter: min(uses[parameter] for uses in by_task)):
        weights.setdefault(_PART.sub("", names[parameter]), []).append(parameter)
    ranked = list(weights.values())
    if len(ranked) > 1 and len(by_task) > 1 and all(set(uses) == shared for uses in by_task):
        chosen, reason = ranked[-2], "the last hidden weight of a network that the tasks share whole"
    else:
        chosen, reason = ranked[-1], "the last weight that every task's loss reaches"
    _refuse_sharded({parameter: names[parameter] for parameter in chosen})
    reason += "; found from the graph, override shared_layer() to choose another"
    return SharedLayer(tuple(names[parameter] for parameter in chosen), tuple(chosen), reason)


def _nothing_shared(reached: Mapping[str, Mapping[nn.Parameter, tuple[int, int]]], names: Mapping[nn.Parameter, str]) -> str:
    lines = []
    for task, uses in reached.items():
        own = [names[parameter] for parameter in sorted(uses, key=lambda parameter: uses[parameter], reverse=True)]
        what = (
            ", ".join(own[:3]) + (f" and {len(own) - 3} more" if len(own) > 3 else "") if own else "no trainable weight at all"
        )
        lines.append(f"  {task!r} reaches {what}")
    return "\n".join(
        [
            "The tasks share no trainable weight, so there is no gradient to balance:",
            *lines,
            "Is the shared part frozen, or inside a reentrant torch.utils.checkpoint (pass use_reentrant=False)? "
            f"{_OVERRIDE}; or leave out a task that shares nothing with the others.",
        ]
    )
