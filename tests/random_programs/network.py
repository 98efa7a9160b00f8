"""The network of a program: equal parameters, inputs and losses whenever it is built."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import functional as F

from tests.random_programs.description import Hook, Program, Task
from tests.random_programs.operations import make

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of a prediction [rows, width] and a target of its shape
    "square": lambda p, y: (p - y).square().mean(),
    "absolute": lambda p, y: (p - y).abs().mean(),
    "sum": lambda p, y: p.sum(),
    "huber": F.smooth_l1_loss,
    "classes": lambda p, y: F.cross_entropy(p, y.argmax(1)),
    "logsumexp": lambda p, y: p.logsumexp(1).square().sum(),
    "column": lambda p, y: (p[:, 1] - y[:, 1]).square().mean(),
    "row": lambda p, y: p[-1:].square().sum(),
    "through w": lambda p, y: p.square().mean(),  # of the prediction once more through W, where that fits
    "of w": lambda p, y: p.sum() * 0,  # and a penalty on W
}


def as_wide(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Real and complex parameters in that precision."""
    wide = {torch.float64: torch.complex128}.get(dtype, torch.complex64)
    return module._apply(lambda t: t.to(wide) if t.is_complex() else t.to(dtype) if t.is_floating_point() else t)


@dataclass
class Forward:
    """What one forward pass has made.

    Attributes:
        losses: task name → loss, not tapped.
        w: the tensors of W.
        edges: where their gradients arrive, for W that is made by the forward; else ``None``.
        counts: how often each hook has run so far.
        retained: the tensors that were asked to keep their gradient.
        places: of each hook on a tensor or node of the forward, the node that it lies on.
    """

    losses: dict[str, Tensor]
    w: list[Tensor]
    edges: list[GradientEdge] | None
    counts: list[int]
    retained: list[Tensor] = field(default_factory=list)
    places: dict[int, Node] = field(default_factory=dict)


class Network(nn.Module):
    """Built from a program; ``run`` is its forward pass.

    Args:
        program: the description.
        dtype: of parameters and inputs; the same numbers, drawn in float32, whatever it is.
        scaling: whether hooks that scale do so; by their number, all by default.
    """

    def __init__(self, program: Program, dtype: torch.dtype, scaling: Callable[[int], bool] = lambda number: True) -> None:
        super().__init__()
        self.program, self.scaling = program, scaling
        torch.manual_seed(program.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old weight_norm
            self.body = nn.ModuleList([make(piece, program.width) for piece in program.body])
            self.heads = nn.ModuleList(
                [nn.Sequential(*[make(piece, program.width) for piece in task.head]) for task in program.tasks]
            )
        as_wide(self, dtype)
        self.x = (torch.randn(program.rows, program.width) + program.offset).to(dtype)
        self.targets = [torch.randn(program.rows, program.width).to(dtype) for _ in program.tasks]
        self.strain = torch.ones(program.width, dtype=dtype)
        if any(task.derivative_of is not None for task in program.tasks):
            self.x.requires_grad_()
            self.strain.requires_grad_()
        self.owner: nn.Module = self
        self.w = self._choose()
        torch.manual_seed(program.seed + 1)  # of dropout, the same whatever was drawn before

    def _choose(self) -> list[Tensor]:
        """The parameters that are W; none where W is made by the forward."""
        kind, at = self.program.w.kind, self.program.w.at
        where: nn.Module = self.heads if kind == "head" else self.body
        found = [(name, p) for name, p in where.named_parameters() if p.requires_grad][::-1]
        if kind in ("value", "part"):
            return []
        if not found:
            raise LookupError("no parameters to choose W from")
        name, parameter = found[at % len(found)]
        if kind == "everything":
            return [p for p in self.parameters() if p.requires_grad]
        if kind == "body":
            self.owner = self.body
            return [p for _, p in found]
        if kind == "several":
            return [p for _, p in found[at % len(found) :][:3]]
        self.owner = where.get_submodule(name.rpartition(".")[0])
        if kind == "layer":
            return [p for p in self.owner.parameters() if p.requires_grad]
        return [parameter, parameter] if kind == "twice" else [parameter]

    def run(self) -> Forward:
        """One forward pass."""
        program = self.program
        made = Forward({}, list(self.w), None, [0] * len(program.hooks))
        self._lay_module_hooks(made)
        values = [self.x * self.strain if self.strain.requires_grad else self.x]
        for i, piece in enumerate(self.body):
            values.append(self._watched(made, i, piece(values[-1])))
        predictions: list[Tensor] = []
        derivatives: dict[int, tuple[Tensor, ...]] = {}
        for i, task in enumerate(program.tasks):
            given = self._given(i, task, values, predictions, derivatives)
            head = self.heads[i if task.same_head_as is None or not i else task.same_head_as % i]
            prediction = head(given)
            self._lay_tensor_hooks(made, ("head", "retain head"), i, len(program.tasks), prediction)
            predictions.append(prediction)
        self._make_losses(made, predictions)
        return made

    def _watched(self, made: Forward, i: int, value: Tensor) -> Tensor:
        """The ``i``-th value of the body, once its hooks are laid, and taken for W where that is it."""
        program = self.program
        if program.w.kind in ("value", "part") and i == len(self.body) - 1 - program.w.at % len(self.body):
            if program.w.kind == "part":
                first, second = value.split(program.width // 2, 1)
                made.w = [first] if program.w.at % 2 else [first, second]
                value = torch.cat([first, second.tanh()], 1)
            else:
                made.w = [value]
            if not all(tensor.requires_grad for tensor in made.w):
                raise LookupError("W is made of constants")
            made.edges = [get_gradient_edge(tensor) for tensor in made.w]
        self._lay_tensor_hooks(made, ("value", "retain", "node", "node pre"), i, len(self.body), value)
        return value

    def _given(self, i: int, task: Task, values: list[Tensor], predictions: list[Tensor], derivatives: dict) -> Tensor:
        if task.derivative_of is not None and i:
            of = task.derivative_of % i
            if of not in derivatives:
                energy = (
                    predictions[of].float().square().sum() if self.x.dtype == torch.float32 else predictions[of].square().sum()
                )
                derivatives[of] = torch.autograd.grad(energy, (self.x, self.strain), create_graph=True)
            by_x, by_strain = derivatives[of]
            given = by_x if task.by == "x" else by_strain.expand(self.program.rows, -1) * 0.1
        else:
            chosen = [values[len(values) - 1 - source % len(values)] for source in task.sources]
            given = sum(chosen[1:], chosen[0])
        return given if task.reads is None or not i else given + predictions[task.reads % i]

    def _make_losses(self, made: Forward, predictions: list[Tensor]) -> None:
        program = self.program
        predictions = [p.to(self.x.dtype) for p in predictions]
        if program.join == "cat":
            predictions = list(torch.cat(predictions, 1).split(program.width, 1))
        elif program.join == "stack":
            joined = torch.stack(predictions)
            predictions = [joined[i] for i in range(len(predictions))]
        elif program.join == "mean":
            joined = (torch.cat(predictions, 1) + torch.cat(self.targets, 1)).square().mean(0)
            predictions = [part.expand(program.rows, -1) for part in joined.split(program.width)]
        for i, (task, prediction) in enumerate(zip(program.tasks, predictions, strict=True)):
            weight = made.w[0] if made.w else None
            if (
                task.loss == "through w"
                and weight is not None
                and weight.shape == (program.width,) * 2
                and not weight.is_complex()
            ):
                prediction = F.linear(prediction, weight)
            loss = LOSSES[task.loss](prediction.to(self.x.dtype), self.targets[i]) * task.size
            if task.loss == "of w" and not made.edges:
                loss = loss + sum(p.abs().square().sum() for p in made.w)
            if task.adds is not None and i:
                loss = loss + 0.3 * made.losses[f"task{task.adds % i}"]
            made.losses[f"task{i}"] = loss

    def total(self, losses: dict[str, Tensor], untapped: dict[str, Tensor]) -> Tensor:
        """Of the losses, tapped or not, with the further terms."""
        program = self.program
        terms = [loss * task.weight for task, loss in zip(program.tasks, losses.values(), strict=True) if task.in_total]
        for extra in program.extras:
            if extra == "w":
                terms += [p.abs().square().sum() * 0.3 for p in self.w]
            elif extra == "all":
                terms += [p.abs().sum() * 0.1 for p in self.parameters() if p.requires_grad]
            elif extra == "loss":
                terms.append(next(iter(untapped.values())).arctan())
            elif extra == "tap":
                terms.append(list(losses.values())[-1].arctan() * 0.5)
        return sum(terms[1:], terms[0]) * program.scale if terms else torch.zeros(())

    # -- other people's hooks --------------------------------------------------------------------------------------

    def _hooks(self, *kinds: str) -> list[tuple[int, Hook]]:
        return [(number, hook) for number, hook in enumerate(self.program.hooks) if hook.kind in kinds]

    def _gradient(self, made: Forward, number: int, gradient: Tensor | None) -> Tensor | None:
        """What a hook makes of a gradient; ``None`` for no change."""
        made.counts[number] += 1
        factor = self.program.hooks[number].factor
        return None if factor == 1 or gradient is None or not self.scaling(number) else gradient * factor

    def _gradients(self, made: Forward, number: int, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        changed = [self._gradient(made, number, gradient) for gradient in gradients]
        made.counts[number] += 1 - len(gradients)
        if all(new is None for new in changed):
            return None
        return tuple(old if new is None else new for old, new in zip(gradients, changed, strict=True))

    def _lay_tensor_hooks(self, made: Forward, kinds: tuple[str, ...], i: int, count: int, value: Tensor) -> None:
        for number, hook in self._hooks(*kinds):
            if i != count - 1 - hook.at % count or not value.requires_grad:
                continue
            if value.grad_fn is not None:
                made.places[number] = value.grad_fn
            if hook.kind.startswith("retain"):
                value.retain_grad()
                made.retained.append(value)
            elif hook.kind.startswith("node"):
                node = value.grad_fn
                if node is not None and hook.kind == "node pre":
                    node.register_prehook(lambda outputs, number=number: self._gradients(made, number, outputs))
                elif node is not None:
                    node.register_hook(lambda inputs, outputs, number=number: self._gradients(made, number, inputs))
            else:
                value.register_hook(partial(self._gradient, made, number))

    def _lay_module_hooks(self, made: Forward) -> None:
        for number, hook in self._hooks("module", "module pre", "head module"):
            modules = [m for part in (self.heads if hook.kind == "head module" else self.body) for m in part.modules()][::-1]
            if not modules:
                continue
            module = modules[hook.at % len(modules)]
            if hook.kind == "module pre":
                module.register_full_backward_pre_hook(lambda _, outputs, number=number: self._gradients(made, number, outputs))
            else:
                module.register_full_backward_hook(
                    lambda _, inputs, outputs, number=number: self._gradients(made, number, inputs)
                )
        for number, hook in self._hooks("w", "accumulated"):
            if not self.w:
                continue
            parameter: Any = self.w[hook.at % len(self.w)]
            if hook.kind == "w":
                parameter.register_hook(partial(self._gradient, made, number))
            else:
                parameter.register_post_accumulate_grad_hook(partial(self._count, made, number))

    def _count(self, made: Forward, number: int, parameter: Tensor) -> None:
        made.counts[number] += 1
