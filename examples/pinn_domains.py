"""Domain decomposition: a rod of four materials, a network for each, and losses where they meet.

−(k u')' = f on 0 < x < 1, u(0) = u(1) = 0, with k = 1, 0.1, 10 and 1 in the four quarters and f = 100 sin(5πx). u has a kink
wherever k jumps, which one smooth network cannot have; so each quarter has a network of its own (as in XPINN), and seven
losses go into the dict by name: the squared residual of each quarter (``pde 1`` to ``pde 4``), the squared jumps of u
(``continuity``) and of k u' (``flux``) at the three interfaces, and ``ends``.

What is shared? No parameter is reached by all seven losses. GradNorm needs of each task that it reaches some parameter of W,
not that all reach the same one; so ``shared_layer()`` gives all the networks. Then each norm is over what the task reaches:
that of ``pde 2`` over the second network, that of ``flux`` over all four. Within a network, where terms compete, equal norms
mean what they always mean, but for the interface terms, whose norm is spread over several networks. Between networks there is
nothing to compete for: that their residuals are made to pull alike is a choice, harmless under Adam. A trunk under all four
networks would be a layer that all share; it would also tie the quarters together, and not be this method.

Measured with three seeds, 2500 steps: the relative L2 error is 0.4 %, 0.8 % and 0.6 % with GradNorm, and about 300 % with the
plain sum, which solves each quarter by itself: u jumps by 6 to 9 at the interfaces, against 0.004. It is a case made for
balancing, with no weights set by hand to compare with: ``ends`` and ``continuity`` come to thousands, and nobody would have
left them at 1.

    python examples/pinn_domains.py      # three seeds, about four minutes
    python examples/pinn_domains.py --help
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from _common import BLACK, BLUE, GREEN, ORANGE, PURPLE, Progress, draw_runs, figure_style, plt, quiet_lightning, save
from _pinn import (
    Draws,
    History,
    Pinn,
    draw_errors,
    draw_weights,
    fit,
    gradient,
    print_errors,
    read_arguments,
    tanh_network,
)
from torch import Tensor, nn

from lightning_gradnorm import GradNormCallback

CONDUCTIVITIES, AMPLITUDE, WAVES = (1.0, 0.1, 10.0, 1.0), 100.0, 5 * math.pi
DOMAINS = len(CONDUCTIVITIES)
COLOURS = {"equal": ORANGE, "GradNorm": BLUE}
DOMAIN_COLOURS = (BLUE, GREEN, ORANGE, PURPLE)
TASK_COLOURS = {f"pde {i + 1}": colour for i, colour in enumerate(DOMAIN_COLOURS)}
TASK_COLOURS |= {"continuity": BLACK, "flux": "0.45", "ends": "0.75"}


def exact(x: Tensor) -> Tensor:
    """u, ``[N]``: k u' = c + (a/ω) cos(ωx), integrated piece by piece, with c such that u(1) = 0."""

    def integrals(x: Tensor) -> tuple[Tensor, Tensor]:
        """Those of 1/k and of (a/ω) cos(ωx) / k, from 0 to x."""
        first, second = torch.zeros_like(x), torch.zeros_like(x)
        for i, k in enumerate(CONDUCTIVITIES):
            upper = x.clamp(i / DOMAINS, (i + 1) / DOMAINS)
            first += (upper - i / DOMAINS) / k
            second += AMPLITUDE / WAVES**2 * ((WAVES * upper).sin() - math.sin(WAVES * i / DOMAINS)) / k
        return first, second

    whole, end = integrals(x), integrals(torch.ones(1, dtype=x.dtype))
    return whole[1] - end[1] / end[0] * whole[0]


class Jumps(NamedTuple):
    """What differs between the two sides of each interface, ``[DOMAINS − 1]`` each."""

    u: Tensor
    flux: Tensor


class Rod(Pinn):
    """A network of two hidden layers for each quarter, of its own coordinate from −1 to 1."""

    def __init__(self) -> None:
        x = torch.linspace(0, 1, 1001)
        super().__init__(nn.ModuleList(tanh_network(1, 24, 2) for _ in CONDUCTIVITIES), x[:, None], exact(x.double()).float())

    def piece(self, i: int, x: Tensor) -> Tensor:
        """u of the i-th network, ``[N]``, at points ``[N, 1]``."""
        return self.network[i](2 * DOMAINS * x - 2 * i - 1).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        owner = (x[:, 0] * DOMAINS).long().clamp(max=DOMAINS - 1)
        return torch.stack([self.piece(i, x) for i in range(DOMAINS)]).gather(0, owner[None]).squeeze(0)

    def jumps(self) -> Jumps:
        """Of u and of k u'."""
        sides = []
        for i in range(DOMAINS - 1):
            x = torch.full((1, 1), (i + 1) / DOMAINS, requires_grad=True)
            left, right = self.piece(i, x), self.piece(i + 1, x)
            fluxes = [CONDUCTIVITIES[i + side] * gradient(u, x).squeeze(1) for side, u in enumerate((left, right))]
            sides.append((right - left, fluxes[1] - fluxes[0]))
        return Jumps(*(torch.cat(jumps) for jumps in zip(*sides, strict=True)))

    def task_losses(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        losses = {}
        for i, k in enumerate(CONDUCTIVITIES):
            x = ((batch[i] + i) / DOMAINS).requires_grad_()
            bend = gradient(gradient(self.piece(i, x), x).squeeze(1), x).squeeze(1)
            load = AMPLITUDE * (WAVES * x.detach().squeeze(1)).sin()
            losses[f"pde {i + 1}"] = (k * bend + load).square().mean()
        jumps = self.jumps()
        losses |= {"continuity": jumps.u.square().mean(), "flux": jumps.flux.square().mean()}
        losses["ends"] = (
            self.piece(0, x.new_zeros(1, 1)).square().sum() + self.piece(DOMAINS - 1, x.new_ones(1, 1)).square().sum()
        )
        return losses

    def shared_layer(self) -> nn.Module:
        return self.network  # all of it: see above


class JumpHistory(History):
    """With the greatest jumps of u and of the flux, at each record.

    Attributes:
        jumps: of both, as they come.
    """

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self.jumps: list[Jumps] = []

    def record(self, trainer: L.Trainer, module: Rod) -> None:
        super().record(trainer, module)
        self.jumps.append(Jumps(*(jump.detach().abs().max() for jump in module.jumps())))


def train_once(method: str, seed: int, steps: int, every: int, progress: Progress) -> tuple[Rod, JumpHistory]:
    """One fit, with 32 fresh points per quarter and step."""
    torch.manual_seed(seed)
    module, history = Rod(), JumpHistory(every)
    callbacks = [GradNormCallback(summary=False)] if method == "GradNorm" else []
    progress.name(f"seed {seed}, {method}")
    fit(module, Draws(lambda draws: torch.rand(DOMAINS, 32, 1, generator=draws), seed, steps), [progress, *callbacks, history])
    return module, history


def draw(found: dict[str, list[tuple[Rod, JumpHistory]]], path: Path) -> None:
    """The solution of the last seed, the jumps, the errors and the weights."""
    runs = {method: [history for _, history in fits] for method, fits in found.items()}
    with figure_style(), torch.no_grad():
        figure, ((left, right), (bottom, last)) = plt.subplots(2, 2, figsize=(10.5, 6.8))
        module = found["GradNorm"][-1][0]
        x = module.test_points
        left.plot(x, module.exact, color="0.6", linewidth=5, label="exact")
        left.plot(x, found["equal"][-1][0](x), color="0.2", linestyle=":", label="equal")
        for i, (k, colour) in enumerate(zip(CONDUCTIVITIES, DOMAIN_COLOURS, strict=True)):
            own = x[(x[:, 0] >= i / DOMAINS) & (x[:, 0] <= (i + 1) / DOMAINS)]
            left.plot(own, module.piece(i, own), color=colour, label=f"GradNorm, k = {k:g}")
        left.set(title="u, last seed", xlabel="x")
        left.legend(fontsize=8)
        for method, histories in runs.items():
            for name, style in (("u", "-"), ("flux", ":")):
                jumps = [[getattr(jump, name).item() for jump in history.jumps] for history in histories]
                label = f"{name if name == 'u' else 'k u′'}, {method}"
                draw_runs(right, histories[0].steps, jumps, color=COLOURS[method], linestyle=style, label=label)
        right.set(title="greatest jump at an interface ↓", xlabel="step", yscale="log")
        right.legend(fontsize=8, ncols=2)
        draw_errors(bottom, runs, COLOURS)
        draw_weights(last, runs["GradNorm"], TASK_COLOURS)
        last.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "Rod of four materials; curves", path)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[JumpHistory]]:
    args = read_arguments(arguments, __doc__, "pinn_domains", steps=2500, quick_steps=500)
    progress = Progress(args.steps * args.seeds * len(COLOURS))
    with quiet_lightning():
        found = {
            method: [train_once(method, seed, args.steps, args.every, progress) for seed in range(args.seeds)]
            for method in COLOURS
        }
    runs = {method: [history for _, history in fits] for method, fits in found.items()}
    print_errors(f"Rod, after {args.steps} steps", {m: [h.errors[-1] for h in hs] for m, hs in runs.items()})
    for method, histories in runs.items():
        for name in Jumps._fields:
            worst = ", ".join(f"{getattr(history.jumps[-1], name):.2g}" for history in histories)
            print(f"{method}: greatest jump of {name} at an interface, seed by seed: {worst}")
    draw(found, args.out / "pinn_domains.png")
    print(f"Figure: {args.out / 'pinn_domains.png'}")
    return runs


if __name__ == "__main__":
    main()
