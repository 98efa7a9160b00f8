"""Which weights are W: the last ones that the tasks share, judged by the graph and by where their gradients are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradnorm.shared_layer.evidence import Evidence
from lightning_gradnorm.shared_layer.weight_graph import WeightGraph


@dataclass
class Choice:
    """W, and why.

    Attributes:
        weights: their names, in the order of first use.
        kind: what these weights are.
        passed: weight that lies above them → why it was passed over.
    """

    weights: list[str]
    kind: str
    passed: dict[str, str] = field(default_factory=dict)

    def reason(self) -> str:
        """For people to read."""
        by_reason: dict[str, list[str]] = {}
        for weight, why in self.passed.items():
            by_reason.setdefault(why, []).append(weight)
        passed = [f"{_some(weights)} ({why})" for why, weights in by_reason.items()]
        return self.kind + (f"; passed over {', '.join(passed[:3])}" if passed else "")


class Chooser:
    """Chooses W from the weights that all tasks reach.

    Of those, the last, above which no other of them lies, as a set (the levels of a pyramid, experts), provided that

    - every task has a gradient in the set, and by weights on which several have one, all tasks hang together;
    - on no weight the tasks have entries of their own only, as on a wide head of which each takes its columns;
    - on a weight above which there are none but those passed over, all tasks have one: else these are heads;
    - it is not the head of a task whose prediction another task takes in beside what the head was made from.

    What does not fit is passed over, and the last of the rest are looked at. A network that the tasks share whole, as
    physics-informed ones are, ends in an output layer, and the last hidden weight is taken.

    Args:
        graph: of the batch.
        evidence: of the gradients.
        reached: task → the weights that its loss reaches, all tasks that are known; those of the batch as in ``graph``.
    """

    def __init__(self, graph: WeightGraph, evidence: Evidence, reached: Mapping[str, set[str]]) -> None:
        self.graph: WeightGraph = graph
        self.evidence: Evidence = evidence
        self.reached: dict[str, set[str]] = dict(reached)
        self.heads: dict[int, list[int]] = {}  # weight → tasks that are let through
        self.passed: dict[int, str] = {}

    def choose(self) -> Choice:
        """W; the weights that every task reaches must not be none."""
        common = self.common()
        self.alive: list[str] = [task for task in self.reached if not self.evidence.is_silent(task, self._names(common))]
        last = self._last_that_fit(common)
        if last is None:
            meeting = self._where_all_are(common)
            last = self.graph.last_of(meeting if meeting.any() else common)
            kind = "the last weight that every task's loss reaches, though their gradients meet in none of its entries"
            return Choice(self._names(last), kind)
        if self._is_shared_whole(common):
            hidden = common.clone()
            hidden[last if last[common.nonzero().max()] else common.nonzero().max()] = False
            below = self._last_that_fit(hidden) if hidden.any() else None
            if below is not None:
                kind = "the last hidden weight of a network that the tasks share whole"
                return self._choice(below, kind)
        last = self._below_heads(common, last)
        what = "weight" if int(last.sum()) == 1 else "weights"
        every = "on which every task has a gradient" if self.passed else "that every task's loss reaches"
        return self._choice(last, f"the last {what} {every}")

    def common(self) -> Tensor:
        """``[K]``: the weights that every task reaches."""
        every = [all(name in weights for weights in self.reached.values()) for name in self.graph.names]
        return torch.tensor(every, dtype=torch.bool)

    def _choice(self, weights: Tensor, kind: str) -> Choice:
        return Choice(self._names(weights), kind, {self.graph.names[weight]: why for weight, why in self.passed.items()})

    def _names(self, weights: Tensor) -> list[str]:
        return [self.graph.names[weight] for weight in _numbers(weights)]

    def _last_that_fit(self, weights: Tensor) -> Tensor | None:
        weights = weights.clone()
        while weights.any():
            last = self.graph.last_of(weights)
            unfit = self._unfit(_numbers(last))
            if not unfit:
                return last
            self.passed |= unfit
            weights[list(unfit)] = False
        return None

    def _unfit(self, weights: Sequence[int]) -> dict[int, str]:
        """Of weights as a set: those to be passed over → why."""
        on = {weight: self._tasks_on(weight) for weight in weights}
        unfit = {}
        for weight, tasks in on.items():
            if self.alive and not tasks:
                unfit[weight] = "no task has a gradient there"
            elif not self.evidence.meet(tasks, self.graph.names[weight]):
                unfit[weight] = "each task has entries of its own there"
            elif len(tasks) < len(self.alive) and self._is_an_output(weight):
                unfit[weight] = self._without(tasks)
        if unfit or _hang_together(self.alive, on.values()):
            return unfit
        return {weight: self._without(tasks) for weight, tasks in on.items()}

    def _tasks_on(self, weight: int) -> list[str]:
        return [task for task in self.alive if self.evidence.has(task, self.graph.names[weight])]

    def _without(self, tasks: Sequence[str]) -> str:
        return f"no gradient of {_some([f'task {task!r}' for task in self.alive if task not in tasks])}"

    def _is_an_output(self, weight: int) -> bool:
        above = self.graph.above[:, weight].clone()
        above[list(self.passed)] = False
        return not above.any()

    def _where_all_are(self, weights: Tensor) -> Tensor:
        mask = torch.zeros_like(weights)
        mask[[weight for weight in _numbers(weights) if len(self._tasks_on(weight)) == len(self.alive)]] = True
        return mask

    def _is_shared_whole(self, common: Tensor) -> bool:
        if len(self.reached) < 2 or any(self._tasks_on(weight) for weight in self.passed):
            return False
        everywhere = all(weights == set(self._names(common)) for weights in self.reached.values())
        return everywhere and all(len(self._tasks_on(k)) in (0, len(self.alive)) for k in _numbers(common))

    def _below_heads(self, common: Tensor, last: Tensor) -> Tensor:
        """The last weights once no task passes through another's head any more: as if predictions were detached."""
        while (found := self._head(common, last)) is not None:
            before, (weight, own) = dict(self.reached), found
            rows = self.graph.reached_with({**self.heads, weight: own})
            self.reached |= {task: set(self._names(rows[number])) for number, task in enumerate(self.graph.tasks)}
            common = self.common()
            below = self._last_that_fit(common)
            if below is None:
                self.reached = before
                return last
            self.heads[weight], last = own, below
            tasks = _some([f"task {self.graph.tasks[task]!r}" for task in own])
            self.passed[weight] = f"a head of {tasks}, whose output another task takes in"
        return last

    def _head(self, common: Tensor, last: Tensor) -> tuple[int, list[int]] | None:
        """A weight that ends the way of some task, which does not go around it while another does → and whom it serves."""
        tasks = self.graph.tasks
        speaks = torch.tensor([task in self.alive for task in tasks])
        # Through a weight on which a task has a gradient of zero leads a way of the graph, and not of the gradient.
        ways = {weight: [tasks.index(task) for task in self._tasks_on(weight) if task in tasks] for weight in self.passed}
        ways |= self.heads
        reached = self.graph.reached_with(ways)
        for weight in _numbers(last):
            ends = speaks & reached[:, weight] & ~(reached & self.graph.above[:, weight]).any(1)
            if not ends.any():
                continue
            around = (self.graph.reached_with({**ways, weight: []}) & common & self.graph.above[weight]).any(1)
            if (around & speaks).any() and (ends & ~around).any():
                return weight, _numbers(~around)
        return None


def _hang_together(tasks: Sequence[str], groups: Iterable[Sequence[str]]) -> bool:
    """Whether the groups, each joined to those that it has a task in common with, make one of all the tasks."""
    joined: list[set[str]] = []
    for group in groups:
        overlapping = [other for other in joined if not other.isdisjoint(group)]
        joined = [other for other in joined if other.isdisjoint(group)] + [set(group).union(*overlapping)]
    return not tasks or joined == [set(tasks)]


def _numbers(mask: Tensor) -> list[int]:
    return [int(number) for number in mask.nonzero().flatten()]


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
