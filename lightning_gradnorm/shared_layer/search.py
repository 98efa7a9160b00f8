"""The search for W: one look at each of the first batches, until they have shown where all the tasks meet."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from lightning_gradnorm.shared_layer.choice import Chooser
from lightning_gradnorm.shared_layer.evidence import Evidence
from lightning_gradnorm.shared_layer.layer import (
    NAME_IT,
    SharedLayer,
    is_sharded,
    named,
    refuse_sharded,
    weight_names,
)
from lightning_gradnorm.shared_layer.weight_graph import WeightGraph

_PATIENCE = 10  # batches that are waited for a second task to have a gradient


class _Weights(NamedTuple):
    """The weights of a network (two or more dimensions): name → trainable parts, their names; part → weight."""

    parts: dict[str, list[nn.Parameter]]
    part_names: dict[nn.Parameter, str]
    names: dict[nn.Parameter, str]


def _weights(network: nn.Module) -> _Weights:
    names = weight_names(network)
    parts: dict[str, list[nn.Parameter]] = {}
    for parameter, name in names.items():
        if parameter.requires_grad:
            parts.setdefault(name, []).append(parameter)
    parts = {name: own for name, own in parts.items() if any(part.ndim >= 2 for part in own)}
    part_names = {parameter: name for name, parameter in named(network.named_parameters())}
    return _Weights(parts, part_names, {part: name for name, own in parts.items() for part in own})


class SharedLayerSearch:
    """Takes in the first batches until W can be told: where the tasks that were seen, and those declared, meet.

    A look costs a walk over the batch's graph and one backward for each task whose gradients are not known yet; where a
    batch can bring nothing new, nothing.

    Args:
        network: the module that the parameters belong to.
        declared_tasks: names known beforehand; W is not told before each was seen.

    Attributes:
        silent_tasks: tasks that had no gradient so far on any weight that all reach; they had no say in the last choice.
    """

    def __init__(self, network: nn.Module, declared_tasks: Iterable[str] = ()) -> None:
        self.network: nn.Module = network
        self.declared_tasks: tuple[str, ...] = tuple(declared_tasks)
        self.silent_tasks: tuple[str, ...] = ()
        self._reached: dict[str, list[str]] = {}  # task → weights, the last first
        self._evidence = Evidence()
        self._looks = 0

    def look(self, losses: Mapping[str, Tensor]) -> SharedLayer | None:
        """W, as this batch and those before it show it; ``None`` while it cannot be told.

        That is while fewer than two tasks have shown a gradient (but for one task that is the only one declared), or a
        declared one was not seen.

        Args:
            losses: task name → scalar loss of the batch, with its graph.

        Raises:
            ValueError: if the tasks have no trainable weight in common, saying what each reaches; if the weight is sharded.
        """
        seen = self._reached.keys() | losses.keys()
        waiting = not seen.issuperset(self.declared_tasks) or (len(seen) == 1 and seen != set(self.declared_tasks))
        if waiting and losses.keys() <= self._reached.keys():
            return None
        look = self._take_in(losses)
        speaking = len(self._reached) - len(self.silent_tasks)
        if waiting or (speaking < 2 and len(self._reached) > 1 and self._looks <= _PATIENCE):
            return None
        return self._tell(look)

    def fits(self, layer: SharedLayer, losses: Mapping[str, Tensor]) -> bool:
        """Whether every task of the batch reaches the layer."""
        if not layer.parameters:
            return True
        wanted = dict(zip(layer.parameters, layer.names, strict=True))
        graph = WeightGraph(losses, wanted)
        return bool(graph.names) and bool(graph.reached.any(1).all())

    def _take_in(self, losses: Mapping[str, Tensor]) -> "_Look":
        weights = _weights(self.network)
        graph = WeightGraph(losses, weights.names)
        reached = self._reached | {
            task: [name for name, there in zip(graph.names, row, strict=True) if there][::-1]
            for task, row in zip(graph.tasks, graph.reached.tolist(), strict=True)
        }
        chooser = Chooser(graph, self._evidence, {task: set(own) for task, own in reached.items()})
        common = chooser.common()
        if not common.any():
            refuse_sharded({part: name for part, name in weights.part_names.items() if part.ndim >= 2})
            raise ValueError(_nothing_shared(reached))
        checked = common & ~graph.runs_once
        if any(is_sharded(parameter) for parameter in self.network.parameters()):
            checked[:] = False  # a backward of our own would have shards gathered and given back once more
        for task, loss in losses.items():
            parts = {name: weights.parts[name] for name, check in zip(graph.names, checked, strict=True) if check}
            self._evidence.look(task, loss, parts)
        self._reached, self._looks = reached, self._looks + 1
        names = [name for name, there in zip(graph.names, common, strict=True) if there]
        self.silent_tasks = tuple(task for task in reached if self._evidence.is_silent(task, names))
        return _Look(weights, chooser, bool((common & ~checked).any()))

    def _tell(self, look: "_Look") -> SharedLayer:
        choice, weights = look.chooser.choose(), look.weights
        reached = look.chooser.reached
        self._reached |= {task: [name for name in self._reached[task] if name in own] for task, own in reached.items()}
        chosen = [part for name in choice.weights for part in weights.parts[name]]
        refuse_sharded({part: weights.part_names[part] for part in chosen})
        reason = choice.reason()
        if look.by_graph:
            reason += "; by the graph alone, part of which can run backward only once or is sharded"
        if self.silent_tasks:
            reason += f"; {', '.join(f'task {task!r}' for task in self.silent_tasks)} had no gradient so far, and no say"
        reason += "; found from the graph, name another by shared_layer"
        return SharedLayer(tuple(weights.part_names[part] for part in chosen), tuple(chosen), reason)


class _Look(NamedTuple):
    """What a batch was taken in as: the weights to choose from, and whether some gradients could not be looked at."""

    weights: _Weights
    chooser: Chooser
    by_graph: bool


def detect_shared_layer(losses: Mapping[str, Tensor], network: nn.Module) -> SharedLayer:
    """W as one batch shows it: the last weight, or weights, on which every task has a gradient.

    See ``Chooser`` for what that means. A task that has no gradient in this batch has no say.

    Args:
        losses: task name → scalar loss of one training batch, with its graph.
        network: the module that the parameters belong to.

    Raises:
        ValueError: if the tasks have no trainable weight in common, saying what each task reaches; if the weight is sharded.
    """
    search = SharedLayerSearch(network)
    return search._tell(search._take_in(losses))


def _nothing_shared(reached: Mapping[str, list[str]]) -> str:
    lines = []
    for task, own in reached.items():
        more = f" and {len(own) - 3} more" if len(own) > 3 else ""
        lines.append(f"  {task!r} reaches {', '.join(own[:3]) + more if own else 'no trainable weight at all'}")
    return "\n".join(
        [
            "The tasks share no trainable weight, so there is no gradient to balance:",
            *lines,
            "Is the shared part frozen, or inside a reentrant torch.utils.checkpoint (pass use_reentrant=False)? "
            f"{NAME_IT}; or leave out a task that shares nothing with the others.",
        ]
    )
