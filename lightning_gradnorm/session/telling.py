"""What a balancer has counted, in words."""

from collections.abc import Mapping, Sequence

from lightning_gradnorm.balancers import LossBalancer


def of_skipped(balancer: LossBalancer, name: str) -> str:
    """What is said of updates that were skipped; nothing where none was. Asks the device.

    Args:
        balancer: the method.
        name: of what the user sees.
    """
    skipped = int(balancer.skipped_updates.item())
    if not skipped:
        return ""
    return (
        f"{name} skipped {skipped} weight update{'s' if skipped > 1 else ''} so far: a task's loss or gradient was not "
        "finite, or all gradients on the shared layer were zero. The weights stayed as they were; the count is in "
        "balancer.skipped_updates."
    )


def idle_tasks(balancer: LossBalancer) -> dict[str, int]:
    """Task → the measured steps in which its gradient on the shared layer was exactly zero, if any; asks the device."""
    return {task: steps for task, steps in zip(balancer.tasks, balancer.idle_steps.tolist(), strict=True) if steps}


def of_idle(tasks: Mapping[str, int]) -> str:
    """What is said of tasks that took no part.

    Args:
        tasks: task → in how many steps.
    """
    named = [f"{task!r} in {steps} step{'s' if steps > 1 else ''}" for task, steps in tasks.items()]
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    return (
        f"Tasks that took no part so far, as if they were absent: {', '.join(named[:4])}{more}. Their gradient on the shared "
        "layer was exactly zero. Look whether the loss depends on that layer at all, whether an output saturates or is "
        "clamped, and whether there are labels in every batch. The counts are in balancer.idle_steps."
    )


def evaluated_again() -> str:
    """What is said of a task that goes backward again once an optimiser steps, where a method acts in the backward."""
    return (
        "A task goes backward again after the optimiser has begun to step: it evaluates its closure again, as L-BFGS does to "
        "search a line, or it is a second optimiser's turn in the same batch. when='same step' would change the objective at "
        "every evaluation. Take when='next step', whose weights stay as they are within a step."
    )


def alone(task: str) -> str:
    """What is said of a backward with one task, where a method acts in the backward.

    Args:
        task: its name.
    """
    return (
        f"A backward had one task alone, {task!r}, and when='same step' left its gradient as it is. Where each task has a "
        "backward of its own nothing is weighed: call backward() once on the total of all tasks, or take when='next step'."
    )


def plain_step() -> str:
    """What is said of a step in which a method that acts in the backward could not act."""
    return (
        "when='same step' did not act in a step, which was trained on the plain sum of the losses: there was no shared layer "
        "to compare gradients on. Name one that is trained and that every batch uses: shared_layer."
    )


def needs_total(balancer: LossBalancer, task_has_points: bool) -> str:
    """Why a task's loss cannot come by itself, before the others of its step; nothing where it can.

    Args:
        balancer: the method.
        task_has_points: whether the points of the task's term are weighed one by one.
    """
    name = type(balancer).__name__
    if task_has_points:
        return "the points of this task are weighed one by one"
    if "kpis" in balancer.needs:
        return f"{name} needs each task's key performance indicator beside its loss"
    if balancer.needs_residuals:
        return f"{name} needs the loss of each point"
    return f"the weights of {name} depend on all losses of a step" if balancer.needs_all_losses else ""


def never_multiplied(tasks: Sequence[str]) -> str:
    """What is said of weights that were handed out, and by which no loss was multiplied that went backward in an epoch."""
    return (
        f"No loss that was multiplied by the weight of {', '.join(map(repr, tasks))} went backward in this epoch, so these "
        "terms are not balanced. The library may have read the number once, as by float(weight) or torch.tensor(weight), or "
        "its term is switched off. Where its losses are added up, write total_loss({'task': loss, …}); or take the weight out."
    )


def unused() -> str:
    """What is said of a loss that goes backward without those that were to be balanced."""
    return (
        "training_step handed losses over to be balanced, but returned a loss that was not built from the result, so there is "
        "nothing to balance. Return what total_loss() gave, or the sum of the weighed terms, with further terms added if you "
        "like."
    )


def lone(task: str) -> str:
    """What is said at the end of an epoch in which there was one task."""
    return f"There is one task so far, {task!r}, and so there is nothing to weigh. Hand over the losses of all tasks."


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
