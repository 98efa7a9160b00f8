"""What a shared layer W is, once it is known, and what the network's weights are called."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from torch.nn.utils.weight_norm import WeightNorm

_T = TypeVar("_T")
_PART = re.compile(r"\bparametrizations\.([^.]+)\..*")
NAME_IT = "Name the layer that all tasks share, by the module's shared_layer() or the callback's shared_layer='its name'"


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


def named(pairs: Iterable[tuple[str, _T]]) -> Iterable[tuple[str, _T]]:
    """The names as the user wrote the network: without what ``torch.compile`` puts between."""
    return ((name.replace("_orig_mod.", "").removesuffix("._orig_mod"), value) for name, value in pairs)


def weight_names(network: nn.Module) -> dict[nn.Parameter, str]:
    """Every parameter → the name of the weight that it is, or that it is a part of.

    The parts of a parametrised weight have one name: those that ``torch.nn.utils.parametrize`` makes, and the magnitude and
    direction of the older ``torch.nn.utils.weight_norm``.
    """
    parts = {
        f"{prefix}{'.' if prefix else ''}{hook.name}{suffix}": f"{prefix}{'.' if prefix else ''}{hook.name}"
        for prefix, module in named(network.named_modules())
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, WeightNorm)
        for suffix in ("_g", "_v")
    }
    return {p: parts.get(name, _PART.sub(r"\1", name)) for name, p in named(network.named_parameters())}


def refuse_sharded(names: Mapping[nn.Parameter, str]) -> None:
    """Refuse parameters of which a rank holds a part only.

    Args:
        names: parameter → its name, for the message.

    Raises:
        ValueError: naming those, with the way out.
    """
    sharded = [name for parameter, name in names.items() if is_sharded(parameter)]
    if sharded:
        more = f" and {len(sharded) - 4} more" if len(sharded) > 4 else ""
        raise ValueError(
            "Each task's gradient on the shared layer is read from whole parameters, and when the backward began each rank "
            f"held only its shard of {', '.join(sharded[:4])}{more}. Take norm_of='features' with a shared_layer() that names "
            "the module; or, with FSDP2, keep the shared layer whole from the forward to the backward: "
            "fully_shard(layer, reshard_after_forward=False)."
        )


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether it is a DTensor; by name: that class has moved between modules of torch, and importing it takes long."""
    return type(parameter).__name__ == "DTensor"
