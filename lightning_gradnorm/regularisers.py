"""Terms that are no task: one made of the weights alone is known by its graph, another can be guessed by its name."""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

_KINDS = frozenset({
    "Abs", "Add", "Alias", "Cat", "Clone", "Div", "Dot", "ForeachNorm", "LinalgVectorNorm", "Max", "Mean", "Mul", "Neg", "Norm",
    "Permute", "Pow", "Sqrt", "Squeeze", "Stack", "Sub", "Sum", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "Vdot",
    "View",
})  # fmt: skip
_WORDS = frozenset({"kl", "kld", "penalty", "prior", "smoothness", "sparsity"})
_WORDS |= {"regularisation", "regulariser", "regularization", "regularizer"}
# Words of which each alone is more often something else: a regression, radioactive decay, a mean absolute error.
_TOGETHER = frozenset({"decay", "reg"}), frozenset({"l1", "l2", "weight", "weights"})


def is_weight_penalty(loss: Tensor, network: nn.Module) -> bool:
    """Whether the loss is made of the network's parameters alone, by elementwise operations, reductions, and numbers.

    Such a term does not know the data. A penalty of another form (of singular values, of the distance to earlier weights) is
    not seen; nor is what is made of single numbers alone, which may be fitted to others.
    """
    parameters = {id(parameter) for parameter in network.parameters()}
    stack, seen, is_of_several = [loss.grad_fn], set(), False
    while stack:
        node: Any = stack.pop()
        if node is None:
            return False
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            if id(node.variable) not in parameters:
                return False
            is_of_several |= node.variable.numel() > 1
        elif type(node).__name__.partition("Backward")[0] in _KINDS:
            # What takes part without a gradient is a number where the outcome is one; elsewhere it may be data.
            is_scalar = tuple(node._input_metadata[0].shape) in ((), (1,))
            stack += [child for child, _ in node.next_functions if child is not None or not is_scalar]
        else:
            return False
    return is_of_several


def sounds_like_a_regulariser(task: str) -> bool:
    """Whether the name has a word in it by which regularisers go: ``kl_loss``, ``weightDecay``, ``l2_reg``."""
    words = set(re.split(r"[\W_]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", task).lower()))
    return bool(words & _WORDS) or all(words & some for some in _TOGETHER)


def of_penalties(tasks: Sequence[str], name: str) -> str:
    """What is said of terms that are made of the weights alone.

    Args:
        tasks: those terms.
        name: of who weighs them.
    """
    one = len(tasks) == 1
    return (
        f"Task{'' if one else 's'} {', '.join(map(repr, tasks))}: made of the network's parameters alone, whatever the data. "
        f"{'That is a weight penalty' if one else 'Those are weight penalties'}, and no task: {name} would move its weight "
        "until it pulls as the tasks do, whatever factor you gave it. Leave it out of the dict and add it to the total, "
        "total_loss({…}) + penalty; or use the optimiser's weight_decay."
    )
