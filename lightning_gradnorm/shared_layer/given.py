"""W as the user gives it: a module, a parameter, the dotted name of either, or several of these."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import accumulate

from torch import Tensor, nn

from lightning_gradnorm.shared_layer.layer import NAME_IT, SharedLayer, named, refuse_sharded, weight_names

SharedLayerSpec = nn.Module | nn.Parameter | str | Iterable[nn.Module | nn.Parameter | str]
"""What names a shared layer: a module, a parameter, the dotted name of either, or several of these."""

_METHOD = "shared_layer()"


def resolve_shared_layer(spec: SharedLayerSpec, network: nn.Module, giver: str = _METHOD) -> SharedLayer:
    """W as the user gave it.

    Args:
        spec: a module (all its trainable parameters), a parameter, the dotted name of either, or an iterable of these. The
            name of a parametrised weight stands for all that it is made of.
        network: the module that they belong to, for their names.
        giver: where the user gave it, for messages.

    Raises:
        TypeError: if ``spec`` is of another kind.
        ValueError: if a name is unknown, a parameter is not the network's, there is none, all are frozen, or one is sharded.
    """
    given = _given(spec, network, giver)
    trainable = [parameter for parameter in given if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            f"The shared layer is frozen: none of its parameters ({', '.join(list(given.values())[:4])}) requires grad, so no "
            f"task has a gradient there. {NAME_IT}: one that is trained; or unfreeze it."
        )
    refuse_sharded({parameter: given[parameter] for parameter in trainable})
    return SharedLayer(tuple(given[p] for p in trainable), tuple(trainable), f"given by {giver}")


def feature_modules(spec: SharedLayerSpec | None, network: nn.Module, giver: str = _METHOD) -> list[nn.Module]:
    """The modules whose outputs are the shared features: those that ``spec`` names, or that own the parameters it names.

    Raises:
        TypeError: if ``spec`` is of a kind that ``shared_layer()`` cannot return.
        ValueError: if it is ``None`` (the features must be known before the forward pass), or names nothing of ``network``.
    """
    if spec is None:
        raise ValueError(
            f"norm_of='features' reads the gradient at the shared layer's output, and {giver} names no layer. {NAME_IT}."
        )
    if not isinstance(spec, nn.Module) or spec not in network.modules():  # a module without parameters has features too
        _given(spec, network, giver)
    return list(dict.fromkeys(_modules(spec, network, giver)))


def shared_features(spec: SharedLayerSpec | None, network: nn.Module, giver: str = _METHOD) -> SharedLayer:
    """The layer as ``feature_modules`` takes it, for people to read: names of modules, and no parameters."""
    names = {module: name for name, module in named(network.named_modules())}
    return SharedLayer(tuple(names[module] for module in feature_modules(spec, network, giver)), (), f"given by {giver}")


def owner_of(parameters: Iterable[Tensor], network: nn.Module) -> nn.Module | None:
    """The one module that all these parameters are the own ones of; ``None`` where they are several modules', or shared."""
    wanted = {id(parameter) for parameter in parameters}
    owners = [m for m in network.modules() if not wanted.isdisjoint(id(p) for p in m.parameters(recurse=False))]
    return owners[0] if len(owners) == 1 and wanted <= {id(p) for p in owners[0].parameters(recurse=False)} else None


def is_compiled(network: nn.Module) -> bool:
    """Whether ``torch.compile`` has been at the network or a part of it."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in network.modules())


def _modules(spec: SharedLayerSpec, network: nn.Module, giver: str) -> Iterable[nn.Module]:
    modules = dict(named(network.named_modules(remove_duplicate=False)))
    if isinstance(spec, nn.Module):
        yield spec
    elif isinstance(spec, str) and spec in modules:
        yield modules[spec]
    elif isinstance(spec, nn.Parameter | str):
        wanted = {id(parameter) for parameter in _parameters(spec, network, giver)}
        yield from (m for m in network.modules() if any(id(p) in wanted for p in m.parameters(recurse=False)))
    else:
        for part in spec:
            yield from _modules(part, network, giver)


def _given(spec: SharedLayerSpec, network: nn.Module, giver: str) -> dict[nn.Parameter, str]:
    """The parameters that ``spec`` stands for → their names; each once, as a tied parameter counts once in the norm."""
    given = list(dict.fromkeys(_parameters(spec, network, giver)))
    if not given:
        raise ValueError(f"{giver} gave no parameters ({_describe(spec)}). {NAME_IT}: one with weights.")
    names = {parameter: name for name, parameter in named(network.named_parameters())}
    if any(parameter not in names for parameter in given):
        raise ValueError(
            f"{giver} gave a parameter that is not one of {type(network).__name__}'s own ({_describe(spec)}). {NAME_IT}: not "
            "a copy of it."
        )
    return {parameter: names[parameter] for parameter in given}


def _parameters(spec: SharedLayerSpec, network: nn.Module, giver: str) -> Iterable[nn.Parameter]:
    if isinstance(spec, nn.Parameter):
        yield spec
    elif isinstance(spec, nn.Module):
        yield from spec.parameters()
    elif isinstance(spec, str):
        modules = dict(named(network.named_modules(remove_duplicate=False)))
        parameters = dict(named(network.named_parameters(remove_duplicate=False)))
        parts = [parameter for parameter, name in weight_names(network).items() if name == spec]
        if spec not in modules and spec not in parameters and not parts:
            raise ValueError(
                f"{giver} named {spec!r}, which is no module or parameter of {type(network).__name__}. "
                f"{_what_is_there(spec, modules, parameters)}"
            )
        yield from [parameters[spec]] if spec in parameters else modules[spec].parameters() if spec in modules else parts
    elif isinstance(spec, Iterable) and not isinstance(spec, Tensor):
        for part in spec:
            yield from _parameters(part, network, giver)
    else:
        raise TypeError(
            f"{giver} gave {_describe(spec)}. It returns a module, a parameter, the dotted name of either, an iterable of "
            "these, or None to have the layer found. (A parametrised weight is computed: give its module or its name.)"
        )


def _what_is_there(wrong: str, modules: Mapping[str, nn.Module], parameters: Iterable[str]) -> str:
    """Names like the wrong one, and all that stand where its path leaves the network."""
    names = [name for name in (*modules, *parameters) if name]
    like = [name for name in names if name.endswith(f".{wrong}")] or get_close_matches(wrong, names)
    meant = f"Did you mean {' or '.join(map(repr, like[:3]))}? " if like else ""
    there = [path for path in accumulate(wrong.split("."), "{}.{}".format) if path in modules]
    last = modules[there[-1] if there else ""]
    found = [name for name, _ in (*last.named_children(), *last.named_parameters(recurse=False))]
    where = f"In {there[-1]!r}" if there else "In it"
    return f"{meant}{where} there are: {', '.join(found) or 'no modules or parameters'}."


def _describe(spec: object) -> str:
    if isinstance(spec, list | tuple):
        return ", ".join(map(_describe, spec)) or "an empty list"
    if isinstance(spec, str):
        return repr(spec)
    return f"a tensor of shape {tuple(spec.shape)} that is no parameter" if isinstance(spec, Tensor) else type(spec).__name__
