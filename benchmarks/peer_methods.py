"""The methods that ``peers.py`` times: GradNorm and UPGrad as they are here, and the packages that people use today."""

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn
from torchjd.aggregation import IMTLG, Aggregator, UPGrad, UPGradWeighting

from benchmarks.methods import FeatureNorms, JointEngine, Method, ProductPerTask
from benchmarks.workloads import Losses, Workload
from lightning_gradnorm import GramianWeighting, JointBackward, Measurement, tap_losses
from lightning_gradnorm.recombination import RecombiningBackward
from lightning_gradnorm.task_gradients import TaskGradients

FEATURES = {"conv": "trunk", "transformer": "encoder", "mlp": "trunk"}  # where each network's tasks part


class GradNormPytorch(Method):
    """gradnorm-pytorch 0.2.3: a second-order graph; W is one parameter."""

    name = "gradnorm-pytorch"

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(workload, optimizer)
        from gradnorm_pytorch import GradNormLossWeighter

        (w,) = workload.shared
        self.weighter = GradNormLossWeighter(
            num_losses=len(workload.losses), restoring_force_alpha=1.5, learning_rate=1e-4, grad_norm_parameters=w
        )

    def backward(self, losses: Losses) -> None:
        self.weighter.backward(list(losses.values()))


class LibMTL(Method):
    """LibMTL 1.1.5's GradNorm: one backward per task; norms over all parameters that the tasks share."""

    name = "LibMTL"

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(workload, optimizer)
        # LibMTL imports torchvision for models that are not used here.
        for name in ("torchvision", "torchvision.models", "torchvision.models.utils", "torchvision.transforms"):
            sys.modules.setdefault(name, MagicMock())
        from LibMTL.weighting.GradNorm import GradNorm

        shared = shared_parameters(workload)
        count = len(workload.losses)
        self.weighting = GradNorm()
        members = {
            "task_num": count,
            "device": torch.device("cpu"),
            "rep_grad": False,
            "epoch": 1,
            "train_loss_buffer": torch.stack([loss.detach() for loss in workload.losses.values()]).unsqueeze(1).numpy(),
            "get_share_params": lambda: iter(shared),
            "zero_grad_share_params": lambda: [
                setattr(p.grad, "data", torch.zeros_like(p)) for p in shared if p.grad is not None
            ],
        }
        for name, value in members.items():
            object.__setattr__(self.weighting, name, value)
        self.weighting.init_param()

    def backward(self, losses: Losses) -> None:
        self.weighting.backward(torch.stack(list(losses.values())), alpha=1.5)


class UPGradHere(Method):
    """UPGrad from the Gram matrix on W that the one joint backward brings, one step late."""

    name = "UPGrad, one backward"

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(workload, optimizer)
        self.balancer = GramianWeighting(UPGradWeighting())

    def backward(self, losses: Losses) -> None:
        losses = tap_losses(losses)
        total = self.balancer.total(losses)
        reader = JointBackward(total, losses, self.workload.shared, keep=False, pairs=True)
        total.backward()
        self.balancer.update(reader.measurement(gramian=True))


class UPGradSameStep(Method):
    """UPGrad in the step itself: the tasks' gradients weighed where they meet, by the Gram matrix on W."""

    name = "UPGrad, same step, W"

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(workload, optimizer)
        self.balancer = GramianWeighting(UPGradWeighting(), when="same step")
        self.shared = self.compared()

    def compared(self) -> Sequence[Tensor]:
        return self.workload.shared

    def backward(self, losses: Losses) -> None:
        losses = tap_losses(losses)
        measured: list[Measurement] = []

        def weigh(gradients: TaskGradients) -> list[float]:
            values = torch.stack([loss.detach() for loss in losses.values()]).double()
            measured.append(Measurement(gradients.tasks, values, gramian=gradients.gramian()))
            return self.balancer.weigh(measured[0]).tolist()

        total = self.balancer.total(losses)
        RecombiningBackward(total, losses, self.shared, weigh=weigh)
        total.backward()
        self.balancer.update(measured[0])


class UPGradSameStepAll(UPGradSameStep):
    """The same with W all that the tasks share, which is what TorchJD's is."""

    name = "UPGrad, same step, all"

    def compared(self) -> Sequence[Tensor]:
        return shared_parameters(self.workload)


class TorchJD(Method):
    """TorchJD 0.18: the Jacobian of all shared parameters, aggregated by IMTL-G, which evens out the tasks' projections."""

    name = "TorchJD, IMTL-G"
    aggregates: Callable[[], Aggregator] = IMTLG

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(workload, optimizer)
        self.aggregator = self.aggregates()
        self.shared = shared_parameters(workload)
        self.features: Tensor | None = None
        for name, module in workload.network.named_children():
            if name in FEATURES.values():
                module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.features = output

    def backward(self, losses: Losses) -> None:
        from torchjd.autojac import backward, jac_to_grad, mtl_backward

        if self.features is None:
            backward(list(losses.values()), inputs=self.shared)
        else:
            mtl_backward(list(losses.values()), features=self.features)
            self.features = None
        jac_to_grad(self.shared, self.aggregator)


class TorchJDUPGrad(TorchJD):
    """TorchJD 0.18 with UPGrad, which turns no task's loss upwards."""

    name = "TorchJD, UPGrad"
    aggregates = UPGrad


class Pina(Method):
    """PINA 0.3.2's self-adaptive weighting: norms over all parameters, one autograd.grad per term, at every step."""

    name = "PINA, self-adaptive"

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(workload, optimizer)
        from pina.weighting import SelfAdaptiveWeighting

        self.weighting = SelfAdaptiveWeighting()
        object.__setattr__(self.weighting, "_solver", SimpleNamespace(model=workload.network))

    def backward(self, losses: Losses) -> None:
        weights = self.weighting.update_weights(losses)
        sum(weights[task].detach() * loss for task, loss in losses.items()).backward()


PEERS: dict[str, type[Method]] = {
    "ours": JointEngine,
    "features": FeatureNorms,
    "product": ProductPerTask,
    "gradnorm-pytorch": GradNormPytorch,
    "libmtl": LibMTL,
    "upgrad": UPGradHere,
    "upgrad-same": UPGradSameStep,
    "upgrad-same-all": UPGradSameStepAll,
    "torchjd": TorchJD,
    "torchjd-upgrad": TorchJDUPGrad,
    "pina": Pina,
}


def shared_parameters(workload: Workload) -> list[nn.Parameter]:
    """Those that every task's loss reaches."""
    parameters = [p for p in workload.network.parameters() if p.requires_grad]
    reached = [
        {
            id(p)
            for p, g in zip(
                parameters, torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), strict=True
            )
            if g is not None
        }
        for loss in workload.losses.values()
    ]
    common = set.intersection(*reached)
    return [p for p in parameters if id(p) in common]
