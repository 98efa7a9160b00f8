"""Curves kept in memory while a run goes on, so that its figure needs no logger whose files can be read back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.report.history import History

_MOST = 400  # points per curve: more than a panel of the figure has pixels for


class KeptCurves:
    """Tag → values over the steps, thinned out evenly: past 400 points every second one goes, and so on."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, tuple[str, ...], Tensor]] = []
        self._every = 1
        self._offered = 0

    def skips_next(self) -> bool:
        """Whether the next step would not be kept; it is counted then."""
        skips = self._offered % self._every != 0
        self._offered += skips
        return skips

    def add(self, step: int, tags: Sequence[str], values: Tensor) -> None:
        """Take what one step has to show.

        Args:
            step: its number, from 0.
            tags: of the values.
            values: as many, in one vector.
        """
        tags, last = tuple(tags), self._rows[-1][1] if self._rows else ()
        if tags == last:
            tags = last  # one set of names for all rows: of many tasks they take more room than the values
        self._rows.append((step, tags, values.detach().to("cpu", torch.float32)))
        if len(self._rows) > _MOST:
            self._rows, self._every = self._rows[::2], 2 * self._every
        self._offered += 1

    def history(self) -> History:
        """What is kept, as it would be read from a log folder."""
        curves: dict[str, dict[int, float]] = {}
        for step, tags, values in self._rows:
            for tag, value in zip(tags, values.tolist(), strict=True):
                curves.setdefault(tag, {})[step] = value
        return History(curves)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings; rows of the same tags stand together."""
        groups: dict[tuple[str, ...], list[tuple[int, Tensor]]] = {}
        for step, tags, values in self._rows:
            groups.setdefault(tags, []).append((step, values))
        rows = [
            {"tags": list(tags), "steps": [step for step, _ in group], "values": torch.stack([values for _, values in group])}
            for tags, group in groups.items()
        ]
        return {"rows": rows, "every": self._every, "offered": self._offered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``."""
        self._every, self._offered = state["every"], state["offered"]
        rows = [
            (step, tags, values)
            for group in state["rows"]
            for tags in (tuple(group["tags"]),)
            for step, values in zip(group["steps"], group["values"].unbind(), strict=True)
        ]
        self._rows = sorted(rows, key=lambda row: row[0])
