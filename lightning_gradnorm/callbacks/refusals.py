"""What a balancing callback refuses before a run begins, with what to do instead."""

from collections.abc import Sequence
from typing import Any

from lightning_gradnorm.mixin import MultiTaskMixin, check_attributes

_TESTED = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")


def check_module(module: Any) -> None:
    """Refuse a module in which names of ``MultiTaskMixin`` stand for something else.

    Raises:
        TypeError: naming the attribute.
    """
    if isinstance(module, MultiTaskMixin):
        check_attributes(module)


def check_strategy(strategy: Any, name: str, *, untested: bool) -> None:
    """Refuse a Trainer's strategy that the callback is not tested with, unless the user says so.

    Raises:
        ValueError: naming the strategy.
    """
    names = [cls.__name__ for cls in type(strategy).__mro__]
    tested = any(known in _TESTED for known in names) and not any("DeepSpeed" in known for known in names)
    found = names[0]
    if tested and "ModelParallelStrategy" in names:
        tensor_parallel = strategy.device_mesh["tensor_parallel"].size()
        tested, found = tensor_parallel == 1, f"{found}(tensor_parallel_size={tensor_parallel})"
    if not (tested or untested):
        raise ValueError(
            f"{name} is tested with one device, with DDP, and with FSDP2 by ModelParallelStrategy(data_parallel_size=…, "
            f"tensor_parallel_size=1); not with {found}. Use one of these; or try it with untested_strategies=True, best with "
            "norm_of='features', which needs no parameter gradient."
        )


def check_alone(callbacks: Sequence[object]) -> None:
    """Refuse several callbacks that weigh losses.

    Raises:
        ValueError: naming them.
    """
    if len(callbacks) > 1:
        them = ", ".join(type(callback).__name__ for callback in callbacks)
        raise ValueError(
            f"One callback weighs the losses, and the Trainer was given {len(callbacks)}: {them}. Keep one of them."
        )


def never_called(module: Any, name: str, handed_out: Sequence[str] = ()) -> str:
    """What is said of a module that has handed no losses over by the end of its first step.

    Args:
        module: the module.
        name: of the callback.
        handed_out: the tasks whose weight was handed out.
    """
    own = type(module).__name__
    owner = next((cls for cls in type(module).__mro__ if "total_loss" in vars(cls)), MultiTaskMixin)
    hidden = "" if owner is MultiTaskMixin else f" (It has a total_loss of its own, from {owner.__name__}.)"
    mixes_in = isinstance(module, MultiTaskMixin)
    way = (
        "Return self.total_loss({'task': loss, …}) from training_step, with the losses of all tasks"
        if mixes_in
        else "Where all its losses are at hand, in its training_step or in the criterion that adds them up, write "
        "total_loss({'task': loss, …}) in the place of their sum (from lightning_gradnorm import total_loss). If it takes "
        "numbers to multiply its terms by, give it callback.weight('task') for each; if a submodule returns the losses as a "
        f"dict, {name}(losses_of='its name'). In a module of your own, mix in MultiTaskMixin and return "
        "self.total_loss({'task': loss, …})"
    )
    numbers = (
        f" The weight of {', '.join(map(repr, handed_out))} was handed out, but no loss with a gradient was multiplied by it: "
        "the library may have read the number once, as by float(weight) or torch.tensor(weight)."
        if handed_out
        else ""
    )
    return (
        f"The training_step of {own} never called total_loss(), so {name} has no losses to weigh, and the network is trained "
        f"on what {own} adds up by itself.{hidden}{numbers} {way}; or take {name} off the Trainer."
    )
