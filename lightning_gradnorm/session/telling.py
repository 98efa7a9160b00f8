"""What a balancer has counted, in words."""

from collections.abc import Iterator, Sequence

import torch

from lightning_gradnorm.balancers import LossBalancer


def of_counts(balancer: LossBalancer, name: str) -> Iterator[tuple[str, str]]:
    """(about, message) of updates that were skipped, and of tasks that had no gradient; asks the device.

    Args:
        balancer: the method.
        name: of what the user sees.
    """
    skipped = int(balancer.skipped_updates.item())
    if skipped:
        yield (
            "skipped",
            f"{name} skipped {skipped} weight update{'s' if skipped > 1 else ''} so far: a task's loss or gradient was not "
            "finite, or all gradients on the shared layer were zero. The weights stayed as they were; the count is in "
            "balancer.skipped_updates.",
        )
    idle = getattr(balancer, "idle_steps", None)
    if not isinstance(idle, torch.Tensor):
        return
    for task, steps in zip(balancer.tasks, idle.tolist(), strict=True):
        if steps:
            yield (
                f"idle {task}",
                f"Task {task!r} took no part in {steps} step{'s' if steps > 1 else ''} so far, as if it were absent: its "
                "gradient on the shared layer was exactly zero. Look whether its loss depends on that layer at all, whether "
                "its output saturates or is clamped, and whether its batches have labels. The counts are in "
                "balancer.idle_steps.",
            )


def unsettled(tasks: Sequence[str]) -> str:
    """What is said at the end of an epoch in which the shared layer could not be settled.

    Args:
        tasks: those that are known or declared.
    """
    declared = f" ({', '.join(map(repr, tasks))})" if tasks else ""
    return (
        "No gradient was measured in this epoch, so the weights are what they were: the shared layer is settled once every "
        f"declared task{declared} has had a batch, and two tasks at least have shown a gradient. Take out the names of tasks "
        "that do not come, or name the layer with shared_layer()."
    )
