"""Whether gradients that are put together anew inside the backward are what one ``autograd.grad`` per task makes of them."""

import dataclasses
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_gradnorm import tap_losses
from lightning_gradnorm.gradient_reader import CompiledSharedLayerError, HiddenUseError, UnreachedSharedLayerError
from lightning_gradnorm.meeting_place import ScatteredTasksError
from lightning_gradnorm.recombination import RecombiningBackward
from tests.random_programs.checking import Verdict
from tests.random_programs.description import Program
from tests.random_programs.network import Network
from tests.random_programs.running import _left, _nodes, dense, run_plainly

RELATIVE, ROUNDING = 1e-6, 1e-11  # of what is added up; of the largest gradient there is
REFUSALS = (CompiledSharedLayerError, HiddenUseError, ScatteredTasksError, UnreachedSharedLayerError, ValueError)
WEIGHTS = (0.25, 3.0, -0.5, 1.5, 0.0, 2.0)


def check_recombined(program: Program) -> Verdict:
    """Run a program in float64, without hooks that change gradients, under weights that have nothing to do with them."""
    tasks = tuple(dataclasses.replace(task, weight=task.weight or 1.0) for task in program.tasks)
    hooks = tuple(dataclasses.replace(hook, factor=1) for hook in program.hooks)
    extras = tuple(extra for extra in program.extras if extra != "tap")  # a term made of a tapped loss is the task's
    program = dataclasses.replace(program, precision="float64", tasks=tasks, hooks=hooks, extras=extras)
    if program.holds_in_a_checkpoint("spectral_norm"):
        return Verdict("no program")  # its power iteration goes on as it is run again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plain = run_plainly(program)
            alone = [_alone(program, task) for task in range(len(tasks))]
            network = Network(program, torch.float64)
            made = network.run()
            taps = tap_losses(made.losses)
            root = network.total(taps, made.losses)
        except (RuntimeError, ValueError, LookupError) as error:
            return Verdict("no program", notes=[f"{type(error).__name__}: {str(error)[:60]}"])
        weights = WEIGHTS[: len(tasks)]
        try:
            reader = RecombiningBackward(root, taps, made.w, made.edges, weigh=lambda gradients: weights, verify=True)
        except REFUSALS as error:
            return Verdict("refused", notes=[f"{type(error).__name__}: {str(error).partition('Here ')[2][:40]}"])
        root.backward()
        reader.gradients()
        left = _left(network, made)
    verdict = Verdict("agreed")
    for words in plain.differences(left):
        what = words.partition(":")[0]
        if what in ("buffers", "counts", "generator"):
            verdict.differences["recombining", what] = words
    for name, words in _wrong(plain.gradients, left.gradients, alone, weights):
        verdict.differences["recombining", name] = words
    verdict.outcome = "DIFFERENT" if verdict.differences else "agreed"
    return verdict


def _alone(program: Program, task: int) -> dict[str, Tensor]:
    """What the task's part of the total brings to every leaf that it leads to, on an equal program of its own."""
    network = Network(program, torch.float64)
    loss = list(network.run().losses.values())[task]
    leaves = {name: p for name, p in network.named_parameters() if p.requires_grad}
    leaves |= {name: t for name, t in (("x", network.x), ("strain", network.strain)) if t.requires_grad}
    share = program.tasks[task].weight * program.scale
    found = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, share), allow_unused=True)
    nodes = _nodes(loss.grad_fn)  # a function's backward may give None: then what it leads to has a gradient of 0
    reached = {name: g for (name, leaf), g in zip(leaves.items(), found, strict=True) if get_gradient_edge(leaf).node in nodes}
    return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in reached.items()}


def _wrong(
    plain: dict[str, Tensor | None],
    left: dict[str, Tensor | None],
    alone: list[dict[str, Tensor]],
    weights: tuple[float, ...],
) -> Iterator[tuple[str, str]]:
    """What several tasks reach has the weighted sum, and further terms as they were; what is one task's alone is as it was."""
    largest = max((float(dense(g).norm().nan_to_num(0, 0, 0)) for row in alone for g in row.values()), default=0.0)
    for name, before in plain.items():
        parts = [(weight, dense(row[name])) for weight, row in zip(weights, alone, strict=True) if name in row]
        found = left[name]
        if before is None or found is None:
            if before is not found:
                yield name, "a gradient where there was none, or none where there was one"
            continue
        expected = dense(before)
        if len(parts) > 1:
            expected = expected + sum((weight - 1) * part for weight, part in parts)
        sizes = [dense(before).norm(), *((1 + abs(weight)) * part.norm() for weight, part in parts)]
        if not all(size.isfinite() for size in sizes):
            continue
        off = float((dense(found) - expected).norm())
        if not off <= RELATIVE * float(max(sizes)) + ROUNDING * largest:
            yield name, f"off by {off:.3g} of {float(max(sizes)):.3g}, {len(parts)} tasks"
