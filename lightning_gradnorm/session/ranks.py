"""What the ranks of a distributed run agree on, so that all of them hold the same weights."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed
from torch import Tensor, nn


class RankAgreement:
    """The tasks' order and W, the same on every rank.

    Agreed at the first update of a run, by all ranks together, and again while no rank has measured anything; after that,
    each update needs one collective whose size every rank knows, whatever it has seen itself.

    Args:
        device: where the collectives work.

    Attributes:
        tasks: all tasks, in the agreed order; empty before.
        layer: the names of the parameters of W.
        entries: ∣W∣; 0 where no rank measures gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tasks: tuple[str, ...] = ()
        self.layer: tuple[str, ...] = ()
        self.entries: int = 0

    @classmethod
    def of(cls, network: nn.Module) -> "RankAgreement | None":
        """That of the distributed run which this process is in, on the network's device; ``None`` where it is alone.

        Args:
            network: what is trained.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_world_size() == 1:
            return None
        return cls(next((parameter.device for parameter in network.parameters()), torch.device("cpu")))

    @property
    def rank(self) -> int:
        """This process's number."""
        return torch.distributed.get_rank()

    def agree(self, tasks: Sequence[str], layer: Sequence[str], entries: int) -> None:
        """Exchange what each rank knows; a collective, called by all ranks.

        Args:
            tasks: the tasks that this rank knows of.
            layer: names of the parameters of W, where this rank knows them.
            entries: their size, 0 where it does not.

        Raises:
            ValueError: on every rank, if the ranks found different layers.
        """
        gathered: list[tuple[Sequence[str], Sequence[str], int]] = [((), (), 0)] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, (tuple(tasks), tuple(layer), entries))
        layers = {tuple(known) for _, known, _ in gathered if known}
        if len(layers) > 1:
            raise ValueError(
                f"The ranks found different shared layers: {', '.join(' and '.join(names) for names in sorted(layers))}. "
                "Let shared_layer() name the one to use."
            )
        self.tasks = tuple(dict.fromkeys(task for known, _, _ in gathered for task in known))
        self.layer = next(iter(layers), ())
        self.entries = max(size for _, _, size in gathered)

    def check(self, tasks: Sequence[str]) -> None:
        """Refuse a task that the ranks do not all know of.

        Args:
            tasks: those of this rank's step.

        Raises:
            ValueError: naming it.
        """
        new = [task for task in tasks if task not in self.tasks]
        if new:
            raise ValueError(
                f"Task {', '.join(map(repr, new))} appeared after the first step of a distributed run, where the ranks agreed "
                f"on the tasks {list(self.tasks)}. Declare all of them: tasks={[*self.tasks, *new]}."
            )

    @staticmethod
    def check_complete(tasks: Iterable[str], counts: Mapping[str, int | Tensor]) -> None:
        """Refuse a batch that has not the same tasks on every rank.

        Args:
            tasks: those of this rank's batch.
            counts: task → how many ranks have it.

        Raises:
            ValueError: naming those that some rank lacks.
        """
        size, here = torch.distributed.get_world_size(), set(tasks)
        lacking = [task for task, count in counts.items() if task not in here or int(count) < size]
        if lacking:
            raise ValueError(
                f"Task {', '.join(map(repr, lacking))} is missing from the batch of a rank, and when='same step' has all ranks "
                "weigh the same tasks in the same backward. Give every rank batches with all tasks, or take when='next step'."
            )

    @staticmethod
    def all_reduce(vector: Tensor) -> Tensor:
        """Σ over the ranks, in place.

        Args:
            vector: of the same shape on every rank.
        """
        torch.distributed.all_reduce(vector)
        return vector
