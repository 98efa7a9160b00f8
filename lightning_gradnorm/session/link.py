"""Between the module, which has the losses, and the session, which needs them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class TotalLink:
    """Put on a module while a Trainer is at work, so that its ``total_loss`` finds the session.

    A copy of the module is a plain module: its total is the plain sum.

    Args:
        total: the session's; a compiled ``training_step`` breaks its graph there.
    """

    def __init__(self, total: Callable[..., Tensor]) -> None:
        disable: Any = torch.compiler.disable
        self._outside_compiled_code: Callable[..., Tensor] = disable(total)

    def total(
        self, losses: Any, kpis: Mapping[str, Any], points: Mapping[str, Tensor], *, differentiable: bool | None
    ) -> Tensor:
        """The total, scalar."""
        return self._outside_compiled_code(losses, kpis=kpis, points=points, differentiable=differentiable)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return (type(None), ())
