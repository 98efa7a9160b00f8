"""What the physics-informed examples share: a tanh network, derivatives, a fit, the curves that it leaves, the figures."""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import lightning as L
import torch
from _common import BLACK, BLUE, GREEN, ORANGE, PURPLE, CommandLine, by_task, draw_runs, mean_std, print_table, quiet_trainer
from matplotlib.axes import Axes
from torch import Tensor, nn

from lightning_gradnorm import LossBalancingCallback, MultiTaskMixin

TASK_COLOURS = {"pde": BLACK, "boundary": ORANGE, "data": BLUE, "initial": PURPLE}
LINES = (BLACK, GREEN, PURPLE, ORANGE, BLUE)


def tanh_network(inputs: int, width: int, hidden: int) -> nn.Sequential:
    """``hidden`` tanh layers and one output, with Glorot's initial weights."""
    widths = [inputs, *[width] * hidden, 1]
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        nn.init.xavier_normal_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def gradient(u: Tensor, x: Tensor) -> Tensor:
    """∂u_i/∂x_i at every point: ``u`` ``[N]``, ``x`` ``[N, d]`` → ``[N, d]``, to be differentiated again."""
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def laplacian(u: Tensor, x: Tensor) -> Tensor:
    """Δu at every point, ``[N]``."""
    slopes = gradient(u, x)
    return torch.stack([gradient(slopes[:, i], x)[:, i] for i in range(x.shape[1])]).sum(0)


def grid(low: Sequence[float], high: Sequence[float], size: int = 100) -> Tensor:
    """``size`` × ``size`` points over a rectangle, ``[size², 2]``, the first coordinate slowest."""
    axes = [torch.linspace(a, b, size) for a, b in zip(low, high, strict=True)]
    return torch.cartesian_prod(*axes)


def uniform(low: Sequence[float], high: Sequence[float], count: int, draws: torch.Generator) -> Tensor:
    """Points drawn evenly from a box, ``[count, d]``."""
    a, b = torch.tensor(low), torch.tensor(high)
    return a + (b - a) * torch.rand(count, len(a), generator=draws)


def square_edges(count: int, draws: torch.Generator) -> Tensor:
    """Points on the boundary of (−1, 1)², ``count`` on each edge, ``[4 count, 2]``."""
    along, side = 2 * torch.rand(4 * count, generator=draws) - 1, torch.tensor([-1.0, 1.0]).repeat(2 * count)
    points = torch.stack([along, side], 1)
    points[: 2 * count] = points[: 2 * count].flip(1)
    return points


class Pinn(MultiTaskMixin, L.LightningModule):
    """A network for u, with Adam at 1e-3 that slows down as in Wang et al. (2021); an example adds its losses.

    Args:
        network: u, from ``[N, d]`` to ``[N, 1]``.
        test_points: where the error is measured, ``[M, d]``.
        exact: u there, ``[M]``.
    """

    def __init__(self, network: nn.Module, test_points: Tensor, exact: Tensor) -> None:
        super().__init__()
        self.network, self.test_points, self.exact = network, test_points, exact

    def forward(self, x: Tensor) -> Tensor:
        """u, ``[N]``."""
        return self.network(x).squeeze(1)

    @torch.no_grad()
    def relative_error(self) -> float:
        """‖u − exact‖ / ‖exact‖ over the test points."""
        return ((self(self.test_points) - self.exact).norm() / self.exact.norm()).item()

    def configure_optimizers(self) -> dict[str, object]:
        adam = torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)
        slower = torch.optim.lr_scheduler.StepLR(adam, step_size=1000, gamma=0.9)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": slower, "interval": "step"}}


class Draws:
    """A batch for every step, drawn when it comes; the same ones for the same seed.

    Args:
        draw: from a generator to the batch.
        seed: of the generator.
        steps: how many.
    """

    def __init__(self, draw: Callable[[torch.Generator], object], seed: int, steps: int) -> None:
        self.draw, self.seed, self.steps = draw, seed, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[object]:
        draws = torch.Generator().manual_seed(self.seed + 1_000_000)
        for _ in range(self.steps):
            yield self.draw(draws)


class History(L.Callback):
    """Keeps the error and the weights every so many steps, over one or several fits.

    Args:
        every: steps from one record to the next.

    Attributes:
        steps: how many steps had been made.
        errors: the relative error then.
        weights: task → weight then; none without a balancing callback.
    """

    def __init__(self, every: int) -> None:
        self.every, self.count = every, 0
        self.steps: list[int] = []
        self.errors: list[float] = []
        self.weights: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Pinn, *args: object) -> None:
        self.count += 1
        if self.count % self.every == 0:
            self.record(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Pinn) -> None:
        if self.count % self.every:
            self.record(trainer, pl_module)

    def record(self, trainer: L.Trainer, module: Pinn) -> None:
        """What is kept of this step."""
        self.steps.append(self.count)
        self.errors.append(module.relative_error())
        self.weights += [c.weights for c in trainer.callbacks if isinstance(c, LossBalancingCallback)]


def fit(module: Pinn, batches: Iterable[object], callbacks: Sequence[L.Callback], epochs: int = 1) -> None:
    """Train on every batch once, or ``epochs`` times; the weights are updated before ``History`` looks at them."""
    in_order = sorted(callbacks, key=lambda callback: isinstance(callback, History))
    quiet_trainer(in_order, max_epochs=epochs).fit(module, batches)


def read_arguments(
    arguments: Sequence[str] | None, about: str | None, name: str, *, steps: int, quick_steps: int, seeds: int = 3
) -> argparse.Namespace:
    """The command line that all of them have, read; ``out`` is made, and ``every`` gives about 60 records of a fit."""
    args = CommandLine(about, name, seeds=seeds, steps=steps, quick=quick_steps).read(arguments)
    args.every = max(args.steps // 60, 1)
    return args


def print_errors(title: str, results: dict[str, Sequence[float]]) -> None:
    """A row per method: its relative errors, in percent, for each seed, and their mean and spread."""
    percent = {name: [100 * error for error in errors] for name, errors in results.items()}
    rows = [(name, *(f"{error:.2f}" for error in errors), mean_std(errors, 2)) for name, errors in percent.items()]
    print_table(title, ["relative L2 error, %", *(f"seed {i}" for i in range(len(rows[0]) - 2)), "mean ± std"], rows)


def draw_errors(axes: Axes, runs: dict[str, Sequence[History]], colours: dict[str, str]) -> None:
    """Each method's relative error over the steps."""
    for name, histories in runs.items():
        draw_runs(axes, histories[0].steps, [history.errors for history in histories], color=colours[name], label=name)
    axes.set(title="relative L2 error ↓", xlabel="step", yscale="log")
    axes.legend(loc="best")


def draw_weights(axes: Axes, histories: Sequence[History], colours: dict[str, str]) -> None:
    """The weight of each task over the steps."""
    for task in histories[0].weights[-1]:
        weights = [by_task(history.weights, task) for history in histories]
        draw_runs(axes, histories[0].steps, weights, color=colours[task], label=task)
    axes.set(title="GradNorm's loss weights", xlabel="step", yscale="log")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, fontsize=9)  # the curves leave no corner free


def draw_field(axes: Axes, values: Tensor, extent: Sequence[float], title: str, **looks: object) -> None:
    """Values ``[size²]`` of ``grid``, the first coordinate to the right, with their colour bar."""
    size = round(values.numel() ** 0.5)
    image = axes.imshow(values.reshape(size, size).T.numpy(), origin="lower", extent=extent, aspect="auto", **looks)
    axes.figure.colorbar(image, ax=axes)
    axes.grid(visible=False)
    axes.set_title(title)
