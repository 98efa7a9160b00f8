"""What one update of GradNorm's weights goes by, and what a way to update them is."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from lightning_gradnorm.balancers.arrays import Vector, like, placed, where


class Step(NamedTuple):
    """One measured step; vectors are of its tasks, shape ``[T]``, unless it says otherwise.

    Attributes:
        tasks: those of the step.
        known: all tasks so far, ``K`` of them.
        positions: where the step's stand among these; ``None`` where they are all, in order.
        all_weights, memory: of all tasks, shape ``[K]``: the weights, and what is remembered under a name.
        norms: n_i, of the unweighted tasks.
        rates: r_i.
        priorities: relative importance; ``None`` where all are alike.
        shares: s_i = L̃_i^α times the priority: what the weighted norms should be proportional to.
        active: which tasks take part, boolean; ``None`` for all.
        interval: of how many optimiser steps one is measured now.
    """

    tasks: tuple[str, ...]
    known: tuple[str, ...]
    positions: Vector | None
    all_weights: Vector
    memory: Mapping[str, Vector]
    norms: Vector
    rates: Vector
    priorities: Vector | None
    shares: Vector
    active: Vector | None
    interval: int

    def of_step(self, vector: Vector) -> Vector:
        """The entries of the step's tasks, of a vector of all."""
        return vector if self.positions is None else vector[self.positions]

    def of_all(self, vector: Vector, values: Vector, accept: Vector | None) -> Vector:
        """A vector of all, with these in the place of the step's entries where ``accept`` says so; ``None`` for all."""
        values = values if accept is None else where(accept, values, self.of_step(vector))
        return values if self.positions is None else placed(vector, self.positions, values)

    @property
    def weights(self) -> Vector:
        """That the step applied."""
        return self.of_step(self.all_weights)

    def members(self, names: tuple[str, ...]) -> Vector:
        """Which of all tasks are among these, boolean, shape ``[K]``."""
        return like(self.norms, [task in names for task in self.known])


class UpdateRule(Protocol):
    """A way to update the weights."""

    def next(self, step: Step, accept: Vector | None) -> tuple[Vector, dict[str, Vector]]:
        """What the step leads to.

        Args:
            step: what was measured.
            accept: whose entries may change, boolean; ``None`` for all.

        Returns:
            What the weighted norms w_i n_i should be, shape ``[T]``; and name → what changes, of all tasks, shape ``[K]``:
            ``"weights"``, and what is remembered.
        """
