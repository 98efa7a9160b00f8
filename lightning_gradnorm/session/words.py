"""What a run has to say, each matter once, and what it has to have seen for that."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from lightning_gradnorm.balancers import EqualWeights, FixedWeights, LossBalancer
from lightning_gradnorm.regularisers import is_weight_penalty, of_penalties
from lightning_gradnorm.session.loop import Loop, warn
from lightning_gradnorm.session.telling import idle_tasks, lone, never_multiplied, of_idle, of_skipped, unsettled


class Words:
    """Speaks for one run.

    Args:
        balancer: the method.
        loop: to whom; ``None`` between runs.
        name: of what the user sees, where there is no loop.

    Attributes:
        penalties: those of the run's tasks that are made of the network's parameters alone, and so are none.
    """

    def __init__(self, balancer: LossBalancer, loop: Loop | None, name: str) -> None:
        self._balancer, self._loop = balancer, loop
        self._name = name if loop is None else loop.name
        self._told: set[str] = set()
        self._taken: set[str] = set()  # the tasks of the run's steps
        self._seen: set[str] = set()  # and of those that were to be measured
        self.penalties: list[str] = []

    def tell(self, about: str, message: str) -> None:
        """Warn of something, once in a run."""
        if about not in self._told:
            self._told.add(about)
            (warn if self._loop is None else self._loop.tell)(about, message)

    def take(self, losses: Mapping[str, Tensor], *, measured: bool) -> None:
        """See the losses, with their graphs, that a step goes backward with; say which are weight penalties."""
        new = not self._taken.issuperset(losses)
        self._taken.update(losses)
        self._seen.update(losses if measured else ())
        if not new or self._loop is None:
            return
        found = [task for task, loss in losses.items() if is_weight_penalty(loss, self._loop.network)]
        if not 0 < len(found) < len(losses):
            return  # where all are, the parameters are the problem
        self.penalties += [task for task in found if task not in self.penalties]
        if not isinstance(self._balancer, EqualWeights | FixedWeights):  # these keep the factor that the user gave
            self.tell(f"penalty {found}", of_penalties(found, self._name))

    def tell_counts(self) -> None:
        """Warn of updates that were skipped and of tasks that took no part; asks the device, so not for every step."""
        skipped, idle = of_skipped(self._balancer, self._name), idle_tasks(self._balancer)
        if skipped:
            self.tell("skipped", skipped)
        new = {task: steps for task, steps in idle.items() if f"idle {task}" not in self._told}
        if new:
            self._told |= {f"idle {task}" for task in new}
            self.tell(f"idle: {', '.join(new)}", of_idle(new))

    def end_epoch(self, handed_out: Iterable[str], *, looks_for_layer: bool) -> None:
        """An epoch of training is over.

        Args:
            handed_out: the tasks whose weight was handed out.
            looks_for_layer: whether the shared layer has been looked for in vain so far.
        """
        self.tell_counts()
        if self._loop is None:
            return
        left = sorted(set(handed_out) - self._taken)
        if left and "unused" not in self._told:
            self.tell("never multiplied", never_multiplied(left))
        if not looks_for_layer:
            return
        tasks = self._balancer.known_tasks
        if len(self._seen) == 1 and not tasks:
            self._loop.inform(lone(*self._seen))
        elif "frozen" not in self._told:
            self.tell("unsettled", unsettled(tasks))
