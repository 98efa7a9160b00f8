"""Callbacks by their short names: ``--trainer.callbacks+=GradNormCallback``, of a LightningCLI in any program of ours.

LightningCLI knows a short name where its class is loaded, and this package loads its parts when they are asked for. So its
callbacks are loaded when LightningCLI is, whichever of the two a program imports first.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

_CLI = ("lightning.pytorch.cli", "pytorch_lightning.cli")


class _LooksForLightningCLI(MetaPathFinder):
    """Finds nothing; it hears which modules are looked for, until LightningCLI is."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname in _CLI and self in sys.meta_path:
            sys.meta_path.remove(self)
            _load()


def _load() -> None:
    import lightning_gradnorm.callbacks  # noqa: F401 (to be loaded is all that is wanted of it)


def load_with_lightning_cli() -> None:
    """Load the callbacks with LightningCLI: now, if it is there."""
    if any(name in sys.modules for name in _CLI):
        _load()
    else:
        sys.meta_path.insert(0, _LooksForLightningCLI())
