"""One network, one set of batches, and what the Lightning callback makes of them: what every other loop has to come to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_gradnorm import GradNorm, LossBalancer, LossBalancingCallback, total_loss
from tests.helpers import quiet_trainer

STEPS = 6
SCALES = {"small": 0.05, "middle": 1.0, "large": 20.0}


class Network(nn.Module):
    """A trunk and three heads, which adds its losses up deep inside, as a vendor's does.

    A row whose last number is above 50 has no label for ``middle``; a batch without any has no such task.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(10, 2) for task in SCALES})

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x % 50)
        losses = {
            task: SCALES[task] * (head(z) - (k + 1) * x[:, :2]).pow(2).mean()
            for k, (task, head) in enumerate(self.heads.items())
        }
        if bool((x[:, 5] > 50).all()):
            del losses["middle"]
        return losses

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": total_loss(self.losses(x))}


def rows(steps: int = STEPS, size: int = 8, *, absent: Iterable[int] = ()) -> Tensor:
    """``[steps · size, 6]``; the batches named in ``absent`` have no label for ``middle``."""
    x = torch.rand(steps, size, 6, generator=torch.Generator().manual_seed(1))
    for step in absent:
        x[step, :, 5] += 50
    return x.flatten(0, 1)


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)


def balancer() -> LossBalancer:
    return GradNorm(lr=0.1)


@dataclass
class Run:
    """Weights after each optimiser step; the parameters and the balancer's state at the end."""

    weights: list[dict[str, float]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)

    def ended(self, network: nn.Module, session: Any) -> "Run":
        self.parameters = {name: value.detach().clone() for name, value in network.named_parameters()}
        self.state = session.state_dict()
        return self


def of_rank(run: Run) -> dict[str, Any]:
    """What a process of several leaves in a file."""
    return {"weights": run.weights, "parameters": run.parameters}


class _Module(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.network(**batch)["loss"] if isinstance(batch, dict) else self.network(batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.network)


def by_the_callback(tmp_path: Any, batches: Iterable[Any], network: nn.Module | None = None, **settings: Any) -> Run:
    """The same under a Lightning Trainer.

    Args:
        tmp_path: for whatever it writes.
        batches: one by one.
        network: what is trained.
        settings: of the Trainer.
    """
    network = network or Network()
    callback, run = LossBalancingCallback(balancer(), summary=False), Run()

    class Watch(L.Callback):
        steps = 0

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step > self.steps:
                self.steps = trainer.global_step
                run.weights.append(callback.weights)

    loader = torch.utils.data.DataLoader(list(batches), batch_size=None)
    quiet_trainer(tmp_path, callbacks=[callback, Watch()], **settings).fit(_Module(network), loader)
    return run.ended(network, callback.session)


def same(found: Run, expected: Run) -> bool:
    """Whether the two runs are equal to the last digit."""
    return found.weights == expected.weights and all(
        torch.equal(found.parameters[name], value) for name, value in expected.parameters.items()
    )


def moved(run: Run) -> bool:
    """Whether the run has weights that are far from 1 by now."""
    return max(abs(weight - 1) for weight in run.weights[-1].values()) > 0.1


def assert_close(found: Mapping[str, Any], expected: Run, rel: float = 1e-5) -> None:
    """Equal but for the order in which numbers are added up."""
    assert len(found["weights"]) == len(expected.weights)
    for one, other in zip(found["weights"], expected.weights, strict=True):
        assert set(one) == set(other)
        assert all(abs(one[task] / other[task] - 1) < rel for task in one)
    for name, value in expected.parameters.items():
        torch.testing.assert_close(found["parameters"][name], value, rtol=10 * rel, atol=rel)
