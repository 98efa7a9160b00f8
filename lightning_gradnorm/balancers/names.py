"""The names of a method's tasks: learnt or declared, and what may be one."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from lightning_gradnorm.balancers.checks import check_names
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.task_names import check_task_names


class NamedTasks:
    """What a balancer knows of its tasks' names.

    Args:
        tasks: all of them, if they are to be fixed from the start; any other name is then an error.

    Attributes:
        tasks: the names known so far, ``T`` of them.
    """

    tasks: tuple[str, ...] = ()

    def __init__(self, tasks: Iterable[str] | None) -> None:
        self._declared = None if tasks is None else check_names("tasks", tasks)
        check_task_names(self._declared or ())

    @property
    def known_tasks(self) -> tuple[str, ...]:
        """The tasks learnt so far, or else the declared ones."""
        return self.tasks or self._declared or ()

    def _in_order(self, tasks: Sequence[str]) -> list[int]:
        """Positions of these, in the order in which tasks came first, or were declared."""
        known = (*self.known_tasks, *(task for task in tasks if task not in self.known_tasks))
        return sorted(range(len(tasks)), key=[known.index(task) for task in tasks].__getitem__)

    @contextlib.contextmanager
    def _told_of_absent(self, tasks: Sequence[str]) -> Iterator[None]:
        """Where somebody else's function fails, say which tasks it had to do without."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            absent = [task for task in self.known_tasks if task not in tasks]
            if not absent:
                raise
            raise ValueError(
                f"{error} This step is without {', '.join(map(repr, absent))}. Give every task's loss in every batch, or take "
                "a method that can do without some."
            ) from error

    def _check_names(self, tasks: Sequence[str]) -> None:
        if not tasks:
            raise ValueError(f"{type(self).__name__} weighs at least one task's loss, got none.")
        check_task_names((*self.known_tasks, *(task for task in tasks if task not in self.known_tasks)))
        self._check_declared(tasks)

    def _check_declared(self, tasks: Iterable[str]) -> None:
        unknown = [task for task in tasks if self._declared is not None and task not in self._declared]
        if unknown:
            plural, them = "s" if len(unknown) > 1 else "", ", ".join(map(repr, unknown))
            raise ValueError(
                f"Unknown task{plural} {them}: {type(self).__name__} was given tasks={list(self._declared or ())}. Add the "
                "name there, or leave tasks out to have the names learnt."
            )

    def _check_named(self, setting: str, names: Iterable[str], measurement: Measurement) -> None:
        """Refuse a setting that names what is no task."""
        known = {*self.known_tasks, *measurement.tasks, *(self._declared or ())}
        unknown = [task for task in names if task not in known]
        if unknown:
            them, tasks = (", ".join(map(repr, names)) for names in (unknown, sorted(known)))
            raise ValueError(
                f"{setting} names {them}, which is no task: the tasks are {tasks}. Correct the name; if the task appears only "
                "in later batches, list all names with tasks=[…]."
            )
