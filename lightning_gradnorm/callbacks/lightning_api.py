"""What is used of Lightning, for both of its namespaces.

``lightning.pytorch`` and ``pytorch_lightning`` are two trees of classes, and a Trainer of one refuses a lone callback of the
other. Our callbacks inherit from the ``Callback`` of every namespace that the program uses when one of them is made, whatever
was imported first, and of the first that is installed if it uses none; nothing is imported that nobody asked for.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    LightningModule = Trainer = Any
    _NAMESPACES = ("lightning.pytorch", "pytorch_lightning")

    def _callback_bases() -> tuple[type, ...]:
        used = [name for name in _NAMESPACES if name in sys.modules]
        installed = [name for name in _NAMESPACES if importlib.util.find_spec(name.partition(".")[0]) is not None]
        return tuple(importlib.import_module(name).Callback for name in used or installed[:1])

    class Callback(*_callback_bases()):
        """The Callback of every Lightning namespace in use."""

        def __new__(cls, *args: Any, **settings: Any) -> Any:
            bases = _callback_bases()
            if set(bases) - set(Callback.__bases__):
                Callback.__bases__ = bases
            return super().__new__(cls)


__all__ = [
    "Callback",
    "LightningModule",
    "Trainer",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "setting_of",
    "trainer_class_of",
]


def trainer_class_of(module: Any) -> Any:
    """The Trainer of the namespace that the module's class comes from.

    Raises:
        TypeError: if it is no LightningModule.
    """
    for name in ("lightning.pytorch", "pytorch_lightning"):
        namespace = sys.modules.get(name)
        if namespace is not None and isinstance(module, namespace.LightningModule):
            return namespace.Trainer
    raise TypeError(f"A LightningModule is needed, got {type(module).__name__}.")


def setting_of(trainer: Trainer, name: str) -> Any:
    """What Lightning's connectors put on the Trainer, where its type does not show it."""
    return getattr(trainer, name)
