"""Draws many programs, checks them, and keeps what came of it."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.random_programs.checking import Verdict, check, least
from tests.random_programs.description import Program
from tests.random_programs.strategies import programs

_SIMPLIFIED = 1  # programs of a chunk that differ in the same ways


@dataclass
class Found:
    """What some programs came to: counts, and those that showed a difference, made as simple as can be."""

    outcomes: Counter[str] = field(default_factory=Counter)
    ingredients: Counter[str] = field(default_factory=Counter)  # of the programs that ran
    notes: Counter[str] = field(default_factory=Counter)
    differences: list[tuple[Program, Verdict]] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        """Take in what others came to."""
        self.outcomes += other.outcomes
        self.ingredients += other.ingredients
        self.notes += other.notes
        self.differences += other.differences


def look(first_seed: int, chunk: int, count: int, simplify: bool) -> Found:
    """Draw and check; the same programs for the same numbers."""
    torch.set_num_threads(1)
    found = Found()

    @seed(1_000_003 * first_seed + chunk)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(programs())
    def one(program: Program) -> None:
        verdict = check(program)
        found.outcomes[verdict.outcome] += 1
        found.notes.update(verdict.notes)
        if verdict.outcome != "no program":
            found.ingredients.update(program.ingredients())
        if verdict.differences:
            found.differences.append((program, verdict))

    one()
    if simplify:
        seen: Counter[tuple[tuple[str, str], ...]] = Counter()
        for i, (program, verdict) in enumerate(found.differences):
            kind = tuple(sorted(verdict.differences))
            seen[kind] += 1
            if seen[kind] <= _SIMPLIFIED:
                found.differences[i] = least(program, verdict)
    return found
