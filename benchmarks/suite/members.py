"""Many trainings of one problem at once: their parameters stacked, each with its own balancer, batches and Adam's memory.

A small network's step costs mostly what it takes to launch its operations; stacked, a step of eighteen costs a fraction of
eighteen steps. A member's numbers are those that it would have alone in a ``BalancingSession`` loop.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from benchmarks.suite.problem import Problem
from lightning_gradnorm import LossBalancer, Measurement
from lightning_gradnorm.traces import generator_of, random_signs, residual_cotangents

NormsOn = Literal["shared", "matrices", "all"]
Found = dict[NormsOn, dict[str, list[Tensor]]]  # where gradients are compared → statistic → what was kept of each task so far
Statistics = dict[str, Callable[[Tensor], Tensor]]  # name → what is kept of a task's gradients ``[M, |W|]``; mostly ``[M]``
MARKS = (0.25, 0.5, 1.0)  # shares of the training at which errors are taken


@dataclass
class Member:
    """One training of the stack.

    Attributes:
        method, seed: which.
        balancer: its own.
        norms_on: where its gradients are compared: the problem's W, all weights without biases, or all parameters.
        errors, weights: at each of the marks.
        applied: while ``train`` runs: ∂total/∂L_i of the step to come, ``[T]``.
    """

    method: str
    seed: int
    balancer: LossBalancer
    norms_on: NormsOn = "shared"
    errors: list[float] = field(default_factory=list)
    weights: list[dict[str, float]] = field(default_factory=list)
    applied: Tensor | None = None


class Stack:
    """The trainings, to be carried on step by step.

    Args:
        make: seed → the problem, with the network of that seed.
        members: who takes part.
        steps: of the whole training.
    """

    def __init__(self, make: Callable[[int], Problem], members: Sequence[Member], steps: int) -> None:
        self.members, self.steps, self.step = list(members), steps, 0
        self.problems = [fresh(make, member.seed) for member in self.members]
        first = self.first = self.problems[0]
        self.tasks = first.tasks
        seeds = sorted({member.seed for member in self.members})
        self.streams = [self.problems[[m.seed for m in self.members].index(seed)].stream() for seed in seeds]
        self.stream_of = torch.tensor([seeds.index(member.seed) for member in self.members])
        self.parameters, buffers = stack_module_state([*self.problems])
        self.losses = vmap(lambda parameters, *batch: functional_call(first, (parameters, buffers_of(buffers)), batch))
        adam = torch.optim.AdamW if first.weight_decay else torch.optim.Adam
        self.optimizer = adam(
            self.parameters.values(), lr=first.lr, betas=first.betas, weight_decay=first.weight_decay, fused=True
        )
        self.compared = {norms_on: self._compared(norms_on) for norms_on in dict.fromkeys(m.norms_on for m in self.members)}

    def _compared(self, norms_on: NormsOn) -> list[Tensor]:
        of = {name: stacked for name, stacked in self.parameters.items() if norms_on != "matrices" or stacked.ndim > 2}
        return [of[name] for name in self.first.shared] if norms_on == "shared" else list(of.values())

    def advance(self) -> dict[str, Tensor]:
        """One step of all; task → the losses before it, one per member, detached."""
        batch = [torch.stack(parts)[self.stream_of] for parts in zip(*map(next, self.streams), strict=True)]
        points = self.losses(self.parameters, *batch)
        losses = {task: loss.flatten(1).mean(1) if loss.ndim > 1 else loss for task, loss in points.items()}
        detached = torch.stack([losses[task].detach() for task in self.tasks], 1).double()
        for place, member in enumerate(self.members):
            if member.applied is None:
                member.applied = member.balancer.weights_at(dict(zip(self.tasks, detached[place].unbind(), strict=True)))
        weights = torch.stack([member.applied for member in self.members], 1)
        measured = self._measure(losses, points)
        total = torch.stack([(weight * losses[task]).sum() for task, weight in zip(self.tasks, weights.float(), strict=True)])
        gradients = torch.autograd.grad(total.sum(), list(self.parameters.values()), materialize_grads=True)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient.contiguous()  # the fused Adam takes numbers as they lie in memory
        for group in self.optimizer.param_groups:
            group["lr"] = self.first.lr * self.first.lr_factor(self.step / self.steps)
        self.optimizer.step()
        for place, member in enumerate(self.members):
            due, balancer = member.balancer.due, member.balancer
            statistics = {name: vectors[:, place] for name, vectors in measured.get(member.norms_on, {}).items()}
            balancer.update(Measurement(self.tasks, detached[place], **statistics) if due else None)
            if due or type(balancer).weights_at is not LossBalancer.weights_at:
                member.applied = None
        self.step += 1
        if self.step % self.first.epoch() == 0:
            for member in self.members:
                member.balancer.end_epoch()
                member.applied = None
        return dict(zip(self.tasks, detached.unbind(1), strict=True))

    def _measure(self, losses: dict[str, Tensor], points: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Where gradients are compared → statistic that a member needs now → ``[T, M]``, of the Gram matrix ``[T, M, T]``."""
        needs: dict[NormsOn, set[str]] = {}
        for member in self.members:
            if member.balancer.due and member.balancer.needs_gradients:
                needs.setdefault(member.norms_on, set()).update(member.balancer.needs)
        found: Found = {norms_on: {name: [] for name in names} for norms_on, names in needs.items()}
        for number, task in enumerate(self.tasks if needs else ()):
            self._take(OF_LOSSES, losses[task], found)
            if any("ntk_traces" in statistics for statistics in found.values()):
                signs = random_signs(points[task].shape[1:], generator_of(self.step, 0, 0, number))
                self._take(OF_RESIDUALS, signed_sums(points[task], signs), found)
        return {
            norms_on: {name: TOGETHER.get(name, torch.stack)(kept) for name, kept in statistics.items()}
            for norms_on, statistics in found.items()
        }

    def _take(self, statistics: Statistics, outputs: Tensor, found: Found) -> None:
        """Add to what was found those statistics that are wanted of the gradients of ``outputs``, one per member."""
        places = [norms_on for norms_on, vectors in found.items() if not statistics.keys().isdisjoint(vectors)]
        wanted = list({id(one): one for norms_on in places for one in self.compared[norms_on]}.values())
        if not wanted:
            return
        gradients = torch.autograd.grad(outputs.sum(), wanted, retain_graph=True, materialize_grads=True)
        by_id = {id(one): gradient.flatten(1) for one, gradient in zip(wanted, gradients, strict=True)}
        for norms_on in places:
            whole = torch.cat([by_id[id(one)] for one in self.compared[norms_on]], 1)
            for name in statistics.keys() & found[norms_on]:
                found[norms_on][name].append(statistics[name](whole).double())

    @torch.no_grad()
    def note(self) -> None:
        """Errors and weights as they are now."""
        for place, (member, problem) in enumerate(zip(self.members, self.problems, strict=True)):
            for name, parameter in problem.named_parameters():
                parameter.copy_(self.parameters[name][place])
            member.errors.append(problem.eval().error())
            problem.train()
            member.weights.append(member.balancer.weights)


OF_LOSSES: Statistics = {
    "gradient_norms": lambda gradients: gradients.norm(dim=1),
    "gradient_maxima": lambda gradients: gradients.abs().amax(1),
    "gradient_means": lambda gradients: gradients.abs().mean(1),
    "gramian": lambda gradients: gradients,
}
OF_RESIDUALS: Statistics = {"ntk_traces": lambda gradients: gradients.square().sum(1)}


def gram_rows(gradients: list[Tensor]) -> Tensor:
    """⟨∇L_i, ∇L_j⟩ of each member, ``[T, M, T]``, given every task's gradients, ``[M, |W|]``."""
    by_member = torch.stack(gradients, 1)
    return (by_member @ by_member.mT).transpose(0, 1)


TOGETHER: dict[str, Callable[[list[Tensor]], Tensor]] = {"gramian": gram_rows}  # of all tasks' kept; the others are stacked


def signed_sums(squares: Tensor, signs: Tensor) -> Tensor:
    """Σ_j ε_j r_j / √N of each member's points, ``[M]``, given their r², ``[M, N]``, and signs ε, ``[N]``."""
    count = squares.count_nonzero(1).clamp_min(1)
    return (residual_cotangents(squares.detach(), signs) * squares).sum(1) / count.sqrt()


def fresh(make: Callable[[int], Problem], seed: int) -> Problem:
    """The problem with the network of this seed."""
    torch.manual_seed(seed)
    return make(seed)


def buffers_of(stacked: dict[str, Tensor]) -> dict[str, Tensor]:
    """A problem of the suite has none: what a step changes beside the parameters would have to be stacked too."""
    assert not stacked, "a problem of the suite has no buffers"
    return stacked


def train(make: Callable[[int], Problem], members: Sequence[Member], steps: int) -> float:
    """Train all; errors and weights are noted in the members at each of ``MARKS``.

    Returns:
        Seconds of processor time for one step of one member.
    """
    stack = Stack(make, members, steps)
    marks = [max(round(mark * steps), 1) for mark in MARKS]
    spent = 0.0
    for step in range(1, steps + 1):
        start = time.process_time()
        stack.advance()
        spent += time.process_time() - start
        for _ in range(marks.count(step)):
            stack.note()
    return spent / steps / len(stack.members)
