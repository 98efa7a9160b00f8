"""Ways to turn a step's losses into gradients: the plain sum, GradNorm with either engine, and its textbook form."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.workloads import Losses, Workload
from lightning_gradnorm import GradNorm, JointBackward, PerTaskBackward, tap_losses
from lightning_gradnorm.gradients import GradientReader


class Method(ABC):
    """One way to train a workload's network. It keeps the state of its weights from step to step.

    Args:
        workload: what is trained.
        optimizer: the network's own; all methods of a comparison share it.
    """

    name: ClassVar[str]

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        self.workload, self.optimizer = workload, optimizer

    def step(self) -> None:
        """One training step: forward, backward with all that the method adds, optimiser step, gradients cleared."""
        self.backward(self.workload.losses)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @abstractmethod
    def backward(self, losses: Losses) -> None:
        """Fill every parameter's ``.grad`` from the losses, and update the method's weights."""


class PlainSum(Method):
    """Σ_i L_i: what every other method is compared with."""

    name = "plain sum"

    def backward(self, losses: Losses) -> None:
        sum(losses.values()).backward()


class GradNormMethod(Method):
    """GradNorm as in a bare loop, on the steps that are due; the others add nothing but the weighted sum."""

    reader: Callable[..., GradientReader]

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer, update_every: int = 1) -> None:
        super().__init__(workload, optimizer)
        self.gradnorm = GradNorm(update_every=update_every)

    def backward(self, losses: Losses) -> None:
        if not self.gradnorm.due:
            self.gradnorm.total(losses).backward()
            self.gradnorm.update(None)
            return
        losses = tap_losses(losses)
        total = self.gradnorm.total(losses)
        reader = self.reader(total, losses, self.workload.shared, keep=False)
        total.backward()
        self.gradnorm.update(reader.measurement())


class JointEngine(GradNormMethod):
    """GradNorm, its norms read from the one joint backward: the default."""

    name = "GradNorm"
    reader = JointBackward


class _ProductsMade(JointBackward):
    _keeps_factors = False


class ProductPerTask(GradNormMethod):
    """GradNorm, its norms read from the one joint backward, with one product per task through any kind of layer."""

    name = "GradNorm, product per task"
    reader = _ProductsMade


class FeatureNorms(GradNormMethod):
    """GradNorm on ``norm_of="features"``: the norms of the gradients at the shared layer's output, no product at all."""

    name = "GradNorm, features"

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer, update_every: int = 1) -> None:
        super().__init__(workload, optimizer, update_every)
        self.features: list[Tensor] = []
        owner = next(m for m in workload.network.modules() if any(p is workload.shared[0] for p in m.parameters(recurse=False)))
        owner.register_forward_hook(lambda module, inputs, output: self.features.append(output))

    def reader(self, root: Tensor, losses: Losses, parameters: list[Tensor], *, keep: bool) -> GradientReader:
        reader = JointBackward(root, losses, self.features, keep=keep)
        self.features = []
        return reader


class PerTaskEngine(GradNormMethod):
    """GradNorm, its norms from one ``autograd.grad`` per task: the fallback."""

    name = "GradNorm, per-task engine"
    reader = PerTaskBackward


class DoubleBackward(Method):
    """GradNorm as in most public code: the norms' own graph is kept, and L_grad differentiated through it.

    For the comparison of cost only. Its gradient of L_grad is taken with respect to the weights alone, which is correct
    and the cheapest form; public code that calls ``backward()`` there pays more, and spoils the network's gradients.
    """

    name = "GradNorm, double backward"

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__(workload, optimizer)
        self.alpha = alpha
        self.weights = torch.ones(len(workload.losses), requires_grad=True)
        self.weights_optimizer = torch.optim.Adam([self.weights], lr=lr)
        self.initial: Tensor | None = None

    def backward(self, losses: Losses) -> None:
        weighted = [weight * loss for weight, loss in zip(self.weights.unbind(), losses.values(), strict=True)]
        sum(weighted).backward(retain_graph=True)
        norms = torch.stack([self._norm(loss) for loss in weighted])
        values = torch.stack([loss.detach() for loss in losses.values()])
        self.initial = values if self.initial is None else self.initial
        ratios = values / self.initial
        target = (norms.mean() * (ratios / ratios.mean()) ** self.alpha).detach()
        self.weights.grad = torch.autograd.grad((norms - target).abs().sum(), self.weights)[0]
        self.weights_optimizer.step()
        with torch.no_grad():
            self.weights.mul_(len(weighted) / self.weights.sum())

    def _norm(self, loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, self.workload.shared, create_graph=True, allow_unused=True)
        return torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()


BALANCED: dict[str, type[Method]] = {
    "gradnorm": JointEngine,
    "features": FeatureNorms,
    "joint": ProductPerTask,
    "per-task": PerTaskEngine,
    "double": DoubleBackward,
}
