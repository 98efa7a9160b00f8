"""Random Loss Weighting (Lin, Ye, Zhang, Tsang, TMLR 2022, arXiv 2111.10603): the litmus test of every other method."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.balancers.checks import check_whole
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.balancers.scale import softmax_weights
from lightning_gradnorm.measurement import Measurement


class Draws:
    """Random numbers of a method: the same on every rank, and going on after a resume.

    Args:
        seed: where they start.
    """

    def __init__(self, seed: int) -> None:
        self.seed: int = check_whole("seed", seed, "a whole number")
        self.reset()

    def reset(self) -> None:
        """Start again."""
        self.generator: torch.Generator = torch.Generator().manual_seed(self.seed)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from ``state_dict``."""
        self.generator.set_state(state["generator"])


class RandomLossWeighting(RuleBalancer):
    """w = T softmax(z) with z ~ N(0, I) drawn anew at every update; Σ w = T. The first step uses weights of one.

    Source: Lin, Ye, Zhang, Tsang, TMLR 2022, arXiv 2111.10603.

    Args:
        seed: of the draws, which are the method's own: the same on every rank, and going on after a resume.
        tasks: all tasks' names, if they are to be fixed from the start.
        update_every: on one of how many optimiser steps new weights are drawn.
    """

    def __init__(self, seed: int = 0, *, tasks: Iterable[str] | None = None, update_every: int = 1) -> None:
        self._draws = Draws(seed)
        self._parts = {"draws": self._draws}
        super().__init__(tasks=tasks, update_every=update_every)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"seed": self._draws.seed}

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        drawn = torch.randn(len(self.tasks), generator=self._draws.generator, dtype=torch.float64)
        of_task = dict(zip(sorted(self.tasks), drawn.tolist(), strict=True))
        scores = state["weights"].new_tensor([of_task[task] for task in measurement.tasks])
        return {"weights": softmax_weights(scores, state["weights"].sum())}
