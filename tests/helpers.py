"""Small modules, graphs and Trainers that several tests use."""

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradnorm import MultiTaskMixin

_T = TypeVar("_T")

of_version_0_1 = pytest.mark.filterwarnings("ignore:GradNorm's .* is of version 0.1:FutureWarning")
"""Of tests of what still works for one version."""


def use_up_node_numbers() -> None:
    """So that the nodes made from now on have greater numbers than those of a new thread."""
    for _ in range(100):
        torch.ones(1, requires_grad=True).exp()


def in_another_thread(make: Callable[[], _T]) -> _T:
    """What ``make`` returns, run where autograd's nodes are numbered anew, as they are by a backward on a GPU."""
    made: list[_T] = []
    thread = threading.Thread(target=lambda: made.append(make()))
    thread.start()
    thread.join()
    return made[0]


class Labelled(Tensor):
    """Has an attribute that its operations lose, and cannot do without it, like PINA's LabelTensor."""

    labels: list[str]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args[0].labels  # noqa: B018 (that it is there is the point)
        return super().__torch_function__(func, types, args, kwargs or {})


QUIET = {  # settings of a Trainer on the CPU that writes and shows nothing
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "max_epochs": 1,
}


def quiet_trainer(tmp_path: Any, **settings: Any) -> L.Trainer:
    return L.Trainer(**(QUIET | {"default_root_dir": tmp_path} | settings))


def loading(*, weights_only: bool | None) -> dict[str, Any]:
    """How a fit or a module takes up a checkpoint; before 2.6 Lightning has no say in it, and loads all."""
    known = "weights_only" in inspect.signature(L.Trainer.fit).parameters
    return {"weights_only": weights_only} if known else {}


def batches(steps: int, size: int = 8, features: int = 6, seed: int = 1) -> DataLoader:
    """The same batches in the same order, whenever asked for."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps * size, features, generator=generator)
    return DataLoader(TensorDataset(x), batch_size=size, shuffle=False)


SCALES = {"small": 0.05, "middle": 1.0, "large": 20.0, "odd": 3.0}


class TrunkAndHeads(MultiTaskMixin, L.LightningModule):
    """A trunk, four heads on it, losses of different scale and difficulty."""

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        lr: float = 0.01,
        scales: Mapping[str, float] = SCALES,
    ) -> None:
        super().__init__()
        self.scales = dict(scales)
        self.trunk = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(10, 2) for task in scales})
        self.make_optimizer, self.lr = optimizer, lr

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        z = self.features(x)
        target = x[:, :2]
        return {
            task: self.reduced(self.scales[task] * (head(z) - (k + 1) * target).pow(2))
            for k, (task, head) in enumerate(self.heads.items())
        }

    def reduced(self, squares: Tensor) -> Tensor:
        return squares.mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.losses(batch[0])
        return self.total_loss(losses, kpis={task: 1 / (1 + loss) for task, loss in losses.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters(), lr=self.lr)


class PerPoint(TrunkAndHeads):
    """The same with each task's squared residuals, whose mean is its loss, in small steps: weights may be large."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, lr: float = 1e-4) -> None:
        super().__init__(optimizer, lr)

    def reduced(self, squares: Tensor) -> Tensor:
        return squares


class MemoryLogger(Logger):
    """Keeps what it is given: (step, name → value), of steps and of whole epochs of training."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.epochs: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        rows = self.epochs if "total_loss/unweighted_epoch" in metrics else self.logged
        rows.append((step, dict(metrics)))


class Recorder(L.Callback):
    """After every batch: the weights that are to come, none without balancing, and the parameters."""

    def __init__(self, balancing: Any) -> None:
        self.balancing = balancing
        self.weights: list[dict[str, float]] = []
        self.parameters: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.weights.append(self.balancing.weights if self.balancing else {})
        self.parameters.append(torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()]))


def same_state(a: Any, b: Any) -> bool:
    """Whether two nested state dicts hold the same, bit for bit; NaN equals NaN."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and a.dtype == b.dtype
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same_state, a, b))
    return bool(a == b) or (a != a and b != b)
