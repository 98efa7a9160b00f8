"""# An equation

A physics-informed network learns u from what it has to satisfy: an equation inside, conditions on the border. The
equation's residual has second derivatives in it, so its gradient is far larger than the border's, and the plain sum
learns a function that solves the equation with the wrong border. This page says which term is the residual, and lets
GradNorm raise the other.

Run it: `python docs/tutorials/equation.py`, two minutes on one core; with `--quick` some seconds.
"""

import math
import sys
import warnings

import lightning as L
import matplotlib
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradnorm import GradNormCallback, MultiTaskMixin

matplotlib.use("Agg")
from matplotlib import pyplot as plt

QUICK = "--quick" in sys.argv
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec)")
torch.set_num_threads(1)

# %%
# ## The problem
#
# Poisson's equation −Δu = f on (−1, 1)², u = 0 on the border, with f such that u = sin(πx) sin(3πy).


def solution(x):
    return torch.sin(math.pi * x[:, 0]) * torch.sin(3 * math.pi * x[:, 1])


def right_side(x):
    return 10 * math.pi**2 * solution(x)


# %%
# ## Points
#
# A hundred fresh ones inside and a hundred on the border in every step.


def points(seed, steps):
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inside = 2 * torch.rand(100, 2, generator=draws) - 1
        border = 2 * torch.rand(100, 2, generator=draws) - 1
        border[:50, 0], border[50:, 1] = border[:50, 0].sign(), border[50:, 1].sign()
        yield inside, border


# %%
# ## The module
#
# `task_losses` names the two terms; the mixin makes the training step of it. u is differentiated twice by
# `torch.autograd.grad`, as in any such network: the callback needs nothing else.


class Poisson(MultiTaskMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.u = nn.Sequential(
            nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def forward(self, x):
        return self.u(x).squeeze(1)

    def task_losses(self, batch, batch_idx):
        inside, border = batch
        inside.requires_grad_()
        (slopes,) = torch.autograd.grad(self(inside).sum(), inside, create_graph=True)
        second = [torch.autograd.grad(slopes[:, i].sum(), inside, create_graph=True)[0][:, i] for i in (0, 1)]
        residual = second[0] + second[1] + right_side(inside.detach())
        return {"pde": residual.square().mean(), "border": self(border).square().mean()}

    def configure_optimizers(self):
        adam = torch.optim.Adam(self.parameters(), lr=3e-3)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 100 if QUICK else 3000)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


# %%
# ## Two trainings
#
# From the same start, on the same points. `residuals=["pde"]` keeps the residual's weight at 1 and raises the border's.


def trained(callbacks):
    torch.manual_seed(0)
    module = Poisson()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    steps = 100 if QUICK else 3000
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(module, DataLoader(list(points(0, steps)), batch_size=None))
    return module


callback = GradNormCallback(residuals=["pde"], summary=False)
modules = {"plain sum": trained([]), "GradNorm": trained([callback])}

# %%
# ## What came of it
#
# The relative error on a grid, and the weights at the end.

axis = torch.linspace(-1, 1, 81)
grid = torch.cartesian_prod(axis, axis)
exact = solution(grid)
errors = {}
with torch.no_grad():
    for name, module in modules.items():
        errors[name] = module(grid) - exact
        print(f"{name}: relative error {errors[name].norm() / exact.norm():.1%}")
print("weights:", {task: float(f"{weight:.3g}") for task, weight in callback.weights.items()})

# %%
# ![The exact solution, and how far off either network is](../images/equation.png)
#
# The two errors are drawn in one scale: only so can they be compared.

figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
worst = max(float(error.abs().max()) for error in errors.values())
pictures = {
    "exact u": (exact, "RdBu_r", -1),
    **{f"|error|, {name}": (error.abs(), "magma", 0) for name, error in errors.items()},
}
for panel, (title, (values, colours, least)) in zip(axes, pictures.items(), strict=True):
    greatest = 1 if least else worst
    shown = panel.imshow(
        values.reshape(81, 81).T, origin="lower", extent=(-1, 1, -1, 1), cmap=colours, vmin=least, vmax=greatest
    )
    panel.set(title=title, xlabel="x", ylabel="y")
    figure.colorbar(shown, ax=panel)
figure.savefig("equation.png", dpi=110)

# %%
# ## What to take from it
#
# One word says which term is the equation. There is no rate, no memory and no factor to tune, and after the first hundred
# steps ever fewer are measured. Where the plain sum is best already, raising the conditions can cost something: [what
# `residuals` rests on](../physics-informed.md) has twelve equations, also those where it loses. Inverse problems, L-BFGS,
# subdomains: [the examples](../examples.md).
