"""One forward and backward of a program: plainly, with a reader around the backward, or one task at a time."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from lightning_gradnorm import JointBackward, PerTaskBackward, tap_losses
from lightning_gradnorm.reading import Reading
from tests.random_programs.description import Program
from tests.random_programs.network import Forward, Network

READERS = ("joint", "letting go", "letting go of pairs", "per task", "audited")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}


@dataclass
class Left:
    """What a step leaves behind, to be compared entry by entry."""

    gradients: dict[str, Tensor | None]
    retained: list[Tensor | None]
    counts: list[int]
    buffers: dict[str, Tensor]
    generator: Tensor

    def differences(self, other: "Left") -> list[str]:
        """What is not bit for bit the same."""
        found = []
        for name in ("gradients", "buffers"):
            mine, its = getattr(self, name), getattr(other, name)
            unequal = [key for key in mine if not same(mine[key], its[key])]
            if unequal:
                found.append(f"{name}: {unequal[0]} is {_shown(its[unequal[0]])}, plainly {_shown(mine[unequal[0]])}")
        if len(self.retained) != len(other.retained) or not all(map(same, self.retained, other.retained)):
            found.append(f"retained: {list(map(_shown, other.retained))}, plainly {list(map(_shown, self.retained))}")
        if self.counts != other.counts:
            found.append(f"counts: hooks ran {other.counts} times, plainly {self.counts}")
        if not torch.equal(self.generator, other.generator):
            found.append("generator: other random numbers follow")
        return found


@dataclass
class Read:
    """What a reader gave, ``[T]``, ``[T, T]``, ``[T, |W|]`` and ``[T]``; how, and what it had to say.

    One that lets gradients go has norms alone.
    """

    norms: Tensor
    cosines: Tensor | None
    flat: Tensor | None
    cotangents: Tensor
    how: str
    words: list[str]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit for bit; NaN equals NaN."""
    if a is None or b is None:
        return a is b
    a, b = dense(a), dense(b)
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def dense(t: Tensor) -> Tensor:
    """Of an embedding with ``sparse=True`` too."""
    return t if t.layout == torch.strided else t.to_dense()


def _shown(t: Tensor | None) -> str:
    return "None" if t is None else f"{dense(t).abs().double().norm():.6g} in size"


def autocast(program: Program, *, half: bool = True) -> AbstractContextManager:
    """Where the forward of a program runs: under autocast, if it is one of half precision and that is wanted."""
    half = half and program.precision == "bfloat16"
    return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()


def _left(network: Network, made: Forward) -> Left:
    return Left(
        {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}
        | {"x": network.x.grad, "strain": network.strain.grad},
        [None if t.grad is None else t.grad.clone() for t in made.retained],
        list(made.counts),
        {name: buffer.clone() for name, buffer in network.named_buffers()},
        torch.get_rng_state(),
    )


def run_plainly(program: Program) -> Left:
    """The ordinary step."""
    dtype = DTYPES[program.precision]
    network = Network(program, dtype)
    with autocast(program):
        made = network.run()
    network.total(made.losses, made.losses).backward()
    return _left(network, made)


def run_read(program: Program, kind: str) -> tuple[Read, Left]:
    """The same with a reader around the backward. Whatever it raises is raised."""
    dtype = DTYPES[program.precision]
    network = Network(program, dtype)
    with autocast(program):
        made = network.run()
    taps = tap_losses(made.losses)
    root = network.total(taps, made.losses)
    reading = Reading()
    if kind == "audited":
        reading.begin(root, taps, made.w, made.edges)
    elif kind == "letting go":
        with mock.patch("lightning_gradnorm.task_gradients._FEW", -1):  # what is small is kept
            reader = JointBackward(root, taps, made.w, made.edges, keep=False)
    elif kind == "letting go of pairs":
        reader = JointBackward(root, taps, made.w, made.edges, keep=False, pairs=True)
    else:
        reader = {"joint": JointBackward, "per task": PerTaskBackward}[kind](root, taps, made.w, made.edges)
    root.backward()
    left = _left(network, made)
    for parameter in network.parameters():  # clipping, say, comes before the norms are asked for
        if parameter.grad is not None:
            parameter.grad.zero_()
    found = reading.finish() if kind == "audited" else reader.gradients()
    assert found is not None
    how = "with factors" if found.factors else "plainly"
    cosines = None if kind == "letting go" else found.cosines()
    flat = None if kind.startswith("letting go") else found.flat()
    return Read(found.norms(), cosines, flat, found.cotangents, how, reading.words), left


@dataclass
class Truth:
    """Of each task ∇_W L_i by one ``autograd.grad``.

    Attributes:
        rows: ``[T, |W|]`` in float64; W given twice counts once.
        reached: per task, whether its graph leads to any of W.
        without: per task, whether there is no gradient all the same: a function's backward may give None.
        detached: tasks whose loss has no graph.
    """

    rows: Tensor
    reached: list[bool]
    without: list[bool]
    detached: list[str]


def truth(
    program: Program, dtype: torch.dtype, scaling: Callable[[int], bool], *, half: bool = True, seeded: bool = False
) -> Truth:
    """Each task on an equal program of its own: nothing that one backward leaves can touch the next.

    Args:
        program: the description.
        dtype: in which it is run.
        scaling: which hooks scale what passes by.
        half: whether under autocast, if it is a program for that.
        seeded: whether with what the total's backward begins with at the loss, divided out again: rounding is another then.
    """
    rows, reached, without, detached = [], [], [], []
    for task in range(len(program.tasks)):
        network = Network(program, dtype, scaling)
        with autocast(program, half=half):
            made = network.run()
        name, loss = list(made.losses.items())[task]
        w = list(dict.fromkeys(made.edges or made.w))
        found: list[Tensor | None] = [None] * len(w)
        seed = program.tasks[task].weight * program.scale if seeded else 1.0
        if loss.requires_grad:
            found = list(torch.autograd.grad(loss, w, torch.full_like(loss, seed or 1.0), allow_unused=True))
        elif loss == 0:
            raise LookupError("a loss of 0 without a graph is a task that is absent")
        else:
            detached.append(name)
        nodes = _nodes(loss.grad_fn)
        edges = made.edges or [get_gradient_edge(tensor) for tensor in made.w]
        reached.append(any(edge.node in nodes for edge in edges))
        without.append(all(g is None for g in found))
        row = torch.cat([_flat(g, t) for g, t in zip(found, dict.fromkeys(made.w), strict=True)])
        rows.append(row.double() / (seed or 1.0))
    return Truth(torch.stack(rows), reached, without, detached)


def _flat(gradient: Tensor | None, like: Tensor) -> Tensor:
    gradient = torch.zeros_like(like) if gradient is None else dense(gradient)
    return (torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient).flatten().detach()


def reached_by(program: Program) -> dict[int, set[int]]:
    """Hook → the tasks whose loss reaches the place where it lies; -1 for a further term of the total."""
    network = Network(program, DTYPES[program.precision])
    with autocast(program):
        made = network.run()
    found: dict[int, set[int]] = {number: set() for number in made.places}
    for task, loss in enumerate(made.losses.values()):
        nodes = _nodes(loss.grad_fn)
        for number, place in made.places.items():
            if place in nodes:
                found[number] |= {task, -1} if task == 0 and "loss" in program.extras else {task}
    return found


def _nodes(root: Node | None) -> set[Node]:
    seen: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [child for child, _ in node.next_functions]
    return seen
